"""TRL's SFTTrainer with our data stream, our loss on labelled tokens, and checkpoints that are whole or absent."""

import json
import math
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from transformers import Trainer
from trl import SFTConfig, SFTTrainer

from phoque.data.stream import TrainStream
from phoque.errors import FAILED, PhoqueError, disk_full
from phoque.models.architectures import Architecture
from phoque.models.lora import check_finite, load_adapter, save_adapter
from phoque.training import checkpoints
from phoque.training.engine.engine import Engine
from phoque.training.engine.loss import TokenLoss, with_token_loss
from phoque.training.hub_push import CheckpointPusher
from phoque.training.metrics_log import METRICS, SAMPLES
from phoque.training.timer import Timer


@dataclass
class Saves:
    """What belongs to a save beside the trainer's own state.

    `keep` checkpoints stay in the run folder; `pusher` brings each to the Hub; `took` learns how long it lasted;
    `replan` sets the schedule from the settings instead of the checkpoint, for a change that was allowed.
    """

    keep: int
    pusher: CheckpointPusher | None
    took: Callable[[float], None]
    warn: Callable[[str], None]
    replan: bool


class PersonaTrainer(SFTTrainer):
    """One optimizer step trains on packed conversations from a stream whose state lies in every checkpoint."""

    model: Any
    processing_class: Any

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        args: SFTConfig,
        stream: TrainStream,
        family: Architecture,
        saves: Saves,
        watch: Timer,
        callbacks: list[Any],
        engine: Engine | None = None,
    ) -> None:
        from datasets import IterableDataset

        # SFTTrainer looks at one row of a dataset to learn its columns; the batches come from `stream`
        columns = IterableDataset.from_generator(lambda: iter([{"input_ids": [0, 0], "labels": [0, 0]}]))
        # SFTTrainer makes the adapter of a 4-bit model bf16, where a step of 2e-4 is lost against a weight of 0.1
        model.is_loaded_in_4bit = False
        super().__init__(model=model, args=args, train_dataset=columns, processing_class=tokenizer, callbacks=callbacks)
        del model.is_loaded_in_4bit
        self.stream, self._family, self._saves, self._watch = stream, family, saves, watch
        self._staging: str | None = None
        self._unseen: tuple[int, torch.Tensor, Any] | None = None  # a gradient norm that is on its way to the CPU
        with_token_loss(self.model.get_base_model(), engine)

    def get_train_dataloader(self) -> Any:
        return self.stream

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        # Trainer's own waits for each copy, and so for all that the GPU still has to do for the step before
        device = self.args.device
        return {k: v.to(device, non_blocking=True) if torch.is_tensor(v) else v for k, v in inputs.items()}

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> int:
        return sum(len(batch["loss_at"]) for batch in batch_samples)

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> torch.Tensor:
        found: TokenLoss = model(**inputs, token_loss=True)
        self._metrics["train"]["accuracy"].append(found.right / found.count)
        return found.nll / (found.count if num_items_in_batch is None else num_items_in_batch)

    def _clip_grad_norm(self, model: Any) -> Any:
        # Any NaN or infinity in the loss or a gradient shows here, before the optimizer can write it into a weight.
        norm = super()._clip_grad_norm(model)
        self._refuse_unseen()
        if norm.is_cuda:
            # fused AdamW leaves out a step whose `found_inf` is 1, so the number itself may come a step later:
            # waiting for it here would leave the GPU without work
            cast(Any, self.optimizer).optimizer.found_inf = (~norm.isfinite()).float()
            seen, arrived = norm.to("cpu", non_blocking=True), torch.cuda.Event()
            arrived.record()
            self._unseen = self.state.global_step + 1, seen, arrived
        else:
            self._unseen = self.state.global_step + 1, norm, None
            self._refuse_unseen()
        return norm

    def _refuse_unseen(self) -> None:
        """Raise PhoqueError (1) if the gradient norm that was measured last is not finite."""
        if self._unseen is None:
            return
        (step, norm, arrived), self._unseen = self._unseen, None
        if arrived:
            arrived.synchronize()
        if not math.isfinite(float(norm)):
            raise PhoqueError(
                f"The loss or its gradient is not finite at step {step}.",
                "Usually the learning rate is too high, or one row is extreme.",
                "Run the same command: it goes on from the checkpoint before. If it happens again, lower "
                f"--learning-rate (now {self.args.learning_rate:g}) with --allow-change learning_rate.",
                FAILED,
            )

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        accuracy = self._metrics["train"].pop("accuracy", [])
        if accuracy and "loss" in logs:
            logs["accuracy"] = torch.stack(accuracy).mean().item()
        Trainer.log(self, logs, start_time)

    def _get_output_dir(self, trial: Any) -> str:
        return self._staging or super()._get_output_dir(trial)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        begun = time.monotonic()
        with self._watch.paused("saving"):
            self._save_whole(model, trial)
        self._saves.took(time.monotonic() - begun)

    def _save_whole(self, model: Any, trial: Any) -> None:
        run = Path(str(self.args.output_dir))
        step = self.state.global_step
        if checkpoints.find_defect(run / f"checkpoint-{step}") is None:
            return  # asked to stop right after it was saved
        self._refuse_unseen()
        check_finite(self.model, step)
        staging = run / checkpoints.STAGING
        self._staging = str(staging)
        pusher = self._saves.pusher
        try:
            Trainer._save_checkpoint(self, model, trial)  # not TRL's, which writes its own model card
            folder = staging / f"checkpoint-{step}"
            (folder / checkpoints.DATA_STATE).write_text(json.dumps(self.stream.state_dict()))
            for name in (checkpoints.RECORD, METRICS, SAMPLES):  # all that another machine needs to go on
                if (run / name).is_file():
                    shutil.copyfile(run / name, folder / name)
            checkpoints.write_manifest(folder)
            final = run / folder.name
            shutil.rmtree(final, ignore_errors=True)  # only ever one that was found not to be whole
            folder.rename(final)
            if pusher:
                pusher.offer(final)
            checkpoints.prune(run, self._saves.keep, pusher.held() if pusher else set())
        except Exception as error:
            if not disk_full(error):
                raise
            # a later save may find room again, and the older checkpoints are whole
            self._saves.warn(f"checkpoint {step} was not saved: the disk is full; training goes on")
        finally:
            self._staging = None
            shutil.rmtree(staging, ignore_errors=True)

    def _load_optimizer_and_scheduler(self, checkpoint: Any) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None or not self._saves.replan:
            return
        # a loaded schedule knows the learning rates of the run that saved it, and would go on with them
        args, schedule, optimizer = self.args, cast(Any, self.lr_scheduler), cast(Any, self.optimizer)
        schedule.base_lrs = [args.learning_rate for _ in schedule.base_lrs]
        for group, plan in zip(optimizer.param_groups, schedule.lr_lambdas, strict=True):
            group["initial_lr"] = args.learning_rate
            group["lr"] = args.learning_rate * plan(schedule.last_epoch)
        optimizer.param_groups[0]["weight_decay"] = args.weight_decay  # the other group is what is never decayed
        schedule._last_lr = [group["lr"] for group in optimizer.param_groups]

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        # Trainer's own also pickles its arguments, which is where tokens leak
        save_adapter(self.model, Path(str(output_dir)), self._family)
        self.processing_class.save_pretrained(output_dir)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        load_adapter(self.model, Path(resume_from_checkpoint), self._family)
