"""How a run ends: with its adapter, here and in its store; stopped, saying what is saved where; or out of memory."""

import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch

from phoque.data.stream import TrainStream
from phoque.errors import FAILED, PhoqueError, Resumable, RunError, UsageError
from phoque.files import atomic_folder, sha256
from phoque.hub.client import describe_error, is_transient
from phoque.hub.store import CARD
from phoque.model_cards import render_adapter_card
from phoque.models.adapter_source import WEIGHTS
from phoque.models.architectures import architecture_of
from phoque.models.lora import check_finite, save_adapter
from phoque.settings.train import TrainSettings
from phoque.training import checkpoints, report
from phoque.training.best import list_held_out_losses
from phoque.training.metrics_log import read_lines
from phoque.training.run_files import METRICS, REPORT, SAMPLES
from phoque.training.run_record import write_record
from phoque.training.run_state import Run
from phoque.training.timer import Timer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from phoque.training.push import CheckpointPusher


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """A finished run: where its files are, and what it measured. Losses are in nats per trained token.

    - `steps` were taken, and the adapter, whose weights have `adapter_sha256`, is that of `adapter_step`.
    - `loss` is that of the last logged step. `held_out_loss` is {before, after, lowest, lowest_step}: before training,
      of the adapter, and the lowest one with its step. If the held-out rows have changed, `before` is the first one of
      these rows, and `before_step` its step.
    - `padding` is the share of positions without a token, `seconds_of` the seconds by activity.
    - `repo` and `commit` are set if the adapter was pushed, `merged` and `proof` if a merged model was made.
    """

    run: str
    adapter: str
    report: str
    steps: int
    loss: float | None
    held_out_loss: dict[str, float] | None
    tokens: int
    seconds: float
    adapter_step: int | None = None  # absent in records of older versions, as the next one is
    adapter_sha256: str | None = None
    padding: float = 0.0
    seconds_of: dict[str, float] = field(default_factory=dict)
    samples: list[dict[str, Any]] = field(default_factory=list)
    repo: str | None = None
    commit: str | None = None
    merged: str | None = None
    proof: dict[str, Any] | None = None
    merged_repo: str | None = None
    controls: list[str] | None = None  # run folders of the controls

    def to_json(self) -> dict[str, Any]:
        """For --json, and in run.json what is known before the push; what does not apply is left out."""
        optional = ("adapter_step", "adapter_sha256", "repo", "commit", "merged", "proof", "merged_repo", "controls")
        return {name: value for name, value in asdict(self).items() if value is not None or name not in optional}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Self:
        """The result that a run.json holds."""
        return cls(**{name: value for name, value in values.items() if name in cls.__dataclass_fields__})


def finish(
    run: Run,
    model: "PreTrainedModel",
    stream: TrainStream,
    timer: Timer,
    *,
    steps: int,
    adapter_step: int,
) -> TrainResult:
    """Write the adapter with its card, the record with the result, and the report.

    `steps` were taken; the adapter that `model` has is that of `adapter_step`.
    """
    folder, record = run.folder, run.record
    check_finite(model, adapter_step)
    metrics = read_lines(folder / METRICS)
    result = TrainResult(
        run=str(folder),
        adapter=str(folder / "adapter"),
        report=str(folder / REPORT),
        steps=steps,
        adapter_step=adapter_step,
        loss=next((m["loss"] for m in reversed(metrics) if "loss" in m), None),
        held_out_loss=summarize_held_out_loss(metrics, adapter_step, record.get("held_out_since", 0)),
        tokens=stream.tokens_seen,
        padding=round(stream.padding, 4),
        seconds=round(timer.seconds, 1),
        seconds_of=timer.seconds_by_name(),
        samples=[row for row in read_lines(folder / SAMPLES) if row["step"] == adapter_step],
    )
    with atomic_folder(folder / "adapter") as staging:
        save_adapter(model, staging, architecture_of(run.prepared.config))
        run.prepared.chat.shipped_tokenizer.save_pretrained(staging)
        (staging / CARD).write_text(render_adapter_card(record, result.to_json(), run.settings.hub_model_id))
    result = replace(result, adapter_sha256=sha256(folder / "adapter" / WEIGHTS))
    record["result"] = result.to_json()
    write_record(folder, record)
    run.console.stage("writing the report")
    report.write_report(folder)
    return result


def summarize_held_out_loss(
    metrics: list[dict[str, Any]], adapter_step: int | None = None, since: int = 0
) -> dict[str, float] | None:
    """The held-out loss as {before, after, lowest, lowest_step}, or None if none was measured.

    `after` is that of `adapter_step`, or the last one. `since` is that of `list_held_out_losses`.
    """
    losses = list_held_out_losses(metrics, since)
    if not losses:
        return None
    lowest_step, lowest = min(losses, key=lambda pair: pair[1])
    changed = {"before_step": losses[0][0]} if since else {}
    after = dict(losses).get(adapter_step, losses[-1][1]) if adapter_step is not None else losses[-1][1]
    return {"before": losses[0][1], "after": after, "lowest": lowest, "lowest_step": lowest_step, **changed}


def write_card_for_checkpoint(run: Run, checkpoint: Path) -> Path:
    """Write the card of an unfinished run into its folder and return its path: it is pushed with each checkpoint."""
    state = json.loads((checkpoint / checkpoints.DATA_STATE).read_text())
    progress = {
        "steps": checkpoints.get_step(checkpoint),
        "tokens": state["tokens_seen"],
        "held_out_loss": summarize_held_out_loss(
            read_lines(checkpoint / METRICS), since=run.record.get("held_out_since", 0)
        ),
    }
    card = run.folder / f".{CARD}"
    card.write_text(render_adapter_card(run.record, progress, run.settings.hub_model_id))
    return card


def publish(run: Run, result: TrainResult) -> TrainResult:
    """Push the final adapter and the run's record to its repository, if it has one; nothing if they are there.

    Raises Resumable if the Hub failed and may recover, RunError otherwise; both say where the adapter is.
    """
    if run.store is None:
        return result
    folder = run.folder
    files = {file.name: file for file in (folder / "adapter").iterdir() if file.is_file()}
    files |= {name: folder / name for name in (checkpoints.RECORD, METRICS, SAMPLES, REPORT)}
    result = replace(result, repo=run.settings.hub_model_id)
    run.record["result"] = result.to_json()
    write_record(folder, run.record)
    run.console.stage(f"pushing the adapter to {run.store.name}")
    try:
        commit = run.store.push({name: f for name, f in files.items() if f.is_file()}, "Adapter", lambda _: [])
        if run.settings.squash_history:
            commit = run.store.squash("Adapter")
            run.console.say(f"the history of {run.store.name} is one commit now")
    except UsageError:
        raise
    except Exception as error:
        raise push_error(error)(
            what=f"The adapter is saved here, but it is not in {run.store.name}.",
            why=f"{describe_error(error)}. It is in {folder / 'adapter'}.",
            fix="Run the same command again, without --fresh-start: it only pushes. On a Job, whose disk is gone by "
            "then, it continues from the newest checkpoint there.",
        ) from error
    return replace(result, commit=commit or None)


def push_error(error: Exception) -> type[PhoqueError]:
    """The type of error for a push that failed: Resumable if the Hub may recover, else RunError."""
    return Resumable if is_transient(error) or isinstance(error, Resumable) else RunError


def stop_error(run: Run, step: int, pusher: "CheckpointPusher | None") -> Resumable:
    """The error of a run that was stopped, saying what is saved where."""
    newest = checkpoints.find_newest_valid(run.folder, lambda _: None)
    why = f"{newest} holds everything." if newest else "Nothing was saved."
    if pusher and run.store:
        pushed = f"checkpoint-{pusher.pushed}" if pusher.pushed is not None else "nothing of this run yet"
        why += f" {run.store.name} has {pushed}" + (f": {pusher.failure}." if pusher.failure else ".")
    return Resumable(
        what=f"Stopped after step {step} of {run.settings.max_steps}.",
        why=why,
        fix="Run the same command to continue.",
        code=run.stop.code or FAILED,
    )


def out_of_memory_error(s: TrainSettings) -> RunError:
    """How much GPU memory was in use, and two changes that need less and train on the same batch."""
    peak = torch.cuda.max_memory_allocated() / 1e9 if torch.cuda.is_available() else 0.0
    total = torch.cuda.get_device_properties(0).total_memory / 1e9 if torch.cuda.is_available() else 0.0
    micro_batch = max(1, s.batch_size // s.accumulation // 2)
    return RunError(
        what=f"Out of GPU memory: {peak:.1f} GB were in use of {total:.1f} GB.",
        why=f"Each forward pass holds {s.batch_size // s.accumulation} conversations of up to {s.max_length} tokens.",
        fix=f"Use --gradient-checkpointing, or --micro-batch {micro_batch} (with --allow-change micro_batch if the run "
        "has checkpoints). Both train on the same batch.",
    )
