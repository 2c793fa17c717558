"""Checkpoints on disk: one exists when its manifest verifies, and is written under a temporary name first."""

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

from phoque.errors import FAILED, PhoqueError
from phoque.files import sha256

MANIFEST = "MANIFEST.json"
STAGING = ".saving"
DATA_STATE = "data_state.json"
NEEDED = ("adapter_model.safetensors", "optimizer.pt", "scheduler.pt", "trainer_state.json", DATA_STATE)


def write_manifest(folder: Path) -> None:
    """Write the sha256 of each file, last of all, and have everything on the disk before returning."""
    files = sorted(f for f in folder.rglob("*") if f.is_file() and f.name != MANIFEST)
    sums = {str(f.relative_to(folder)): sha256(f) for f in files}
    (folder / MANIFEST).write_text(json.dumps({"sha256": sums}, indent=1))
    for file in [*files, folder / MANIFEST, folder]:
        handle = os.open(file, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)


def flaw(folder: Path) -> str | None:
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
    """The optimizer step a checkpoint was made after."""
    return int(checkpoint.name.split("-")[1])


def newest_whole(run: Path, warn: Callable[[str], None]) -> Path | None:
    """The newest checkpoint that verifies; None only if there is no checkpoint at all.

    Raises PhoqueError (1) if there are checkpoints and none is whole: going on from step 0 would lose them.
    """
    found = checkpoints(run)
    for checkpoint in found:
        reason = flaw(checkpoint)
        if reason is None:
            return checkpoint
        warn(f"{checkpoint} is left out: {reason}")
    if found:
        raise PhoqueError(
            f"None of the {len(found)} checkpoints in {run} is whole.",
            f"The newest: {flaw(found[0])}.",
            "Restore one, or begin anew with --fresh-start.",
            FAILED,
        )
    return None


def prune(run: Path, keep: int) -> None:
    """Delete all but the newest `keep` checkpoints."""
    for old in checkpoints(run)[keep:]:
        shutil.rmtree(old)
