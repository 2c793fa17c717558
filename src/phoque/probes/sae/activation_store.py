"""Activations in shards on disk: written once while the model reads, streamed from there in a new order each pass."""

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import Queue
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from phoque.errors import PhoqueError
from phoque.inference.residual_stream import massive, norms_of, read

STORED = torch.bfloat16  # an error of 1e-5 of the variance, far below what any dictionary leaves unexplained
SHARD = 16_384  # tokens, about, in a shard
MIXED = 8  # shards that are shuffled together
WRITERS = 3

LEFT_OUT = ("position_0", "massive", "special")


@dataclass(frozen=True)
class Shards:
    """The activation shards of some layers: a file each, with a tensor (tokens, hidden) a layer."""

    folder: Path
    layers: tuple[int, ...]

    def files(self) -> list[Path]:
        """Those that are whole, in order."""
        return sorted(self.folder.glob("[0-9]*.safetensors"))

    def counts(self, layer: int) -> list[int]:
        """Tokens a shard, from the headers alone."""
        found = []
        for file in self.files():
            with safe_open(file, "pt") as f:
                found.append(f.get_slice(str(layer)).get_shape()[0])
        return found

    def left_out(self) -> dict[str, int]:
        """How many tokens were left out, by reason, over all layers; and how many were kept."""
        totals = dict.fromkeys(("kept", *LEFT_OUT), 0)
        for file in self.files():
            with safe_open(file, "pt") as f:
                for name, value in f.metadata().items():
                    totals[name] += int(value)
        return totals

    def tensor(self, file: Path, layer: int) -> torch.Tensor:
        """One layer of one shard."""
        with safe_open(file, "pt") as f:
            return f.get_tensor(str(layer))


def ordinary(
    ids: torch.Tensor, mask: torch.Tensor, hidden: torch.Tensor, special: torch.Tensor
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Which tokens count, and how many of the others there are, by reason, as numbers on the device.

    Position 0 and tokens of over MASSIVE times the usual norm are attention sinks; special tokens are the template's.
    """
    later = mask.clone()
    later[:, 0] = False
    large = massive(norms_of(hidden), later) & later
    control = torch.isin(ids, special) & later & ~large
    kept = later & ~large & ~control
    first = mask[:, 0].sum()
    return kept, {"kept": kept.sum(), "position_0": first, "massive": large.sum(), "special": control.sum()}


def collect(
    model: Any,
    rows: Sequence[list[int]],
    layers: Sequence[int],
    special: Sequence[int],
    folder: Path,
    show: Callable[[int, str], None] = lambda done, text: None,
) -> Shards:
    """Read `rows` and keep every ordinary token's residual stream after these blocks; shards that are there are kept.

    Shards are written beside the reading, each under a temporary name first, so that a killed run goes on.
    """
    if not rows:
        raise PhoqueError(
            "There is nothing to read.", "No text is left for training once some are held out.", "Give more of them."
        )
    folder.mkdir(parents=True, exist_ok=True)
    controls = torch.tensor(sorted(special), device=model.device)
    groups = grouped([len(row) for row in rows], SHARD)
    with _Writer() as writer:
        done = 0
        for number, group in enumerate(groups):
            path = folder / f"{number:06}.safetensors"
            if not path.exists():
                writer.write(path, *_activations(model, [rows[n] for n in group], layers, controls))
            done += len(group)
            show(done, "texts read")
    return Shards(folder, tuple(layers))


def grouped(lengths: Sequence[int], tokens: int) -> list[list[int]]:
    """Row numbers in order, in groups of about so many tokens."""
    groups: list[list[int]] = [[]]
    total = 0
    for number, length in enumerate(lengths):
        if groups[-1] and total + length > tokens:
            groups.append([])
            total = 0
        groups[-1].append(number)
        total += length
    return groups


def _activations(
    model: Any, rows: Sequence[list[int]], layers: Sequence[int], special: torch.Tensor
) -> tuple[dict[str, list[torch.Tensor]], dict[str, list[torch.Tensor]]]:
    found: dict[str, list[torch.Tensor]] = {str(layer): [] for layer in layers}
    counts: dict[str, list[torch.Tensor]] = {}

    def take(layer: int, _: list[int], hidden: torch.Tensor, ids: torch.Tensor, mask: torch.Tensor) -> None:
        kept, reasons = ordinary(ids, mask, hidden, special)
        found[str(layer)].append(hidden[kept].to(STORED))
        for name, count in reasons.items():
            counts.setdefault(name, []).append(count)

    read(model, rows, layers, take)
    return found, counts


class _Writer:
    """Writes shards in threads of its own, a few behind: the GPU goes on, and copies over a stream beside its work."""

    def __enter__(self) -> "_Writer":
        self.pool = ThreadPoolExecutor(WRITERS)
        self.room = threading.Semaphore(WRITERS + 1)
        self.waiting: list[Future[None]] = []
        return self

    def write(self, path: Path, parts: dict[str, list[torch.Tensor]], counts: dict[str, list[torch.Tensor]]) -> None:
        """Hand over the pieces of one shard; waits while too many are on their way."""
        self.room.acquire()
        for one in [one for one in self.waiting if one.done()]:
            self.waiting.remove(one)
            one.result()
        ready = torch.cuda.Event() if next(iter(parts.values()))[0].is_cuda else None
        if ready:
            ready.record()
        self.waiting.append(self.pool.submit(self._written, path, parts, counts, ready))

    def __exit__(self, kind: Any, *_: Any) -> None:
        self.pool.shutdown()
        if kind is None:
            for one in self.waiting:
                one.result()

    def _written(
        self,
        path: Path,
        parts: dict[str, list[torch.Tensor]],
        counts: dict[str, list[torch.Tensor]],
        ready: torch.cuda.Event | None,
    ) -> None:
        try:
            tensors = _on_host(parts, ready)
            totals = {name: str(sum(int(count) for count in found)) for name, found in counts.items()}
            staging = path.with_name(f".{path.name}.{os.getpid()}")
            save_file(tensors, staging, totals)
            staging.replace(path)
        finally:
            self.room.release()


def _on_host(parts: dict[str, list[torch.Tensor]], ready: torch.cuda.Event | None) -> dict[str, torch.Tensor]:
    """The pieces of each tensor joined in host memory; from a GPU through pinned memory, so that nothing waits."""
    if ready is None:
        return {name: torch.cat(pieces) for name, pieces in parts.items()}
    made: dict[str, torch.Tensor] = {}
    beside = torch.cuda.Stream()
    beside.wait_event(ready)
    with torch.cuda.stream(beside):
        for name, pieces in parts.items():
            made[name] = torch.empty(sum(map(len, pieces)), pieces[0].shape[1], dtype=STORED, pin_memory=True)
            for into, piece in zip(made[name].split([len(p) for p in pieces]), pieces, strict=True):
                into.copy_(piece, non_blocking=True)
    beside.synchronize()
    return made


@dataclass(frozen=True)
class Stream:
    """Batches of one layer's activations: every pass in a new order, drawn from MIXED shards at a time.

    What does not fill a batch at the end of such a buffer is left for another pass. Deterministic in `seed`, and
    `batches(skip)` begins where an earlier stream was stopped without reading what came before.
    """

    shards: Shards
    layer: int
    batch: int
    passes: int
    seed: int

    def plan(self) -> list[tuple[list[int], int]]:
        """(shards of a buffer, batches in it) for all passes."""
        counts = self.shards.counts(self.layer)
        made = []
        for n in range(self.passes):
            order = torch.randperm(len(counts), generator=_chance(self.seed, n, 0)).tolist()
            for start in range(0, len(order), MIXED):
                own = order[start : start + MIXED]
                made.append((own, sum(counts[i] for i in own) // self.batch))
        return made

    def steps(self) -> int:
        """How many batches there are."""
        return sum(count for _, count in self.plan())

    def batches(self, on: torch.device, skip: int = 0) -> Iterator[torch.Tensor]:
        """fp32 tensors (batch, hidden) on the device; the next buffer is read while one is used."""
        files, wanted = self.shards.files(), []
        for number, (own, count) in enumerate(self.plan()):
            if skip >= count:
                skip -= count
                continue
            wanted.append((number, own, count, skip))
            skip = 0
        ahead: Queue[Any] = Queue(maxsize=1)
        over = threading.Event()

        def load() -> None:
            for number, own, count, begun in wanted:
                if over.is_set():
                    return
                try:
                    held = torch.cat([self.shards.tensor(files[i], self.layer) for i in own])
                    ahead.put((held[torch.randperm(len(held), generator=_chance(self.seed, number, 1))], count, begun))
                except BaseException as error:
                    ahead.put(error)
                    return

        reader = threading.Thread(target=load, daemon=True)
        reader.start()
        try:
            for _ in wanted:
                item = ahead.get()
                if isinstance(item, BaseException):
                    raise item
                held, count, begun = item
                held = held.to(on)
                for n in range(begun, count):
                    yield held[n * self.batch : (n + 1) * self.batch].float()
        finally:
            over.set()
            while reader.is_alive():
                if not ahead.empty():
                    ahead.get()
                reader.join(0.01)


def _chance(seed: int, number: int, kind: int) -> torch.Generator:
    return torch.Generator().manual_seed((seed * 1_000_003 + number) * 2 + kind)
