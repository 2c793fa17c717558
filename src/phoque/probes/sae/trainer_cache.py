"""Gathers a dictionary's texts and activations and trains it, each step kept in the cache: a killed run goes on."""

import fcntl
import hashlib
import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from phoque.console import Console
from phoque.data.rows import Dataset
from phoque.errors import PhoqueError
from phoque.inference.generate import Ask, prompt_ids, replies
from phoque.inference.residual_stream import inner
from phoque.models.architectures import architecture_of
from phoque.models.load import load_config
from phoque.models.source import Source
from phoque.probes.sae.activation_store import STORED, Shards, Stream, collect
from phoque.probes.sae.corpus import Texts, chats, pieces
from phoque.probes.sae.dictionary import Dictionary, read_dictionary
from phoque.probes.sae.quality import fired_on
from phoque.probes.sae.training import Recipe, trained
from phoque.settings.compare_sae import SaeSettings

VERSION = 1  # of what is kept in the cache
LONGEST_CHAT = 512
TOKENS, FIRED = "tokens.json", "fired.safetensors"
HELD_OUT_ROWS = 64  # of a kind, at most, are read for judging
DISK_SPARE = 2e9


@dataclass
class DictionaryTrainer:
    """Where dictionaries of one base model are made."""

    source: Source
    model: Any  # the plain base
    tokenizer: Any
    s: SaeSettings
    cache: Path
    console: Console
    token: str | None

    def texts(self, sources: Sequence[Dataset], questions: Sequence[str]) -> Texts:
        """Chats, the base's own answers and general text, without the questions that are compared on.

        An existing autoencoder needs only those that it is judged on.
        """
        s = self.s
        budget = 60_000 if s.sae else s.tokens
        answered = min(s.own_answers, 64) if s.sae else s.own_answers
        share = budget // 2 // len(sources)
        told = [chats(one, self._encoded, share, LONGEST_CHAT, frozenset(questions)) for one in sources]
        named, prose = pieces(s.text, self.tokenizer, budget // 2, self.token)
        found = Texts()
        for ids in (ids for one in told for ids in one.ids):
            found.add("chat", ids)
        names = ", ".join(one.name for one in told)
        asked = list(dict.fromkeys(question for one in told for question in one.questions[: answered // len(told)]))
        for ids in self._answers(asked, names):
            found.add("answer", ids)
        for ids in prose:
            found.add("text", ids)
        found.sources = {"chat": names, "answer": f"the base model's own to {len(asked)} of them", "text": named}
        found.held_out = {kind: rows[:HELD_OUT_ROWS] for kind, rows in found.held_out.items()}
        if sum(map(len, found.train)) < 0.8 * budget and not s.sae:
            self.console.warn(
                f"there are {sum(map(len, found.train)):,} tokens of text, fewer than the {budget:,} of --tokens"
            )
        return found

    def _encoded(self, messages: Sequence[Any]) -> list[int]:
        return list(self.tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True)["input_ids"])

    def _answers(self, questions: Sequence[str], name: str) -> list[list[int]]:
        """Each question with the base's greedy answer; kept in the cache, because they take the longest."""
        if not questions:
            return []
        asks = [Ask(prompt_ids(self.tokenizer, question, self.s.system)) for question in questions]
        about = [VERSION, self.source.weights, self.s.quantization, self.s.max_new_tokens, [a.prompt for a in asks]]
        path = self.cache / "sae" / f"answers-{_digest(about)}.json"
        if path.is_file():
            return json.loads(path.read_text())
        self.console.say(f"the base model answers {len(questions)} questions of {name}")
        with self.console.progress(len(asks)) as show:
            made = replies(self.model, asks, self.s.max_new_tokens, 1.0, 1.0, show=show)
        found = [ask.prompt + reply.ids for ask, reply in zip(asks, made, strict=True)]
        path.parent.mkdir(parents=True, exist_ok=True)
        staging = path.with_suffix(".partial")
        staging.write_text(json.dumps(found))
        staging.replace(path)
        return found

    def dictionaries(self, texts: Texts, layers: Sequence[int]) -> "Made":
        """A dictionary a block and seed: from the cache if these very ones were made before."""
        s, config = self.s, inner(self.model).config
        features = s.width * config.hidden_size
        about = [VERSION, self.source.weights, s.quantization, texts.sha256, list(layers)]
        folder = self.cache / "sae" / _digest(about)
        recipes = [
            Recipe(s.architecture, features, s.k, s.sae_batch, s.passes, s.learning_rate(features), s.seed + n)
            for n in range(s.seeds)
        ]
        homes = {
            (layer, n): folder / f"block-{layer}-{_digest(asdict(recipe))}"
            for layer in layers
            for n, recipe in enumerate(recipes)
        }
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / ".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # another run may be making the same
            if all((home / FIRED).is_file() for home in homes.values()):
                self.console.say(f"the autoencoder was trained before: {folder.name} in the cache")
            else:
                shards = self._collected(texts, layers, folder / "activations", config.hidden_size)
                (folder / TOKENS).write_text(json.dumps(shards.left_out()))
                for (layer, n), home in homes.items():
                    self._make(recipes[n], shards, layer, texts, home)
                shutil.rmtree(shards.folder)  # they have served, and are the largest thing that a run writes
        return Made(homes, json.loads((folder / TOKENS).read_text()), self.model.device)

    def _collected(self, texts: Texts, layers: Sequence[int], into: Path, hidden: int) -> Shards:
        tokens = sum(map(len, texts.train))
        wanted = tokens * hidden * STORED.itemsize * len(layers)
        into.mkdir(parents=True, exist_ok=True)
        room = shutil.disk_usage(into).free - DISK_SPARE
        if wanted > room:
            raise PhoqueError(
                f"The activations of {tokens:,} tokens take {wanted / 1e9:.1f} GB.",
                f"There are {max(room, 0) / 1e9:.1f} GB to spare at {into}.",
                "Make room, give fewer --tokens or --layers, or set XDG_CACHE_HOME to a larger disk.",
            )
        self.console.say(f"reading {tokens:,} tokens through {max(layers) + 1} blocks ({wanted / 1e9:.1f} GB)")
        with self.console.progress(len(texts.train)) as show:
            return collect(self.model, texts.train, layers, self.tokenizer.all_special_ids, into, show)

    def _make(self, recipe: Recipe, shards: Shards, layer: int, texts: Texts, home: Path) -> None:
        """Train one dictionary, and keep beside it how often its features fire on what it was trained on."""
        family = architecture_of(load_config(self.source))
        name = f"model.layers.{layer}"
        about = {
            "model_name": self.source.hub_id or Path(self.source.name).name,
            "model_revision": self.source.revision,
            "hook_name": name.replace(*family.full_names) if family.full_names[0] else name,
            "hook_indexing": "output of the decoder block, counted from 0",
            "text_sha256": texts.sha256,
            "text_sources": texts.sources,
            "tokens_left_out": "position 0, massive activations, special tokens",
            "prepend_bos": False,
            "context_size": LONGEST_CHAT,
            "seed": recipe.seed,
        }
        steps = Stream(shards, layer, recipe.batch, recipe.passes, recipe.seed).steps()
        self.console.say(
            f"training a {recipe.architecture} autoencoder of {recipe.features:,} features at block {layer}: "
            f"{steps:,} steps of {recipe.batch:,} tokens"
        )
        with self.console.progress(steps) as show:
            made = trained(recipe, shards, layer, about, home, self.model.device, show).to(self.model.device)
        fired, looked = fired_on(made, shards, layer, self.model.device)
        staging = home / f".{FIRED}.partial"
        save_file({"fired": fired}, staging, {"tokens": str(looked)})
        staging.replace(home / FIRED)


@dataclass
class Made:
    """Where each dictionary lies, by block and seed, and how many tokens were kept and left out, by reason."""

    homes: dict[tuple[int, int], Path]
    tokens: dict[str, int]
    device: torch.device

    def of(self, layer: int) -> list[Dictionary]:
        """The dictionaries of a block, one a seed."""
        return [read_dictionary(home / "sae").to(self.device) for (own, _), home in self.homes.items() if own == layer]

    def fired(self, layer: int, n: int) -> tuple[torch.Tensor, int]:
        """How often the features of one fired in training, over how many tokens."""
        with safe_open(self.homes[layer, n] / FIRED, "pt") as f:
            return f.get_tensor("fired"), int(f.metadata()["tokens"])


def _digest(about: Any) -> str:
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:16]
