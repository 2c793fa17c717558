"""Run the measurements of a probe in order: first the base model, then each adapter."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy

from phoque.distributed.processes import current
from phoque.probes import stats
from phoque.probes.persona import CONDITIONS
from phoque.probes.persona_vectors import evidence as ev
from phoque.probes.persona_vectors import judge
from phoque.probes.persona_vectors.difference_lens import Reading, measure_differences, read_difference
from phoque.probes.persona_vectors.dose import (
    TEXT_TOKENS,
    TEXTS,
    Dose,
    SideEffects,
    measure_doses,
    measure_side_effects,
)
from phoque.probes.persona_vectors.model import Answer, ProbeModel, Residuals
from phoque.probes.persona_vectors.nulls import count_false_alarms
from phoque.probes.persona_vectors.persona_share import PersonaShare, mean_by_question, measure_persona_share
from phoque.probes.persona_vectors.ranking import rank_cosines, rank_projections
from phoque.probes.persona_vectors.steering import (
    DIFFERENCE,
    VECTOR,
    AnswerRow,
    Steerer,
    SteeringSetting,
    compute_contrasts,
    correlate_scorers,
    summarize_conditions,
)
from phoque.probes.roles import MIN_RANKED
from phoque.probes.sae.corpus import CONTEXT_TOKENS, PYTHON_DOCS, read_text_chunks
from phoque.probes.scorers import Context, Scorer
from phoque.probes.verdicts import Ranking
from phoque.probes.word_profile import WordProfile

MAX_MASSIVE_SHARE = 0.02  # share of response tokens left out above which to warn
# beside the controls, those whose words are compared
COMPARED_CONDITIONS = ("persona", "neutral_plus_vector", "tuned")

Shifts = dict[str, ev.Shift]  # own or same_text -> shift


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
    profile: WordProfile
    conditions: dict[str, Any] = field(default_factory=dict)
    contrasts: dict[str, Any] = field(default_factory=dict)
    agreement: dict[str, float | None] = field(default_factory=dict)
    mean_shifts: dict[str, Any] = field(default_factory=dict)  # adapter -> own or same_text -> means, steered blocks
    shares: dict[str, PersonaShare] = field(default_factory=dict)  # by condition
    rankings: dict[str, Ranking] = field(default_factory=dict)
    causes: judge.Causes | None = None
    differences: list[Reading] = field(default_factory=list)
    doses: list[Dose] = field(default_factory=list)
    side_effects: dict[str, SideEffects] = field(default_factory=dict)  # adapter -> its effects on unrelated text
    false_alarms: dict[str, Any] = field(default_factory=dict)
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

    def run(self, adapters: list[str]) -> ProbeResult | None:
        """Measure the base model, and the model with each of these adapters; None in all processes but process 0."""
        probe_model, seed = self.probe_model, self.s.seed
        texts = self._read_unrelated_texts() if adapters else []
        shown = [name for name in ("tuned", "control") if name in adapters]  # of several controls, the first
        if adapters:
            probe_model.console.stage("measuring what the adapters change on unrelated text")
        differences = measure_differences(probe_model, shown, texts) if adapters else {}
        with probe_model.use_base():
            answers_by_split = self._answer()
            self.context.profile = self._profile_words(answers_by_split["extraction"])
            neutral = [a for a in answers_by_split["heldout"] if a.condition == "neutral"]
            self.extraction, self.heldout = self._read_residuals(answers_by_split)
            if self.s.shuffle_labels:
                ev.swap_labels(self.extraction, ev.draw_half(len(self.extraction.get("neutral")), seed))
                ev.swap_labels(self.heldout, ev.draw_half(len(self.heldout.get("neutral")), seed + 1))
            vectors = ev.extract_vectors(self.extraction, probe_model.roles, seed)
            probe_model.console.stage("measuring evidence on held-out questions")
            is_main = current().is_main  # the others only help to run the model
            evidence_rows = ev.measure_evidence(vectors, self.extraction, self.heldout, seed) if is_main else []
            steerer = Steerer(probe_model, vectors, self.scorers, self.context, differences)
            sweep, settings = steerer.sweep(self.layers)
            answers = steerer.test(settings[VECTOR])
            others = steerer.test_directions(settings)
        shifts: dict[str, Shifts] = {}
        for name in adapters:
            with probe_model.use_adapter(name):
                shifts[name] = self._measure_shift(vectors, neutral, name)
                answers += steerer.test(settings[VECTOR], [name])
        with probe_model.use_base():
            steerer.measure(answers)
            steerer.score(others, self.scorers[:1])
        doses = []
        if adapters and self.s.dose_scales:
            greedy = {
                name: [r.text for r in answers if r.condition == name and r.sample is None]
                for name in ("neutral", *shown)
            }
            doses = measure_doses(probe_model, self.context.profile, greedy, self.s.dose_scales, texts)
        if not is_main:  # what follows needs no other process
            return None
        result = ProbeResult(
            vectors=vectors,
            layers=evidence_rows,
            sweep=sweep,
            selected=settings[VECTOR],
            has_coherent=steerer.coherent[VECTOR],
            answers=answers,
            columns=steerer.columns,
            profile=self.context.profile,
            doses=doses,
        )
        result.token_counts = {"kept": sum(self.extraction.kept), "massive": sum(self.extraction.massive)}
        result.causes = self._compare_directions(steerer, answers, others)
        with probe_model.use_base():
            result.differences = [
                read_difference(
                    probe_model,
                    result.profile,
                    vectors,
                    name,
                    difference,
                    settings[DIFFERENCE.format(name)],
                    [row for row in others if row.direction == DIFFERENCE.format(name)],
                    coherent=steerer.coherent[DIFFERENCE.format(name)],
                    lens_block=self.layers[len(self.layers) // 2],
                    trait=steerer.trait,
                    natural_traits=list(result.causes.natural.values()) if result.causes else [],
                )
                for name, difference in differences.items()
            ]
        if adapters and self.s.dose_scales:
            probe_model.console.stage("measuring side effects on unrelated text")
            result.side_effects = measure_side_effects(probe_model, shown, texts)
        self._describe(result, steerer, shifts)
        self._judge(result, steerer, shifts)
        self._add_warnings(result)
        return result

    def _answer(self) -> dict[str, list[Answer]]:
        """Answers to the extraction and held-out questions as the persona, the placebo and each role."""
        persona, limit = self.persona, self.s.role_questions
        lists = {"extraction": persona.extraction, "heldout": persona.heldout}
        answers = self.probe_model.answers(lists, CONDITIONS, "vectors and evidence")
        if self.probe_model.roles:
            short = {split: texts[:limit] for split, texts in lists.items()}
            for split, rows in self.probe_model.answers(short, self.probe_model.roles, "other roles").items():
                answers[split] += rows
        return answers

    def _profile_words(self, answers: Sequence[Answer]) -> WordProfile:
        """The words of each role's answers; paraphrases of a prompt take turns, so that no role has more answers."""
        limit = min(self.s.role_questions, len(self.persona.extraction))
        texts: dict[str, list[str]] = {}
        for a in answers:
            prompts = self.probe_model.system_prompts[a.condition]
            if a.question < limit and a.paraphrase == a.question % len(prompts):
                texts.setdefault(a.condition, []).append(str(self.probe_model.tokenizer.decode(a.turn.response)))
        return WordProfile.fit(texts, self.probe_model.system_prompts)

    def _read_residuals(self, answers_by_split: dict[str, list[Answer]]) -> tuple[Residuals, Residuals]:
        self.probe_model.console.stage("reading residual streams")
        extraction = self._read_with_roles(answers_by_split["extraction"])
        persona = [a for a in answers_by_split["heldout"] if a.condition == "persona"]
        text_persona = self.probe_model.replace_system_prompts(persona, self.persona.heldout, "neutral", "text_persona")
        heldout = self._read_with_roles(answers_by_split["heldout"] + text_persona)
        for name in ("text_neutral", "before"):  # copies: a null run swaps in place, `before` must not change
            heldout.by_condition[name] = {way: values.copy() for way, values in heldout.by_condition["neutral"].items()}
        return extraction, heldout

    def _read_with_roles(self, answers: Sequence[Answer]) -> Residuals:
        """The residual streams of all answers; norms and counts of tokens are those without the other roles."""
        roles = self.probe_model.roles
        residuals = self.probe_model.read_residuals([a for a in answers if a.condition not in roles])
        if roles:
            of_roles = self.probe_model.read_residuals([a for a in answers if a.condition in roles])
            residuals.by_condition |= of_roles.by_condition
        return residuals

    def _measure_shift(self, vectors: ev.PersonaVectors, neutral: list[Answer], name: str) -> Shifts:
        """Measure the fine-tune's shift over its own answers, and over the base model's neutral answers (same text)."""
        own_answers = self.probe_model.answers({"heldout": self.persona.heldout}, ["neutral"], f"{name} model")[
            "heldout"
        ]
        before = self.heldout.get("before")
        self.probe_model.console.stage(f"measuring where the {name} model moved")
        residuals_by_kind = {
            kind: self.probe_model.read_residuals(answers)
            for kind, answers in (("own", own_answers), ("same_text", neutral))
        }
        if not current().is_main:  # process 0 judges
            return {}
        return {
            kind: ev.measure_shift(vectors, before, residuals.get("neutral"), self.layers, self.s.seed)
            for kind, residuals in residuals_by_kind.items()
        }

    def _read_unrelated_texts(self) -> list[list[int]]:
        """Chunks of Python's documentation, which is on every machine and about nothing that a persona says."""
        _, chunks = read_text_chunks(PYTHON_DOCS, self.probe_model.tokenizer, TEXTS * CONTEXT_TOKENS, None)
        return [chunk[:TEXT_TOKENS] for chunk in chunks[:TEXTS]]

    def _compare_directions(
        self, steerer: Steerer, answers: Sequence[AnswerRow], others: Sequence[AnswerRow]
    ) -> judge.Causes | None:
        """The trait of greedy answers with each direction at its own setting; None if there are too few directions."""
        if len(steerer.natural) < MIN_RANKED:
            return None
        steered = [r for r in answers if r.condition == "neutral_plus_vector" and r.sample is None]
        means = {
            name: float(numpy.mean([r.measurements[steerer.trait] for r in others if r.direction == name]))
            for name in (*steerer.natural, *steerer.wrong_roles)
        }
        return judge.Causes(
            float(numpy.mean([r.measurements[steerer.trait] for r in steered])),
            {name: means[name] for name in steerer.natural},
            {name: means[name] for name in steerer.wrong_roles},
            len(steered),
        )

    def _describe(self, result: ProbeResult, steerer: Steerer, shifts: dict[str, Shifts]) -> None:
        """Fill in condition summaries, contrasts, scorer agreement and the fine-tune's shift."""
        seed = self.s.seed
        result.conditions = summarize_conditions(result.answers, seed)
        result.contrasts = compute_contrasts(result.answers, steerer.columns, seed)
        result.agreement = correlate_scorers(result.answers, steerer.columns)
        result.mean_shifts = {
            name: {kind: {k: float(v[-1]) for k, v in shift.columns.items()} for kind, shift in kinds.items()}
            for name, kinds in shifts.items()
        }
        for row in result.layers:
            for name, kinds in shifts.items():
                for kind, shift in kinds.items():
                    if row["extraction"] == "response_avg":
                        row |= _shift_columns(name, kind, shift.columns, row["layer"])

    def _judge(self, result: ProbeResult, steerer: Steerer, shifts: dict[str, Shifts]) -> None:
        """Fill in the rankings and the verdicts."""
        seed, heldout_count = self.s.seed, len(self.persona.heldout)
        ranked = len(self.probe_model.roles) >= MIN_RANKED
        evidence = next(
            r for r in result.layers if (r["layer"], r["extraction"]) == (result.selected.layer, "response_avg")
        )
        controls = [name for name in shifts if name != "tuned"]
        own_by_question = {c: self._attribute_answers(result, c) for c in ("neutral", *COMPARED_CONDITIONS, *controls)}
        lead = move = None
        if ranked:
            base = own_by_question["neutral"]
            for condition in (*COMPARED_CONDITIONS, *controls):
                if own_by_question[condition] is not None:
                    share = measure_persona_share(result.profile, own_by_question[condition], base, seed)
                    # the profile is of answers to the very prompt that gave these
                    ranking = replace(share.ranking, exchangeable=condition != "persona")
                    result.shares[condition] = replace(share, ranking=ranking)
            result.rankings["specific"] = rank_projections(
                result.vectors, self.extraction, self.heldout, result.selected.layer, seed
            )
        place = result.profile.roles.index("persona")
        if controls and "tuned" in shifts and ranked:
            shares = numpy.stack([own_by_question[name][:, place] for name in controls])
            spread = stats.predict_spread(shares.mean(1))
            gap = own_by_question["tuned"][:, place] - shares.mean(0)
            lead = judge.Lead(stats.mean_interval(gap - spread, seed), len(controls), spread)
        if "tuned" in shifts and ranked:
            tuned_shift = shifts["tuned"]["own"]
            ranking = rank_cosines(result.vectors, tuned_shift.gaps, self.extraction, self.layers, seed)
            result.rankings["tuned_moves_along_vector"] = ranking
            c = tuned_shift.columns
            move = judge.Move(
                cosine=float(c["cos"][-1]),
                low=float(c["cos_low"][-1]),
                random_p95=float(c["random_p95"][-1]),
                ranking=ranking,
                lead=self._lead_over_controls(result.vectors, shifts, controls),
                n=heldout_count,
            )
        means = {c: {k: v["mean"] for k, v in values.items()} for c, values in result.conditions.items()}
        heldout_roles = min(heldout_count, self.s.role_questions)
        profiled = min(len(self.persona.extraction), self.s.role_questions)
        decided = {
            "follows": judge.judge_follows(result.shares.get("persona"), profiled),
            "separable": judge.judge_separable(evidence),
            "specific": judge.judge_specific(evidence, result.rankings.get("specific"), heldout_roles),
            "causal": judge.judge_causal(result.causes, result.trait),
            "coherent": judge.judge_coherent(
                means["neutral_plus_vector"], means["neutral"], self.s.coherence_limit, len(self.persona.test)
            ),
            "adopts": judge.judge_adopts(result.shares.get("tuned"), lead, has_tuned="tuned" in shifts),
            "tuned_moves_along_vector": judge.judge_moves(move, has_tuned="tuned" in shifts),
        }
        result.verdicts = {name: verdict.to_json() for name, verdict in decided.items()}
        result.false_alarms = count_false_alarms(
            self.extraction, self.heldout, result.selected.layer, self.s.nulls, seed
        )

    def _attribute_answers(self, result: ProbeResult, condition: str) -> Any:
        """The share of the answers to each question that are each role's, (questions, roles); None without answers."""
        rows = sorted((r for r in result.answers if r.condition == condition), key=lambda r: r.question)
        if not rows:
            return None
        return mean_by_question(result.profile.attribute([r.text for r in rows]), len(self.persona.test))

    def _lead_over_controls(
        self, vectors: ev.PersonaVectors, shifts: dict[str, Shifts], controls: list[str]
    ) -> judge.Lead | None:
        """How far the fine-tune's cosine is above the mean of the controls'; None without a control."""
        if not controls:
            return None
        unit = vectors.unit_vectors()[self.layers]

        gaps = [shifts[name]["own"].gaps[:, self.layers] for name in ("tuned", *controls)]
        tuned, *others = (stats.MeanCosine(gap, unit) for gap in gaps)
        spread = stats.predict_spread(numpy.array([stats.cosine(gap.mean(0), unit).mean() for gap in gaps[1:]]))

        def lead(weights: Any) -> Any:
            of_controls = numpy.mean([cosine(weights).mean(-1) for cosine in others], axis=0)
            return tuned(weights).mean(-1) - of_controls - spread

        low, high = stats.bca_interval(lead, len(gaps[0]), self.s.seed)
        return judge.Lead((float(low), float(high)), len(controls), spread)

    def _add_warnings(self, result: ProbeResult) -> None:
        """Add the warnings that a reader must know before the verdicts."""
        messages = result.warnings
        if self.s.shuffle_labels:
            messages.append("a null run: the labels of half the pairs are swapped, so no result is about the persona")
        if not result.has_coherent:
            messages.append("no setting of the sweep is coherent; one with the smallest coefficient was tested")
        if result.verdicts["follows"]["verdict"] == "no":
            messages.append(
                "the base model does not follow the persona's prompt: the vector is that of the prompt, not of the "
                "persona"
            )
        messages += [
            f"{s.name} is a weak scorer: it misses what is implied but not said" for s in self.scorers if s.is_weak
        ]
        share = result.token_counts["massive"] / max(1, result.token_counts["kept"] + result.token_counts["massive"])
        if share > MAX_MASSIVE_SHARE:
            messages.append(f"{share:.1%} of the response tokens have massive activations and were left out")


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
