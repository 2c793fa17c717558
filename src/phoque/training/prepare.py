"""What a run needs before a weight is loaded: the base model's config and chat template, the data, the repository."""

from dataclasses import dataclass
from functools import partial
from typing import Any

from phoque.data.chat_template import ChatTemplate
from phoque.data.packing import Packing
from phoque.data.readers import Dataset, open_dataset
from phoque.data.scan import DatasetScan, scan_dataset
from phoque.errors import UsageError
from phoque.hub.repo import Repo
from phoque.models.config import load_config, load_tokenizer, max_conversation_tokens
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
    if s.eval_split == s.split:
        raise UsageError(
            what=f"--eval-split and --split are both {s.split}.",
            why="A held-out loss is measured on rows that are not trained on.",
            fix="Give another --eval-split, or leave it out.",
        )
    open_split = partial(
        open_dataset, s.dataset, revision=s.dataset_revision, hub=services.hub, config=s.dataset_config
    )
    dataset = open_split(split=s.split)
    source = find_model(s.base_model, s.revision, services, weights=weights)
    config = load_config(source)
    limit, reason = max_conversation_tokens(config)
    if limit is not None and s.max_length > limit:
        raise UsageError(
            what=f"--max-length {s.max_length} is more than {source.name} can use.",
            why=f"{reason[0].upper()}{reason[1:]}.",
            fix=f"Use --max-length {limit} or less.",
        )
    chat = ChatTemplate(load_tokenizer(source), s.default_system, s.max_length, train_greeting=s.greeting == "train")
    evaluation = open_split(split=s.eval_split) if s.eval_split else None
    scan = scan_dataset(dataset, chat, s.held_out_rows, s.max_bad_rows, evaluation=evaluation)
    return Prepared(source, config, chat, dataset, scan)


def packing_for(s: TrainSettings, scan: DatasetScan, static: bool) -> Packing:
    """How conversations are packed into rows; `static` rows all have one shape, or one of a few."""
    longest = max(scan.lengths) if scan.complete else s.max_length
    return Packing(s.batch_size // s.accumulation, scan.mean_length, longest, s.packing == "exact", static)


def rows_per_step(s: TrainSettings, packing: Packing) -> int:
    """Packed rows that one optimizer step trains on: as many as hold --batch-size conversations of mean length.

    --micro-batch sets how many rows that is, unless the longest conversation makes each row larger than its share.
    """
    if packing.exact:
        return s.accumulation
    return max(1, min(s.accumulation, round(s.batch_size * packing.mean / packing.tokens)))


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
