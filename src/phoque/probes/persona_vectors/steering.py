"""Test if adding the persona vector causes the behavior: sweep on validation questions, report on test questions.

Coefficients are in units of the residual stream's mean norm at the block, so that blocks are comparable. The sweep
selects the setting with the highest trait score whose answers stay coherent; results come from the test questions.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy
import torch

from phoque.inference.generate import Reply, Request
from phoque.inference.likelihood import mean_nll
from phoque.inference.residual_stream import Turn
from phoque.probes import stats
from phoque.probes.persona_vectors.evidence import PersonaVectors
from phoque.probes.persona_vectors.model import ProbeModel
from phoque.probes.scorers import Context, ScoredAnswer, Scorer, score_answers
from phoque.probes.scorers.words import distinct_2, repetition

TEST_CONDITIONS = ("neutral", "persona", "neutral_plus_vector", "neutral_plus_random", "neutral_minus_vector")
MIN_DISTINCT, MIN_LENGTH = 0.75, 0.25  # relative to the neutral answers
SELECTION_MARGIN = 0.6  # share of these limits that the sweep allows: test answers are longer and questions differ


@dataclass(frozen=True)
class SteeringSetting:
    """The block to steer, and the coefficient in units of the residual norm at that block."""

    layer: int
    coefficient: float


@dataclass(frozen=True, kw_only=True)
class AnswerRow:
    """One steered or unsteered answer and its measurements: a row of generation_results.csv."""

    question: int  # index
    prompt: str  # text of the question
    condition: str
    setting: SteeringSetting | None
    sample: int | None  # None for the greedy answer
    text: str
    reply: Reply
    measurements: dict[str, float]  # coherence, and `score__<scorer>__<label>`


class Steerer:
    """Generates answers with and without steering and measures them; `trait` is the column of the first scorer."""

    def __init__(
        self, probe_model: ProbeModel, vectors: PersonaVectors, scorers: Sequence[Scorer], context: Context
    ) -> None:
        self.probe_model, self.vectors, self.scorers, self.context = probe_model, vectors, scorers, context
        self.columns = {scorer.name: score_column(scorer) for scorer in scorers}
        self.trait = score_column(scorers[0])

    def make_steering(self, setting: SteeringSetting, condition: str, sample: int | None) -> tuple[int, torch.Tensor]:
        """The block and the vector to add to its output: plus or minus the persona vector, or a random one as long."""
        direction = self.vectors.unit_vectors()[setting.layer]
        if condition == "neutral_plus_random":  # a different one for each sample
            direction = self.vectors.random_directions[0 if sample is None else sample + 1, setting.layer]
        sign = -1.0 if condition == "neutral_minus_vector" else 1.0
        length = sign * setting.coefficient * float(self.vectors.norm[setting.layer])
        return setting.layer, torch.tensor(length * direction, dtype=torch.float32)

    def sweep(self, layers: Sequence[int]) -> tuple[list[dict[str, Any]], SteeringSetting, bool]:
        """Steer at every block and coefficient on the validation questions.

        Returns the table of means, the selected setting, and whether any setting is coherent.
        """
        questions = self.probe_model.persona.validation
        settings = [SteeringSetting(layer, c) for layer in layers for c in self.probe_model.s.strengths]
        requests: list[tuple[int, str, SteeringSetting | None, int | None]] = [
            (n, "neutral_plus_vector" if setting else "neutral", setting, None)
            for setting in (None, *settings)
            for n in range(len(questions))
        ]
        rows = self.generate_answers(questions, requests, self.probe_model.s.sweep_tokens, "sweep")
        self.measure(rows)
        neutral = self.average([r for r in rows if r.setting is None])
        table = []
        for setting in settings:
            means = self.average([r for r in rows if r.setting == setting])
            coherent = not self.find_defects(means, neutral, SELECTION_MARGIN)
            table.append(
                {"layer": setting.layer, "coeff_rel_resid": setting.coefficient, **means, "coherent": coherent}
            )
        coherent_rows = [row for row in table if row["coherent"]]
        # if no setting is coherent, take the most likely answers at the smallest coefficient
        weakest_rows = [row for row in table if row["coeff_rel_resid"] == min(self.probe_model.s.strengths)]
        best = (
            max(coherent_rows, key=lambda r: r[self.trait])
            if coherent_rows
            else min(weakest_rows, key=lambda r: r["nll_base"])
        )
        unsteered = {"layer": None, "coeff_rel_resid": 0.0, **neutral, "coherent": True}
        return [unsteered, *table], SteeringSetting(int(best["layer"]), best["coeff_rel_resid"]), bool(coherent_rows)

    def test(self, selected: SteeringSetting, conditions: Sequence[str] = TEST_CONDITIONS) -> list[AnswerRow]:
        """Answer the test questions under each condition, greedy and sampled, with the same random numbers in each."""
        questions = self.probe_model.persona.test
        requests = [
            (n, condition, selected if "_" in condition else None, sample)
            for condition in conditions
            for n in range(len(questions))
            for sample in (None, *range(self.probe_model.s.samples))
        ]
        return self.generate_answers(questions, requests, self.probe_model.s.max_new_tokens, "test")

    def generate_answers(
        self,
        questions: Sequence[str],
        requests: Sequence[tuple[int, str, SteeringSetting | None, int | None]],
        max_tokens: int,
        purpose: str,
    ) -> list[AnswerRow]:
        """Generate answers for (question, condition, setting, sample) requests, without measurements yet."""
        persona = self.probe_model.persona
        asks = []
        for n, condition, setting, sample in requests:
            systems = persona.persona if condition == "persona" else persona.neutral
            system = systems[0 if sample is None else (sample + 1) % len(systems)]
            key = None if sample is None else f"{self.probe_model.s.seed}/{n}/{sample}"
            steer = self.make_steering(setting, condition, sample) if setting else None
            asks.append(Request(self.probe_model.prompt_ids(questions[n], system), key, steer))
        replies = self.probe_model.generate_replies(asks, max_tokens, purpose, list(self.context.lexicon_token_ids))
        return [
            AnswerRow(
                question=n,
                prompt=questions[n],
                condition=condition,
                setting=setting,
                sample=sample,
                text=str(self.probe_model.tokenizer.decode(reply.ids)),
                reply=reply,
                measurements={},
            )
            for (n, condition, setting, sample), reply in zip(requests, replies, strict=True)
        ]

    def measure(self, rows: Sequence[AnswerRow]) -> None:
        """Fill in the coherence measures and scores of answers. Adapters must be disabled: both use the base model."""
        neutral = self.probe_model.persona.neutral[0]
        nll = mean_nll(
            self.probe_model.model, [Turn(self.probe_model.prompt_ids(r.prompt, neutral), r.reply.ids) for r in rows]
        )
        for row, value in zip(rows, nll, strict=True):
            mass = row.reply.mass or [0.0]
            row.measurements.update(
                n_tokens=len(row.reply.ids),
                nll_base=value,
                distinct2=distinct_2(row.reply.ids),
                repetition=repetition(row.text),
                pathway_mass_mean=sum(mass) / len(mass),
                pathway_mass_max=max(mass),
            )
        answers = [ScoredAnswer(row.prompt, row.text, row.reply) for row in rows]
        for scorer in self.scorers:
            for row, labels in zip(rows, score_answers(scorer, answers, self.context), strict=True):
                row.measurements.update({f"score__{scorer.name}__{label}": v for label, v in labels.items()})

    def average(self, rows: Sequence[AnswerRow]) -> dict[str, float]:
        """Average each measurement over the rows, ignoring NaN."""
        return {name: float(numpy.nanmean([r.measurements[name] for r in rows])) for name in rows[0].measurements}

    def find_defects(self, means: dict[str, float], neutral: dict[str, float], share: float = 1.0) -> list[str]:
        """List how answers are less coherent than the neutral ones by more than `share` of the limits."""
        defects = []
        if not means["nll_base"] <= neutral["nll_base"] + share * self.probe_model.s.coherence_limit:
            defects.append(f"they are {means['nll_base'] - neutral['nll_base']:.2f} nats per token less likely")
        if means["distinct2"] < (1 - share * (1 - MIN_DISTINCT)) * neutral["distinct2"]:
            defects.append("they repeat themselves")
        if means["n_tokens"] < (1 - share * (1 - MIN_LENGTH)) * neutral["n_tokens"]:
            defects.append("they are much shorter than neutral answers")
        return defects


def score_column(scorer: Scorer) -> str:
    """The column of a scorer's primary label."""
    return f"score__{scorer.name}__{scorer.primary}"


def mean_by_question(rows: Sequence[AnswerRow], condition: str, name: str) -> Any:
    """A measurement's mean over the samples of each question, (questions,)."""
    count = 1 + max(row.question for row in rows)
    values_by_question = [
        [r.measurements[name] for r in rows if (r.condition, r.question) == (condition, n)] for n in range(count)
    ]
    return numpy.array([numpy.nanmean(values) for values in values_by_question])


def summarize_conditions(rows: Sequence[AnswerRow], seed: int) -> dict[str, dict[str, dict[str, Any]]]:
    """Summarize the conditions as {condition: {measurement: {mean, ci95, n}}}; n counts questions."""
    summary: dict[str, dict[str, dict[str, Any]]] = {}
    for condition in dict.fromkeys(row.condition for row in rows):
        summary[condition] = {}
        for name in rows[0].measurements:
            values = mean_by_question(rows, condition, name)
            if numpy.isfinite(values).any():  # a question whose answers are all empty has no likelihood
                values = values[numpy.isfinite(values)]
            ci = list(stats.mean_interval(values, seed))
            summary[condition][name] = {"mean": float(values.mean()), "ci95": ci, "n": len(values)}
    return summary


CONTRASTS = {
    "steered-neutral": ("neutral_plus_vector", "neutral"),
    "persona-neutral": ("persona", "neutral"),
    "steered-random": ("neutral_plus_vector", "neutral_plus_random"),
    "reversed-neutral": ("neutral_minus_vector", "neutral"),
    "tuned-neutral": ("tuned", "neutral"),
    "control-neutral": ("control", "neutral"),
}


def compute_contrasts(rows: Sequence[AnswerRow], columns: dict[str, str], seed: int) -> dict[str, dict[str, Any]]:
    """Compare conditions, paired by question: {contrast: {scorer: {diff, ci95, p, n}}}, if both conditions were run."""
    conditions = {row.condition for row in rows}
    return {
        name: {
            scorer: stats.paired_contrast(mean_by_question(rows, first, col), mean_by_question(rows, second, col), seed)
            for scorer, col in columns.items()
        }
        for name, (first, second) in CONTRASTS.items()
        if {first, second} <= conditions
    }


def correlate_scorers(rows: Sequence[AnswerRow], columns: dict[str, str]) -> dict[str, float | None]:
    """Compute the Spearman correlation of each pair of scorers over all answers; None if either is constant."""
    names, correlations = list(columns), {}
    for i, first in enumerate(names):
        for second in names[i + 1 :]:
            values = (numpy.array([r.measurements[columns[name]] for r in rows]) for name in (first, second))
            rho = stats.spearman(*values)
            correlations[f"{first} ~ {second}"] = None if numpy.isnan(rho) else rho
    return correlations
