"""Gather texts and activations and train dictionaries; every stage is cached, so that a killed run can resume."""

import hashlib
import json
import shutil
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from phoque.data.readers import Dataset
from phoque.distributed.processes import current
from phoque.errors import UsageError
from phoque.files import atomic_file, lock, write_atomically
from phoque.inference.generate import Request, prompt_ids
from phoque.inference.residual_stream import unwrap_model
from phoque.models.architectures import architecture_of
from phoque.models.config import load_config
from phoque.models.source import Source
from phoque.probes.sae.activation_store import ACTIVATION_DTYPE, ActivationStore, ActivationStream, collect_activations
from phoque.probes.sae.corpus import Corpus, read_conversations, read_text_chunks
from phoque.probes.sae.dictionary import Dictionary, read_dictionary
from phoque.probes.sae.quality import count_firings
from phoque.probes.sae.training import Recipe, train_dictionary
from phoque.probes.shared_inference import generate_replies
from phoque.services import Services
from phoque.settings.compare_sae import SaeSettings

CACHE_VERSION = 1  # of the cache format
MAX_CHAT_TOKENS = 512
TOKENS_FILE, FIRINGS_FILE = "tokens.json", "fired.safetensors"
HELD_OUT_ROWS = 64  # at most, per kind of text, to measure quality on
DISK_RESERVE = 2e9  # bytes that stay free


@dataclass
class DictionaryTrainer:
    """Trains the dictionaries of one base model, or loads them from the cache."""

    source: Source
    model: Any  # the base model, adapters off
    tokenizer: Any
    s: SaeSettings
    services: Services

    def gather_texts(self, datasets: Sequence[Dataset], questions: Sequence[str]) -> Corpus:
        """Gather chats, the base model's own answers and general text, without chats that ask a compared question.

        With --sae only enough text to measure its quality is gathered.
        """
        s = self.s
        budget = 60_000 if s.sae else s.tokens
        answer_count = min(s.own_answers, 64) if s.sae else s.own_answers
        budget_per_source = budget // 2 // len(datasets)
        processes = current()
        chat_sets = processes.broadcast_from_main(
            lambda: [
                read_conversations(source, self._encode_chat, budget_per_source, MAX_CHAT_TOKENS, frozenset(questions))
                for source in datasets
            ]
        )
        text_name, text_rows = processes.broadcast_from_main(
            lambda: read_text_chunks(s.text, self.tokenizer, budget // 2, self.services.hub)
        )
        texts = Corpus()
        for ids in (ids for source in chat_sets for ids in source.ids):
            texts.add("chat", ids)
        chat_names = ", ".join(source.name for source in chat_sets)
        asked_questions = list(
            dict.fromkeys(
                question for source in chat_sets for question in source.questions[: answer_count // len(chat_sets)]
            )
        )
        for ids in self._answer_questions(asked_questions, chat_names):
            texts.add("answer", ids)
        for ids in text_rows:
            texts.add("text", ids)
        texts.sources = {
            "chat": chat_names,
            "answer": f"the base model's own answers to {len(asked_questions)} of their questions",
            "text": text_name,
        }
        texts.held_out = {kind: rows[:HELD_OUT_ROWS] for kind, rows in texts.held_out.items()}
        if sum(map(len, texts.train)) < 0.8 * budget and not s.sae:
            self.services.console.warn(
                f"only {sum(map(len, texts.train)):,} tokens of text are available; --tokens is {budget:,}"
            )
        return texts

    def _encode_chat(self, messages: Sequence[Any]) -> list[int]:
        return list(self.tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True)["input_ids"])

    def _answer_questions(self, questions: Sequence[str], source_name: str) -> list[list[int]]:
        """Answer each question greedily with the base model: rows of prompt and answer ids, cached."""
        if not questions:
            return []
        requests = [Request(prompt_ids(self.tokenizer, question, self.s.system)) for question in questions]
        key = [
            CACHE_VERSION,
            self.source.weights,
            self.s.quantization,
            self.s.max_new_tokens,
            [a.prompt for a in requests],
        ]
        path, processes = self.services.cache / "sae" / f"answers-{_hash_json(key)}.json", current()
        cached = processes.broadcast_from_main(lambda: json.loads(path.read_text()) if path.is_file() else None)
        if cached is not None:
            return cached
        self.services.console.stage(f"the base model answers {len(questions)} questions of {source_name}")
        with self.services.console.progress(len(requests)) as show:
            answers = generate_replies(self.model, requests, self.s.max_new_tokens, show=show)
        rows = [ask.prompt + reply.ids for ask, reply in zip(requests, answers, strict=True)]
        if processes.is_main:
            write_atomically(path, json.dumps(rows))
        return rows

    def train_dictionaries(self, texts: Corpus, layers: Sequence[int]) -> "TrainedDictionaries":
        """Train one dictionary per block and seed; those with the same inputs are taken from the cache.

        Of several processes, each trains some of them.
        """
        s, config = self.s, unwrap_model(self.model).config
        features = s.width * config.hidden_size
        key = [CACHE_VERSION, self.source.weights, s.quantization, texts.sha256, list(layers)]
        folder = self.services.cache / "sae" / _hash_json(key)
        recipes = [
            Recipe(s.architecture, features, s.k, s.sae_batch, s.passes, s.learning_rate(features), s.seed + n)
            for n in range(s.seeds)
        ]
        homes = {
            (layer, n): folder / f"block-{layer}-{_hash_json(asdict(recipe))}"
            for layer in layers
            for n, recipe in enumerate(recipes)
        }
        folder.mkdir(parents=True, exist_ok=True)
        processes = current()
        # another run may train the same dictionaries
        with lock(folder / ".lock") if processes.is_main else nullcontext():
            is_trained = lambda: all((home / FIRINGS_FILE).is_file() for home in homes.values())
            if processes.broadcast_from_main(is_trained):
                self.services.console.stage(f"the autoencoder was trained before; loading {folder.name} from the cache")
            else:
                shards = self._collect_activations(texts, layers, folder / "activations", config.hidden_size)
                if processes.is_main:
                    (folder / TOKENS_FILE).write_text(json.dumps(shards.token_counts()))
                for number, ((layer, n), home) in enumerate(homes.items()):
                    if number % processes.size == processes.rank:
                        self._train_one(recipes[n], shards, layer, texts, home)
                processes.wait_for_all()
                if processes.is_main:
                    shutil.rmtree(shards.folder)  # no longer needed, and the largest files of a run
        return TrainedDictionaries(homes, json.loads((folder / TOKENS_FILE).read_text()), self.model.device)

    def _collect_activations(self, texts: Corpus, layers: Sequence[int], target: Path, hidden: int) -> ActivationStore:
        tokens = sum(map(len, texts.train))
        size = tokens * hidden * ACTIVATION_DTYPE.itemsize * len(layers)
        target.mkdir(parents=True, exist_ok=True)

        def check_space() -> None:
            available = shutil.disk_usage(target).free - DISK_RESERVE
            if size > available:
                raise UsageError(
                    what=f"The activations of {tokens:,} tokens take {size / 1e9:.1f} GB.",
                    why=f"{target} has {max(available, 0) / 1e9:.1f} GB to spare.",
                    fix="Free disk space, lower --tokens, use fewer --blocks, or set XDG_CACHE_HOME to a larger disk.",
                )

        current().broadcast_from_main(check_space)
        self.services.console.stage(f"reading {tokens:,} tokens through {max(layers) + 1} blocks ({size / 1e9:.1f} GB)")
        with self.services.console.progress(len(texts.train)) as show:
            return collect_activations(
                self.model, texts.train, layers, special=self.tokenizer.all_special_ids, folder=target, show=show
            )

    def _train_one(self, recipe: Recipe, shards: ActivationStore, layer: int, texts: Corpus, home: Path) -> None:
        """Train one dictionary, and save how often its features fire on training tokens next to it."""
        arch = architecture_of(load_config(self.source))
        name = f"model.layers.{layer}"
        metadata = {
            "model_name": self.source.hub_id or Path(self.source.name).name,
            "model_revision": self.source.revision,
            "hook_name": name.replace(*arch.full_names) if arch.full_names[0] else name,
            "hook_indexing": "output of the decoder block, counted from 0",
            "text_sha256": texts.sha256,
            "text_sources": texts.sources,
            "tokens_left_out": "position 0, massive activations, special tokens",
            "prepend_bos": False,
            "context_size": MAX_CHAT_TOKENS,
            "seed": recipe.seed,
        }
        steps = ActivationStream(shards, layer, recipe.batch, recipe.passes, recipe.seed).count_batches()
        self.services.console.stage(
            f"training a {recipe.architecture} autoencoder of {recipe.features:,} features at block {layer}: "
            f"{steps:,} steps of {recipe.batch:,} tokens"
        )
        with self.services.console.progress(steps) as show:
            dictionary = train_dictionary(
                recipe, shards, layer, metadata=metadata, folder=home, on=self.model.device, show=show
            ).to(self.model.device)
        fired, tokens = count_firings(dictionary, shards, layer, self.model.device)
        with atomic_file(home / FIRINGS_FILE) as staging:
            save_file({"fired": fired}, staging, {"tokens": str(tokens)})


@dataclass
class TrainedDictionaries:
    """The folder of each dictionary by (block, seed number), and token counts: kept, and left out by reason."""

    homes: dict[tuple[int, int], Path]
    tokens: dict[str, int]
    device: torch.device

    def load(self, layer: int) -> list[Dictionary]:
        """Load the dictionaries of a block, one per seed."""
        return [
            read_dictionary(home / "sae").to(self.device) for (block, _), home in self.homes.items() if block == layer
        ]

    def load_firings(self, layer: int, n: int) -> tuple[torch.Tensor, int]:
        """Load how often each feature of one dictionary fired on training tokens, and the number of those tokens."""
        with safe_open(self.homes[layer, n] / FIRINGS_FILE, "pt") as f:
            return f.get_tensor("fired"), int(f.metadata()["tokens"])


def _hash_json(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]
