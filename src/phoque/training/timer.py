"""Measures how a run spends its time: on training steps, and by name on everything else."""

import time
from collections.abc import Generator
from contextlib import contextmanager

import torch


class Timer:
    """Measures training time; other work, such as samples or a save, is measured separately by name."""

    def __init__(self) -> None:
        self._start = self._lap_start = time.monotonic()
        self._by_name: dict[str, float] = {}

    @property
    def seconds(self) -> float:
        """All seconds so far."""
        return time.monotonic() - self._start

    def mark_loaded(self) -> None:
        """Count all time so far as loading."""
        self._by_name["loading"] = self.seconds

    def lap(self) -> float:
        """Return the seconds of training since the last lap."""
        now = time.monotonic()
        self._lap_start, previous = now, self._lap_start
        return now - previous

    @contextmanager
    def measure(self, name: str) -> Generator[None]:
        """Count the time of the `with` block as `name`, not as training."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # steps that still run on the GPU count as training
        start = time.monotonic()
        yield
        seconds = time.monotonic() - start
        self._lap_start += seconds
        self._by_name[name] = self._by_name.get(name, 0.0) + seconds

    def seconds_by_name(self) -> dict[str, float]:
        """Return seconds by name, the largest first."""
        seconds_of = {"steps": self.seconds - sum(self._by_name.values())} | self._by_name
        return {
            name: round(seconds_of[name], 1) for name in sorted(seconds_of, key=seconds_of.__getitem__, reverse=True)
        }
