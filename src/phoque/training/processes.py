"""What the processes of one run do together: deal the rows of a step, add up gradients, and decide as one.

Every process reads the same stream and packs the same rows, so a step's rows are dealt without a word. Each takes its
share, and the gradients of all are summed before the optimizer's step: the sum over the step's tokens is what a single
process would have, to rounding. The adapter is small (132 MB in fp32 at 3B), so one all-reduce per step is enough;
weights stay equal because every process takes the same step from the same sum. Process 0 alone writes, pushes, measures
and speaks.
"""

import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch

from phoque.console import Console
from phoque.data.stream import TrainStream
from phoque.errors import FAILED, RunError, UsageError, first_line
from phoque.training.launch import Launch

T = TypeVar("T")
PATIENCE = timedelta(hours=2)  # while process 0 reads, measures or answers, the others wait
NVIDIA_DRIVER = Path("/proc/driver/nvidia/version")
BEAT_S = 5.0
SILENCE_S = 45.0  # after which a process that gives no sign of life is taken for dead


class Processes:
    """The processes of a run; one that trains alone is process 0 of 1."""

    def __init__(self, rank: int = 0, size: int = 1, store: Any = None) -> None:
        self.rank, self.size, self._store = rank, size, store
        self._finished, self._is_watching = threading.Event(), False

    @property
    def is_main(self) -> bool:
        """Whether this is process 0."""
        return self.rank == 0

    def decide(self, choose: Callable[[], T]) -> T:
        """Return what process 0 chooses, in every process. If it raises, it says why, and the others end silently."""
        if self.size == 1:
            return choose()
        chosen: list[Any] = [choose() if self.is_main else None]
        try:
            torch.distributed.broadcast_object_list(chosen, src=0, device=torch.device("cpu"))
        except RuntimeError:
            if self.is_main:
                raise
            raise SystemExit(FAILED) from None
        return chosen[0]

    def agree(self, code: int) -> int:
        """The largest of all processes' codes; every process has to ask at the same place. Raises RunError."""
        if self.size == 1:
            return code
        codes = torch.tensor([int(code)])
        self._reduce(codes, torch.distributed.ReduceOp.MAX)
        return int(codes)

    def sum(self, tensor: torch.Tensor) -> None:
        """Replace a tensor by the sum over all processes. Raises RunError if one of them is gone."""
        if self.size > 1:
            self._reduce(tensor, torch.distributed.ReduceOp.SUM)

    def _reduce(self, tensor: torch.Tensor, operation: Any) -> None:
        try:
            torch.distributed.all_reduce(tensor, operation)
        except RuntimeError as error:
            raise RunError(
                what=f"Process {self.rank} of {self.size} has lost another one.",
                why=f"{first_line(error)[:120]}.",
                fix="Run the same command again: it continues from the newest checkpoint.",
            ) from error

    def sum_gradients(self, parameters: Sequence[torch.Tensor], flat: torch.Tensor | None) -> None:
        """Replace gradients by their sums over all processes; `flat` holds all of them, if one tensor does."""
        if self.size == 1:
            return
        if flat is not None:
            return self.sum(flat)
        gradients = [p.grad for p in parameters if p.grad is not None]
        joined = torch.cat([gradient.reshape(-1) for gradient in gradients])
        self.sum(joined)
        for gradient, part in zip(gradients, joined.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(part.view_as(gradient))

    def equalize(self, tensors: Sequence[torch.Tensor]) -> None:
        """Give every process the values that process 0 has."""
        if self.size > 1:
            for tensor in tensors:
                torch.distributed.broadcast(tensor.data, src=0)

    def share(self, path: Path | None) -> None:
        """Give every process the file, or the folder's files, that process 0 has; a shared disk has them already."""
        if self.size == 1 or path is None:
            return
        files = lambda: [path] if path.is_file() else [file for file in sorted(path.rglob("*")) if file.is_file()]
        for name in self.decide(lambda: [str(file) for file in files()]):
            content, target = self.decide(Path(name).read_bytes), Path(name)
            if not self.is_main and not (target.is_file() and target.read_bytes() == content):
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(content)

    def watch(self, console: Console) -> None:
        """Begin to give signs of life, and end this process if another one gives none any more."""
        if self.size > 1 and not self._is_watching:
            self._is_watching = True
            threading.Thread(target=self._watch, args=(console,), daemon=True, name="watch").start()

    def _watch(self, console: Console) -> None:
        own, seen = f"life/{self.rank}", dict.fromkeys(range(self.size), (-1, time.monotonic()))
        while not self._finished.wait(BEAT_S):
            try:
                self._store.add(own, 1)
                beats = {rank: self._store.add(f"life/{rank}", 0) for rank in seen}
                over = [rank for rank in seen if self._store.check([f"over/{rank}"])]
            except Exception:  # the store is in process 0, or in the launcher
                if not self._finished.is_set():
                    self._end(console, "process 0 is gone")
                return
            now = time.monotonic()
            for rank, beat in beats.items():
                if beat != seen[rank][0] or rank in over:
                    seen[rank] = beat, now
                elif now - seen[rank][1] > SILENCE_S:
                    self._end(console, f"process {rank} has given no sign of life for {now - seen[rank][1]:.0f} s")

    def _end(self, console: Console, why: str) -> None:
        console.error(
            RunError(
                what=f"Process {self.rank} of {self.size} ends: {why}.",
                why="The processes of a run need each other at every step.",
                fix="Run the same command again: it continues from the newest checkpoint.",
            )
        )
        os._exit(FAILED)  # the main thread waits inside a collective operation

    def finish(self) -> None:
        """Take no further part: what is left is process 0's alone."""
        self._finished.set()
        if self.size > 1:
            with suppress(RuntimeError):  # process 0 may be gone, and with it the store
                self._store.set(f"over/{self.rank}", "1")
            torch.distributed.destroy_process_group()


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


def deal(lengths: Sequence[int], processes: Processes) -> list[int]:
    """The rows that this process gets, as indices into the `lengths` of a step's rows: as many for each process."""
    order = sorted(range(len(lengths)), key=lambda number: -lengths[number])
    size, rank = processes.size, processes.rank
    rounds = [order[start : start + size] for start in range(0, len(order), size)]
    return [members[rank if n % 2 == 0 else size - 1 - rank] for n, members in enumerate(rounds)]


_joined = Processes()


def current() -> Processes:
    """The processes that this one trains with; it alone unless `join` was called."""
    return _joined


def join(launch: Launch) -> Processes:
    """Meet the other processes of a launch, once per process."""
    global _joined
    if _joined.size > 1:
        return _joined
    if NVIDIA_DRIVER.exists() and not torch.cuda.is_available():
        raise UsageError(
            what=f"There is no GPU for process {launch.local_rank + 1} of this machine.",
            why="Each process trains on a GPU of its own.",
            fix="Launch at most as many processes per machine as it has GPUs.",
        )
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    meeting = f"tcp://{launch.address}:{launch.port}?rank={launch.rank}&world_size={launch.size}"
    store, _, _ = next(torch.distributed.rendezvous(meeting))
    store.set_timeout(PATIENCE)
    torch.distributed.init_process_group(
        backend,
        store=torch.distributed.PrefixStore("phoque", store),
        rank=launch.rank,
        world_size=launch.size,
        timeout=PATIENCE,
    )
    _joined = Processes(launch.rank, launch.size, store)
    return _joined


def seed_row(seed: int, step: int, number: int) -> None:
    """Seed dropout by the row, so that a resumed run drops out the same, whichever process has the row."""
    torch.manual_seed(hash((seed, step, number)) & 0x7FFFFFFF)
