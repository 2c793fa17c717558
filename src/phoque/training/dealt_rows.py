"""Deal the rows of each step to the processes of a run, without communication: every process reads the same stream."""

from collections.abc import Iterator
from typing import Any

import torch

from phoque.data.stream import PackedRow, Step, TrainStream
from phoque.distributed.processes import Processes, deal


class DealtStream(TrainStream):
    """This process's rows of each step of a stream; `step` describes the whole step.

    Rows are dealt by length, the longest first and back and forth, so that all processes have about as many tokens.
    Each process packs all rows, and encodes its own. The state is that after the whole step, so that any number of
    processes that divides a step can go on from it.
    """

    def __init__(self, *args: Any, rows_per_step: int, processes: Processes, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._rows_per_step, self._processes = rows_per_step, processes

    def _make_batches(self) -> Iterator[tuple[dict[str, Any], Step]]:
        rows: list[PackedRow] = []
        for row in self._pack_rows():
            rows.append(row)
            if len(rows) == self._rows_per_step:
                numbers = deal([row.tokens for row in rows], self._processes)
                step = Step(row.state, sum(row.trained_tokens for row in rows), numbers)
                for number in numbers:
                    yield self._build_batch(rows[number]), step
                rows = []


def seed_row(seed: int, step: int, number: int) -> None:
    """Seed dropout by the row, so that a resumed run drops out the same, whichever process has the row."""
    torch.manual_seed(hash((seed, step, number)) & 0x7FFFFFFF)
