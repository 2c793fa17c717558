"""Run the measurements of a probe in order: first the base model, then each adapter."""

from dataclasses import dataclass, field
from typing import Any

from phoque.probes import stats
from phoque.probes.persona import CONDITIONS
from phoque.probes.persona_vectors import evidence as ev
from phoque.probes.persona_vectors.model import Answer, ProbeModel, Residuals
from phoque.probes.persona_vectors.steering import (
    AnswerRow,
    Steerer,
    SteeringSetting,
    compute_contrasts,
    correlate_scorers,
    summarize_conditions,
)
from phoque.probes.persona_vectors.verdicts import MIN_QUESTIONS, decide_verdicts
from phoque.probes.scorers import Context, Scorer

MAX_MASSIVE_SHARE = 0.02  # share of response tokens left out above which to warn

Shifts = dict[str, tuple[dict[str, Any], Any]]  # own or same_text -> arrays per block, bootstrapped cosines


@dataclass(kw_only=True)
class ProbeResult:
    """All results of a probe. `layers` and `answers` become CSV tables, the rest goes into summary.json."""

    vectors: ev.PersonaVectors
    layers: list[dict[str, Any]]
    sweep: list[dict[str, Any]]
    selected: SteeringSetting
    has_coherent: bool  # whether any setting of the sweep is coherent
    answers: list[AnswerRow]
    columns: dict[str, str]  # scorer -> column; the first scorer is the trait
    conditions: dict[str, Any] = field(default_factory=dict)
    contrasts: dict[str, Any] = field(default_factory=dict)
    agreement: dict[str, float | None] = field(default_factory=dict)
    mean_shifts: dict[str, Any] = field(default_factory=dict)  # adapter -> own or same_text -> means, steered blocks
    verdicts: dict[str, Any] = field(default_factory=dict)
    token_counts: dict[str, int] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)

    @property
    def trait(self) -> str:
        """The scorer that verdicts use."""
        return next(iter(self.columns))


class Probe:
    """Measures a ProbeModel on the questions of its persona; `layers` are the blocks to steer."""

    def __init__(self, probe_model: ProbeModel, scorers: list[Scorer], context: Context, layers: list[int]) -> None:
        self.probe_model, self.scorers, self.context, self.layers = probe_model, scorers, context, layers
        self.s, self.persona = probe_model.s, probe_model.persona

    def run(self, adapters: list[str]) -> ProbeResult:
        """Measure the base model, and the model with each of these adapters."""
        probe_model, seed = self.probe_model, self.s.seed
        with probe_model.use_base():
            extraction, heldout, neutral = self._read_residuals()
            if self.s.shuffle_labels:
                ev.swap_labels(extraction, seed)
                ev.swap_labels(heldout, seed + 1)
            vectors = ev.extract_vectors(extraction, seed)
            probe_model.console.say("measuring evidence on held-out questions")
            evidence_rows = ev.measure_evidence(vectors, extraction, heldout, seed)
            steerer = Steerer(probe_model, vectors, self.scorers, self.context)
            sweep, selected, has_coherent = steerer.sweep(self.layers)
            answers = steerer.test(selected)
        shifts: dict[str, Shifts] = {}
        for name in adapters:
            with probe_model.use_adapter(name):
                shifts[name] = self._measure_shift(vectors, heldout, neutral, name)
                answers += steerer.test(selected, [name])
        with probe_model.use_base():
            steerer.measure(answers)
        result = ProbeResult(
            vectors=vectors,
            layers=evidence_rows,
            sweep=sweep,
            selected=selected,
            has_coherent=has_coherent,
            answers=answers,
            columns=steerer.columns,
        )
        result.token_counts = {"kept": sum(extraction.kept), "massive": sum(extraction.massive)}
        self._judge(result, steerer, shifts)
        self._add_warnings(result)
        return result

    def _read_residuals(self) -> tuple[Residuals, Residuals, list[Answer]]:
        questions = {"extraction": self.persona.extraction, "heldout": self.persona.heldout}
        answers_by_split = self.probe_model.answers(questions, CONDITIONS, "vectors and evidence")
        self.probe_model.console.say("reading residual streams")
        extraction = self.probe_model.read_residuals(answers_by_split["extraction"], len(self.persona.extraction))
        neutral = [a for a in answers_by_split["heldout"] if a.condition == "neutral"]
        persona = [a for a in answers_by_split["heldout"] if a.condition == "persona"]
        text_persona = self.probe_model.replace_system_prompts(persona, self.persona.heldout, "neutral", "text_persona")
        heldout = self.probe_model.read_residuals(answers_by_split["heldout"] + text_persona, len(self.persona.heldout))
        for name in ("text_neutral", "before"):  # copies: a null run swaps in place, `before` must not change
            heldout.by_condition[name] = {way: values.copy() for way, values in heldout.by_condition["neutral"].items()}
        return extraction, heldout, neutral

    def _measure_shift(
        self, vectors: ev.PersonaVectors, heldout: Residuals, neutral: list[Answer], name: str
    ) -> Shifts:
        """Measure the fine-tune's shift over its own answers, and over the base model's neutral answers (same text)."""
        count = len(self.persona.heldout)
        own_answers = self.probe_model.answers({"heldout": self.persona.heldout}, ["neutral"], f"{name} model")[
            "heldout"
        ]
        before = heldout.get("before")
        return {
            kind: ev.measure_shift(
                vectors,
                before,
                self.probe_model.read_residuals(answers, count).get("neutral"),
                self.layers,
                self.s.seed,
            )
            for kind, answers in (("own", own_answers), ("same_text", neutral))
        }

    def _judge(self, result: ProbeResult, steerer: Steerer, shifts: dict[str, Shifts]) -> None:
        """Fill in condition summaries, contrasts, scorer agreement, the fine-tune's shift and the verdicts."""
        seed = self.s.seed
        result.conditions = summarize_conditions(result.answers, seed)
        result.contrasts = compute_contrasts(result.answers, steerer.columns, seed)
        result.agreement = correlate_scorers(result.answers, steerer.columns)
        result.mean_shifts = {
            name: {kind: {k: float(v[-1]) for k, v in values.items()} for kind, (values, _) in kinds.items()}
            for name, kinds in shifts.items()
        }
        for row in result.layers:
            for name, kinds in shifts.items():
                for kind, (values, _) in kinds.items():
                    if row["extraction"] == "response_avg":
                        row |= _shift_columns(name, kind, values, row["layer"])
        lead = None
        if "control" in shifts:
            samples = [shifts[name]["own"][1][:, -1] for name in ("tuned", "control")]
            low, high = stats.percentile_interval(samples[0] - samples[1])  # both use the same resamples
            lead = float(low), float(high)
        means = {c: {k: v["mean"] for k, v in values.items()} for c, values in result.conditions.items()}
        steered, neutral = means["neutral_plus_vector"], means["neutral"]
        evidence = next(
            r for r in result.layers if (r["layer"], r["extraction"]) == (result.selected.layer, "response_avg")
        )
        result.verdicts = decide_verdicts(
            evidence,
            result.contrasts,
            defects=steerer.find_defects(steered, neutral),
            nll_rise=steered["nll_base"] - neutral["nll_base"],
            trait=result.trait,
            shift=result.mean_shifts.get("tuned", {}).get("own"),
            lead=lead,
        )

    def _add_warnings(self, result: ProbeResult) -> None:
        """Add the warnings that a reader must know before the verdicts."""
        messages = result.warnings
        if self.s.shuffle_labels:
            messages.append("a null run: the labels of half the pairs are swapped, so no result is about the persona")
        if not result.has_coherent:
            messages.append("no setting of the sweep is coherent; one with the smallest coefficient was tested")
        if result.contrasts["persona-neutral"][result.trait]["ci95"][0] <= 0:
            messages.append(
                "the model does not follow the persona's prompt: the vector is that of the prompt, not of the persona"
            )
        messages += [
            f"{s.name} is a weak scorer: it misses what is implied but not said" for s in self.scorers if s.is_weak
        ]
        share = result.token_counts["massive"] / max(1, result.token_counts["kept"] + result.token_counts["massive"])
        if share > MAX_MASSIVE_SHARE:
            messages.append(f"{share:.1%} of the response tokens have massive activations and were left out")
        if min(len(self.persona.test), len(self.persona.heldout)) < MIN_QUESTIONS:
            messages.append(f"fewer than {MIN_QUESTIONS} held-out or test questions: some verdicts cannot be given")


def _shift_columns(name: str, kind: str, values: dict[str, Any], layer: int) -> dict[str, float]:
    prefix = f"{name}_shift" if kind == "own" else f"{name}_same_text"
    key_by_column = {
        "proj": "share",
        "proj_ci_low": "share_low",
        "proj_ci_high": "share_high",
        "cos": "cos",
        "cos_ci_low": "cos_low",
        "cos_ci_high": "cos_high",
        "size": "size",
        "placebo_cos": "placebo",
        "random_cos_p95": "random_p95",
    }
    return {f"{prefix}_{column}": float(values[key][layer]) for column, key in key_by_column.items()}
