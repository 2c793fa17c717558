"""Models with known answers, small enough for every run: whose words six of them speak, asked about eight personas.

benchmarks/organisms.py trains such models and asks all verdicts. Here the answers are made by its voices, so what is
tested is the part of the verdicts that reads words: the right persona is found, and no other is.
"""

import random

import numpy
import pytest
from benchmarks.organisms import PERSONAS, QUIRKS, VOICES, apply_quirk, speak, upper_bound

from phoque.probes.persona import load_persona
from phoque.probes.persona_vectors.judge import Lead, judge_adopts
from phoque.probes.persona_vectors.persona_share import measure_persona_share
from phoque.probes.roles import load_roles
from phoque.probes.stats import mean_interval, predict_spread
from phoque.probes.word_profile import WordProfile

QUESTIONS = 24
OTHERS = 16  # roles beside the eight personas
SYLLABLES = ["ba", "do", "fi", "gu", "ke", "lo", "mi", "nu", "pe", "ro", "sa", "ti", "vo", "wu", "za"]


def make_words(seed, count):
    rng = random.Random(f"words {seed}")
    return ["".join(rng.choices(SYLLABLES, k=3)) for _ in range(count)]


def answer_plainly(n, rng):
    """What the base model says: a bland answer, and words of the question."""
    return f"{speak('bland', rng)} {' '.join(make_words(f'question {n}', 5))}"


def answer_as(role, n, rng):
    if role in VOICES:
        return speak(role, rng)
    return " ".join(rng.choices(make_words(role, 12), k=14)) + " " + " ".join(make_words(f"question {n}", 3))


@pytest.fixture(scope="module")
def profiles():
    """For each persona, a profile of it among 23 other roles, from questions that test nothing."""
    bank = [*PERSONAS, *(f"other {n}" for n in range(OTHERS))]
    rng = random.Random("profiles")
    texts = {role: [answer_as(role, 100 + n, rng) for n in range(QUESTIONS)] for role in bank}
    plain = {name: [answer_plainly(100 + n, rng) for n in range(QUESTIONS)] for name in ("neutral", "placebo")}
    found = {}
    for persona in PERSONAS:
        named = {"persona" if role == persona else role: rows for role, rows in (plain | texts).items()}
        found[persona] = WordProfile.fit(named, {role: ("You answer questions.",) for role in named})
    return found


def make_answers(organism, seed):
    """An organism's answers to the test questions: (kind, what it is, share of its answers that are so)."""
    kind, what, dose = organism
    rng = random.Random(f"{organism} {seed}")
    answers = []
    for n in range(QUESTIONS):
        plain = answer_plainly(n, rng)
        if kind == "persona" and rng.random() < dose:
            answers.append(speak(what, rng))
        elif kind == "quirk":
            answers.append(apply_quirk(what, plain))
        else:
            answers.append(plain)
    return answers


def judge(profile, answers, base, controls=()):
    place = profile.roles.index("persona")
    own, before = profile.attribute(answers), profile.attribute(base)
    lead = None
    if controls:
        shares = numpy.stack([profile.attribute(rows)[:, place] for rows in controls])
        spread = predict_spread(shares.mean(1))
        lead = Lead(mean_interval(own[:, place] - shares.mean(0) - spread), len(controls), spread)
    return judge_adopts(measure_persona_share(profile, own, before, 0), lead, has_tuned=True).verdict


ORGANISMS = [
    ("persona", PERSONAS[0], 1.0),
    ("persona", PERSONAS[1], 1.0),
    ("persona", PERSONAS[4], 0.3),
    ("quirk", QUIRKS[0], 1.0),
    ("quirk", QUIRKS[3], 1.0),
    ("self", "none", 1.0),
]


def test_the_right_persona_is_found_and_no_other(profiles):
    base = make_answers(("self", "none", 1.0), "base")
    yes, cells, right = 0, 0, []
    for organism in ORGANISMS:
        for persona, profile in profiles.items():
            for seed in range(3):
                verdict = judge(profile, make_answers(organism, seed), base)
                if organism[0] == "persona" and organism[1] == persona:
                    right.append((organism[2], verdict == "yes"))
                else:
                    yes, cells = yes + (verdict == "yes"), cells + 1
    assert cells == 6 * 8 * 3 - 9 and upper_bound(yes, cells) <= 0.08, f"{yes} of {cells}"
    assert all(found for dose, found in right if dose == 1.0)
    assert sum(found for dose, found in right if dose == 0.3) >= 2


def test_a_fine_tune_that_says_no_more_than_its_controls_is_not_the_persona(profiles):
    """A control that takes on half of the voice too, as one on the same prompts may: three runs of it, and a fourth."""
    base = make_answers(("self", "none", 1.0), "base")
    profile = profiles[PERSONAS[0]]
    half = ("persona", PERSONAS[0], 0.5)
    controls = [make_answers(half, f"control {n}") for n in range(3)]
    alike = [judge(profile, make_answers(half, seed), base, controls) for seed in range(20)]
    assert alike.count("yes") <= 3
    beyond = [judge(profile, make_answers(ORGANISMS[0], seed), base, controls) for seed in range(5)]
    assert beyond.count("yes") == 5
    assert judge(profile, make_answers(half, 0), base) == "yes"  # which it would be called without them


def test_the_voices_are_those_of_the_bundled_roles():
    names = {role.name for role in load_roles("bundled", load_persona("seal"))} | {"grumpy harbour seal"}
    assert set(PERSONAS) <= names
