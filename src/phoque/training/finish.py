"""How a run ends: with its adapter, here and on the Hub; stopped, with what is where; or out of memory."""

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from phoque.data.stream import TrainStream
from phoque.errors import FAILED, RESUMABLE, PhoqueError, Stopped
from phoque.hub.client import is_transient
from phoque.hub.client import reason as why
from phoque.hub.repo import CARD
from phoque.model_cards import adapter_card
from phoque.models.architectures import architecture_of
from phoque.models.lora import check_finite, save_adapter
from phoque.settings.train import TrainSettings
from phoque.training import checkpoints, report
from phoque.training.metrics_log import METRICS, SAMPLES, read_lines
from phoque.training.prepare import Run
from phoque.training.run_record import write_record
from phoque.training.timer import Timer

if TYPE_CHECKING:
    from phoque.training.hub_push import CheckpointPusher


def finish(run: Run, model: Any, stream: TrainStream, watch: Timer) -> dict[str, Any]:
    """Write the adapter with its card, the record with the result, and the report; under a temporary name first."""
    folder, record = run.folder, run.record
    step = record["fingerprint"]["max_steps"]
    check_finite(model, step)
    metrics = read_lines(folder / METRICS)
    result = {
        "run": str(folder),
        "adapter": str(folder / "adapter"),
        "report": str(folder / report.NAME),
        "steps": step,
        "loss": next((m["loss"] for m in reversed(metrics) if "loss" in m), None),
        "held_out_loss": held_out_of(metrics),
        "tokens": stream.tokens_seen,
        "padding": round(stream.padding, 4),
        "seconds": round(watch.seconds, 1),
        "seconds_of": watch.shares(),
        "samples": [row for row in read_lines(folder / SAMPLES) if row["step"] == step],
    }
    staging = folder / ".adapter"
    shutil.rmtree(staging, ignore_errors=True)
    save_adapter(model, staging, architecture_of(run.ready.config))
    run.ready.chat.tokenizer.save_pretrained(staging)
    (staging / CARD).write_text(adapter_card(record, result, run.settings.hub_model_id))
    shutil.rmtree(folder / "adapter", ignore_errors=True)
    staging.rename(folder / "adapter")
    record["result"] = result
    write_record(folder, record)
    report.write(folder)
    return result


def held_out_of(metrics: list[dict[str, Any]]) -> dict[str, float] | None:
    """The first and the last held-out loss of a run, if any was measured."""
    losses = [m["held_out_loss"] for m in metrics if m.get("held_out_loss") is not None]
    return {"before": losses[0], "after": losses[-1]} if losses else None


def card_of(run: Run, saved: Path) -> Path:
    """The card that goes with a checkpoint, in the run folder: the repository has one from its first push on."""
    state = json.loads((saved / checkpoints.DATA_STATE).read_text())
    so_far = {
        "steps": checkpoints.step_of(saved),
        "tokens": state["tokens_seen"],
        "held_out_loss": held_out_of(read_lines(saved / METRICS)),
    }
    card = run.folder / f".{CARD}"
    card.write_text(adapter_card(run.record, so_far, run.settings.hub_model_id))
    return card


def published(run: Run, result: dict[str, Any]) -> dict[str, Any]:
    """Bring the final adapter and the run's record to the Hub, if there is a repository; nothing if it is there.

    Raises PhoqueError (1) saying what is where, if that cannot be done.
    """
    if run.repo is None:
        return result
    folder = run.folder
    files = {file.name: file for file in (folder / "adapter").iterdir() if file.is_file()}
    files |= {name: folder / name for name in (checkpoints.RECORD, METRICS, SAMPLES, report.NAME)}
    result = result | {"repo": run.repo.name}
    run.record["result"] = result
    write_record(folder, run.record)
    try:
        commit = run.repo.push({name: f for name, f in files.items() if f.is_file()}, "Adapter", lambda _: [])
    except PhoqueError:
        raise
    except Exception as error:
        raise PhoqueError(
            f"The adapter is made, but it is not in {run.repo.name}.",
            f"{why(error)}. It is in {folder / 'adapter'}.",
            "Run the same command again, without --fresh-start: it only pushes. On a Job, whose disk is gone by then, "
            "it goes on from the newest checkpoint on the Hub.",
            RESUMABLE if is_transient(error) else FAILED,
        ) from error
    return result | {"commit": commit}


def stopped_after(run: Run, step: int, pusher: "CheckpointPusher | None") -> Stopped:
    """A stop in good order, saying what is where."""
    saved = checkpoints.newest_whole(run.folder, lambda _: None)
    where = f"{saved} holds everything." if saved else "Nothing was saved."
    if pusher and run.repo:
        there = f"checkpoint-{pusher.pushed}" if pusher.pushed is not None else "nothing of this run yet"
        where += f" {run.repo.name} has {there}" + (f": {pusher.failure}." if pusher.failure else ".")
    of = f"Stopped after step {step} of {run.settings.max_steps}."
    return Stopped(of, where, "Run the same command to go on.", run.stop.code or FAILED)


def out_of_memory(s: TrainSettings) -> PhoqueError:
    """How much was in use, and three changes that need less."""
    peak = torch.cuda.max_memory_allocated() / 1e9 if torch.cuda.is_available() else 0.0
    total = torch.cuda.get_device_properties(0).total_memory / 1e9 if torch.cuda.is_available() else 0.0
    micro = max(1, s.batch_size // s.accumulation // 2)
    return PhoqueError(
        f"Out of GPU memory: {peak:.1f} GB were in use of {total:.1f} GB.",
        f"{s.batch_size // s.accumulation} conversations of up to {s.max_length} tokens went through at once.",
        f"Use --micro-batch {micro}, or --gradient-checkpointing, or --max-length {s.max_length // 2}.",
        FAILED,
    )
