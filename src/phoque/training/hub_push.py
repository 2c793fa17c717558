"""Checkpoints on their way to the Hub, in the background while training goes on."""

import threading
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path

from phoque.console import Console
from phoque.errors import PhoqueError
from phoque.errors import Superseded
from phoque.hub.client import reason
from phoque.hub.repo import CARD, Repo, Snapshot
from phoque.training import checkpoints

COMMITS_AN_HOUR = 128  # the Hub's limit for a repository
SPARE = 8  # of them for the end of a run


class CheckpointPusher:
    """One thread and room for one waiting checkpoint: if pushes are slower than saves, the newest wins.

    `pushed` is the newest step that is on the Hub and was read back, `seconds` how long the slowest push took,
    `failure` why the last one that was tried is not there. `export` is called with each checkpoint that was pushed.
    """

    def __init__(
        self,
        repo: Repo,
        keep: int,
        card: Callable[[Path], Path],
        console: Console,
        every: int,
        export: Callable[[Path], None] = lambda folder: None,
    ) -> None:
        self._repo, self._keep, self._card, self._console, self._every = repo, keep, card, console, every
        self._export = export
        self._changed = threading.Condition()
        self._waiting: Path | None = None
        self._current: Path | None = None
        self._offered, self._warned = 0.0, False
        self._commits: deque[float] = deque()
        self._ending = False
        self._refused: PhoqueError | None = None
        self.pushed: int | None = None
        self.seconds, self.failure = 0.0, ""
        threading.Thread(target=self._work, daemon=True, name="push").start()

    def offer(self, folder: Path) -> None:
        """Have a checkpoint pushed; one that was still waiting is left out. Raises PhoqueError if none may be."""
        if self._refused:
            raise self._refused
        self._check_pace()
        with self._changed:
            self._waiting = folder
            self._changed.notify_all()

    def held(self) -> set[Path]:
        """The checkpoints that must not be deleted now."""
        with self._changed:
            return {folder for folder in (self._waiting, self._current) if folder}

    def drain(self, seconds: float | None = None) -> bool:
        """Wait until nothing is under way, at most `seconds`; return whether that was so."""
        end = None if seconds is None else time.monotonic() + seconds
        with self._changed:
            self._ending = True
            self._changed.notify_all()
            while self._waiting or self._current:
                left = 1.0 if end is None else min(1.0, end - time.monotonic())
                if left <= 0:
                    return False
                self._changed.wait(left)  # a second at most, so that a signal is heeded
        return True

    def _check_pace(self) -> None:
        now = time.monotonic()
        self._offered, since = now, self._offered
        if since and now - since < 3600 / COMMITS_AN_HOUR and not self._warned:
            self._warned = True
            self._console.warn(
                f"--save-steps {self._every} makes a checkpoint every {now - since:.0f} s, and the Hub takes "
                f"{COMMITS_AN_HOUR} commits an hour: when they are used up only the newest is pushed"
            )

    def _work(self) -> None:
        while True:
            with self._changed:
                self._current = None
                self._changed.notify_all()
                while self._waiting is None:
                    self._changed.wait()
                self._current, self._waiting = self._waiting, None
            step = checkpoints.step_of(self._current)
            try:
                begun = time.monotonic()
                self._push(self._current, step)
                self._console.say(f"checkpoint {step} is on the Hub ({time.monotonic() - begun:.0f} s)")
                self._exported(self._current)
                self.seconds = max(self.seconds, time.monotonic() - begun)
            except Superseded:
                self._console.say(f"checkpoint {step} is not pushed: a newer one is waiting")
            except PhoqueError as error:
                self._refused, self.failure = error, error.what
                self._console.warn(f"checkpoint {step} is not on the Hub: {error.what}")
            except Exception as error:  # of whatever kind: training goes on, and the end of the run says what is where
                self.failure = reason(error)
                self._console.warn(f"checkpoint {step} is not on the Hub: {self.failure}")

    def _exported(self, folder: Path) -> None:
        """The checkpoint's merged model, made on the way; that it is not is no reason to end a run."""
        try:
            self._export(folder)
        except Exception as error:
            what = error.what if isinstance(error, PhoqueError) else reason(error)
            self._console.warn(f"{folder.name} is on the Hub, but no merged model was made of it: {what}")

    def _push(self, folder: Path, step: int) -> None:
        self._keep_pace()
        files = {f"{folder.name}/{file.relative_to(folder)}": file for file in folder.rglob("*") if file.is_file()}
        files[CARD] = self._card(folder)
        before = self._repo.commits
        self._repo.push(files, f"Step {step}", lambda there: self._stale(there, step), self._wait)
        if self._repo.commits > before:
            self._commits.append(time.monotonic())
        self.pushed, self.failure = step, ""

    def _stale(self, there: Snapshot, step: int) -> list[str]:
        """All but the newest checkpoints up to this one; what lies beyond it is not this run's to delete."""
        older = [n for n in checkpoints.in_order(there.folders()) if checkpoints.step_of(Path(n)) < step]
        return older[self._keep - 1 :]

    def _keep_pace(self) -> None:
        while len(self._commits) >= COMMITS_AN_HOUR - SPARE and not self._ending:
            left = self._commits[0] + 3600 - time.monotonic()
            if left <= 0:
                self._commits.popleft()
            else:
                self._wait(left)

    def _wait(self, seconds: float) -> None:
        """Wait, unless something newer comes, which raises GivenUp, or the run ends."""
        end = time.monotonic() + seconds
        ending = self._ending
        with self._changed:
            while (left := end - time.monotonic()) > 0:
                if self._waiting is not None:
                    raise Superseded
                if self._ending and not ending:
                    return
                self._changed.wait(left)
