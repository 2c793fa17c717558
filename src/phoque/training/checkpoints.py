"""Checkpoints on disk: one exists when its manifest verifies, and is written under a temporary name first."""

import json
import os
import pickle
import re
import shutil
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from phoque.errors import FAILED, PhoqueError, first_line
from phoque.files import sha256

MANIFEST = "MANIFEST.json"
STAGING = ".saving"
DATA_STATE = "data_state.json"
RECORD = "run.json"
OURS = (MANIFEST, DATA_STATE)  # in a checkpoint of ours, whole or not
PICKLED = "training_args.bin"  # plain Trainer's arguments, token and all: never listed, pushed or fetched
LAST = "last-checkpoint"  # what plain Trainer calls the one that it pushes
FOREIGN = ("adapter_model.safetensors", "optimizer.pt", "scheduler.pt", "trainer_state.json")
NEEDED = (*FOREIGN, DATA_STATE)


def write_manifest(folder: Path) -> None:
    """Write the sha256 of each file, last of all, and have everything on the disk before returning."""
    files = sorted(f for f in folder.rglob("*") if f.is_file() and f.name not in (MANIFEST, PICKLED))
    sums = {str(f.relative_to(folder)): sha256(f) for f in files}
    (folder / MANIFEST).write_text(json.dumps({"sha256": sums}, indent=1))
    for file in [*files, folder / MANIFEST, folder]:
        handle = os.open(file, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)


def find_defect(folder: Path) -> str | None:
    """What keeps a checkpoint from being resumed, or None if its manifest verifies."""
    try:
        sums = json.loads((folder / MANIFEST).read_text())["sha256"]
    except FileNotFoundError:
        return "it has no manifest"
    except (json.JSONDecodeError, KeyError, TypeError):
        return "its manifest cannot be read"
    for name in (*NEEDED, *sums):
        if name not in sums or not (folder / name).is_file():
            return f"{name} is missing"
    return next((f"{name} is damaged" for name, wanted in sums.items() if sha256(folder / name) != wanted), None)


def checkpoints(run: Path) -> list[Path]:
    """The checkpoint folders of a run, newest first, whole or not."""
    found = [p for p in run.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", p.name)]
    return sorted(found, key=step_of, reverse=True)


def step_of(checkpoint: Path) -> int:
    """The optimizer step a checkpoint was made after; `last-checkpoint` does not say, and counts as newest."""
    return sys.maxsize if checkpoint.name == LAST else int(checkpoint.name.split("-")[1])


def in_order(names: Iterable[str]) -> list[str]:
    """Those of the names that are a checkpoint's, newest first."""
    found = [name for name in names if name == LAST or re.fullmatch(r"checkpoint-\d+", name)]
    return sorted(found, key=lambda name: step_of(Path(name)), reverse=True)


def record_in(folder: Path) -> dict[str, Any] | None:
    """The record of the run that a checkpoint belongs to, as it stood then; None for one of plain Trainer."""
    path = folder / RECORD
    return json.loads(path.read_text()) if path.is_file() else None


def is_ours(folder: Path) -> bool:
    """Whether phoque made a checkpoint, whole or not."""
    return any((folder / name).is_file() for name in OURS)


def find_trainer_defect(folder: Path) -> str | None:
    """What keeps a checkpoint of plain Trainer, which has no manifest, from being resumed: each part is opened."""
    from safetensors import SafetensorError, safe_open

    for name in FOREIGN:
        if not (folder / name).is_file():
            return f"{name} is missing"
    try:
        with safe_open(folder / FOREIGN[0], "pt") as weights:
            for name in weights.keys():  # noqa: SIM118 - not a dict
                weights.get_tensor(name)
        states = [torch.load(folder / name, map_location="cpu", weights_only=True) for name in FOREIGN[1:3]]
        json.loads((folder / FOREIGN[3]).read_text())["global_step"]
    except (SafetensorError, OSError, RuntimeError, ValueError, KeyError, EOFError, pickle.UnpicklingError) as error:
        return f"a part cannot be read: {first_line(error)[:120]}"
    kept = states[0].get("state", {}).values()
    if not kept or not all({"exp_avg", "exp_avg_sq"} <= set(state) for state in kept):
        return "its optimizer is not torch's AdamW"
    return None


def import_trainer_checkpoint(folder: Path, used: dict[str, Any], warn: Callable[[str], None]) -> Path:
    """A checkpoint of plain Trainer that has no flaw as one of ours, with `used` for its place in the data."""
    step = json.loads((folder / "trainer_state.json").read_text())["global_step"]
    seen = step * used["batch_size"]
    epoch, within = divmod(seen, used["rows"])
    reader = {"place": {"epoch": epoch, "used": within}, "read": seen, "bad": 0}
    state = {"reader": reader, "taken": 0, "rows_seen": seen, "tokens_seen": 0, "filled": 0, "epoch": epoch}
    (folder / DATA_STATE).write_text(json.dumps(state))
    write_manifest(folder)
    named = folder.with_name(f"checkpoint-{step}")
    folder.rename(named)
    warn(f"{named.name} was made by plain Trainer: its parts are whole, but its place in the data is an estimate")
    return named


def newest_whole(run: Path, warn: Callable[[str], None]) -> Path | None:
    """The newest checkpoint that verifies; None only if there is no checkpoint at all.

    Raises PhoqueError (1) if there are checkpoints and none is whole: going on from step 0 would lose them.
    """
    found = checkpoints(run)
    for checkpoint in found:
        reason = find_defect(checkpoint)
        if reason is None:
            return checkpoint
        warn(f"{checkpoint} is left out: {reason}")
    if found:
        raise PhoqueError(
            f"None of the {len(found)} checkpoints in {run} is whole.",
            f"The newest: {find_defect(found[0])}.",
            "Restore one, or begin anew with --fresh-start.",
            FAILED,
        )
    return None


def prune(run: Path, keep: int, spared: set[Path]) -> None:
    """Delete all but the newest `keep` checkpoints and those that are spared because they are on their way."""
    for old in checkpoints(run)[keep:]:
        if old not in spared:
            shutil.rmtree(old)
