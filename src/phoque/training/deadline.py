"""Stopping in good order: a signal is heeded at the end of a step, after a save; a second one stops at once."""

import signal
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

from transformers import TrainerCallback

from phoque.console import Console
from phoque.errors import INTERRUPTED, RESUMABLE


class StopRequest(TrainerCallback):
    """Remembers that a stop was asked for, and has the trainer save and stop when the step in hand is done."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.code: int | None = None

    @contextmanager
    def heeded(self) -> Generator[None]:
        """Take SIGINT and SIGTERM while the block runs."""
        before = {number: signal.signal(number, self._ask) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _ask(self, number: int, frame: Any) -> None:
        if self.code is not None:
            raise KeyboardInterrupt
        self.code = INTERRUPTED if number == signal.SIGINT else RESUMABLE
        self.console.say("stopping after this step and a save; once more stops at once")

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.code is not None:
            control.should_save = control.should_training_stop = True
