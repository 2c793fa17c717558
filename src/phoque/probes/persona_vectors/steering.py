"""Test if adding the persona vector causes the behavior: sweep on validation questions, report on test questions.

Coefficients are in units of the residual stream's mean norm at the block, so that blocks are comparable. The sweep
selects the setting with the highest trait score whose answers stay coherent; results come from the test questions.

One random direction differs from the next by more than one question from the next, so the direction is the unit of the
test: each of many natural directions, and of other roles' vectors, gets the same sweep and its own best setting, and
the persona vector is ranked among them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy
import torch

from phoque.inference.generate import Reply, Request
from phoque.inference.residual_stream import Turn
from phoque.probes import stats
from phoque.probes.persona_vectors.evidence import PersonaVectors
from phoque.probes.persona_vectors.model import ProbeModel
from phoque.probes.roles import MIN_RANKED
from phoque.probes.scorers import Context, ScoredAnswer, Scorer, score_answers
from phoque.probes.scorers.words import distinct_2, repetition
from phoque.probes.shared_inference import mean_nll

TEST_CONDITIONS = ("neutral", "persona", "neutral_plus_vector", "neutral_plus_random", "neutral_minus_vector")
MIN_DISTINCT, MIN_LENGTH = 0.75, 0.25  # relative to the neutral answers
VECTOR = "persona vector"
DIFFERENCE = "what {} changes on unrelated text"  # the name of a direction, by the adapter's
NATURAL_PER_ROLE = 5  # natural directions for each other role's vector that is tried
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
    direction: str  # the name of the direction that it was steered along, or ""
    sample: int | None  # None for the greedy answer
    text: str
    reply: Reply
    measurements: dict[str, float]  # coherence, and `score__<scorer>__<label>`


@dataclass(frozen=True)
class Trial:
    """A question to be answered under a condition, steered along a direction if it has a setting."""

    question: int
    condition: str
    setting: SteeringSetting | None = None
    direction: str = VECTOR
    sample: int | None = None  # None: greedy


class Steerer:
    """Generates answers with and without steering and measures them; `trait` is the column of the first scorer.

    `directions` maps a name to unit vectors (blocks, hidden): the persona vector, natural directions, other roles and
    `differences`, what adapters change on unrelated text.
    """

    def __init__(
        self,
        probe_model: ProbeModel,
        vectors: PersonaVectors,
        scorers: Sequence[Scorer],
        context: Context,
        differences: Mapping[str, Any],
    ) -> None:
        self.probe_model, self.vectors, self.scorers, self.context = probe_model, vectors, scorers, context
        self.coherent: dict[str, bool] = {}  # direction -> whether any setting of its sweep is coherent
        self.columns = {scorer.name: score_column(scorer) for scorer in scorers}
        self.trait = score_column(scorers[0])
        count = probe_model.s.directions if probe_model.s.directions >= MIN_RANKED else 0  # fewer rank nothing
        self.natural = [f"natural direction {n}" for n in range(count)]
        self.wrong_roles = [f"vector of {role}" for role in list(vectors.roles)[: count // NATURAL_PER_ROLE]]
        self.differences = {DIFFERENCE.format(name): stats.normalize(gap) for name, gap in differences.items()}
        self.directions = {
            VECTOR: vectors.unit_vectors(),
            **self.differences,
            **dict(zip(self.natural, vectors.random_directions, strict=False)),
            **{f"vector of {role}": stats.normalize(vector) for role, vector in vectors.roles.items()},
        }

    def make_steering(self, trial: Trial) -> tuple[int, torch.Tensor] | None:
        """The block and the vector to add to its output; None for a trial that is not steered."""
        if trial.setting is None:
            return None
        direction = self.directions[trial.direction][trial.setting.layer]
        if trial.condition == "neutral_plus_random":  # a different one for each sample
            sample = 0 if trial.sample is None else trial.sample + 1
            direction = self.vectors.random_directions[sample, trial.setting.layer]
        sign = -1.0 if trial.condition == "neutral_minus_vector" else 1.0
        length = sign * trial.setting.coefficient * float(self.vectors.norm[trial.setting.layer])
        return trial.setting.layer, torch.tensor(length * direction, dtype=torch.float32)

    def sweep(self, layers: Sequence[int]) -> tuple[list[dict[str, Any]], dict[str, SteeringSetting]]:
        """Steer along every direction, at every block and coefficient, on the validation questions.

        Returns the persona vector's table of means, and the selected setting of each direction; `coherent` then says
        for which directions any setting is coherent.
        """
        questions = self.probe_model.persona.validation[: self.probe_model.s.sweep_questions]
        settings = [SteeringSetting(layer, c) for layer in layers for c in self.probe_model.s.strengths]
        names = [VECTOR, *self.natural, *self.wrong_roles, *self.differences]
        trials = [Trial(n, "neutral") for n in range(len(questions))]
        trials += [
            Trial(n, "neutral_plus_vector", setting, name)
            for name in names
            for setting in settings
            for n in range(len(questions))
        ]
        rows = self.generate_answers(questions, trials, self.probe_model.s.sweep_tokens, "sweep")
        self.measure(rows, self.scorers[:1])
        neutral = self.average([r for r in rows if r.setting is None])
        rows_by_setting: dict[tuple[str, SteeringSetting], list[AnswerRow]] = {}
        for row in rows:
            if row.setting is not None:
                rows_by_setting.setdefault((row.direction, row.setting), []).append(row)
        selected, tables = {}, {}
        for name in names:
            tables[name] = [
                self._summarize_setting(rows_by_setting[name, setting], setting, neutral) for setting in settings
            ]
            selected[name] = self._select(tables[name])
        self.coherent = {name: any(row["coherent"] for row in table) for name, table in tables.items()}
        unsteered = {"layer": None, "coeff_rel_resid": 0.0, **neutral, "coherent": True}
        return [unsteered, *tables[VECTOR]], selected

    def _summarize_setting(
        self, rows: Sequence["AnswerRow"], setting: SteeringSetting, neutral: dict[str, float]
    ) -> dict[str, Any]:
        means = self.average(rows)
        coherent = not self.find_defects(means, neutral, SELECTION_MARGIN)
        return {"layer": setting.layer, "coeff_rel_resid": setting.coefficient, **means, "coherent": coherent}

    def _select(self, table: Sequence[dict[str, Any]]) -> SteeringSetting:
        """The coherent setting with the highest trait; if there is none, the likeliest of the weakest settings."""
        coherent_rows = [row for row in table if row["coherent"]]
        weakest_rows = [row for row in table if row["coeff_rel_resid"] == min(self.probe_model.s.strengths)]
        best = (
            max(coherent_rows, key=lambda r: r[self.trait])
            if coherent_rows
            else min(weakest_rows, key=lambda r: r["nll_base"])
        )
        return SteeringSetting(int(best["layer"]), best["coeff_rel_resid"])

    def test(self, selected: SteeringSetting, conditions: Sequence[str] = TEST_CONDITIONS) -> list[AnswerRow]:
        """Answer the test questions under each condition, greedy and sampled, with the same random numbers in each."""
        questions = self.probe_model.persona.test
        trials = [
            Trial(n, condition, selected if "_" in condition else None, sample=sample)
            for condition in conditions
            for n in range(len(questions))
            for sample in (None, *range(self.probe_model.s.samples))
        ]
        return self.generate_answers(questions, trials, self.probe_model.s.max_new_tokens, "test")

    def test_directions(self, selected: dict[str, SteeringSetting]) -> list[AnswerRow]:
        """Greedy answers to the test questions, steered along each other direction at its own setting."""
        questions = self.probe_model.persona.test
        trials = [
            Trial(n, "other_direction", selected[name], name)
            for name in (*self.natural, *self.wrong_roles, *self.differences)
            for n in range(len(questions))
        ]
        if not trials:
            return []
        return self.generate_answers(questions, trials, self.probe_model.s.max_new_tokens, "other directions")

    def generate_answers(
        self, questions: Sequence[str], trials: Sequence[Trial], max_tokens: int, purpose: str
    ) -> list[AnswerRow]:
        """Generate the answer of each trial, without measurements yet."""
        persona = self.probe_model.persona
        asks = []
        for trial in trials:
            systems = persona.persona if trial.condition == "persona" else persona.neutral
            system = systems[0 if trial.sample is None else (trial.sample + 1) % len(systems)]
            key = None if trial.sample is None else f"{self.probe_model.s.seed}/{trial.question}/{trial.sample}"
            prompt = self.probe_model.prompt_ids(questions[trial.question], system)
            asks.append(Request(prompt, key, self.make_steering(trial)))
        replies = self.probe_model.generate_replies(asks, max_tokens, purpose, list(self.context.lexicon_token_ids))
        return [
            AnswerRow(
                question=trial.question,
                prompt=questions[trial.question],
                condition=trial.condition,
                setting=trial.setting,
                direction=trial.direction if trial.setting else "",
                sample=trial.sample,
                text=str(self.probe_model.tokenizer.decode(reply.ids)),
                reply=reply,
                measurements={},
            )
            for trial, reply in zip(trials, replies, strict=True)
        ]

    def measure(self, rows: Sequence[AnswerRow], scorers: Sequence[Scorer] | None = None) -> None:
        """Fill in the coherence measures and scores of answers. Adapters must be disabled: both use the base model."""
        neutral = self.probe_model.persona.neutral[0]
        self.probe_model.console.stage(f"measuring how likely {len(rows)} answers are")
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
        self.score(rows, self.scorers if scorers is None else scorers)

    def score(self, rows: Sequence[AnswerRow], scorers: Sequence[Scorer]) -> None:
        """Fill in the scores of answers."""
        answers = [ScoredAnswer(row.prompt, row.text, row.reply) for row in rows]
        for scorer in scorers:
            self.probe_model.console.stage(f"scoring {len(rows)} answers with {scorer.name}")
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
    "tuned-control": ("tuned", "control"),
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
