"""Does the vector cause the behaviour: a sweep on validation questions, and what was chosen, on test questions.

Coefficients are in units of the residual stream's mean norm at the block, so that blocks compare. The choice is the
highest trait among settings whose answers stay coherent; what is reported is measured on other questions.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy
import torch

from phoque.inference.generate import Ask, Reply
from phoque.inference.likelihood import mean_nll
from phoque.inference.residual_stream import Turn
from phoque.probes import stats
from phoque.probes.persona_vectors.evidence import Vectors
from phoque.probes.persona_vectors.model import ProbeModel
from phoque.probes.scorers import Context, ScoredAnswer, Scorer, scores
from phoque.probes.scorers.words import distinct_pairs, repetition

STEERED = ("neutral", "persona", "neutral_plus_vector", "neutral_plus_random", "neutral_minus_vector")
LEAST_DISTINCT, LEAST_LENGTH = 0.75, 0.25  # of the neutral answers' own
MARGIN = 0.6  # of these limits may be used up by what is chosen: answers get longer, and other questions differ


@dataclass(frozen=True)
class Setting:
    """Where and how strongly to steer; `coefficient` in units of the residual norm."""

    layer: int
    coefficient: float


@dataclass(frozen=True)
class Row:
    """One answer with its place and all that was measured of it."""

    question: int
    prompt: str
    condition: str
    setting: Setting | None
    sample: int | None  # None is the greedy one
    text: str
    reply: Reply
    measured: dict[str, float]  # coherence, and `score__<scorer>__<label>`


class Steerer:
    """Asks, steers and measures; `trait` is the column of the scorer that counts."""

    def __init__(self, lab: ProbeModel, found: Vectors, scorers: Sequence[Scorer], context: Context) -> None:
        self.lab, self.found, self.scorers, self.context = lab, found, scorers, context
        self.columns = {scorer.name: column(scorer) for scorer in scorers}
        self.trait = column(scorers[0])

    def push(self, setting: Setting, condition: str, sample: int | None) -> tuple[int, torch.Tensor]:
        """What is added at a block: plus or minus the persona vector, or a random one of the same length."""
        direction = self.found.unit()[setting.layer]
        if condition == "neutral_plus_random":  # another one for each sample
            direction = self.found.directions[0 if sample is None else sample + 1, setting.layer]
        sign = -1.0 if condition == "neutral_minus_vector" else 1.0
        length = sign * setting.coefficient * float(self.found.norm[setting.layer])
        return setting.layer, torch.tensor(length * direction, dtype=torch.float32)

    def sweep(self, layers: Sequence[int]) -> tuple[list[dict[str, Any]], Setting, bool]:
        """Every block and coefficient on the validation questions; the chosen setting, and whether it is coherent."""
        questions = self.lab.persona.validation
        settings = [Setting(layer, c) for layer in layers for c in self.lab.s.strengths]
        wanted: list[tuple[int, str, Setting | None, int | None]] = [
            (n, "neutral_plus_vector" if setting else "neutral", setting, None)
            for setting in (None, *settings)
            for n in range(len(questions))
        ]
        rows = self.answered(questions, wanted, self.lab.s.sweep_tokens, "sweep")
        self.measure(rows)
        neutral = self.means([r for r in rows if r.setting is None])
        table = []
        for setting in settings:
            means = self.means([r for r in rows if r.setting == setting])
            coherent = not self.flaws(means, neutral, MARGIN)
            table.append(
                {"layer": setting.layer, "coeff_rel_resid": setting.coefficient, **means, "coherent": coherent}
            )
        fit = [row for row in table if row["coherent"]]
        # if none is coherent, the gentlest is what can still be looked at
        gentle = [row for row in table if row["coeff_rel_resid"] == min(self.lab.s.strengths)]
        best = max(fit, key=lambda r: r[self.trait]) if fit else min(gentle, key=lambda r: r["nll_base"])
        unsteered = {"layer": None, "coeff_rel_resid": 0.0, **neutral, "coherent": True}
        return [unsteered, *table], Setting(int(best["layer"]), best["coeff_rel_resid"]), bool(fit)

    def test(self, chosen: Setting, conditions: Sequence[str] = STEERED) -> list[Row]:
        """The test questions under every condition, greedy and sampled, with the same random numbers for all."""
        questions = self.lab.persona.test
        wanted = [
            (n, condition, chosen if "_" in condition else None, sample)
            for condition in conditions
            for n in range(len(questions))
            for sample in (None, *range(self.lab.s.samples))
        ]
        return self.answered(questions, wanted, self.lab.s.max_new_tokens, "test")

    def answered(
        self,
        questions: Sequence[str],
        wanted: Sequence[tuple[int, str, Setting | None, int | None]],
        tokens: int,
        what: str,
    ) -> list[Row]:
        """Answers to (question, condition, setting, sample), not yet measured by scorers but for coherence."""
        persona = self.lab.persona
        asks = []
        for n, condition, setting, sample in wanted:
            systems = persona.persona if condition == "persona" else persona.neutral
            system = systems[0 if sample is None else (sample + 1) % len(systems)]
            key = None if sample is None else f"{self.lab.s.seed}/{n}/{sample}"
            steer = self.push(setting, condition, sample) if setting else None
            asks.append(Ask(self.lab.prompt_ids(questions[n], system), key, steer))
        replies = self.lab.asked(asks, tokens, what, list(self.context.watched))
        return [
            Row(n, questions[n], condition, setting, sample, self.lab.tokenizer.decode(reply.ids), reply, {})
            for (n, condition, setting, sample), reply in zip(wanted, replies, strict=True)
        ]

    def measure(self, rows: Sequence[Row]) -> None:
        """Fill in coherence and scores; the base model must be the one that runs."""
        neutral = self.lab.persona.neutral[0]
        nll = mean_nll(self.lab.model, [Turn(self.lab.prompt_ids(r.prompt, neutral), r.reply.ids) for r in rows])
        for row, value in zip(rows, nll, strict=True):
            mass = row.reply.mass or [0.0]
            row.measured.update(
                n_tokens=len(row.reply.ids),
                nll_base=value,
                distinct2=distinct_pairs(row.reply.ids),
                repetition=repetition(row.text),
                pathway_mass_mean=sum(mass) / len(mass),
                pathway_mass_max=max(mass),
            )
        said = [ScoredAnswer(row.prompt, row.text, row.reply) for row in rows]
        for scorer in self.scorers:
            for row, found in zip(rows, scores(scorer, said, self.context), strict=True):
                row.measured.update({f"score__{scorer.name}__{label}": v for label, v in found.items()})

    def means(self, rows: Sequence[Row]) -> dict[str, float]:
        """The mean of everything that was measured."""
        return {name: float(numpy.nanmean([r.measured[name] for r in rows])) for name in rows[0].measured}

    def flaws(self, means: dict[str, float], neutral: dict[str, float], share: float = 1.0) -> list[str]:
        """What is wrong with answers that are less coherent than the neutral ones, beyond a share of the limits."""
        found = []
        if not means["nll_base"] <= neutral["nll_base"] + share * self.lab.s.coherence_limit:
            found.append(f"they are {means['nll_base'] - neutral['nll_base']:.2f} nats a token less likely")
        if means["distinct2"] < (1 - share * (1 - LEAST_DISTINCT)) * neutral["distinct2"]:
            found.append("they repeat themselves")
        if means["n_tokens"] < (1 - share * (1 - LEAST_LENGTH)) * neutral["n_tokens"]:
            found.append("they are hardly answers")
        return found


def column(scorer: Scorer) -> str:
    """The column of a scorer's primary label."""
    return f"score__{scorer.name}__{scorer.primary}"


def by_question(rows: Sequence[Row], condition: str, name: str) -> Any:
    """One number a question, samples averaged: (questions,)."""
    count = 1 + max(row.question for row in rows)
    own = [[r.measured[name] for r in rows if (r.condition, r.question) == (condition, n)] for n in range(count)]
    return numpy.array([numpy.nanmean(values) for values in own])


def summaries(rows: Sequence[Row], seed: int) -> dict[str, dict[str, dict[str, Any]]]:
    """{condition: {what was measured: {mean, ci95, n}}}; n counts questions."""
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for condition in dict.fromkeys(row.condition for row in rows):
        found[condition] = {}
        for name in rows[0].measured:
            values = by_question(rows, condition, name)
            if numpy.isfinite(values).any():  # a question with nothing but empty answers has no likelihood
                values = values[numpy.isfinite(values)]
            ci = list(stats.mean_interval(values, seed))
            found[condition][name] = {"mean": float(values.mean()), "ci95": ci, "n": len(values)}
    return found


PAIRS = {
    "steered-neutral": ("neutral_plus_vector", "neutral"),
    "persona-neutral": ("persona", "neutral"),
    "steered-random": ("neutral_plus_vector", "neutral_plus_random"),
    "reversed-neutral": ("neutral_minus_vector", "neutral"),
    "tuned-neutral": ("tuned", "neutral"),
    "control-neutral": ("control", "neutral"),
}


def contrasts(rows: Sequence[Row], columns: dict[str, str], seed: int) -> dict[str, dict[str, Any]]:
    """{contrast: {scorer: {diff, ci95, p, n}}}, paired by question, for the conditions that there are."""
    there = {row.condition for row in rows}
    return {
        name: {
            scorer: stats.contrast(by_question(rows, first, col), by_question(rows, second, col), seed)
            for scorer, col in columns.items()
        }
        for name, (first, second) in PAIRS.items()
        if {first, second} <= there
    }


def agreement(rows: Sequence[Row], columns: dict[str, str]) -> dict[str, float | None]:
    """Spearman's rank correlation of each pair of scorers over all answers; None where one of them is constant."""
    names, found = list(columns), {}
    for i, first in enumerate(names):
        for second in names[i + 1 :]:
            values = (numpy.array([r.measured[columns[name]] for r in rows]) for name in (first, second))
            rho = stats.spearman(*values)
            found[f"{first} ~ {second}"] = None if numpy.isnan(rho) else rho
    return found
