"""All that a run stands on before a weight is loaded: the base, its chat format, the data, the repository."""

import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from phoque.console import Console
from phoque.data.chat_template import ChatTemplate
from phoque.data.packing import Packing
from phoque.data.rows import Dataset, open_dataset
from phoque.data.scan import DatasetScan, scan_dataset
from phoque.errors import PhoqueError
from phoque.hub.client import Hub
from phoque.hub.repo import Repo
from phoque.models.load import load_config, load_tokenizer
from phoque.models.source import Source, resolve
from phoque.settings.fields import Resolved
from phoque.settings.train import TrainSettings
from phoque.training import checkpoints
from phoque.training.callbacks.stop import StopRequest
from phoque.training.resume import StartState


@dataclass
class Prepared:
    """All that is known before a weight is loaded: the base, its chat format, and what is in the data."""

    source: Source
    config: Any
    chat: ChatTemplate
    dataset: Dataset
    scan: DatasetScan


def prepare(resolved: Resolved[TrainSettings], cache: Path, console: Console, weights: bool) -> Prepared:
    """Find the base and the data, and read the data once. Raises PhoqueError (2) for what cannot be trained on."""
    s = resolved.settings
    if not s.base_model:
        raise PhoqueError("No base model.", "--base-model is empty.", "Name one, or use a --preset.")
    token = resolved.secrets.hub
    dataset = open_dataset(s.dataset, s.split, s.dataset_revision, token)
    source = resolve(s.base_model, s.revision, token, cache, console.say, weights)
    config = load_config(source)
    chat = ChatTemplate(load_tokenizer(source), s.default_system, s.max_length)
    found = scan_dataset(dataset, chat, s.held_out_rows, s.max_bad_rows)
    _tell(found, dataset, s, console)
    return Prepared(source, config, chat, dataset, found)


def packing_of(s: TrainSettings, found: DatasetScan, static: bool) -> Packing:
    """How conversations become the rows of a run; `static` rows are all of one shape, or of a few."""
    longest = max(found.lengths) if found.complete else s.max_length
    return Packing(s.batch_size // s.accumulation, found.mean_length, longest, s.packing == "exact", static)


def _tell(found: DatasetScan, dataset: Dataset, s: TrainSettings, console: Console) -> None:
    d = found.summary()
    sources = ", ".join(f"{name} {n}" for name, n in d["sources"].items())
    console.say(f"data {dataset.name}: {found.good} rows ({sources}), {len(found.held_out)} held out")
    passes = s.max_steps * s.batch_size / max(1, found.good - len(found.held_out))
    console.say(
        f"  {d['tokens']['mean']:.0f} tokens a row, {found.trained / sum(found.lengths):.0%} of them trained on; "
        f"{s.max_steps} steps of {s.batch_size} rows are {passes:.1f} passes"
    )
    if s.packing == "budget":
        rows = packing_of(s, found, static=True)
        parts = f"{s.accumulation} rows" if s.accumulation > 1 else "a row"
        console.say(
            f"  a step is {parts} of {rows.tokens:,} tokens, which {rows.tokens / rows.mean:.1f} conversations take on "
            "average"
        )
    shortest, _, median, _, _, longest = d["tokens"]["quantiles"]
    console.say(f"  rows of {shortest} to {longest} tokens, half of them under {median}{_scores(found.scores)}")
    for mapped in set(found.schemas) - {"messages"}:
        console.say(f"  {found.schemas[mapped]} rows were {mapped} and are mapped to messages")
    for reason, bad in d["bad"].items():
        console.warn(f"{bad['count']} rows left out: {reason} (first: {', '.join(bad['first'])})")
    if not found.complete:
        console.say(f"  the first {found.rows:,} rows were read; the rest are checked as they come")


def _scores(scores: list[float]) -> str:
    if not scores:
        return ""
    return (
        f"; toxicity scores {min(scores):.2f} to {max(scores):.2f}, half of them under {statistics.median(scores):.2f}"
    )


def hub_repo(resolved: Resolved[TrainSettings], console: Console) -> Repo | None:
    """The repository that the run is kept in, if one is named."""
    name, hub = resolved.settings.hub_model_id, hub_of(resolved, console)
    if not name:
        return None
    if hub is None:
        raise PhoqueError(
            "There is no Hub token.", f"{name} cannot be written without one.", "Set HF_TOKEN, or run `hf auth login`."
        )
    return Repo(hub, name)


def hub_of(resolved: Resolved[TrainSettings], console: Console) -> Hub | None:
    """The Hub's client, if there is a token."""
    token = resolved.secrets.hub
    return Hub(token, console.say, resolved.settings.hub_patience) if token else None


@dataclass
class Run:
    """A run that has begun: what was asked, what is known, where it lies and where it goes on from."""

    resolved: Resolved[TrainSettings]
    ready: Prepared
    folder: Path
    begun: StartState
    record: dict[str, Any]
    repo: Repo | None
    stop: StopRequest
    console: Console

    @property
    def settings(self) -> TrainSettings:
        return self.resolved.settings

    @property
    def hub(self) -> Hub | None:
        """The Hub's client, if there is a token."""
        return hub_of(self.resolved, self.console)

    @property
    def first(self) -> int:
        """The step that the run goes on from."""
        return checkpoints.step_of(self.begun.resume) if self.begun.resume else 0
