"""Pushes checkpoints to the run's store in a background thread during training."""

import threading
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path

from phoque.console import Console
from phoque.errors import PhoqueError, Superseded, UsageError
from phoque.hub.client import describe_error
from phoque.hub.store import CARD, Snapshot, Store, git_blob_id
from phoque.training import checkpoints

RESERVED_COMMITS = 8  # commits reserved for the end of a run


class CheckpointPusher:
    """Pushes from one thread with a queue of one: if pushes are slower than saves, only the newest is pushed.

    `pushed` is the newest step that is verified there, `seconds` the duration of the slowest push, `failure` why
    the last push failed ("" if it did not). `export` is called with each checkpoint after its push.
    """

    def __init__(
        self,
        store: Store,
        *,
        keep: int,
        card: Callable[[Path], Path],
        console: Console,
        every: int,
        export: Callable[[Path], None] = lambda folder: None,
    ) -> None:
        self._store, self._keep, self._card, self._console, self._every = store, keep, card, console, every
        self._export = export
        self._changed = threading.Condition()
        self._waiting: Path | None = None
        self._current: Path | None = None
        self._last_offer, self._warned = 0.0, False
        self._commits: deque[float] = deque()
        self._draining = False
        self._fatal_error: PhoqueError | None = None
        # git's hashes of manifests: of those that are accounted for in the store, and of those that this run has sent
        self._known: set[str] | None = None
        self._sent: set[str] = set()
        self._foreign_writes = 0
        self.pushed: int | None = None
        self.seconds, self.failure = 0.0, ""
        threading.Thread(target=self._work, daemon=True, name="push").start()

    def offer(self, folder: Path) -> None:
        """Queue a checkpoint, replacing one that still waits. Raises the PhoqueError of an earlier push."""
        if self._fatal_error:
            raise self._fatal_error
        self._check_pace()
        with self._changed:
            self._waiting = folder
            self._changed.notify_all()

    def in_use(self) -> set[Path]:
        """Return the waiting and the current checkpoint, which must not be deleted."""
        with self._changed:
            return {folder for folder in (self._waiting, self._current) if folder}

    def drain(self, seconds: float | None = None) -> bool:
        """Wait at most `seconds` for all pushes to finish; return whether they did."""
        end = None if seconds is None else time.monotonic() + seconds
        with self._changed:
            self._draining = True
            self._changed.notify_all()
            while self._waiting or self._current:
                remaining = 1.0 if end is None else min(1.0, end - time.monotonic())
                if remaining <= 0:
                    return False
                self._changed.wait(remaining)  # at most one second, so that signals are handled
        return True

    def _check_pace(self) -> None:
        now = time.monotonic()
        self._last_offer, previous = now, self._last_offer
        most = self._store.commits_per_hour
        if most and previous and now - previous < 3600 / most and not self._warned:
            self._warned = True
            self._console.warn(
                f"--save-steps {self._every} saves a checkpoint every {now - previous:.0f} s, and the Hub allows "
                f"{most} commits per hour: beyond that, only the newest checkpoint is pushed"
            )

    def _work(self) -> None:
        while True:
            with self._changed:
                self._current = None
                self._changed.notify_all()
                while self._waiting is None:
                    self._changed.wait()
                self._current, self._waiting = self._waiting, None
            step = checkpoints.get_step(self._current)
            try:
                start = time.monotonic()
                self._push(self._current, step)
                self._console.say(f"checkpoint {step} is {self._store.place} ({time.monotonic() - start:.0f} s)")
                self._export_merged(self._current)
                self.seconds = max(self.seconds, time.monotonic() - start)
            except Superseded:
                self._console.say(f"checkpoint {step} is not pushed: a newer one is waiting")
            except UsageError as error:
                self._fatal_error, self.failure = error, error.what
                self._console.warn(f"checkpoint {step} is not {self._store.place}: {error.what}")
            except Exception as error:  # training continues after any error; the end of the run reports what was pushed
                self.failure = describe_error(error)
                self._console.warn(f"checkpoint {step} is not {self._store.place}: {self.failure}")

    def _export_merged(self, folder: Path) -> None:
        """Export the checkpoint's merged model; a failure is a warning and does not stop the run."""
        try:
            self._export(folder)
        except Exception as error:
            what = error.what if isinstance(error, PhoqueError) else describe_error(error)
            self._console.warn(f"{folder.name} is {self._store.place}, but no merged model was created: {what}")

    def _push(self, folder: Path, step: int) -> None:
        self._wait_for_quota()
        files = {f"{folder.name}/{file.relative_to(folder)}": file for file in folder.rglob("*") if file.is_file()}
        files[CARD] = self._card(folder)
        if (manifest := folder / checkpoints.MANIFEST).is_file():
            self._sent.add(git_blob_id(manifest))
        before = self._store.commits
        self._store.push(files, f"Step {step}", lambda snapshot: self._find_old(snapshot, step), self._wait)
        if self._store.commits > before:
            self._commits.append(time.monotonic())
        self.pushed, self.failure = step, ""

    def _find_old(self, snapshot: Snapshot, step: int) -> list[str]:
        """Return the old checkpoints to delete; those after `step` and other programs' are kept.

        Raises UsageError if another process has written checkpoints twice since this run began to push.
        """
        self._notice_other_writers(snapshot)
        older = [
            name
            for name in checkpoints.sort_checkpoints(snapshot.checkpoint_folders())
            if checkpoints.get_step(Path(name)) < step and f"{name}/{checkpoints.MANIFEST}" in snapshot.files
        ]
        return older[self._keep - 1 :]

    def _notice_other_writers(self, snapshot: Snapshot) -> None:
        """Warn if another process has written a checkpoint; raise UsageError at the second one.

        The first may be the last push of an attempt that was killed before this one began. A manifest holds the hashes
        of all files of its checkpoint, the times in the logs among them, so no two processes write the same.
        """
        present = {
            file.blob_id: path.partition("/")[0]
            for path, file in snapshot.files.items()
            if path.endswith(f"/{checkpoints.MANIFEST}")
        }
        if self._known is None:  # the first push of this run: what is there was there before
            self._known = set(present)
        foreign = [name for blob_id, name in present.items() if blob_id not in self._known | self._sent]
        self._known |= set(present)
        self._foreign_writes += len(foreign)
        if foreign and self._foreign_writes > 1:
            raise UsageError(
                what=f"Another process is writing checkpoints to {self._store.name}.",
                why=f"{foreign[-1]} is not this run's. Two runs in one repository overwrite each other's work.",
                fix=f"Stop one of the two, or give one of them another {self._store.flag}.",
            )
        if foreign:
            self._console.warn(
                f"{foreign[-1]} in {self._store.name} was written by another process. "
                "If it writes again, this run stops"
            )

    def _wait_for_quota(self) -> None:
        most = self._store.commits_per_hour
        while most and len(self._commits) >= most - RESERVED_COMMITS and not self._draining:
            remaining = self._commits[0] + 3600 - time.monotonic()
            if remaining <= 0:
                self._commits.popleft()
            else:
                self._wait(remaining)

    def _wait(self, seconds: float) -> None:
        """Wait `seconds`, or until the run ends. Raises Superseded if a newer checkpoint arrives."""
        end = time.monotonic() + seconds
        was_draining = self._draining
        with self._changed:
            while (remaining := end - time.monotonic()) > 0:
                if self._waiting is not None:
                    raise Superseded
                if self._draining and not was_draining:
                    return
                self._changed.wait(remaining)
