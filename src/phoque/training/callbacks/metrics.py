"""Logs one line per logged step: loss, learning rate, gradient and adapter norms, speed, memory, held-out loss."""

import math
from collections.abc import Callable
from typing import Any

import psutil
import torch
from transformers import TrainerCallback

from phoque.data.chat_template import EncodedChat
from phoque.data.packing import build_batch, pack_best_fit
from phoque.data.stream import TrainStream
from phoque.models.load import evaluation_mode
from phoque.models.lora import compute_lora_norms
from phoque.training.best import has_stalled, list_held_out_losses
from phoque.training.metrics_log import Tracker, read_lines
from phoque.training.run_files import METRICS
from phoque.training.timer import Timer

HELD_OUT_TOKENS = {"cuda": 4096, "cpu": 1024}  # per forward pass; on a CPU 4,096 tokens take half a minute
TRAINER_METRICS = ("loss", "grad_norm", "learning_rate", "accuracy")


class MetricsCallback(TrainerCallback):
    """Collects the metrics of a step, writes them as one line, and updates the progress display.

    The run ends when the held-out loss has not fallen for `early_stop` measurements, of those since step
    `comparable_since`; `agree` tells the other processes. `keep_best` is called with the step and the loss of each
    measurement.
    """

    def __init__(
        self,
        tracker: Tracker,
        stream: TrainStream,
        *,
        held_out: list[EncodedChat],
        norms_every: int,
        eval_every: int,
        early_stop: int | None,
        comparable_since: int,
        keep_best: Callable[[int, float], None],
        show: Callable[[int, str], None],
        timer: Timer,
        agree: Callable[[int], int] = lambda code: code,
    ) -> None:
        self._agree = agree
        self.tracker, self.stream, self.held_out, self.show = tracker, stream, held_out, show
        self.norms_every, self.eval_every, self.timer = norms_every, eval_every, timer
        self.early_stop, self.keep_best = early_stop, keep_best
        self._losses = list_held_out_losses(read_lines(tracker.run / METRICS), comparable_since)
        self._tokens, self._waited = stream.tokens_seen, 0.0  # at the last logged step
        self._pending: dict[str, float] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        self.timer.mark_loaded()
        if state.global_step == 0:
            self._measure(model, 0)
            self._write(0)
        self.timer.lap()

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        last = state.global_step == state.max_steps
        if control.should_training_stop and not last:  # a stop was requested: leave the remaining time to the save
            control.should_log = True
            return
        if is_measured := state.global_step % self.eval_every == 0 or last:
            self._measure(model, state.global_step)
        if self.early_stop and not last and is_measured and self._agree(has_stalled(self._losses, self.early_stop)):
            state.max_steps = state.global_step  # so that the other callbacks know that this is the last step
            last = control.should_training_stop = control.should_save = True
        if state.global_step % self.norms_every == 0 or last:
            self._pending |= compute_lora_norms(model)
        if last:
            control.should_log = True
        elif is_measured and not control.should_log:  # the held-out loss is logged even if no other metrics are due
            self._write(state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if "loss" not in logs:
            return
        stream, seconds = self.stream, max(1e-9, self.timer.lap())
        speed, waited = (stream.tokens_seen - self._tokens) / seconds, (stream.waited - self._waited) / seconds
        self._tokens, self._waited = stream.tokens_seen, stream.waited
        values = {name: float(logs[name]) for name in TRAINER_METRICS if name in logs}
        values |= {"tokens_per_s": round(speed, 1), "tokens": stream.tokens_seen, "epoch": stream.epoch}
        values |= {"padding": round(stream.padding, 4), "waiting_for_data": round(waited, 4)}
        self._pending = values | measure_memory() | self._pending
        self.show(state.global_step, f"loss {values['loss']:.3f}  {speed:,.0f} tokens/s")
        self._write(state.global_step)

    def _write(self, step: int) -> None:
        if self._pending:
            self.tracker.log_metrics(step, self._pending)
        self._pending = {}

    def _measure(self, model: Any, step: int) -> None:
        if self.held_out:
            self.show(step, "measuring the held-out loss")
            with self.timer.measure("measuring"):
                measured = measure_held_out_loss(
                    model, self.held_out, lambda row: self.show(step, f"measuring the held-out loss, {row}")
                )
            self._pending |= measured
            if math.isfinite(measured["held_out_loss"]):
                self._losses.append((step, measured["held_out_loss"]))
                self.keep_best(step, measured["held_out_loss"])


class FollowCallback(TrainerCallback):
    """Follows process 0, which measures, in another process.

    Ends the run when process 0 finds that the held-out loss has stalled (`agree`), and takes part in each measurement
    of `held_out`, where a model is sharded.
    """

    def __init__(self, eval_every: int, agree: Callable[[int], int] | None, held_out: list[EncodedChat]) -> None:
        self._eval_every, self._agree, self._held_out = eval_every, agree, held_out

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        if state.global_step == 0:
            self._measure(model)

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        last = state.global_step == state.max_steps
        if (control.should_training_stop and not last) or (state.global_step % self._eval_every and not last):
            return
        self._measure(model)
        if self._agree and not last and self._agree(0):
            state.max_steps = state.global_step
            control.should_training_stop = True

    def _measure(self, model: Any) -> None:
        if self._held_out:
            measure_held_out_loss(model, self._held_out)


@torch.no_grad()
def measure_held_out_loss(
    model: Any,
    conversations: list[EncodedChat],
    show: Callable[[str], None] = lambda row: None,
    tokens: int | None = None,
) -> dict[str, float]:
    """Return the mean loss per trained token (nats) and the token accuracy on held-out conversations.

    Conversations are packed into rows of `tokens` tokens (HELD_OUT_TOKENS of the device if None), or of the longest
    conversation's length if that is more. `show` is called with `row 1 of 8`.
    """
    device = next(model.parameters()).device
    lengths = [len(encoded.ids) for encoded in conversations]
    rows = pack_best_fit(lengths, max(tokens or HELD_OUT_TOKENS[device.type], *lengths), len(lengths))
    losses = []
    with evaluation_mode(model):
        for number, row in enumerate(rows, 1):
            show(f"row {number} of {len(rows)}")
            batch = build_batch([conversations[index] for index in row])
            batch = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in batch.items()}
            losses.append(model(**batch, token_loss=True))
    count = sum(part.count for part in losses)
    nll, correct = (
        torch.stack([part.nll for part in losses]).double().sum(),
        torch.stack([part.correct for part in losses]),
    )
    return {"held_out_loss": nll.item() / count, "held_out_accuracy": correct.sum().item() / count}


def measure_memory() -> dict[str, float]:
    """Return the peak GPU memory in GB, or without a GPU the process's resident memory."""
    if torch.cuda.is_available():
        return {"gpu_memory_gb": torch.cuda.max_memory_allocated() / 1e9}
    return {"memory_gb": psutil.Process().memory_info().rss / 1e9}
