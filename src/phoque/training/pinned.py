"""A run is resumed with what it began with: the revisions of base and data, the rows of its steps, and the date."""

from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from typing import Any

from phoque.hub.refs import hub_id
from phoque.hub.store import Store
from phoque.services import Services
from phoque.settings.config_file import REVISIONS
from phoque.settings.fields import Resolved
from phoque.settings.train import TrainSettings
from phoque.training import checkpoints
from phoque.training.fingerprint import update_record
from phoque.training.resume import DOWNLOADS, is_fresh_start_continued, read_record_or_none
from phoque.training.run_record import RECORD


@dataclass(frozen=True)
class Pinned:
    """What a run began with, if it has begun.

    - `resolved`: the settings, with its --micro-batch, and the revisions of what is on the Hub and was given without
      one.
    - `rows`: the packed rows of its steps.
    - `today`: the date that its chat template writes, if it writes one.
    """

    resolved: Resolved[TrainSettings]
    rows: int | None = None
    today: date | None = None


def pin_recorded(
    resolved: Resolved[TrainSettings], run: Path, store: Store | None, services: Services, submission: str = ""
) -> Pinned:
    """The settings, and what the run began with.

    Nothing is pinned for a fresh start, and nothing that --allow-change names. Says what has newer commits.
    """
    s = resolved.settings
    record = _find_record(run, store, s)
    if record is None or (s.fresh_start and not is_fresh_start_continued(record, s, submission)):
        return Pinned(resolved)
    rows = (
        None
        if {"micro_batch", "batch_size", "packing", "max_length"} & {*s.allow_change}
        else record.get("rows_per_step")
    )
    recorded = {key: row.get("value") for key, row in record["settings"].items()}
    pins: dict[str, Any] = {}
    if s.micro_batch is None and "micro_batch" not in s.allow_change:  # chosen by the number of processes, or given
        pins["micro_batch"] = record["fingerprint"].get("micro_batch")
    for name, (setting, key) in REVISIONS.items():
        value, revision = getattr(s, name), record["fingerprint"].get(key)
        is_given = getattr(s, setting) is not None or key in s.allow_change
        if is_given or not revision or hub_id(value) is None or recorded.get(name) != value or Path(value).exists():
            continue
        info = services.hub.api.dataset_info if name == "dataset" else services.hub.api.model_info
        newest = services.hub.retry(value, lambda info=info, value=value: info(value)).sha
        if newest != revision:
            services.console.warn(
                f"{value} has newer commits; this run continues to use {revision[:8]}, with which it began. For the "
                f"newest, start another run, or pass --allow-change {key}"
            )
            pins[setting] = revision
    began = str(record.get("template_date") or record["started"])[:10]  # older versions wrote the present date
    settings = replace(resolved, settings=s.model_copy(update=pins)) if pins else resolved
    return Pinned(settings, rows, date.fromisoformat(began))


def _find_record(run: Path, store: Store | None, s: TrainSettings) -> dict[str, Any] | None:
    """The record of the newest state of the run: of the newest checkpoint here or in its store, else of run.json."""
    local = checkpoints.sort_checkpoints(path.name for path in run.glob("checkpoint-*"))
    snapshot = store.snapshot() if store else None
    remote = checkpoints.sort_checkpoints(snapshot.checkpoint_folders()) if snapshot else []
    newest_here = checkpoints.get_step(Path(local[0])) if local else -1
    if store and snapshot:
        newer = [f"{name}/{RECORD}" for name in remote if checkpoints.get_step(Path(name)) > newest_here]
        for path in [*newer, *([] if local else [RECORD])]:
            record = store.read_json(snapshot, path, run / DOWNLOADS) if path in snapshot.files else None
            if record is not None:
                return update_record(record)
    return read_record_or_none(run, s)
