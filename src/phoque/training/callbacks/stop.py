"""Stops a run at the end of a step, on a signal or before a deadline, with enough time left to save and push."""

import signal
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any

from transformers import TrainerCallback

from phoque.console import Console, format_duration
from phoque.errors import INTERRUPTED, RESUMABLE, PhoqueError, Resumable

GUESS_S = 60.0  # assumed seconds of a save or a push that has not been measured yet
RESERVE_S = 30.0  # safety margin; both are at most a tenth of the time limit
FIRST_SAVE_S = 60.0  # seconds from the first step to the first save in a Job whose time limit is not known
LAST_SAVE_INTERVAL_S = 1200.0  # the interval between such saves doubles up to this


class StopRequest(TrainerCallback):
    """Records a request to stop; the trainer then saves and stops after the current step.

    `deadline` is the time.time() at which the process will be killed, `time_limit` its total time in seconds. Where
    several processes train, all stop if one does: `agree` returns the largest of their codes. `push_s` returns the
    seconds of the slowest push, `find_problem` the error that the run must stop with, if any. A second signal stops at
    once.
    """

    def __init__(
        self,
        console: Console,
        deadline: float | None = None,
        time_limit: float = 0.0,
        agree: Callable[[int], int] | None = None,
    ) -> None:
        self.console, self.deadline, self._time_limit, self._agree = console, deadline, time_limit, agree
        self.code: int | None = None
        self._signalled = False
        self.push_s: Callable[[], float] = lambda: 0.0
        self.find_problem: Callable[[], PhoqueError | None] = lambda: None
        self.problem: PhoqueError | None = None
        self._started = False  # until the first step there is nothing to save
        self._finishing = False
        self._save_s = 0.0
        self._step_s = 0.0
        self._step_start = time.monotonic()

    @contextmanager
    def handle_signals(self) -> Generator[None]:
        """Handle SIGINT, SIGTERM and, unless nohup ignores it, SIGHUP (a closed terminal) inside the `with` block."""
        numbers = [signal.SIGINT, signal.SIGTERM]
        if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
            numbers.append(signal.SIGHUP)
        previous = {number: signal.signal(number, self._on_signal) for number in numbers}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    @property
    def seconds_left(self) -> float | None:
        """Seconds until the deadline; None without a deadline."""
        return None if self.deadline is None else self.deadline - time.time()

    def mark_finishing(self) -> None:
        """Note that the last step is done: the rest is short, so the first signal no longer interrupts it."""
        self._finishing = True

    def record_save(self, seconds: float) -> None:
        """Note how many seconds a save took."""
        self._save_s = max(self._save_s, seconds)

    def _on_signal(self, number: int, frame: Any) -> None:
        if self._signalled:
            raise KeyboardInterrupt
        self._signalled = True
        self.code = self.code or (INTERRUPTED if number == signal.SIGINT else RESUMABLE)
        if self._finishing:
            self.console.say("the last step is done: finishing the run; signal again to stop at once")
        elif self._started:
            self.console.say("stopping after this step and a save; signal again to stop at once")
        else:
            raise Resumable(
                what="Stopped before the first step.",
                why="Nothing was changed.",
                fix="Run the same command again.",
                code=self.code,
            )

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._started, self._step_start = True, time.monotonic()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        now = time.monotonic()
        self._step_s, self._step_start = max(now - self._step_start, 0.5 * self._step_s), now
        if self.code is None and (remaining := self.seconds_left) is not None and remaining < self._seconds_needed():
            self.code = RESUMABLE
            self.console.say(f"{format_duration(max(0.0, remaining))} to the deadline: saving and stopping")
        if self.code is None and (problem := self.find_problem()):
            self.code, self.problem = problem.code, problem
            self.console.say("too many rows are unusable: saving a checkpoint and stopping")
        if self._agree and (agreed := self._agree(self.code or 0)):
            self.code = self.code or agreed
        if self.code is not None:
            control.should_save = control.should_training_stop = True

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        # the request came during a save, so this checkpoint is current; of several processes only one may have heard it
        if self.code is not None and self._agree is None:
            control.should_training_stop = True

    def _seconds_needed(self) -> float:
        """Return the seconds that one more step, a save and a push may take."""
        guess, reserve = (min(limit, 0.1 * self._time_limit) for limit in (GUESS_S, RESERVE_S))
        return self._step_s + 1.5 * ((self._save_s or guess) + (self.push_s() or guess)) + reserve


class SaveWithoutLimit(TrainerCallback):
    """Saves by time, in a Job whose time limit is not known: after 1 minute, then 2, 4 and so on up to 20 minutes.

    The Hub does not tell a Job its limit, so a Job that was given none could be killed before its first save.
    """

    def __init__(self) -> None:
        self._interval = FIRST_SAVE_S
        self._last_save = time.monotonic()

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._last_save = time.monotonic()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if time.monotonic() - self._last_save > self._interval and state.global_step < state.max_steps:
            control.should_save = True

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._last_save = time.monotonic()
        self._interval = min(2 * self._interval, LAST_SAVE_INTERVAL_S)
