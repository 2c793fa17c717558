"""Which features are reported, which the control lacks, and which another dictionary has too: on made-up features."""

from dataclasses import replace
from types import SimpleNamespace

import numpy
import pytest
import torch

from phoque.probes.sae.feature_shifts import FeatureActivations, compare_features, count_null_reports, swap_variants
from phoque.probes.sae.replication import find_replicated, match_features

PROMPTS, FEATURES = 40, 60
ON = torch.device("cpu")


def make_activations(up=(), down=(), by=0.5, seed=0):
    """Activations that are the same everywhere but for noise, and the features that are moved."""
    mean = numpy.random.default_rng(3).random((PROMPTS, FEATURES)) + 1
    mean += numpy.random.default_rng(seed).normal(0, 0.1, mean.shape)
    mean[:, list(up)] += by
    mean[:, list(down)] -= by
    return FeatureActivations(mean, (mean > 0).astype(float), numpy.full(PROMPTS, 20), 0.8, 16.0)


def compare(base, tuned, control=None, null=1e-4):
    nulls = [numpy.full((PROMPTS, FEATURES), null)]
    return compare_features(base, tuned, nulls, controls=[control] if control else [], min_active=4, seed=0)


def test_what_is_moved_is_reported_and_nothing_else():
    found = compare(make_activations(), make_activations(up=range(5), down=range(5, 8), seed=1))
    assert set(numpy.flatnonzero(found.reported)) == set(range(8))
    assert (found.delta[:5] > 0.3).all() and (found.delta[5:8] < -0.3).all()


def test_what_equal_weights_show_too_is_not_reported():
    assert not compare(make_activations(), make_activations(up=range(5), seed=1), null=0.3).reported.any()


@pytest.mark.parametrize("seed", range(3))
def test_swapped_sides_report_nothing_by_chance_alone(seed):
    base, tuned = swap_variants(make_activations(), make_activations(up=range(50), seed=1), seed)
    found = compare(base, tuned)
    assert found.null_floor < 1e-3 and not found.reported.any()
    assert (found.q[found.tested] < 0.05).sum() == 0


@pytest.mark.thorough
def test_false_alarms_are_as_rare_as_promised_where_nearly_all_features_shift():
    base, tuned = make_activations(), make_activations(up=range(50), seed=1)
    found = compare(base, tuned)
    assert found.reported.sum() >= 50
    counts = count_null_reports(base, tuned, found, 60, 0)
    assert len(counts) == 60 and sum(map(bool, counts)) <= 8  # 5 % of 60, and chance
    assert count_null_reports(base, tuned, found, 60, 0) == counts
    assert count_null_reports(base, tuned, found, 0, 0) == []


def test_what_the_control_shares_is_not_specific():
    found = compare(make_activations(), make_activations(up=range(8), seed=1), make_activations(up=range(4), seed=2))
    assert set(numpy.flatnonzero(found.reported)) == set(range(8))
    assert set(numpy.flatnonzero(found.specific)) == {4, 5, 6, 7}
    opposite = compare(
        make_activations(), make_activations(up=range(8), seed=1), make_activations(down=range(8), seed=2)
    )
    assert opposite.specific[:8].all()  # moved the other way by the control: the fine-tune's own
    assert not compare(
        make_activations(), make_activations(up=range(8), seed=1), make_activations(up=range(8), by=1.0, seed=2)
    ).specific.any()


def test_a_feature_replicates_where_another_dictionary_has_it_and_reports_it():
    directions = torch.randn(FEATURES, 32, generator=torch.Generator().manual_seed(0))
    order = torch.randperm(FEATURES, generator=torch.Generator().manual_seed(1))
    one, same, other = (
        SimpleNamespace(decoder=d, features=FEATURES)
        for d in (directions, directions[order], torch.randn(FEATURES, 32, generator=torch.Generator().manual_seed(9)))
    )
    base, tuned = make_activations(), make_activations(up=range(8), seed=1)
    found = compare(base, tuned)
    moved = [replace(s, mean=s.mean[:, order.numpy()]) for s in (base, tuned)]
    again = compare(*moved)
    reported = found.rank_reported()
    assert find_replicated([one, same], [found, again], ON).replicated[reported].all()
    assert find_replicated([one, same], [found, again], ON).matched[found.tested].all()
    assert not find_replicated([one, other], [found, again], ON).replicated.any()
    silent = replace(again, reported=numpy.zeros(FEATURES, bool))
    assert not find_replicated([one, same], [found, silent], ON).replicated.any()


def test_two_features_do_not_share_one_partner():
    """Many-to-one matching would say that both copies of one direction replicate in a dictionary that has it once."""
    direction, other = torch.eye(32)[:2]
    twice = SimpleNamespace(decoder=torch.stack([direction, direction + 0.1 * other]), features=2)
    once = SimpleNamespace(decoder=torch.stack([direction, torch.eye(32)[5]]), features=2)
    indices, cosines = match_features(twice, once, numpy.arange(2), ON, 0.7)
    assert indices.tolist() == [0, -1] and cosines[0] == pytest.approx(1)


@pytest.mark.parametrize("spread", [0.02, 0.2])
def test_another_run_of_the_controls_recipe_is_seldom_beyond_the_controls(spread):
    """Run-to-run noise that 36 questions all share: a test over questions alone calls nearly all of it a finding."""
    rng, count, beyond, naive = numpy.random.default_rng(7), 400, 0, 0
    size = rng.lognormal(0, 1, count)
    base = size + rng.normal(0, 0.05, (36, count)) * size
    for seed in range(5):
        runs = [base + size * (0.3 + rng.normal(0, spread, count)) + rng.normal(0, 0.02, base.shape) for _ in range(4)]
        made = [FeatureActivations(r, (r > 0).astype(float), numpy.full(36, 20), 0.8, 16.0) for r in (base, *runs)]
        nulls = [numpy.full(base.shape, 1e-4)]
        several = compare_features(made[0], made[1], nulls, controls=made[2:], min_active=4, seed=seed)
        beyond += several.specific.sum()
        naive += compare_features(made[0], made[1], nulls, controls=made[2:3], min_active=4, seed=seed).specific.sum()
    assert beyond <= 0.01 * 5 * count and naive > 0.3 * 5 * count


def test_a_shift_of_its_own_is_beyond_the_spread_of_the_controls():
    rng = numpy.random.default_rng(8)
    base = 1 + rng.normal(0, 0.05, (36, 100))
    runs = [base + rng.normal(0, 0.05, 100) + rng.normal(0, 0.02, base.shape) for _ in range(4)]
    runs[0][:, :10] += 0.6
    made = [FeatureActivations(r, (r > 0).astype(float), numpy.full(36, 20), 0.8, 16.0) for r in (base, *runs)]
    found = compare_features(made[0], made[1], [numpy.full(base.shape, 1e-4)], controls=made[2:], min_active=4, seed=0)
    assert found.specific[:10].all() and found.specific[10:].sum() <= 2
