"""Every logged step as one line: loss, learning rate, gradient norm, adapter norms, speed, memory, held-out loss."""

from collections.abc import Callable
from typing import Any

import psutil
import torch
from transformers import TrainerCallback

from phoque.data.chat_template import Encoded
from phoque.data.packing import best_fit, packed
from phoque.data.stream import TrainStream
from phoque.models.load import measuring
from phoque.models.lora import lora_norms
from phoque.training.metrics_log import Tracker
from phoque.training.timer import Timer

FROM_TRAINER = ("loss", "grad_norm", "learning_rate", "accuracy")


class MetricsCallback(TrainerCallback):
    """Collects the numbers of a step from all sides, writes them once, and shows the progress."""

    def __init__(
        self,
        tracker: Tracker,
        stream: TrainStream,
        held_out: list[Encoded],
        norms_every: int,
        eval_every: int,
        show: Callable[[int, str], None],
        watch: Timer,
    ) -> None:
        self.tracker, self.stream, self.held_out, self.show = tracker, stream, held_out, show
        self.norms_every, self.eval_every, self.watch = norms_every, eval_every, watch
        self._tokens, self._waited = stream.tokens_seen, 0.0  # at the last logged step
        self._pending: dict[str, float] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        self.watch.loaded()
        if state.global_step == 0:
            self._measure(model)
            self._write(0)
        self.watch.lap()

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        last = state.global_step == state.max_steps
        if control.should_training_stop and not last:  # asked to stop: what time there is belongs to the save
            control.should_log = True
            return
        if state.global_step % self.norms_every == 0 or last:
            self._pending |= lora_norms(model)
        if last:
            control.should_log = True
        if state.global_step % self.eval_every == 0 or last:
            self._measure(model)
            if not control.should_log:  # a held-out loss belongs to its own step, also where no line is due
                self._write(state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if "loss" not in logs:
            return
        stream, seconds = self.stream, max(1e-9, self.watch.lap())
        speed, waited = (stream.tokens_seen - self._tokens) / seconds, (stream.waited - self._waited) / seconds
        self._tokens, self._waited = stream.tokens_seen, stream.waited
        values = {name: float(logs[name]) for name in FROM_TRAINER if name in logs}
        values |= {"tokens_per_s": round(speed, 1), "tokens": stream.tokens_seen, "epoch": stream.epoch}
        values |= {"padding": round(stream.padding, 4), "waiting_for_data": round(waited, 4)}
        self._pending = values | memory() | self._pending
        self.show(state.global_step, f"loss {values['loss']:.3f}  {speed:,.0f} tokens/s")
        self._write(state.global_step)

    def _write(self, step: int) -> None:
        if self._pending:
            self.tracker.metrics(step, self._pending)
        self._pending = {}

    def _measure(self, model: Any) -> None:
        if self.held_out:
            with self.watch.paused("measuring"):
                self._pending |= held_out_loss(model, self.held_out)


@torch.no_grad()
def held_out_loss(model: Any, conversations: list[Encoded], tokens: int = 4096) -> dict[str, float]:
    """Mean loss a trained token on conversations that training never sees, and the share of them guessed right.

    They go through in rows of `tokens`, or as many as the longest has.
    """
    device = next(model.parameters()).device
    lengths = [len(encoded.ids) for encoded in conversations]
    rows = best_fit(lengths, max(tokens, *lengths), len(lengths))
    found = []
    with measuring(model):
        for row in rows:
            batch = packed([conversations[number] for number in row])
            batch = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in batch.items()}
            found.append(model(**batch, token_loss=True))
    count = sum(part.count for part in found)
    nll, right = torch.stack([part.nll for part in found]).double().sum(), torch.stack([part.right for part in found])
    return {"held_out_loss": nll.item() / count, "held_out_accuracy": right.sum().item() / count}


def memory() -> dict[str, float]:
    """Peak GPU memory where there is a GPU, else the process's resident memory, in GB."""
    if torch.cuda.is_available():
        return {"gpu_memory_gb": torch.cuda.max_memory_allocated() / 1e9}
    return {"memory_gb": psutil.Process().memory_info().rss / 1e9}
