"""TRL's SFTTrainer with our data stream, our loss on labelled tokens, and checkpoints that are whole or absent."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer
from trl import SFTConfig, SFTTrainer

from phoque.data.stream import TrainStream
from phoque.errors import FAILED, PhoqueError, disk_full
from phoque.models.adapter import load_adapter, refuse_non_finite, save_adapter
from phoque.models.families import Family
from phoque.training import checkpoint
from phoque.training.callbacks.numbers import Stopwatch
from phoque.training.loss import TokenLoss, with_token_loss


class PersonaTrainer(SFTTrainer):
    """One optimizer step trains on packed conversations from a stream whose state lies in every checkpoint."""

    model: Any
    processing_class: Any

    def __init__(
        self, model: Any, tokenizer: Any, args: SFTConfig, stream: TrainStream, family: Family, keep: int,
        warn: Callable[[str], None], watch: Stopwatch, callbacks: list[Any],
    ) -> None:  # fmt: skip
        from datasets import IterableDataset

        # SFTTrainer looks at one row of a dataset to learn its columns; the batches come from `stream`
        columns = IterableDataset.from_generator(lambda: iter([{"input_ids": [0, 0], "labels": [0, 0]}]))
        super().__init__(
            model=model, args=args, train_dataset=columns, processing_class=tokenizer, callbacks=callbacks
        )  # fmt: skip
        self.stream, self._keep, self._warn, self._watch, self._family = stream, keep, warn, watch, family
        self._staging: str | None = None
        with_token_loss(self.model.get_base_model())
        for parameter in self.model.parameters():
            if parameter.requires_grad:
                # SFTTrainer makes a QLoRA adapter bf16, where a step of 2e-4 is lost against a weight of 0.1
                parameter.data = parameter.data.float()

    def get_train_dataloader(self) -> Any:
        return self.stream

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> torch.Tensor:
        found: TokenLoss = model(**inputs, token_loss=True)
        self._metrics["train"]["accuracy"].append(found.right / found.count)
        return found.nll / (found.count if num_items_in_batch is None else num_items_in_batch)

    def _clip_grad_norm(self, model: Any) -> Any:
        # Any NaN or infinity in the loss or a gradient shows here, before the optimizer can write it into a weight.
        norm = super()._clip_grad_norm(model)
        if not math.isfinite(float(norm)):
            step = self.state.global_step + 1
            raise PhoqueError(
                f"The loss or its gradient is not finite at step {step}.",
                "Usually the learning rate is too high, or one row is extreme.",
                f"The checkpoint before it is whole: lower --learning-rate (now {self.args.learning_rate:g}) "
                "and begin anew with --fresh-start.",
                FAILED,
            )
        return norm

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        accuracy = self._metrics["train"].pop("accuracy", [])
        if accuracy and "loss" in logs:
            logs["accuracy"] = torch.stack(accuracy).mean().item()
        Trainer.log(self, logs, start_time)

    def _get_output_dir(self, trial: Any) -> str:
        return self._staging or super()._get_output_dir(trial)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        with self._watch.paused():
            self._save_whole(model, trial)

    def _save_whole(self, model: Any, trial: Any) -> None:
        run = Path(str(self.args.output_dir))
        step = self.state.global_step
        refuse_non_finite(self.model, step)
        staging = run / checkpoint.STAGING
        self._staging = str(staging)
        try:
            Trainer._save_checkpoint(self, model, trial)  # not TRL's, which writes its own model card
            folder = staging / f"checkpoint-{step}"
            (folder / checkpoint.DATA_STATE).write_text(json.dumps(self.stream.state_dict()))
            checkpoint.write_manifest(folder)
            final = run / folder.name
            shutil.rmtree(final, ignore_errors=True)  # only ever one that was found not to be whole
            folder.rename(final)
            checkpoint.prune(run, self._keep)
        except Exception as error:
            if not disk_full(error):
                raise
            # a later save may find room again, and the older checkpoints are whole
            self._warn(f"checkpoint {step} was not saved: the disk is full; training goes on")
        finally:
            self._staging = None
            shutil.rmtree(staging, ignore_errors=True)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        # Trainer's own also pickles its arguments, which is where tokens leak
        save_adapter(self.model, Path(str(output_dir)), self._family)
        self.processing_class.save_pretrained(output_dir)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        load_adapter(self.model, Path(resume_from_checkpoint), self._family)
