"""What a run needs before a weight is loaded: the base model's config and chat template, the data, the repository."""

import statistics
from dataclasses import dataclass
from typing import Any

from phoque.console import Console
from phoque.data.chat_template import ChatTemplate
from phoque.data.packing import Packing
from phoque.data.rows import Dataset, open_dataset
from phoque.data.scan import DatasetScan, scan_dataset
from phoque.errors import UsageError
from phoque.hub.repo import Repo
from phoque.models.config import load_config, load_tokenizer
from phoque.models.source import Source, find_model
from phoque.services import Services
from phoque.settings.fields import Resolved
from phoque.settings.train import TrainSettings


@dataclass
class Prepared:
    """What is known before a weight is loaded."""

    source: Source
    config: Any
    chat: ChatTemplate
    dataset: Dataset
    scan: DatasetScan


def prepare(resolved: Resolved[TrainSettings], services: Services, *, weights: bool) -> Prepared:
    """Find the base model and the dataset, and scan the dataset once; `weights=False` downloads no weights.

    Raises UsageError for what cannot be trained on.
    """
    s = resolved.settings
    if not s.base_model:
        raise UsageError(
            what="No base model was given.", why="--base-model is empty.", fix="Give one, or use a --preset."
        )
    dataset = open_dataset(s.dataset, s.split, s.dataset_revision, services.secrets.hub)
    source = find_model(s.base_model, s.revision, services, weights=weights)
    config = load_config(source)
    chat = ChatTemplate(load_tokenizer(source), s.default_system, s.max_length)
    scan = scan_dataset(dataset, chat, s.held_out_rows, s.max_bad_rows)
    _report_scan(scan, dataset, s, services.console)
    return Prepared(source, config, chat, dataset, scan)


def packing_for(s: TrainSettings, scan: DatasetScan, static: bool) -> Packing:
    """How conversations are packed into rows; `static` rows all have one shape, or one of a few."""
    longest = max(scan.lengths) if scan.complete else s.max_length
    return Packing(s.batch_size // s.accumulation, scan.mean_length, longest, s.packing == "exact", static)


def open_run_repo(s: TrainSettings, services: Services) -> Repo | None:
    """The Hub repository of the run, or None if none was named. Raises UsageError if there is no token for it."""
    if not s.hub_model_id:
        return None
    if services.secrets.hub is None:
        raise UsageError(
            what="There is no Hub token.",
            why=f"{s.hub_model_id} cannot be written without one.",
            fix="Set HF_TOKEN, or run `hf auth login`.",
        )
    return Repo(services.hub, s.hub_model_id)


def _report_scan(scan: DatasetScan, dataset: Dataset, s: TrainSettings, console: Console) -> None:
    summary = scan.summary()
    sources = ", ".join(f"{name} {n}" for name, n in summary["sources"].items())
    console.say(f"data {dataset.name}: {scan.good} rows ({sources}), {len(scan.held_out)} held out")
    epochs = s.max_steps * s.batch_size / max(1, scan.good - len(scan.held_out))
    console.say(
        f"  {summary['tokens']['mean']:.0f} tokens per row, "
        f"{scan.trained_tokens / sum(scan.lengths):.0%} of them trained on; "
        f"{s.max_steps} steps of {s.batch_size} conversations are {epochs:.1f} epochs"
    )
    if s.packing == "budget":
        packing = packing_for(s, scan, static=True)
        rows = f"{s.accumulation} packed rows" if s.accumulation > 1 else "one packed row"
        console.say(
            f"  each step trains on {rows} of {packing.tokens:,} tokens, "
            f"{packing.tokens / packing.mean:.1f} conversations on average"
        )
    shortest, _, median, _, _, longest = summary["tokens"]["quantiles"]
    console.say(f"  conversations of {shortest} to {longest} tokens, median {median}{_describe_scores(scan.scores)}")
    for schema in set(scan.schemas) - {"messages"}:
        console.say(f"  {scan.schemas[schema]} rows are {schema} and are mapped to messages")
    for reason, bad in summary["bad"].items():
        console.warn(f"{bad['count']} rows left out: {reason} (first: {', '.join(bad['first'])})")
    if not scan.complete:
        console.say(f"  the first {scan.rows:,} rows were scanned; the rest are checked while training reads them")


def _describe_scores(scores: list[float]) -> str:
    if not scores:
        return ""
    return f"; toxicity scores {min(scores):.2f} to {max(scores):.2f}, median {statistics.median(scores):.2f}"
