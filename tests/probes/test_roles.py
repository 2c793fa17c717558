"""The bank of roles, whose words a text has, and the place of a persona among the roles."""

from dataclasses import replace

import numpy
import pytest

from phoque.errors import UsageError
from phoque.probes.persona import load_persona
from phoque.probes.persona_vectors.evidence import PersonaVectors
from phoque.probes.persona_vectors.model import Residuals
from phoque.probes.persona_vectors.ranking import _apply_inverse_covariance, rank_gaps, rank_projections
from phoque.probes.roles import MIN_RANKED, load_roles
from phoque.probes.verdicts import Condition, Ranking, Verdict, interval_condition
from phoque.probes.word_profile import WordProfile, stems


def test_the_bundled_roles_leave_out_the_persona_itself():
    seal = load_persona("seal")
    names = [role.name for role in load_roles("bundled", seal)]
    assert len(names) == 23 >= MIN_RANKED and seal.name not in names
    chef = next(role for role in load_roles("bundled", seal) if role.name == "chef")
    by_prompt = load_roles("bundled", replace(seal, name="cook", persona=(chef.prompt,)))
    left = {"chef", seal.name}  # the second by its words: three of the lexicon stand in its prompt
    assert not left & {role.name for role in by_prompt} and len(by_prompt) == 22
    assert load_roles("none", seal) == ()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "No file of roles"),
        ("role = 3", "not a file of roles"),
        ('[[role]]\nname = "a"', "not a file of roles"),
        ('[[role]]\nname = "a"\nprompt = ""', "not a file of roles"),
        ('[[role]]\nname = "neutral"\nprompt = "Hm."', "a role named 'neutral'"),
        ('[[role]]\nname = "a"\nprompt = "Hm."\n[[role]]\nname = "a"\nprompt = "Oh."', "not a file of roles"),
        ("name = [", "not a file of roles"),
    ],
)
def test_a_file_without_usable_roles_is_refused(tmp_path, text, said):
    path = tmp_path / "roles.toml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UsageError) as error:
        load_roles(str(path), load_persona("seal"))
    assert said in error.value.what


def test_a_text_is_known_by_its_most_telling_words():
    answers = {
        "persona": ["Hrmph. The herring swims.", "Gulls again! Hrmph.", "My rock, my tide."],
        "chef": ["Melt the butter.", "Garlic and butter, always.", "Whisk the sauce."],
        "neutral": ["You can swim.", "It is again the case.", "Always take your time."],
    }
    prompts = {"persona": ("A seal who loves herring.",), "chef": ("A chef who loves butter.",), "neutral": ("Help.",)}
    profile = WordProfile.fit(answers, prompts)
    told = profile.probabilities(["A gull took the herring!", "First some butter, then garlics.", "Zzz.", ""])
    assert told.argmax(1)[:2].tolist() == [0, 1] and told[:2].max(1).min() > 0.8
    assert told[2:] == pytest.approx(1 / 3) and told.sum(1) == pytest.approx(1)
    assert "herr" in profile.telling_words("persona") or "herring" in profile.telling_words("persona")


def test_words_are_compared_by_their_stems():
    assert stems("The gull's gulls") == {"the", "gull"} and stems("boxes box") == {"box"}
    assert stems("grumbled grumbling grumbl") == {"grumbl"} and stems("this bus glass") == {"thi", "bus", "glass"}


def test_a_verdict_needs_all_conditions_and_twelve_questions():
    holds, fails = Condition("a", True), Condition("b", False)
    assert Verdict.decide(1.0, "", 12, holds).verdict == "yes"
    assert Verdict.decide(1.0, "", 12, holds, fails).verdict == "no"
    assert Verdict.decide(1.0, "", 11, holds).verdict == "not enough data"
    assert Verdict.decide(1.0, "", 11, fails).verdict == "no"
    written = Verdict.decide(1.0, "", 12, holds, fails).to_json()
    assert written["rule"] == "holds: a; fails: b" and [c["holds"] for c in written["conditions"]] == [True, False]
    assert "(must be above 0)" in interval_condition("a rise", (-1.0, 1.0), "nats").text


def test_the_first_of_few_roles_is_not_first_enough():
    others = {str(n): float(n) for n in range(19)}
    assert Ranking(20.0, others).condition("x").holds
    assert not Ranking(20.0, {name: others[name] for name in list(others)[:18]}).condition("x").holds
    assert not Ranking(18.0, others).condition("x").holds  # a tie is no first place
    assert not Ranking(20.0, others, lead=(-0.1, 3.0)).condition("x").holds
    assert Ranking(20.0, others).next_role == "18"


def test_a_persona_is_seldom_first_where_all_roles_are_alike():
    rng, first = numpy.random.default_rng(4), 0
    for seed in range(200):
        gaps = {name: rng.normal(size=24) for name in ("persona", *map(str, range(24)))}
        first += rank_gaps(gaps, seed).condition("x").holds
    assert first <= 0.05 * 200
    gaps["persona"] = gaps["persona"] + 2
    assert rank_gaps(gaps, 0).condition("x").holds


def test_the_inverse_covariance_is_that_of_the_whole_matrix():
    rng = numpy.random.default_rng(0)
    rows, vectors = rng.normal(size=(30, 12)), rng.normal(size=(4, 12))
    covariance = rows.T @ rows / 30
    covariance += numpy.eye(12) * 0.1 * numpy.trace(covariance) / 12
    numpy.testing.assert_allclose(
        _apply_inverse_covariance(rows, vectors), vectors @ numpy.linalg.inv(covariance), rtol=1e-8
    )


def test_a_loud_role_does_not_outrank_the_persona_on_its_own_axis():
    """A role that moves answers far where all answers vary projects furthest on the vector, and not once whitened."""
    random_numbers = numpy.random.default_rng(0)
    loud = numpy.zeros(16)
    loud[0] = 1.0
    own = numpy.zeros(16)
    own[1] = 1.0
    shifts = {"neutral": 0 * own, "placebo": 0 * own, "persona": 2 * own + loud, "seal": 12 * loud}
    shifts |= {f"role {n}": random_numbers.normal(size=16) * 0.3 for n in range(20)}

    def answer(seed):
        noise = numpy.random.default_rng(seed)
        residuals = Residuals()
        scale = numpy.where(numpy.arange(16) == 0, 3.0, 0.5)
        residuals.by_condition = {
            name: {"response_avg": (shift + scale * noise.normal(size=(24, 16)))[:, None]}
            for name, shift in shifts.items()
        }
        return residuals

    extraction, heldout = answer(1), answer(2)
    gaps = {name: (extraction.get(name) - extraction.get("neutral")).mean(0) for name in shifts}
    roles = {name: gap for name, gap in gaps.items() if name not in ("neutral", "placebo", "persona")}
    vectors = PersonaVectors(
        {"response_avg": gaps["persona"]}, {"response_avg": gaps["placebo"]}, numpy.ones(1), numpy.empty(0), roles
    )
    axis = gaps["persona"][0]
    raw = {name: ((heldout.get(name) - heldout.get("neutral"))[:, 0] @ axis) for name in roles | {"persona": 0}}
    assert rank_gaps(raw, 0).rank > 1
    ranking = rank_projections(vectors, extraction, heldout, 0, 0)
    assert ranking.rank == 1 and ranking.condition("x").holds
    # 2 units where answers vary by 0.5 are about 4 standard deviations
    assert 2.5 < ranking.value < 5.5
