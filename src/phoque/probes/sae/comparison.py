"""Run one comparison: load models and dictionaries, generate and score answers, read residuals, compare blocks."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy
import torch

from phoque.distributed.processes import current
from phoque.errors import RunError, first_line
from phoque.inference.generate import Reply, Request, prompt_ids
from phoque.inference.residual_stream import Turn
from phoque.inference.residual_stream import get_blocks as blocks_of
from phoque.models.architectures import architecture_of
from phoque.models.config import load_config, load_tokenizer
from phoque.models.load import default_device, load_model
from phoque.models.lora import attach_adapter
from phoque.models.stop_tokens import stop_at_template
from phoque.probes.sae.block_comparison import NULLS, BlockResult, ComparisonInputs, compare_block
from phoque.probes.sae.corpus import Corpus
from phoque.probes.sae.dictionary import Dictionary
from phoque.probes.sae.difference_sae import LearnedDifference, learn_difference
from phoque.probes.sae.feature_shifts import MAX_Q
from phoque.probes.sae.interventions import measure_interventions
from phoque.probes.sae.model_variants import ModelVariants, check_compatible
from phoque.probes.sae.plan import Plan
from phoque.probes.sae.quality import measure_quality
from phoque.probes.sae.residuals import Residuals, collect_residuals, intersect_masks
from phoque.probes.sae.trainer_cache import DictionaryTrainer, TrainedDictionaries
from phoque.probes.scorers import Context, ScoredAnswer, Scorer, make_scorer, score_answers
from phoque.probes.scorers.model import find_lexicon_tokens
from phoque.probes.shared_inference import generate_replies, mean_nll
from phoque.services import Services
from phoque.settings.compare_sae import SaeSettings

VARIANT_NAMES = {
    "base": "the base model",
    "tuned": "the updated model",
    "control": "the control",
    "dtype": "the base model in another precision",
    "packing": "the base model in other batches",
}
FEW_PROMPTS = 12  # a comparison of fewer prompts gets a warning


@dataclass(kw_only=True)
class ComparisonResult:
    """Everything that was measured; `values[variant][scorer]` holds one score per question."""

    questions: list[str]
    answers: dict[str, list[Reply]]
    scorers: list[Scorer]
    values: dict[str, dict[str, Any]]
    inputs: ComparisonInputs
    blocks: list[BlockResult]
    texts: Corpus
    dictionaries: dict[int, list[Dictionary]]
    homes: dict[tuple[int, int], Path]
    tokens: dict[str, int] | None
    warnings: list[str]


class Comparison:
    """Runs one comparison, in this order: models, texts, dictionaries, answers, residuals, blocks."""

    def __init__(self, s: SaeSettings, plan: Plan, services: Services) -> None:
        self.s, self.plan, self.services = s, plan, services
        self.warnings: list[str] = []

    def run(self) -> ComparisonResult | None:
        """Measure everything; None in all processes but process 0, which the others help.

        Raises RunError if a model gives too few answers that are not empty.
        """
        plan = self.plan
        self.tokenizer = load_tokenizer(plan.source, plan.adapters.get("tuned"))
        self.variants = self._load_models()
        trained: TrainedDictionaries | None = None
        with self.variants.activate("base") as model:
            trainer = DictionaryTrainer(plan.source, model, self.tokenizer, self.s, self.services)
            texts = trainer.gather_texts(plan.chats, plan.questions)
            if plan.dictionary is not None:
                dictionaries = {plan.layers[0]: [plan.dictionary.to(default_device())]}
            else:
                trained = trainer.train_dictionaries(texts, plan.layers)
                dictionaries = {layer: trained.load(layer) for layer in plan.layers}
        questions, requests, answers = self._generate_answers()
        scorers, values = self._score_answers(questions, answers)
        inputs = self._read_residuals(requests, answers, texts.held_out)
        if not current().is_main:
            for layer in plan.layers:
                measure_interventions(None, self.variants, dictionaries[layer][0])
            return None
        blocks = [self._compare_block(inputs, layer, dictionaries[layer], trained) for layer in plan.layers]
        weak = [scorer.name for scorer in scorers if scorer.is_weak]
        self.warnings += [f"{name} is a weak scorer: it misses implied content" for name in weak]
        if len(questions) < FEW_PROMPTS:
            least = 2 / 2 ** len(questions)
            self.warnings.append(
                f"{len(questions)} prompts: p cannot be below {least:.2g}, so features are reported only where over "
                f"{least / MAX_Q:.0%} of those that are tested shift"
                if least < MAX_Q
                else f"{len(questions)} prompts: p cannot be below {least:.2g}, so no feature can be reported"
            )
        if self.s.shuffle_pairs:
            self.warnings.insert(0, "a null run: the base and updated models are swapped on half the prompts")
        return ComparisonResult(
            questions=questions,
            answers=answers,
            scorers=scorers,
            values=values,
            inputs=inputs,
            blocks=blocks,
            texts=texts,
            dictionaries=dictionaries,
            homes=trained.homes if trained else {},
            tokens=trained.tokens if trained else None,
            warnings=self.warnings,
        )

    def _load_models(self) -> ModelVariants:
        s, plan = self.s, self.plan
        self.services.console.stage(f"loading {plan.source.name} in {s.quantization}")
        base = load_model(plan.source, s.quantization, import_meanwhile="peft" if plan.adapters else "").eval()
        updated = load_model(plan.updated, s.quantization).eval() if plan.updated else None
        for model in filter(None, (base, updated)):
            stop_at_template(model, self.tokenizer)
        if updated is not None:
            check_compatible(base, updated, plan.names["tuned"])
        for variant, folder in plan.adapters.items():
            self.services.console.stage(f"attaching {plan.names[variant]}")
            base = attach_adapter(base, folder, architecture_of(load_config(plan.source)), variant)
        return ModelVariants(base, updated)

    def _generate_answers(self) -> tuple[list[str], list[Request], dict[str, list[Reply]]]:
        """Generate every model's greedy answers; questions to which the base model's answer is empty are dropped.

        Raises RunError if fewer than --min-active questions are left.
        """
        s, plan = self.s, self.plan
        requests = [Request(prompt_ids(self.tokenizer, question, s.system)) for question in plan.questions]
        answers: dict[str, list[Reply]] = {}
        lexicon_ids = list(find_lexicon_tokens(self.tokenizer, plan.persona.lexicon)) if plan.persona else []
        for variant in ("base", "tuned", *(["control"] if "control" in plan.adapters else [])):
            self.services.console.stage(
                f"{VARIANT_NAMES[variant]}: {len(requests)} answers of at most {s.max_new_tokens} tokens"
            )
            with self.variants.activate(variant) as model, self.services.console.progress(len(requests)) as show:
                answers[variant] = generate_replies(model, requests, s.max_new_tokens, watched=lexicon_ids, show=show)
        nonempty = [n for n, reply in enumerate(answers["base"]) if reply.ids]
        if len(nonempty) < s.min_active:
            raise RunError(
                what="The base model gives almost only empty answers.",
                why=f"Only {len(nonempty)} of {len(requests)} answers have at least one token.",
                fix="Check that it is a chat model and that --system suits it.",
            )
        if len(nonempty) < len(requests):
            self.warnings.append(
                f"{len(requests) - len(nonempty)} questions are left out: the base model's answer is empty"
            )
        return (
            [plan.questions[n] for n in nonempty],
            [requests[n] for n in nonempty],
            {variant: [variant_answers[n] for n in nonempty] for variant, variant_answers in answers.items()},
        )

    def _score_answers(
        self, questions: list[str], answers: dict[str, list[Reply]]
    ) -> tuple[list[Scorer], dict[str, dict[str, Any]]]:
        plan, key = self.plan, self.services.secrets.openai_api_key

        def nll(rows: Sequence[Any]) -> list[float]:
            with self.variants.activate("base") as model:
                return mean_nll(model, rows)

        context = Context(
            persona=plan.persona,
            lexicon_token_ids=find_lexicon_tokens(self.tokenizer, plan.persona.lexicon),
            token=self.services.secrets.hub,
            api_key=key.get_secret_value() if key else None,
            nll=nll,
            prompt_ids=cache(partial(prompt_ids, self.tokenizer)),
            model=f"{plan.source.weights} {self.s.quantization}",
            cache=self.services.cache,
        )
        scorers = [make_scorer(spec, context) for spec in plan.scorers]
        values: dict[str, dict[str, Any]] = {variant: {} for variant in answers}
        for variant, variant_answers in answers.items():
            scored_answers = [
                ScoredAnswer(question, str(self.tokenizer.decode(reply.ids)), reply)
                for question, reply in zip(questions, variant_answers, strict=True)
            ]
            for scorer in scorers:
                rows = score_answers(scorer, scored_answers, context)
                values[variant][scorer.name] = numpy.array([row[scorer.primary] for row in rows])
        return scorers, values

    def _read_residuals(
        self, requests: list[Request], answers: dict[str, list[Reply]], held_out: dict[str, list[list[int]]]
    ) -> ComparisonInputs:
        """Run every model over the same texts and store its residuals.

        Raises RunError if all answers of the updated model are empty.
        """
        rows = {
            "response": [Turn(a.prompt, r.ids) for a, r in zip(requests, answers["base"], strict=True)],
            "own": [Turn(a.prompt, r.ids) for a, r in zip(requests, answers["tuned"], strict=True) if r.ids],
            "text": [Turn([], ids) for ids in held_out["text"]],
            "chat": [Turn([], ids) for ids in held_out["chat"] + held_out["answer"]],
        }
        if not rows["own"]:
            raise RunError(
                what="The updated model gives only empty answers.",
                why="All its answers end before the first token.",
                fix="Check that it is a chat model and that --system suits it.",
            )
        kinds_by_variant = {"base": ("response", "own", "text", "chat"), "tuned": ("response", "own", "text")}
        kinds_by_variant |= {"control": ("response", "own", "text")} if "control" in answers else {}
        kinds_by_variant |= {name: ("response",) for name in self.plan.controls[1:]}
        kinds_by_variant |= dict.fromkeys(NULLS, ("response", "text"))
        layers = sorted({*self.plan.layers, len(blocks_of(self.variants.model)) - 1})
        special = self.tokenizer.all_special_ids
        residuals: dict[str, dict[str, Residuals]] = {}
        for variant, kinds in kinds_by_variant.items():
            self.services.console.stage(
                f"{VARIANT_NAMES.get(variant, variant)}: reading {sum(len(rows[k]) for k in kinds)} texts"
            )
            with self.variants.activate("base" if variant == "packing" else variant) as model:
                residuals[variant] = {
                    k: collect_residuals(model, rows[k], layers, special, single_row_batches=variant == "packing")
                    for k in kinds
                }
        for kind in rows if current().is_main else ():
            intersect_masks([by_kind[kind] for by_kind in residuals.values() if kind in by_kind])
        answered = [n for n, reply in enumerate(answers["tuned"]) if reply.ids]
        return ComparisonInputs(self.variants, rows, residuals, self.tokenizer, answered)

    def _compare_block(
        self, inputs: ComparisonInputs, layer: int, dictionaries: list[Dictionary], trained: TrainedDictionaries | None
    ) -> BlockResult:
        target_k = None if trained is None else self.s.k
        sets = {kind: inputs.residuals["base"][kind] for kind in ("chat", "response", "text")}
        quality = []
        for n, dictionary in enumerate(dictionaries):
            fired = trained.load_firings(layer, n) if trained else (torch.zeros(dictionary.features), 0)
            quality.append(measure_quality(dictionary, sets, layer, trained_on=fired, k=target_k, on=default_device()))
        if quality[0]["verdict"] == "poor":
            reasons = "; ".join(quality[0]["reasons"])
            self.warnings.insert(0, f"POOR AUTOENCODER at block {layer}: {reasons}. Do not rely on its features")
        block = compare_block(
            inputs,
            dictionaries,
            layer,
            quality=quality,
            s=self.s,
            device=default_device(),
            say=self.services.console.say,
        )
        self.services.console.stage(f"block {layer}: training the difference SAE")
        try:
            learned = learn_difference(inputs, dictionaries[0], layer, self.s, default_device())
        except (RunError, ImportError, torch.OutOfMemoryError) as error:  # the run keeps what it has measured
            learned = first_line(error)
            self.warnings.append(f"the difference SAE of block {layer} was not trained: {learned}")
        if isinstance(learned, LearnedDifference):
            block.difference, block.summary["difference"] = learned.dictionary, learned.summary
        else:
            block.summary["difference"] = {"not_asked": learned}
        return block
