"""The measurements of a probe in their order: the base model first, then each adapter."""

from dataclasses import dataclass, field
from typing import Any

from phoque.probes import stats
from phoque.probes.persona import SYSTEMS
from phoque.probes.persona_vectors import evidence as ev
from phoque.probes.persona_vectors.model import Answer, ProbeModel, Residuals
from phoque.probes.persona_vectors.steering import Row, Setting, Steerer, agreement, contrasts, summaries
from phoque.probes.persona_vectors.verdicts import LEAST_QUESTIONS, verdicts
from phoque.probes.scorers import Context, Scorer

MANY_MASSIVE = 0.02  # of the response tokens: then a user should know

Shifts = dict[str, tuple[dict[str, Any], Any]]  # own or same text -> arrays a block, and bootstrap samples


@dataclass
class Found:
    """All that was measured. `layers`, `sweep` and `answers` become tables, the rest a summary."""

    vectors: ev.Vectors
    layers: list[dict[str, Any]]
    sweep: list[dict[str, Any]]
    chosen: Setting
    coherent: bool  # whether any setting of the sweep was
    answers: list[Row]
    columns: dict[str, str]  # scorer -> column; the first is the trait
    conditions: dict[str, Any] = field(default_factory=dict)
    contrasts: dict[str, Any] = field(default_factory=dict)
    agreement: dict[str, float | None] = field(default_factory=dict)
    moved: dict[str, Any] = field(default_factory=dict)  # adapter -> own or same text -> over the steered blocks
    verdicts: dict[str, Any] = field(default_factory=dict)
    tokens: dict[str, int] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)

    @property
    def trait(self) -> str:
        """The scorer that counts."""
        return next(iter(self.columns))


class Probe:
    """Runs a lab through the questions; `layers` are the blocks that are steered."""

    def __init__(self, lab: ProbeModel, scorers: list[Scorer], context: Context, layers: list[int]) -> None:
        self.lab, self.scorers, self.context, self.layers = lab, scorers, context, layers
        self.s, self.persona = lab.s, lab.persona

    def run(self, adapters: list[str]) -> Found:
        """Measure the base model, and the model with each of these adapters."""
        lab, seed = self.lab, self.s.seed
        with lab.base():
            extraction, heldout, neutral = self._read()
            if self.s.shuffle_labels:
                ev.swapped(extraction, seed)
                ev.swapped(heldout, seed + 1)
            vectors = ev.vectors(extraction, seed)
            lab.console.say("evidence on held-out questions")
            rows = ev.evidence(vectors, extraction, heldout, seed)
            steerer = Steerer(lab, vectors, self.scorers, self.context)
            sweep, chosen, coherent = steerer.sweep(self.layers)
            answers = steerer.test(chosen)
        shifts: dict[str, Shifts] = {}
        for name in adapters:
            with lab.tuned(name):
                shifts[name] = self._shift(vectors, heldout, neutral, name)
                answers += steerer.test(chosen, [name])
        with lab.base():
            steerer.measure(answers)
        found = Found(vectors, rows, sweep, chosen, coherent, answers, steerer.columns)
        found.tokens = {"kept": sum(extraction.kept), "massive": sum(extraction.massive)}
        self._judge(found, steerer, shifts)
        self._warn(found)
        return found

    def _read(self) -> tuple[Residuals, Residuals, list[Answer]]:
        questions = {"extraction": self.persona.extraction, "heldout": self.persona.heldout}
        spoken = self.lab.answers(questions, SYSTEMS, "vectors and evidence")
        self.lab.console.say("reading them block by block")
        extraction = self.lab.residuals(spoken["extraction"], len(self.persona.extraction))
        neutral = [a for a in spoken["heldout"] if a.condition == "neutral"]
        persona = [a for a in spoken["heldout"] if a.condition == "persona"]
        texts = self.lab.under(persona, self.persona.heldout, "neutral", "text_persona")
        heldout = self.lab.residuals(spoken["heldout"] + texts, len(self.persona.heldout))
        for name in ("text_neutral", "before"):  # of their own: a null run swaps the first
            heldout.of[name] = {way: values.copy() for way, values in heldout.of["neutral"].items()}
        return extraction, heldout, neutral

    def _shift(self, found: ev.Vectors, heldout: Residuals, neutral: list[Answer], name: str) -> Shifts:
        """The move in the model's own answers, and over the base model's answers, which the fine-tune only reads."""
        count = len(self.persona.heldout)
        own = self.lab.answers({"heldout": self.persona.heldout}, ["neutral"], f"{name} model")["heldout"]
        before = heldout.pair("before")
        return {
            kind: ev.shift(found, before, self.lab.residuals(answers, count).pair("neutral"), self.layers, self.s.seed)
            for kind, answers in (("own", own), ("same_text", neutral))
        }

    def _judge(self, found: Found, steerer: Steerer, shifts: dict[str, Shifts]) -> None:
        """Fill in what follows from the numbers: conditions, contrasts, the fine-tune's move, verdicts."""
        seed = self.s.seed
        found.conditions = summaries(found.answers, seed)
        found.contrasts = contrasts(found.answers, steerer.columns, seed)
        found.agreement = agreement(found.answers, steerer.columns)
        found.moved = {
            name: {kind: {k: float(v[-1]) for k, v in values.items()} for kind, (values, _) in kinds.items()}
            for name, kinds in shifts.items()
        }
        for row in found.layers:
            for name, kinds in shifts.items():
                for kind, (values, _) in kinds.items():
                    if row["extraction"] == "response_avg":
                        row |= _shift_columns(name, kind, values, row["layer"])
        lead = None
        if "control" in shifts:
            samples = [shifts[name]["own"][1][:, -1] for name in ("tuned", "control")]
            low, high = stats.interval(samples[0] - samples[1])  # resampled together
            lead = float(low), float(high)
        means = {c: {k: v["mean"] for k, v in values.items()} for c, values in found.conditions.items()}
        steered, neutral = means["neutral_plus_vector"], means["neutral"]
        at = next(r for r in found.layers if (r["layer"], r["extraction"]) == (found.chosen.layer, "response_avg"))
        found.verdicts = verdicts(
            at,
            found.contrasts,
            steerer.flaws(steered, neutral),
            steered["nll_base"] - neutral["nll_base"],
            found.trait,
            found.moved.get("tuned", {}).get("own"),
            lead,
        )

    def _warn(self, found: Found) -> None:
        """Say what a reader should know before the verdicts."""
        said = found.warnings
        if self.s.shuffle_labels:
            said.append("a null run: the labels of half the pairs are swapped, and nothing here is about the persona")
        if not found.coherent:
            said.append("no setting of the sweep stayed coherent; the gentlest was tested")
        if found.contrasts["persona-neutral"][found.trait]["ci95"][0] <= 0:
            said.append("the model does not follow the persona's prompt: its vector is of the prompt, not the persona")
        said += [f"{s.name} is a weak scorer: it misses what is only implied" for s in self.scorers if s.weak]
        share = found.tokens["massive"] / max(1, found.tokens["kept"] + found.tokens["massive"])
        if share > MANY_MASSIVE:
            said.append(f"{share:.1%} of the response tokens are massive and were left out")
        if min(len(self.persona.test), len(self.persona.heldout)) < LEAST_QUESTIONS:
            said.append(f"fewer than {LEAST_QUESTIONS} questions: some verdicts cannot be given")


def _shift_columns(name: str, kind: str, values: dict[str, Any], layer: int) -> dict[str, float]:
    head = f"{name}_shift" if kind == "own" else f"{name}_same_text"
    shown = {
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
    return {f"{head}_{column}": float(values[key][layer]) for column, key in shown.items()}
