"""A training run in memory: its settings, what was prepared for it, where it is stored and where it starts from."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from phoque.console import Console
from phoque.hub.store import Store
from phoque.services import Services
from phoque.settings.fields import Resolved
from phoque.settings.train import TrainSettings
from phoque.training import checkpoints
from phoque.training.callbacks.stop import StopRequest
from phoque.training.prepare import Prepared


@dataclass
class StartState:
    """Where a run starts: `record` is None if it has none yet; `resume` is the checkpoint that it continues from."""

    run_id: str
    record: dict[str, Any] | None = None
    resume: Path | None = None
    marker: dict[str, Any] | None = None  # of the fresh start that the run began with
    is_fresh: bool = False  # that fresh start was made by this process
    on_hub: bool = False  # a checkpoint of the same name is in the repository already

    @property
    def result(self) -> dict[str, Any] | None:
        """The result of a run that is complete, else None."""
        return (self.record or {}).get("result")


@dataclass(kw_only=True)
class Run:
    """A run that has started."""

    resolved: Resolved[TrainSettings]
    services: Services
    prepared: Prepared
    folder: Path
    start: StartState
    record: dict[str, Any]
    store: Store | None
    stop: StopRequest

    @property
    def settings(self) -> TrainSettings:
        """The settings of the run."""
        return self.resolved.settings

    @property
    def console(self) -> Console:
        """Where progress is shown."""
        return self.services.console

    @property
    def first_step(self) -> int:
        """The step of the checkpoint that the run continues from, 0 for a new run."""
        return checkpoints.get_step(self.start.resume) if self.start.resume else 0
