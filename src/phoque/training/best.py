"""The held-out loss over a run: where it was lowest, the adapter of that step, and when to stop."""

import json
import shutil
from pathlib import Path
from typing import Any

from phoque.files import atomic_folder
from phoque.models.architectures import Architecture
from phoque.models.lora import save_adapter

BEST = "best"  # folder of the adapter with the lowest held-out loss so far, in the run folder and in each checkpoint
NOTE = "best.json"
OVERFITTING = 0.01  # a relative change of the held-out loss that counts
Losses = list[tuple[int, float]]  # (step, held-out loss in nats per trained token), by step


def list_held_out_losses(metrics: list[dict[str, Any]], since: int = 0) -> Losses:
    """The measurements of the held-out loss in the lines of metrics.jsonl; step 0 is before training.

    Those before step `since` were of other held-out rows, after a change that was allowed.
    """
    return [
        (row["step"], row["held_out_loss"])
        for row in metrics
        if row.get("held_out_loss") is not None and row["step"] >= since
    ]


def has_stalled(losses: Losses, patience: int | None) -> bool:
    """Whether the last `patience` measurements were all no lower than an earlier one."""
    if not patience or len(losses) <= patience:
        return False
    lowest = min(range(len(losses)), key=lambda number: losses[number][1])
    return len(losses) - 1 - lowest >= patience


def save_best(model: Any, run: Path, architecture: Architecture, step: int, loss: float) -> None:
    """Write the adapter as it is now to the run's folder of the best one."""
    with atomic_folder(run / BEST) as staging:
        save_adapter(model, staging, architecture)
        (staging / NOTE).write_text(json.dumps({"step": step, "held_out_loss": loss}))


def read_best(folder: Path) -> tuple[int, float] | None:
    """The step and the held-out loss of the best adapter in a run folder or checkpoint; None if it has none."""
    note = folder / BEST / NOTE
    if not note.is_file():
        return None
    values = json.loads(note.read_text())
    return values["step"], values["held_out_loss"]


def copy_best(source: Path | None, target: Path) -> None:
    """Give `target` the best adapter of `source`, or none if that has none."""
    shutil.rmtree(target / BEST, ignore_errors=True)
    if source and (source / BEST).is_dir():
        shutil.copytree(source / BEST, target / BEST)
