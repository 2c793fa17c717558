"""Verdicts of compare-sae on counts: no yes for what chance gives."""

import numpy
import pytest

from phoque.probes.sae.judge import judge_block

QUALITY = {"ev": 0.9, "verdict": "good", "reasons": []}
OVERALL = {
    "n_questions": 24,
    "n_tested": 1000,
    "n_reported": 300,
    "untrained": {"n_tested": 1000, "n_reported": 100},
    "control_runs": 0,
    "replicated_share": 0.5,
    "n_matched": 200,
    "n_replicated": 150,
    "n_alike": 300,
    "n_alike_matched": 90,
}
PUSH = {"gap_share": 0.5, "random_share": 0.1, "p": 0.01, "random_max_share": 0.2, "holds": True}
TOGETHER = {"push": PUSH, "ablate": None, "untrained_share": 0.1, "gap": 1.0, "strength": 2.0, "random_strength": 1.0}


def judge(name, together=TOGETHER, **changes):
    return judge_block(OVERALL | changes, together, QUALITY, 24)[name].verdict


def test_clear_counts_give_a_yes():
    assert [judge(name) for name in ("beyond_untrained", "replicated", "causes")] == ["yes"] * 3


def test_random_directions_rarely_beat_random_directions():
    rng = numpy.random.default_rng(0)
    counts = rng.binomial(1000, 0.8, (400, 2)).tolist()
    verdicts = [
        judge("beyond_untrained", n_reported=one, untrained={"n_tested": 1000, "n_reported": other})
        for one, other in counts
    ]
    assert verdicts.count("yes") < 0.08 * len(verdicts)


def test_partners_as_frequent_as_those_of_features_as_active_are_no_replication():
    rng = numpy.random.default_rng(0)
    counts = rng.binomial(300, 0.6, (400, 2)).tolist()
    verdicts = [judge("replicated", n_matched=one, n_alike_matched=other) for one, other in counts]
    assert verdicts.count("yes") < 0.08 * len(verdicts)
    assert judge("replicated", n_matched=1, n_reported=1, n_alike=1, n_alike_matched=0, n_replicated=1) == "no"
    assert judge("replicated", n_alike=0, n_alike_matched=0) == "not asked"


@pytest.mark.parametrize("gap", [0.0, -0.3])
def test_a_gap_that_is_not_there_is_not_restored(gap):
    assert judge("causes", together=TOGETHER | {"gap": gap}) == "not asked"
