"""Deal the rows of each step to the processes of a run, without communication: every process reads the same stream."""

from collections.abc import Iterator
from typing import Any

import torch

from phoque.data.stream import TrainStream
from phoque.distributed.processes import Processes, deal


class DealtStream:
    """This process's rows of each step of a stream; `labels` is the number of trained tokens of the whole step.

    Rows are dealt by length, the longest first and back and forth, so that all processes have about as many tokens.
    The state is that after the whole step, so that any number of processes that divides a step can go on from it.
    """

    def __init__(self, stream: TrainStream, rows_per_step: int, processes: Processes) -> None:
        self._stream, self._rows, self._processes = stream, rows_per_step, processes
        self.labels = 0
        self.numbers: list[int] = []  # of this process's rows in the step

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self._stream, name)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        step: list[dict[str, Any]] = []
        for batch in self._stream:
            step.append(batch)
            if len(step) == self._rows:
                self.labels = sum(len(row["loss_at"]) for row in step)
                self.numbers = deal([row["input_ids"].shape[1] for row in step], self._processes)
                yield from (step[number] for number in self.numbers)
                step = []


def seed_row(seed: int, step: int, number: int) -> None:
    """Seed dropout by the row, so that a resumed run drops out the same, whichever process has the row."""
    torch.manual_seed(hash((seed, step, number)) & 0x7FFFFFFF)
