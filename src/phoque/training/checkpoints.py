"""Checkpoints on disk: each is written under a temporary name and is valid only if its manifest verifies."""

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

from phoque.errors import RunError, first_line
from phoque.files import sha256
from phoque.training.fingerprint import update_record
from phoque.training.run_files import MANIFEST, RECORD

STAGING = ".saving"
DATA_STATE = "data_state.json"
PHOQUE_FILES = (MANIFEST, DATA_STATE)  # only checkpoints written by phoque have these
TRAINING_ARGS = (
    "training_args.bin"  # plain Trainer's arguments, which contain the token: never listed, pushed or fetched
)
LAST_CHECKPOINT = "last-checkpoint"  # the name under which plain Trainer pushes
TRAINER_STATE = "trainer_state.json"  # Trainer's own, with the step and the last step of the run
TRAINER_FILES = ("adapter_model.safetensors", "optimizer.pt", "scheduler.pt", TRAINER_STATE)
REQUIRED_FILES = (*TRAINER_FILES, DATA_STATE)


def write_manifest(folder: Path) -> None:
    """Write the sha256 of each file to the manifest, the last file written, and fsync everything."""
    files = sorted(f for f in folder.rglob("*") if f.is_file() and f.name not in (MANIFEST, TRAINING_ARGS))
    hashes = {str(f.relative_to(folder)): sha256(f) for f in files}
    (folder / MANIFEST).write_text(json.dumps({"sha256": hashes}, indent=1))
    for file in [*files, folder / MANIFEST, folder]:
        handle = os.open(file, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)


def find_defect(folder: Path) -> str | None:
    """Return why a checkpoint cannot be resumed, or None if its manifest verifies."""
    try:
        hashes = json.loads((folder / MANIFEST).read_text())["sha256"]
    except FileNotFoundError:
        return "it has no manifest"
    except (json.JSONDecodeError, KeyError, TypeError):
        return "its manifest cannot be read"
    for name in (*REQUIRED_FILES, *hashes):
        if name not in hashes or not (folder / name).is_file():
            return f"{name} is missing"
    return next((f"{name} is damaged" for name, expected in hashes.items() if sha256(folder / name) != expected), None)


def list_checkpoints(run: Path) -> list[Path]:
    """List the checkpoint folders of a run, valid or not, newest first."""
    folders = [p for p in run.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", p.name)]
    return sorted(folders, key=get_step, reverse=True)


def get_step(checkpoint: Path) -> int:
    """Return the optimizer step of a checkpoint; `last-checkpoint` has no number and counts as the newest."""
    return sys.maxsize if checkpoint.name == LAST_CHECKPOINT else int(checkpoint.name.split("-")[1])


def sort_checkpoints(names: Iterable[str]) -> list[str]:
    """Return the names that are checkpoint names, newest first."""
    valid = [name for name in names if name == LAST_CHECKPOINT or re.fullmatch(r"checkpoint-\d+", name)]
    return sorted(valid, key=lambda name: get_step(Path(name)), reverse=True)


def read_record_in(folder: Path) -> dict[str, Any] | None:
    """Read the run record stored in a checkpoint; None if plain Trainer wrote the checkpoint."""
    path = folder / RECORD
    return update_record(json.loads(path.read_text())) if path.is_file() else None


def is_phoque_checkpoint(folder: Path) -> bool:
    """Return whether phoque wrote the checkpoint, valid or not."""
    return any((folder / name).is_file() for name in PHOQUE_FILES)


def find_trainer_defect(folder: Path) -> str | None:
    """Open each file of a plain Trainer checkpoint, which has no manifest; return why it cannot be resumed, or None."""
    from safetensors import SafetensorError, safe_open

    for name in TRAINER_FILES:
        if not (folder / name).is_file():
            return f"{name} is missing"
    try:
        with safe_open(folder / TRAINER_FILES[0], "pt") as weights:
            for name in weights.keys():  # noqa: SIM118 - not a dict
                weights.get_tensor(name)
        states = [torch.load(folder / name, map_location="cpu", weights_only=True) for name in TRAINER_FILES[1:3]]
        json.loads((folder / TRAINER_FILES[3]).read_text())["global_step"]
    except (SafetensorError, OSError, RuntimeError, ValueError, KeyError, EOFError, pickle.UnpicklingError) as error:
        return f"a part cannot be read: {first_line(error)[:120]}"
    moments = states[0].get("state", {}).values()
    if not moments or not all({"exp_avg", "exp_avg_sq"} <= set(state) for state in moments):
        return "its optimizer is not torch's AdamW"
    return None


def import_trainer_checkpoint(folder: Path, used: dict[str, Any], warn: Callable[[str], None]) -> Path:
    """Turn a valid plain Trainer checkpoint into a phoque checkpoint; `used` gives its estimated data position."""
    step = json.loads((folder / TRAINER_STATE).read_text())["global_step"]
    rows_seen = step * used["batch_size"]
    epoch, offset = divmod(rows_seen, used["rows"])
    reader = {"place": {"epoch": epoch, "used": offset}, "read": rows_seen, "bad": 0}
    state = {"reader": reader, "taken": 0, "rows_seen": rows_seen, "tokens_seen": 0, "filled": 0, "epoch": epoch}
    (folder / DATA_STATE).write_text(json.dumps(state))
    write_manifest(folder)
    target = folder.with_name(f"checkpoint-{step}")
    folder.rename(target)
    warn(
        f"{target.name} was made by plain Trainer: it is valid, but its position in the data is an estimate; "
        "it is a checkpoint of this run now, so --keep-checkpoints counts it"
    )
    return target


def find_newest_valid(run: Path, warn: Callable[[str], None]) -> Path | None:
    """Return the newest checkpoint that verifies, or None if there are no checkpoints.

    Raises RunError if there are checkpoints but none verifies: starting at step 0 would lose them.
    """
    candidates = list_checkpoints(run)
    for checkpoint in candidates:
        reason = find_defect(checkpoint)
        if reason is None:
            return checkpoint
        warn(f"{checkpoint} is skipped: {reason}")
    if candidates:
        raise RunError(
            what=f"None of the {len(candidates)} checkpoints in {run} is whole.",
            why=f"The newest: {find_defect(candidates[0])}.",
            fix="Restore one, or start over with --fresh-start.",
        )
    return None


def prune(run: Path, step: int, keep: int, protected: set[Path]) -> None:
    """Delete all but the newest `keep` checkpoints up to `step` and the `protected` ones, which are still being pushed.

    A folder without a manifest is not phoque's, and stays. So does one of a later step: it was damaged when the run
    was resumed from an earlier one.
    """
    own = [folder for folder in list_checkpoints(run) if (folder / MANIFEST).is_file() and get_step(folder) <= step]
    for old in own[keep:]:
        if old not in protected:
            shutil.rmtree(old)
