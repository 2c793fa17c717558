"""transformers' Trainer with our data stream, our loss on labelled tokens, and checkpoints that are whole or absent."""

import json
import math
import pickle
import re
import shutil
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from phoque.data.stream import TrainStream
from phoque.distributed.processes import Processes
from phoque.errors import RunError, UsageError, disk_full
from phoque.models.architectures import Architecture
from phoque.models.lora import check_finite, load_adapter, save_adapter
from phoque.training import checkpoints
from phoque.training.best import copy_best
from phoque.training.dealt_rows import DealtStream, seed_row
from phoque.training.engine.engine import Engine
from phoque.training.engine.loss import TokenLoss, add_token_loss
from phoque.training.push import CheckpointPusher
from phoque.training.run_files import METRICS, SAMPLES
from phoque.training.timer import Timer

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedTokenizerBase


@dataclass(kw_only=True)
class CheckpointPolicy:
    """What happens at a save besides writing the trainer's own state.

    `keep` checkpoints stay in the run folder; `pusher` sends each to the Hub; `report_duration` is called with the
    seconds that a save took; `replan` takes the learning rate schedule from the settings instead of the checkpoint,
    for a change that the user allowed.
    """

    keep: int
    pusher: CheckpointPusher | None
    report_duration: Callable[[float], None]
    warn: Callable[[str], None]
    replan: bool


class PersonaTrainer(Trainer):
    """Each optimizer step trains on packed conversations from a stream whose state is saved in every checkpoint."""

    model: Any
    processing_class: Any

    def __init__(
        self,
        model: "PeftModel",
        tokenizer: "PreTrainedTokenizerBase",
        args: TrainingArguments,
        *,
        stream: TrainStream,
        architecture: Architecture,
        policy: CheckpointPolicy,
        timer: Timer,
        callbacks: list[TrainerCallback],
        engine: Engine | None = None,
        processes: Processes | None = None,
    ) -> None:
        super().__init__(model=model, args=args, processing_class=tokenizer, callbacks=callbacks)
        self.remove_callback(PrinterCallback)  # the console alone prints
        self.stream, self._architecture, self._policy, self._timer = stream, architecture, policy, timer
        self._processes, self._engine = processes or Processes(), engine
        self._shares: list[torch.Tensor] = []  # of the step's loss, of each of this process's rows
        # of each step since the last logged line, summed over processes: loss and correct tokens, and of how many
        self._step_losses: list[torch.Tensor] = []
        self._all_correct: list[torch.Tensor] = []
        self._all_counted = 0
        self._drops_out = any(getattr(config, "lora_dropout", 0) > 0 for config in model.peft_config.values())
        self._rows = iter(())  # the numbers in the step of this process's rows that are still to come
        self._staging: str | None = None
        self._correct: list[torch.Tensor] = []  # correct tokens of each forward pass since the last logged line
        self._counted = 0  # tokens of these passes; on the host, because a copy to the GPU would wait for it
        # the step, its gradient norm on the way to the host, and the event that says it has arrived
        self._pending_norm: tuple[int, torch.Tensor, Any] | None = None
        add_token_loss(self.model.get_base_model(), engine)

    def get_train_dataloader(self) -> Any:
        return self.stream

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        # Trainer's own copies are blocking: each would wait for everything the GPU still has to do
        device = self.args.device
        return {k: v.to(device, non_blocking=True) if torch.is_tensor(v) else v for k, v in inputs.items()}

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> int:
        if isinstance(self.stream, DealtStream):
            self._rows = iter(self.stream.step.numbers)
            return self.stream.step.trained_tokens
        return sum(len(batch["loss_at"]) for batch in batch_samples)

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> torch.Tensor:
        if isinstance(self.stream, DealtStream) and self._drops_out:
            seed_row(self.args.seed, self.state.global_step, next(self._rows))
        loss: TokenLoss = model(**inputs, token_loss=True)
        self._correct.append(loss.correct)
        self._counted += loss.count
        share = loss.nll / (loss.count if num_items_in_batch is None else num_items_in_batch)
        if self._processes.size > 1:
            self._shares.append(share.detach())
        return share

    def _clip_grad_norm(self, model: Any) -> Any:
        if self._processes.size > 1:
            self._sum_over_processes()
        # A NaN or infinity in the loss or in a gradient shows in the norm, before the optimizer writes it to a weight.
        if self._engine:
            norm = self._engine.flat.clip_gradients(self.args.max_grad_norm)
        else:
            norm = super()._clip_grad_norm(model)
        self._check_pending_norm()
        if norm.is_cuda:
            # Fused AdamW skips a step whose `found_inf` is 1, so the number itself may arrive one step later; waiting
            # for it here would leave the GPU idle.
            cast(Any, self.optimizer).optimizer.found_inf = (~norm.isfinite()).float()
            on_host, copied = norm.to("cpu", non_blocking=True), torch.cuda.Event()
            copied.record()
            self._pending_norm = self.state.global_step + 1, on_host, copied
        else:
            self._pending_norm = self.state.global_step + 1, norm, None
            self._check_pending_norm()
        return norm

    def _sum_over_processes(self) -> None:
        """Sum the gradients of the step, its loss and its correct tokens over all processes."""
        parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self._processes.sum_gradients(parameters, self._engine.flat.gradients if self._engine else None)
        sums = torch.stack([torch.stack(self._shares).sum().double(), torch.stack(self._correct).sum().double()])
        self._processes.sum(sums)
        self._step_losses.append(sums[0])
        self._all_correct.append(sums[1])
        self._all_counted += self.stream.step.trained_tokens
        self._shares, self._correct, self._counted = [], [], 0

    def _check_pending_norm(self) -> None:
        """Raise RunError if the gradient norm of the last step is not finite."""
        if self._pending_norm is None:
            return
        (step, norm, copied), self._pending_norm = self._pending_norm, None
        if copied:
            copied.synchronize()
        if not math.isfinite(float(norm)):
            raise RunError(
                what=f"The loss or its gradient is not finite at step {step}.",
                why="Usually the learning rate is too high, or one row is extreme.",
                fix="Run the same command: it continues from the last checkpoint. If it happens again, lower "
                f"--learning-rate (now {self.args.learning_rate:g}) with --allow-change learning_rate.",
            )

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs and self._step_losses:  # Trainer's own is the mean of the processes' shares
            logs["loss"] = torch.stack(self._step_losses).mean().item()
            logs["accuracy"] = torch.stack(self._all_correct).sum().item() / self._all_counted
            self._step_losses, self._all_correct, self._all_counted = [], [], 0
        elif "loss" in logs and self._correct:
            logs["accuracy"] = torch.stack(self._correct).sum().item() / self._counted
            self._correct, self._counted = [], 0
        super().log(logs, start_time)

    def _get_output_dir(self, trial: Any) -> str:
        return self._staging or super()._get_output_dir(trial)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        if not self._processes.is_main:
            self._check_pending_norm()  # as process 0 does
            return
        start = time.monotonic()
        with self._timer.measure("saving"):
            self._save_with_manifest(model, trial)
        self._policy.report_duration(time.monotonic() - start)

    def _save_with_manifest(self, model: Any, trial: Any) -> None:
        run = Path(str(self.args.output_dir))
        step = self.state.global_step
        if checkpoints.find_defect(run / f"checkpoint-{step}") is None:
            return  # a stop was requested right after this step was saved
        self._check_pending_norm()
        check_finite(self.model, step)
        staging = run / checkpoints.STAGING
        self._staging = str(staging)
        pusher = self._policy.pusher
        try:
            super()._save_checkpoint(model, trial)
            folder = staging / f"checkpoint-{step}"
            (folder / checkpoints.DATA_STATE).write_text(json.dumps(self.stream.state_dict()))
            for name in (checkpoints.RECORD, METRICS, SAMPLES):  # another machine needs these to continue
                if (run / name).is_file():
                    shutil.copyfile(run / name, folder / name)
            copy_best(run, folder)
            checkpoints.write_manifest(folder)
            final = run / folder.name
            shutil.rmtree(final, ignore_errors=True)  # it has a defect, see above
            folder.rename(final)
            if pusher:
                pusher.offer(final)
            checkpoints.prune(run, step, self._policy.keep, pusher.in_use() if pusher else set())
        except Exception as error:
            if not disk_full(error):
                raise
            # a later save may find room again, and the older checkpoints are whole
            self._policy.warn(f"checkpoint {step} was not saved: the disk is full; training continues")
        finally:
            self._staging = None
            shutil.rmtree(staging, ignore_errors=True)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        with refuse_pickled_objects(checkpoint):
            super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            adapt_optimizer(cast(Any, self.optimizer), fused=self.args.device.type == "cuda")
        if checkpoint is None or not self._policy.replan:
            return
        # the loaded schedule has the learning rates of the run that saved it
        args, schedule, optimizer = self.args, cast(Any, self.lr_scheduler), cast(Any, self.optimizer)
        schedule.base_lrs = [args.learning_rate for _ in schedule.base_lrs]
        for group, factor in zip(optimizer.param_groups, schedule.lr_lambdas, strict=True):
            group["initial_lr"] = args.learning_rate
            group["lr"] = args.learning_rate * factor(schedule.last_epoch)
        optimizer.param_groups[0]["weight_decay"] = args.weight_decay  # the other group is never decayed
        schedule._last_lr = [group["lr"] for group in optimizer.param_groups]

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with refuse_pickled_objects(checkpoint):
            super()._load_rng_state(checkpoint)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        # Trainer's own also pickles its arguments, which may hold a token
        save_adapter(self.model, Path(str(output_dir)), self._architecture)
        self.processing_class.save_pretrained(output_dir)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        load_adapter(self.model, Path(resume_from_checkpoint), self._architecture)


@contextmanager
def refuse_pickled_objects(checkpoint: str | None) -> Generator[None]:
    """Raise UsageError for a checkpoint with other pickled objects than tensors; transformers does not load it."""
    try:
        yield
    except pickle.UnpicklingError as error:
        named = re.search(r"GLOBAL (\S+)", str(error))
        raise UsageError(
            what=f"{checkpoint} holds a pickled object that is no tensor{f': {named[1]}' if named else ''}.",
            why="Loading it could run a program. phoque does not load it, and writes no such file.",
            fix="Find out who wrote it. Once it is deleted here and where the run is kept, an earlier one is used.",
        ) from error


def adapt_optimizer(optimizer: Any, fused: bool) -> None:
    """Let a loaded AdamW run fused or not, whatever the machine that saved it ran.

    A checkpoint restores these options with its state: one from a CPU would not accept `found_inf` on a GPU.
    """
    for group in optimizer.param_groups:
        group["fused"], group["foreach"] = fused, None
        for parameter in group["params"]:
            state = optimizer.state.get(parameter)
            if state and torch.is_tensor(state.get("step")):  # fused kernels count steps where the weights are
                state["step"] = state["step"].to(parameter.device if fused else "cpu", torch.float32)
