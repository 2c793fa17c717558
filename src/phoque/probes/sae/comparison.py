"""One comparison from loaded models to measured blocks: answers, texts, dictionaries, and what both models hold."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import torch

from phoque.console import Console
from phoque.errors import FAILED, PhoqueError
from phoque.inference.generate import Ask, Reply, prompt_ids, replies
from phoque.inference.likelihood import mean_nll
from phoque.inference.residual_stream import Turn
from phoque.inference.residual_stream import blocks as blocks_of
from phoque.models.architectures import architecture_of
from phoque.models.load import device, load_config, load_model, load_tokenizer
from phoque.models.lora import attach_adapter
from phoque.probes.sae.block_comparison import NULLS, Audit, Block, measured
from phoque.probes.sae.corpus import Texts
from phoque.probes.sae.dictionary import Dictionary
from phoque.probes.sae.model_variants import ModelVariants, refuse_strangers
from phoque.probes.sae.plan import Plan
from phoque.probes.sae.quality import judged
from phoque.probes.sae.residuals import Heard, agree, heard
from phoque.probes.sae.trainer_cache import DictionaryTrainer, Made
from phoque.probes.scorers import Context, ScoredAnswer, Scorer, scorer_for, scores
from phoque.probes.scorers.model import lexicon_tokens
from phoque.settings.compare_sae import SaeSettings
from phoque.settings.fields import Resolved

NAMES = {
    "base": "the base model",
    "tuned": "the updated model",
    "control": "the control",
    "dtype": "the base in other precision",
    "packing": "the base in other batches",
}
FEW = 12  # prompts


@dataclass
class Found:
    """All that was measured; `values[side][scorer]` is a number a question."""

    questions: list[str]
    said: dict[str, list[Reply]]
    scorers: list[Scorer]
    values: dict[str, dict[str, Any]]
    audit: Audit
    blocks: list[Block]
    texts: Texts
    dictionaries: dict[int, list[Dictionary]]
    homes: dict[tuple[int, int], Path]
    tokens: dict[str, int] | None
    warnings: list[str]


class Comparison:
    """Runs one comparison, in order: models, texts, dictionaries, answers, readings, blocks."""

    def __init__(self, resolved: Resolved[SaeSettings], plan: Plan, cache: Path, console: Console) -> None:
        self.s, self.secrets, self.plan = resolved.settings, resolved.secrets, plan
        self.cache, self.console = cache, console
        self.warnings: list[str] = []

    def run(self) -> Found:
        """Everything that is measured."""
        plan = self.plan
        self.tokenizer = load_tokenizer(plan.source)
        self.sides = self._loaded()
        made: Made | None = None
        with self.sides.on("base") as model:
            workshop = DictionaryTrainer(
                plan.source, model, self.tokenizer, self.s, self.cache, self.console, self.secrets.hub
            )
            texts = workshop.texts(plan.chats, plan.questions)
            if plan.given is not None:
                dictionaries = {plan.layers[0]: [plan.given.to(device())]}
            else:
                made = workshop.dictionaries(texts, plan.layers)
                dictionaries = {layer: made.of(layer) for layer in plan.layers}
        questions, asks, said = self._answered()
        scorers, values = self._scored(questions, said)
        audit = self._audit(asks, said, texts.held_out)
        blocks = [self._block(audit, layer, dictionaries[layer], made) for layer in plan.layers]
        weak = [one.name for one in scorers if one.weak]
        self.warnings += [f"{name} is a weak scorer: it misses what is only implied" for name in weak]
        if len(questions) < FEW:
            self.warnings.append(f"{len(questions)} prompts: only large shifts can be found")
        if self.s.shuffle_pairs:
            self.warnings.insert(0, "a null run: base and updated are swapped on half the prompts")
        return Found(
            questions,
            said,
            scorers,
            values,
            audit,
            blocks,
            texts,
            dictionaries,
            made.homes if made else {},
            made.tokens if made else None,
            self.warnings,
        )

    def _loaded(self) -> ModelVariants:
        s, plan = self.s, self.plan
        base = load_model(plan.source, s.quantization).eval()
        updated = load_model(plan.updated, s.quantization).eval() if plan.updated else None
        if updated is not None:
            refuse_strangers(base, updated, plan.names["tuned"])
        for side, folder in plan.adapters.items():
            base = attach_adapter(base, folder, architecture_of(load_config(plan.source)), side)
        return ModelVariants(base, updated)

    def _answered(self) -> tuple[list[str], list[Ask], dict[str, list[Reply]]]:
        """Greedy answers of every model to the questions; questions that the base leaves empty are dropped."""
        s, plan = self.s, self.plan
        asks = [Ask(prompt_ids(self.tokenizer, question, s.system)) for question in plan.questions]
        said: dict[str, list[Reply]] = {}
        watched = list(lexicon_tokens(self.tokenizer, plan.persona.lexicon)) if plan.persona else []
        for side in ("base", "tuned", *(["control"] if "control" in plan.adapters else [])):
            self.console.say(f"{NAMES[side]}: {len(asks)} answers of at most {s.max_new_tokens} tokens")
            with self.sides.on(side) as model, self.console.progress(len(asks)) as show:
                said[side] = replies(model, asks, s.max_new_tokens, 1.0, 1.0, watched, show=show)
        kept = [n for n, reply in enumerate(said["base"]) if reply.ids]
        if len(kept) < s.min_active:
            raise PhoqueError(
                "The base model answers next to nothing.",
                f"Only {len(kept)} of {len(asks)} answers hold a token.",
                "Check that it is a chat model and that --system suits it.",
                FAILED,
            )
        if len(kept) < len(asks):
            self.warnings.append(f"{len(asks) - len(kept)} questions got an empty answer from the base: left out")
        return (
            [plan.questions[n] for n in kept],
            [asks[n] for n in kept],
            {side: [own[n] for n in kept] for side, own in said.items()},
        )

    def _scored(
        self, questions: list[str], said: dict[str, list[Reply]]
    ) -> tuple[list[Scorer], dict[str, dict[str, Any]]]:
        plan, key = self.plan, self.secrets.openai_api_key

        def nll(rows: Sequence[Any]) -> list[float]:
            with self.sides.on("base") as model:
                return mean_nll(model, rows)

        context = Context(
            persona=plan.persona,
            watched=lexicon_tokens(self.tokenizer, plan.persona.lexicon),
            token=self.secrets.hub,
            api_key=key.get_secret_value() if key else None,
            nll=nll,
            prompt_ids=lambda question, system: prompt_ids(self.tokenizer, question, system),
            model=f"{plan.source.weights} {self.s.quantization}",
            cache=self.cache,
        )
        scorers = [scorer_for(spec, context) for spec in plan.scorers]
        values: dict[str, dict[str, Any]] = {side: {} for side in said}
        for side, own in said.items():
            spoken = [ScoredAnswer(q, self.tokenizer.decode(r.ids), r) for q, r in zip(questions, own, strict=True)]
            for scorer in scorers:
                found = scores(scorer, spoken, context)
                values[side][scorer.name] = numpy.array([row[scorer.primary] for row in found])
        return scorers, values

    def _audit(self, asks: list[Ask], said: dict[str, list[Reply]], held_out: dict[str, list[list[int]]]) -> Audit:
        """Every model reads the same texts."""
        rows = {
            "response": [Turn(a.prompt, r.ids) for a, r in zip(asks, said["base"], strict=True)],
            "own": [Turn(a.prompt, r.ids) for a, r in zip(asks, said["tuned"], strict=True) if r.ids],
            "text": [Turn([], ids) for ids in held_out["text"]],
            "chat": [Turn([], ids) for ids in held_out["chat"] + held_out["answer"]],
        }
        if not rows["own"]:
            raise PhoqueError(
                "The updated model answers nothing.",
                "Every answer of it is empty.",
                "Compare a model that speaks.",
                FAILED,
            )
        wanted = {"base": ("response", "own", "text", "chat"), "tuned": ("response", "own", "text")}
        wanted |= {"control": ("response", "own", "text")} if "control" in said else {}
        wanted |= dict.fromkeys(NULLS, ("response", "text"))
        kept = sorted({*self.plan.layers, len(blocks_of(self.sides.model)) - 1})
        special = self.tokenizer.all_special_ids
        found: dict[str, dict[str, Heard]] = {}
        for side, kinds in wanted.items():
            self.console.say(f"{NAMES[side]}: reading {sum(len(rows[k]) for k in kinds)} texts")
            with self.sides.on("base" if side == "packing" else side) as model:
                found[side] = {k: heard(model, rows[k], kept, special, alone=side == "packing") for k in kinds}
        for kind in rows:
            agree([held[kind] for held in found.values() if kind in held])
        return Audit(self.sides, rows, found, self.tokenizer)

    def _block(self, audit: Audit, layer: int, own: list[Dictionary], made: Made | None) -> Block:
        k = None if made is None else self.s.k
        sets = {kind: audit.heard["base"][kind] for kind in ("chat", "response", "text")}
        quality = []
        for n, dictionary in enumerate(own):
            fired = made.fired(layer, n) if made else (torch.zeros(dictionary.features), 0)
            quality.append(judged(dictionary, sets, layer, fired, k, device()))
        if quality[0]["verdict"] == "poor":
            reasons = "; ".join(quality[0]["reasons"])
            self.warnings.insert(
                0, f"POOR AUTOENCODER at block {layer}: {reasons}. What it says of features is not to be relied on"
            )
        return measured(audit, own, layer, quality, self.s, device(), self.console.say)
