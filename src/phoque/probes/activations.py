"""Activations in shards on disk: written once while the model reads, streamed from there in a new order each pass."""

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from queue import Queue
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from phoque.probes.blocks import massive, norms_of, read

STORED = torch.bfloat16  # an error of 1e-5 of the variance, far below what any dictionary leaves unexplained
SHARD = 16_384  # tokens, about, in a shard
MIXED = 8  # shards that are shuffled together

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
    model: Any, rows: Sequence[list[int]], layers: Sequence[int], special: Sequence[int], folder: Path,
    show: Callable[[int, str], None] = lambda done, text: None,
) -> Shards:  # fmt: skip
    """Read `rows` and keep every ordinary token's residual stream after these blocks; shards that are there are kept.

    Shards are written beside the reading, each under a temporary name first, so that a killed run goes on.
    """
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
    """Writes shards in a thread of its own, at most two behind."""

    def __enter__(self) -> "_Writer":
        self.queue: Queue[Any] = Queue(maxsize=2)
        self.error: BaseException | None = None
        self.thread = threading.Thread(target=self._work, daemon=True)
        self.thread.start()
        return self

    def write(self, path: Path, parts: dict[str, list[torch.Tensor]], counts: dict[str, list[torch.Tensor]]) -> None:
        self.queue.put((path, parts, counts))
        if self.error:
            raise self.error

    def __exit__(self, kind: Any, *_: Any) -> None:
        self.queue.put(None)
        self.thread.join()
        if self.error and kind is None:
            raise self.error

    def _work(self) -> None:
        while (item := self.queue.get()) is not None:
            if self.error:
                continue  # so that nobody waits for room in the queue
            path, parts, counts = item
            try:
                tensors = {name: torch.cat(pieces).cpu() for name, pieces in parts.items()}
                totals = {name: str(int(torch.stack(found).sum())) for name, found in counts.items()}
                staging = path.with_name(f".{path.name}.{os.getpid()}")
                save_file(tensors, staging, totals)
                staging.replace(path)
            except BaseException as error:
                self.error = error


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
