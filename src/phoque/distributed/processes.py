"""What the processes of one command do together: share work, sum gradients, and stop at the same step.

All processes run the same program on the same data, so rows are dealt without communication. In training the gradients
of all processes are summed before the optimizer's step: the sum over the step's tokens is what a single process would
have, to rounding. The adapter is small (99 MB in fp32 at 3B), so one all-reduce per step is enough, and weights stay
equal because every process takes the same step from the same sum. In a probe each process answers and reads its share
of the rows, and all get the results. Process 0 alone writes the run folder, uploads, evaluates and prints.
"""

import os
import threading
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch

from phoque.console import Console
from phoque.distributed.launch import AGAIN, Launch
from phoque.errors import FAILED, INTERRUPTED, PhoqueError, Resumable, RunError, UsageError, first_line
from phoque.files import sha256

T = TypeVar("T")
COLLECTIVE_TIMEOUT = timedelta(days=30)  # process 0 may read, measure or generate for hours while the others wait
NVIDIA_DRIVER = Path("/proc/driver/nvidia/version")
WAIT_FOR_MAIN_S = 5.0
HEARTBEAT_S = 5.0
HEARTBEAT_TIMEOUT_S = 45.0


class LostProcess(RunError):
    """Another process of the run has ended or is not reachable."""


def is_connection_error(error: RuntimeError) -> bool:
    """Whether a collective operation of torch failed: gloo names itself, and NCCL's errors have their own type."""
    return isinstance(error, torch.distributed.DistError) or "gloo" in str(error)


class Processes:
    """The processes of a command; one that works alone is process 0 of 1. `local_rank` counts those of its machine."""

    def __init__(self, rank: int = 0, size: int = 1, store: Any = None, local_rank: int = 0) -> None:
        self.rank, self.size, self._store, self._local_rank = rank, size, store, local_rank
        self._finished, self._is_watching = threading.Event(), False
        self._last_answer = 0.0  # time.monotonic() when the store answered last

    @property
    def is_main(self) -> bool:
        """Whether this is process 0."""
        return self.rank == 0

    def broadcast_from_main(self, choose: Callable[[], T]) -> T:
        """Return what process 0 chooses, in every process. If it raises an error, process 0 alone reports it."""
        if self.size == 1:
            return choose()
        chosen: list[Any] = [choose() if self.is_main else None]
        try:
            with self.name_lost_connections():
                torch.distributed.broadcast_object_list(chosen, src=0, device=torch.device("cpu"))
        except LostProcess:
            if self.is_main:
                raise
            raise SystemExit(FAILED) from None
        return chosen[0]

    @contextmanager
    def main_first(self) -> Generator[None]:
        """Let process 0 finish the block before the others begin it: they find what it has put into a cache."""
        if not self.is_main:
            self.broadcast_from_main(bool)
        yield
        if self.is_main:
            self.broadcast_from_main(bool)

    def check_one_machine(self, command: str) -> None:
        """Raise UsageError if the processes of a command that needs a common cache are on several machines."""
        if self.max_over_processes(self.rank != self._local_rank):
            raise UsageError(
                what=f"{command} uses the GPUs of one machine.",
                why="Its processes were launched on several, and share no cache.",
                fix="Launch it on one machine, or with --gpus.",
            )

    def check_same(self, value: Any) -> None:
        """Raise RunError if the processes have different values, such as two commits of one branch."""
        if self.size > 1 and any(other != value for other in self._gather(value)):
            raise RunError(
                what="The processes of this command have different inputs.",
                why=f"Process {self.rank} has {str(value)[:120]}.",
                fix="Run it again; if it fails again, run it without --gpus and report this.",
            )

    def share_work(
        self, costs: Sequence[int], run: Callable[[list[int]], Sequence[T]], *, only_main: bool = False
    ) -> list[T]:
        """Run a share of the items in each process, and return the results of all items in order, in every process.

        `costs` has a number for each item, such as its tokens; `run` gets indices into it and returns one result for
        each. Every process has to ask for the same items at the same place. With `only_main` process 0 gets the
        results, and the others an empty list. Raises LostProcess.
        """
        if self.size == 1:
            return list(run(list(range(len(costs)))))
        self.check_same(list(costs))
        numbers = deal(costs, self)
        parts = self._gather((numbers, list(run(numbers))), only_main=only_main)
        results = {number: result for numbers, part in parts for number, result in zip(numbers, part, strict=True)}
        return [results[number] for number in range(len(costs))] if parts else []

    def _gather(self, value: Any, *, only_main: bool = False) -> list[Any]:
        """The values of all processes; with `only_main` an empty list in all but process 0."""
        values: list[Any] = [None] * self.size
        with self.name_lost_connections():
            if not only_main:
                torch.distributed.all_gather_object(values, value)
                return values
            torch.distributed.gather_object(value, values if self.is_main else None, dst=0)
        return values if self.is_main else []

    def max_over_processes(self, code: int) -> int:
        """The largest of all processes' codes; every process has to ask at the same place. Raises LostProcess."""
        if self.size == 1:
            return code
        codes = torch.tensor([int(code)])
        self._reduce(codes, torch.distributed.ReduceOp.MAX)
        return int(codes)

    def wait_for_all(self) -> None:
        """Wait until every process is here. Raises LostProcess."""
        self.max_over_processes(0)

    def sum(self, tensor: torch.Tensor) -> None:
        """Replace a tensor by the sum over all processes. Raises LostProcess if one of them is gone."""
        if self.size > 1:
            self._reduce(tensor, torch.distributed.ReduceOp.SUM)

    def _reduce(self, tensor: torch.Tensor, operation: Any) -> None:
        with self.name_lost_connections():
            torch.distributed.all_reduce(tensor, operation)

    @contextmanager
    def name_lost_connections(self, is_lost: Callable[[RuntimeError], bool] = lambda error: True) -> Generator[None]:
        """Raise LostProcess for torch's errors in the block: any but out of memory, or those that are `is_lost`."""
        try:
            yield
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            if self.size == 1 or not is_lost(error):
                raise
            raise LostProcess(
                what=f"Process {self.rank} of {self.size} lost the connection to another process.",
                why=f"{first_line(error)[:120]}.",
                fix=AGAIN,
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

    def broadcast_parameters(self, tensors: Sequence[torch.Tensor]) -> None:
        """Give every process the values that process 0 has."""
        if self.size > 1:
            for tensor in tensors:
                torch.distributed.broadcast(tensor.data, src=0)

    def broadcast_files(self, path: Path | None) -> None:
        """Give every process the file, or the folder's files, that process 0 has, if any lacks one of them."""
        if self.size == 1 or path is None:
            return
        files = lambda: [path] if path.is_file() else [file for file in sorted(path.rglob("*")) if file.is_file()]
        hashes = self.broadcast_from_main(lambda: {str(file): sha256(file) for file in files()})
        present = all(Path(name).is_file() and sha256(Path(name)) == digest for name, digest in hashes.items())
        if not self.max_over_processes(not present):
            return
        for name in hashes:
            content = self.broadcast_from_main(Path(name).read_bytes)
            if not self.is_main:
                Path(name).parent.mkdir(parents=True, exist_ok=True)
                Path(name).write_bytes(content)

    def watch(self, console: Console) -> None:
        """Begin to send heartbeats, and end this process when the heartbeats of another stop.

        A process that is frozen, or whose machine is gone, is noticed; one whose main thread waits is not.
        """
        if self.size > 1 and not self._is_watching:
            self._is_watching, self._last_answer = True, time.monotonic()
            seen = {rank: (0, time.monotonic()) for rank in range(self.size)}
            for target, name in ((self._beat, "heartbeat"), (self._judge, "watch")):
                threading.Thread(target=target, args=(console, seen), daemon=True, name=name).start()

    def _beat(self, console: Console, seen: dict[int, tuple[int, float]]) -> None:
        """Send this process's heartbeats and note when those of the others change; blocks if process 0 is frozen."""
        while not self._finished.is_set():
            try:
                self._store.add(f"heartbeat/{self.rank}", 1)
                for rank, (last, _) in list(seen.items()):
                    beat = self._store.add(f"heartbeat/{rank}", 0)
                    # one that has not begun to beat still loads, and one that has finished well beats no more
                    if beat != last or beat == 0 or self._has_finished_well(rank):
                        seen[rank] = beat, time.monotonic()
                self._last_answer = time.monotonic()
                if self.has_main_failed():
                    os._exit(FAILED)  # the main thread waits for process 0, which has said why
            except RuntimeError:  # the store is in process 0, or in the launcher
                if not self._finished.is_set():
                    self._end(console, "process 0 is gone")
                return
            self._finished.wait(HEARTBEAT_S)

    def _judge(self, console: Console, seen: dict[int, tuple[int, float]]) -> None:
        while not self._finished.wait(1.0):
            now = time.monotonic()
            if (silence := now - self._last_answer) > HEARTBEAT_TIMEOUT_S:
                self._end(console, f"process 0 has given no sign of life for {silence:.0f} s")
            for rank, (_, since) in list(seen.items()):
                if now - since > HEARTBEAT_TIMEOUT_S:
                    self._end(console, f"process {rank} has given no sign of life for {now - since:.0f} s")

    def _end(self, console: Console, why: str) -> None:
        console.error(
            LostProcess(
                what=f"Process {self.rank} of {self.size} ends: {why}.",
                why="The processes of a command need each other at every step.",
                fix=AGAIN,
            )
        )
        os._exit(FAILED)  # the main thread waits inside a collective operation

    def _has_finished_well(self, rank: int) -> bool:
        return self._store.check([f"finished/{rank}"]) and not self._store.check([f"failed/{rank}"])

    def has_main_failed(self) -> bool:
        """Whether this is another process than 0, and process 0 has ended with an error."""
        return not self.is_main and self._store.check(["failed/0"])

    def leave_error_to_main(self, code: int) -> None:
        """Raise SystemExit in a process other than 0 if process 0 ends as well within WAIT_FOR_MAIN_S: it says why."""
        if self.is_main:
            return
        self._finished.set()  # the watch would say that process 0 is gone
        end = time.monotonic() + WAIT_FOR_MAIN_S
        while time.monotonic() < end:
            try:
                if self._store.check(["finished/0"]):
                    raise SystemExit(code) from None
            except RuntimeError:  # process 0 has ended, and its store with it
                raise SystemExit(code) from None
            time.sleep(0.05)

    def wait_for_main(self) -> None:
        """Wait until process 0 has finished: a launcher takes a process that ends before it for one that failed."""
        with suppress(RuntimeError):
            self._store.set(f"finished/{self.rank}", "1")  # or process 0, which may push for minutes, would miss beats
        self._finished.set()  # when process 0 has finished, its store is gone
        with suppress(RuntimeError):
            while self.size > 1 and not self._store.check(["finished/0"]):
                time.sleep(0.1)

    def finish(self, is_clean: bool) -> None:
        """Take no further part. After an error of its own (not `is_clean`) the watch goes on, in case torch hangs."""
        global _joined
        if self.size == 1:
            return
        with suppress(RuntimeError):  # process 0 may be gone, and with it the store
            if not is_clean:
                self._store.set(f"failed/{self.rank}", "1")
            self._store.set(f"finished/{self.rank}", "1")
        if is_clean:
            torch.distributed.destroy_process_group()
            self._finished.set()
        _joined = Processes()


def deal(costs: Sequence[int], processes: Processes) -> list[int]:
    """The items that this process gets, as indices into `costs`: the costliest first, dealt back and forth."""
    order = sorted(range(len(costs)), key=lambda number: -costs[number])
    size, rank = processes.size, processes.rank
    rounds = [order[start : start + size] for start in range(0, len(order), size)]
    places = [rank if n % 2 == 0 else size - 1 - rank for n in range(len(rounds))]
    return [members[place] for members, place in zip(rounds, places, strict=True) if place < len(members)]


_joined = Processes()
_store: Any = None
_joins = 0


def current() -> Processes:
    """The processes that this one works with; it alone unless `join` was called."""
    return _joined


def join(launch: Launch) -> Processes:
    """Meet the other processes of a launch. Raises UsageError if there is no GPU for this one."""
    global _joined, _store, _joins
    if _joined.size > 1:
        return _joined
    if NVIDIA_DRIVER.exists() and not torch.cuda.is_available():
        raise UsageError(
            what=f"There is no GPU for local process {launch.local_rank}, counted from 0.",
            why="Each process uses a GPU of its own.",
            fix="Launch at most as many processes per machine as it has GPUs.",
        )
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    if _store is None:
        address = f"tcp://{launch.address}:{launch.port}?rank={launch.rank}&world_size={launch.size}"
        _store, _, _ = next(torch.distributed.rendezvous(address))
        _store.set_timeout(COLLECTIVE_TIMEOUT)
    _joins += 1  # a process may train several runs, one after the other
    store = torch.distributed.PrefixStore(f"phoque-{_joins}", _store)
    torch.distributed.init_process_group(
        backend, store=store, rank=launch.rank, world_size=launch.size, timeout=COLLECTIVE_TIMEOUT
    )
    _joined = Processes(launch.rank, launch.size, store, launch.local_rank)
    return _joined


@contextmanager
def take_part(launch: Launch | None) -> Generator[None]:
    """Meet the other processes of a launch, if there is one, and leave them at the end of a `with` statement."""
    if launch:
        join(launch)
    is_clean = False
    try:
        yield
        is_clean = True
    except SystemExit:  # all processes stop together
        is_clean = True
        raise
    except KeyboardInterrupt:  # Ctrl-C reaches all processes of a terminal
        if current().is_main:
            raise
        raise SystemExit(INTERRUPTED) from None
    except LostProcess:
        raise
    except PhoqueError as error:
        is_clean = isinstance(error, Resumable) and current().is_main  # the others then stop, with SystemExit
        current().leave_error_to_main(error.code)
        raise
    finally:
        current().finish(is_clean)
