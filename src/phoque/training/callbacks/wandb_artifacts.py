"""Logs the adapter of each saved checkpoint as a W&B model artifact, for WANDB_LOG_MODEL=checkpoint."""

from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from phoque.training.metrics_log import Tracker


class WandbArtifactsCallback(TrainerCallback):
    """Logs one artifact version per save."""

    def __init__(self, tracker: Tracker) -> None:
        self.tracker = tracker

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if folder.is_dir():
            self.tracker.log_adapter(folder, state.global_step)
