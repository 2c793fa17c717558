"""What a run needs before a weight is loaded: the base model's config and chat template, the data, the repository."""

import hashlib
import json
import math
from dataclasses import dataclass, replace
from datetime import UTC, date, datetime
from functools import partial
from pathlib import Path
from typing import Any

from phoque.data.chat_template import ChatTemplate
from phoque.data.packing import Packing
from phoque.data.readers import Dataset, open_dataset
from phoque.data.row_sizes import RowSizes, find_sizes_file
from phoque.data.scan import DatasetScan, scan_dataset
from phoque.errors import UsageError
from phoque.files import expand_user
from phoque.hub.folder_store import FolderStore
from phoque.hub.repo import Repo
from phoque.hub.store import Store
from phoque.models.config import load_config, load_tokenizer, max_conversation_tokens
from phoque.models.lora import LoraOptions, find_target_modules
from phoque.models.source import Source, find_model, list_tokenizer_files
from phoque.services import Services
from phoque.settings.fields import Origin, Resolved
from phoque.settings.train import TrainSettings

ROUNDED_BATCH = 0.1  # how far several processes may round a step's rows, to have as many each


@dataclass
class Prepared:
    """What is known before a weight is loaded; `targets` is what peft takes as `target_modules`, None for all."""

    source: Source
    config: Any
    chat: ChatTemplate
    dataset: Dataset
    scan: DatasetScan
    sizes: RowSizes
    targets: str | list[str] | None

    def encoding_digest(self) -> str:
        """A hash of how many tokens each scanned row has, and of the chat template: by them rows are packed."""
        encoded = [self.scan.lengths, self.scan.trained_tokens, self.chat.template]
        return hashlib.sha256(json.dumps(encoded).encode()).hexdigest()


def prepare(
    resolved: Resolved[TrainSettings], services: Services, *, weights: bool, today: date | None = None
) -> Prepared:
    """Find the base model and the dataset, and scan the dataset once; `weights=False` downloads no weights.

    A template that writes the date writes `today`, by default the present one. Raises UsageError for what cannot be
    trained on.
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
    is_all = s.target_modules == "all-linear"  # which needs no model to be looked through
    targets = None if is_all else find_target_modules(build_empty_model(config), s.target_modules)
    chat = ChatTemplate(
        load_tokenizer(source),
        s.default_system,
        s.max_length,
        train_greeting=s.greeting == "train",
        today=today or datetime.now(UTC).date(),
    )
    evaluation = open_split(split=s.eval_split) if s.eval_split else None
    sizes = RowSizes(chat, find_sizes_file(services.cache, s.dataset, list_tokenizer_files(source.folder), chat))
    scan = scan_dataset(dataset, chat, s.held_out_rows, s.max_bad_rows, evaluation=evaluation, sizes=sizes)
    if (s.keep_best or s.early_stop) and not scan.held_out:
        raise UsageError(
            what="There is no held-out loss.",
            why=f"{dataset.name} is too small to hold rows out, and --keep-best and --early-stop compare it.",
            fix="Leave them out, or give an --eval-split.",
        )
    return Prepared(source, config, chat, dataset, scan, sizes, targets)


def build_empty_model(config: Any) -> Any:
    """The text model on the meta device: its modules and shapes, without weights."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config.get_text_config())


def lora_options(s: TrainSettings, prepared: Prepared) -> LoraOptions:
    """The shape of the run's adapter."""
    return LoraOptions(
        rank=s.lora_rank, alpha=s.lora_alpha, dropout=s.lora_dropout, targets=prepared.targets, rslora=s.rslora
    )


def with_steps(
    resolved: Resolved[TrainSettings], scan: DatasetScan, processes: int = 1, rows: int | None = None
) -> Resolved[TrainSettings]:
    """The settings with the steps that --epochs takes as their `max_steps`, at most those that the user gave.

    `rows` is the number of packed rows per step of a run that has begun. Raises UsageError if the dataset is too large
    to be counted.
    """
    s, origin = resolved.settings, resolved.origins["max_steps"]
    if s.epochs is None:
        return resolved
    if not scan.complete:
        raise UsageError(
            what="--epochs needs a dataset whose rows are counted.",
            why=f"{s.dataset} has more than the {scan.rows:,} rows that are scanned before training.",
            fix="Give --max-steps instead.",
        )
    per_step = conversations_per_step(s, scan, processes, rows)
    steps = max(1, math.ceil(s.epochs * scan.trained_rows / per_step - 1e-9))
    if origin.is_given and s.max_steps <= steps:
        return resolved
    origins = resolved.origins | {"max_steps": Origin("--epochs", "--epochs")}
    return replace(resolved, settings=s.model_copy(update={"max_steps": steps}), origins=origins)


def packing_for(s: TrainSettings, scan: DatasetScan, static: bool) -> Packing:
    """How conversations are packed into rows; `static` rows all have one shape, or one of a few."""
    longest = max(scan.lengths) if scan.complete else s.max_length
    return Packing(s.batch_size // s.accumulation, scan.mean_length, longest, s.packing == "exact", static)


def rows_per_step(s: TrainSettings, packing: Packing, processes: int = 1) -> int:
    """Packed rows that one optimizer step trains on: as many as hold --batch-size conversations of mean length.

    --micro-batch sets how many rows that is, unless the longest conversation makes each row larger than its share.
    """
    if packing.exact:
        return s.accumulation
    rows = s.batch_size * packing.mean / packing.tokens
    nearest = processes * max(1, round(rows / processes))  # a multiple of the processes, if it is near enough
    if nearest <= s.accumulation and abs(nearest - rows) <= max(0.5, ROUNDED_BATCH * rows):
        return nearest
    return max(1, min(s.accumulation, round(rows)))


def conversations_per_step(s: TrainSettings, scan: DatasetScan, processes: int = 1, rows: int | None = None) -> float:
    """The conversations of mean length that an optimizer step holds, in `rows` packed rows or those of a new run.

    A row holds the longest conversation, so that a small batch may be a part of a row. About 2% of a row are padding.
    """
    packing = packing_for(s, scan, static=True)
    if packing.exact:
        return s.batch_size
    return (rows or rows_per_step(s, packing, processes)) * packing.tokens / packing.mean


def choose_micro_batch(s: TrainSettings, processes: int, recorded_rows: int | None = None) -> int | None:
    """Conversations per forward pass so that each process gets as many rows: --micro-batch, or an equal share.

    A run that has begun goes on with its `recorded_rows` per step. Raises UsageError if the batch cannot be shared out
    evenly.
    """
    if recorded_rows:
        check_rows_divisible(recorded_rows, processes, has_begun=True)
        return s.micro_batch
    if not s.accumulation % processes:
        return s.micro_batch
    if s.micro_batch or s.batch_size % processes:
        given = f"--batch-size {s.batch_size}" + (f" in parts of {s.micro_batch}" if s.micro_batch else "")
        raise UsageError(
            what=f"{given} cannot be dealt to {processes} processes.",
            why="Every process trains on the same number of rows in every step.",
            fix=f"Choose a multiple of {processes} conversations"
            + (", or leave --micro-batch out." * bool(s.micro_batch)),
        )
    return s.batch_size // processes


def check_rows_divisible(rows: int, processes: int, *, has_begun: bool) -> None:
    """Raise UsageError if a step's packed rows cannot be dealt to so many processes."""
    if rows % processes:
        raise UsageError(
            what=f"A step has {rows} packed row{'s' * (rows > 1)}, not a multiple of the {processes} processes.",
            why="The run began with these rows, and continues with them."
            if has_begun
            else "A row holds the longest conversation, so that a step has few of them.",
            fix="Use a number of processes that divides them, or change the rows with --allow-change micro_batch."
            if has_begun
            else "Raise --batch-size, lower --max-length, or use --packing exact.",
        )


def find_store(s: TrainSettings, services: Services) -> Store | None:
    """The Hub repository or the folder that keeps the run, or None. Raises UsageError without a token for the Hub."""
    if s.run_dir:
        return FolderStore(_find_folder(s, s.run_dir))
    if not s.hub_model_id:
        return None
    services.secrets.require_hub(s.hub_model_id)
    named = [str(path) for path in (s.base_model, s.dataset, s.folder) if Path(path).is_absolute()]
    if s.public and named:
        services.console.warn(
            f"{s.hub_model_id} is public, and its run.json, report and card name {' and '.join(named)} of this "
            "machine; relative paths say less"
        )
    return Repo(services.hub, s.hub_model_id)


def _find_folder(s: TrainSettings, run_dir: str) -> Path:
    if run_dir.startswith("hf://"):
        raise UsageError(
            what=f"--run-dir {run_dir} is a bucket of the Hub.",
            why="phoque writes to folders; a Job mounts the bucket as one.",
            fix="Add --on FLAVOR, or give a folder, such as one where hf-mount shows the bucket.",
        )
    folder = expand_user(run_dir)
    if folder.resolve() == s.folder.resolve():
        raise UsageError(
            what=f"--run-dir and --output-dir are both {folder}.",
            why="The run folder is written in ways that a mounted bucket does not allow.",
            fix="Leave --run-dir out if the disk outlives the run, or choose two folders.",
        )
    return folder
