"""Stopping in good order: at a signal or before a deadline, at the end of a step, with time to save and push."""

import signal
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any

from transformers import TrainerCallback

from phoque.console import Console, clock
from phoque.errors import INTERRUPTED, RESUMABLE, Stopped

GUESS_S = 60.0  # a save or a push that has not been measured yet
RESERVE_S = 30.0  # what is kept back beyond what was measured; both at most a tenth of the time there is


class StopRequest(TrainerCallback):
    """Remembers that a stop was asked for, and has the trainer save and stop when the step in hand is done.

    `deadline` is the time.time() at which the process is killed, `allowed` how many seconds it had in all. `push_s`
    tells how long a push takes. A second signal stops at once.
    """

    def __init__(self, console: Console, deadline: float | None = None, allowed: float = 0.0) -> None:
        self.console, self.deadline, self._allowed = console, deadline, allowed
        self.code: int | None = None
        self._signalled = False
        self.push_s: Callable[[], float] = lambda: 0.0
        self._begun = False  # until the first step there is nothing to save
        self._ending = False
        self._save_s = 0.0
        self._step_s = 0.0
        self._since = time.monotonic()

    @contextmanager
    def heeded(self) -> Generator[None]:
        """Take SIGINT and SIGTERM while the block runs."""
        before = {number: signal.signal(number, self._ask) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    @property
    def left(self) -> float | None:
        """Seconds to the deadline, if there is one."""
        return None if self.deadline is None else self.deadline - time.time()

    def ending(self) -> None:
        """The last step is done: what is left is short, and is not given up at a signal."""
        self._ending = True

    def saved_in(self, seconds: float) -> None:
        """A save took so long."""
        self._save_s = max(self._save_s, seconds)

    def _ask(self, number: int, frame: Any) -> None:
        if self._signalled:
            raise KeyboardInterrupt
        self._signalled = True
        self.code = self.code or (INTERRUPTED if number == signal.SIGINT else RESUMABLE)
        if self._ending:
            self.console.say("finishing first: the last step is done; once more stops at once")
        elif self._begun:
            self.console.say("stopping after this step and a save; once more stops at once")
        else:
            raise Stopped(
                "Stopped before the first step.", "Nothing was changed.", "Run the same command to go on.", self.code
            )

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._begun, self._since = True, time.monotonic()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        now = time.monotonic()
        self._step_s, self._since = max(now - self._since, 0.5 * self._step_s), now
        if self.code is None and (left := self.left) is not None and left < self._needed():
            self.code = RESUMABLE
            self.console.say(f"{clock(max(0.0, left))} to the deadline: saving and stopping")
        if self.code is not None:
            control.should_save = control.should_training_stop = True

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.code is not None:  # asked for while it was saving: that was the save
            control.should_training_stop = True

    def _needed(self) -> float:
        """Seconds that one more step and then a save and a push may take."""
        guess, reserve = (min(most, 0.1 * self._allowed) for most in (GUESS_S, RESERVE_S))
        return self._step_s + 1.5 * ((self._save_s or guess) + (self.push_s() or guess)) + reserve
