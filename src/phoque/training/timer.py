"""Where the time of a run goes: its steps, and by name what else it does."""

import time
from collections.abc import Generator
from contextlib import contextmanager

import torch


class Timer:
    """Seconds of training alone; what is paused for, such as samples or a save, is counted by its name instead."""

    def __init__(self) -> None:
        self._begun = self._since = time.monotonic()
        self._apart: dict[str, float] = {}

    @property
    def seconds(self) -> float:
        """All seconds so far."""
        return time.monotonic() - self._begun

    def loaded(self) -> None:
        """All until now was loading."""
        self._apart["loading"] = self.seconds

    def lap(self) -> float:
        """Seconds of training since the last lap."""
        now = time.monotonic()
        self._since, since = now, self._since
        return now - since

    @contextmanager
    def paused(self, name: str) -> Generator[None]:
        """Count what happens in the block as `name`, and not as training."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # steps that are still under way are training
        begun = time.monotonic()
        yield
        seconds = time.monotonic() - begun
        self._since += seconds
        self._apart[name] = self._apart.get(name, 0.0) + seconds

    def shares(self) -> dict[str, float]:
        """Seconds by what they went to, the most first."""
        found = {"steps": self.seconds - sum(self._apart.values())} | self._apart
        return {name: round(found[name], 1) for name in sorted(found, key=found.__getitem__, reverse=True)}
