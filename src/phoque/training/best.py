"""The held-out loss over a run: where it was lowest, the adapter of that step, and when to stop."""

import json
import math
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from phoque.distributed.processes import current, is_connection_error
from phoque.errors import disk_full
from phoque.files import atomic_folder
from phoque.models.architectures import Architecture, architecture_of
from phoque.models.lora import load_adapter, save_adapter
from phoque.training.engine.loss import add_token_loss
from phoque.training.metrics_log import Tracker, read_lines
from phoque.training.run_files import BEST, METRICS, SAMPLES

if TYPE_CHECKING:
    from phoque.training.run_state import Run

NOTE = "best.json"
OVERFITTING = 0.01  # a relative change of the held-out loss that counts
Losses = list[tuple[int, float]]  # (step, held-out loss in nats per trained token), by step


def list_held_out_losses(metrics: list[dict[str, Any]], since: int = 0) -> Losses:
    """The measurements of the held-out loss in the lines of metrics.jsonl; step 0 is before training.

    Those up to step `since`, if it is not 0, were of other held-out rows: a change was allowed at that step.
    """
    return [
        (row["step"], row["held_out_loss"])
        for row in metrics
        if row.get("held_out_loss") is not None and (not since or row["step"] > since)
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


def has_ended(run: "Run") -> bool:
    """Whether the checkpoint that the run continues from is that of its last step."""
    s = run.settings
    losses = list_held_out_losses(read_lines(run.folder / METRICS), run.record.get("held_out_since", 0))
    return run.first_step == s.max_steps or has_stalled(losses, s.early_stop)


def measure_missed_held_out_loss(run: "Run", model: Any, tracker: Tracker | None) -> None:
    """Measure the held-out loss at the step of the checkpoint, if it was due there and the run was stopped instead.

    Without it, the best step and an early stop would be others than in a run that was not stopped. Process 0, which has
    the tracker, measures; the others take part where the model is sharded.
    """
    from phoque.training.callbacks.metrics import measure_held_out_loss

    step, held_out = run.first_step, [encoded for _, encoded in run.prepared.scan.held_out]
    # the rows of a run that was resumed with others count from the next measurement
    is_known = lambda: step in _read_measured(run) or step == run.record.get("held_out_since")
    if current().broadcast_from_main(is_known):
        return
    if step % run.settings.measured_every or not held_out or not (tracker or run.settings.fsdp):
        return
    load_adapter(model, Path(str(run.start.resume)), architecture_of(run.prepared.config))
    add_token_loss(model.get_base_model())
    run.console.stage(f"measuring the held-out loss of step {step}")
    with current().name_lost_connections(is_connection_error):
        values = measure_held_out_loss(model, held_out)
    if tracker is None:
        return
    tracker.log_metrics(step, values)
    if math.isfinite(values["held_out_loss"]):
        keep_if_best(run, model, step, values["held_out_loss"])


def _read_measured(run: "Run") -> set[int]:
    """The steps whose held-out loss is in the log."""
    return {row["step"] for row in read_lines(run.folder / METRICS) if "held_out_loss" in row}


def use_best(run: "Run", model: Any, steps: int, samples: Any) -> int:
    """Load the adapter with the lowest held-out loss, if --keep-best asks for it; return the step of the adapter."""
    best = read_best(run.folder) if run.settings.keep_best else None
    if best is None or best[0] == steps:
        return steps
    step, loss = best
    load_adapter(model, run.folder / BEST, architecture_of(run.prepared.config))
    run.console.say(
        f"of the steps that were taken, step {step} had the lowest held-out loss ({loss:.3f}): the adapter is that of "
        f"step {step}, and checkpoint-{steps} has the last one"
    )
    if samples and all(row["step"] != step for row in read_lines(run.folder / SAMPLES)):
        samples.sample(model, step)
    return step


def keep_if_best(run: "Run", model: Any, step: int, loss: float) -> None:
    """Keep the adapter as it is if --keep-best is given and its held-out loss is the lowest so far."""
    best = read_best(run.folder)
    if not run.settings.keep_best or step == 0 or (best is not None and loss >= best[1]):
        return
    try:
        save_best(model, run.folder, architecture_of(run.prepared.config), step, loss)
    except Exception as error:
        if not disk_full(error):
            raise
        run.console.warn(
            f"the adapter of step {step}, the best so far, was not kept: the disk is full; training continues"
        )
