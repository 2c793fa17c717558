"""Activation shards on disk: written once while the model runs, then streamed in a new order in each epoch."""

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from phoque.distributed.processes import current
from phoque.errors import UsageError
from phoque.files import atomic_file
from phoque.inference.residual_stream import compute_norms, find_massive, read_residual_stream
from phoque.prefetch import Prefetcher

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ACTIVATION_DTYPE = torch.bfloat16  # rounding error: 1e-5 of the variance, far below a dictionary's own error
SHARD_TOKENS = 16_384  # approximate number of tokens in a shard
SHARDS_PER_BUFFER = 8  # the tokens of this many shards are shuffled together
WRITER_THREADS = 3

EXCLUSION_REASONS = ("position_0", "massive", "special")


@dataclass(frozen=True)
class ActivationStore:
    """The activation shards of some layers: each file holds one tensor (tokens, hidden) per layer."""

    folder: Path
    layers: tuple[int, ...]

    def files(self) -> list[Path]:
        """The complete shards, in order."""
        return sorted(self.folder.glob("[0-9]*.safetensors"))

    def shard_sizes(self, layer: int) -> list[int]:
        """Number of tokens in each shard; reads only the file headers."""
        sizes = []
        for file in self.files():
            with safe_open(file, "pt") as f:
                sizes.append(f.get_slice(str(layer)).get_shape()[0])
        return sizes

    def token_counts(self) -> dict[str, int]:
        """Number of tokens that were kept and that were left out for each reason, summed over all layers."""
        totals = dict.fromkeys(("kept", *EXCLUSION_REASONS), 0)
        for file in self.files():
            with safe_open(file, "pt") as f:
                for name, value in f.metadata().items():
                    totals[name] += int(value)
        return totals

    def tensor(self, file: Path, layer: int) -> torch.Tensor:
        """Load one layer of one shard: (tokens, hidden)."""
        with safe_open(file, "pt") as f:
            return f.get_tensor(str(layer))


def select_tokens(
    ids: torch.Tensor, mask: torch.Tensor, hidden: torch.Tensor, special: torch.Tensor
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Select the tokens whose activations are stored: a mask (rows, tokens), and the token counts by reason.

    Position 0 and tokens whose norm is over MASSIVE times the median of their row are left out because they are
    attention sinks; special tokens are left out because they belong to the chat template. The counts stay on the
    device, so that the GPU is not synchronized.
    """
    candidates = mask.clone()
    candidates[:, 0] = False
    is_massive = find_massive(compute_norms(hidden), candidates) & candidates
    is_special = torch.isin(ids, special) & candidates & ~is_massive
    selected = candidates & ~is_massive & ~is_special
    first_tokens = mask[:, 0].sum()
    return selected, {
        "kept": selected.sum(),
        "position_0": first_tokens,
        "massive": is_massive.sum(),
        "special": is_special.sum(),
    }


def collect_activations(
    model: "PreTrainedModel",
    rows: Sequence[list[int]],
    layers: Sequence[int],
    *,
    special: Sequence[int],
    folder: Path,
    show: Callable[[int, str], None] = lambda done, text: None,
) -> ActivationStore:
    """Run the model over `rows` and store the residual stream after each of `layers` for the selected tokens.

    Background threads write the shards, each under a temporary name first. Shards that exist already are not computed
    again, so an interrupted run continues where it stopped. Of several processes, each computes every n-th shard.
    Raises UsageError if `rows` is empty.
    """
    if not rows:
        raise UsageError(
            what="There is no text to collect activations from.",
            why="No text is left for training after some is held out.",
            fix="Provide more text with --chats or --text.",
        )
    folder.mkdir(parents=True, exist_ok=True)
    special_ids = torch.tensor(sorted(special), device=model.device)
    groups = group_rows([len(row) for row in rows], SHARD_TOKENS)
    processes = current()
    with _Writer() as writer:
        done = 0
        for shard, group in enumerate(groups):
            path = folder / f"{shard:06}.safetensors"
            if shard % processes.size == processes.rank and not path.exists():
                writer.write(path, *_read_activations(model, [rows[n] for n in group], layers, special_ids))
            done += len(group)
            show(done, "texts read")
    processes.wait_for_all()
    return ActivationStore(folder, tuple(layers))


def group_rows(lengths: Sequence[int], tokens: int) -> list[list[int]]:
    """Split row numbers, in order, into groups of at most `tokens` tokens; a longer row is a group by itself."""
    groups: list[list[int]] = [[]]
    total = 0
    for row, length in enumerate(lengths):
        if groups[-1] and total + length > tokens:
            groups.append([])
            total = 0
        groups[-1].append(row)
        total += length
    return groups


def _read_activations(
    model: "PreTrainedModel", rows: Sequence[list[int]], layers: Sequence[int], special: torch.Tensor
) -> tuple[dict[str, list[torch.Tensor]], dict[str, list[torch.Tensor]]]:
    activations: dict[str, list[torch.Tensor]] = {str(layer): [] for layer in layers}
    counts: dict[str, list[torch.Tensor]] = {}

    def take(layer: int, _: list[int], hidden: torch.Tensor, ids: torch.Tensor, mask: torch.Tensor) -> None:
        selected, reason_counts = select_tokens(ids, mask, hidden, special)
        activations[str(layer)].append(hidden[selected].to(ACTIVATION_DTYPE))
        for name, count in reason_counts.items():
            counts.setdefault(name, []).append(count)

    read_residual_stream(model, rows, layers, take)
    return activations, counts


class _Writer:
    """Writes shards in background threads, at most WRITER_THREADS + 1 at a time, while the GPU keeps computing.

    Tensors are copied from the GPU on a CUDA stream of their own.
    """

    def __enter__(self) -> "_Writer":
        self.pool = ThreadPoolExecutor(WRITER_THREADS)
        self.slots = threading.Semaphore(WRITER_THREADS + 1)
        self.pending: list[Future[None]] = []
        return self

    def write(self, path: Path, parts: dict[str, list[torch.Tensor]], counts: dict[str, list[torch.Tensor]]) -> None:
        """Submit the pieces of one shard; blocks while too many shards are pending."""
        self.slots.acquire()
        for future in [future for future in self.pending if future.done()]:
            self.pending.remove(future)
            future.result()
        copy_ready = torch.cuda.Event() if next(iter(parts.values()))[0].is_cuda else None
        if copy_ready:
            copy_ready.record()
        self.pending.append(self.pool.submit(self._write_shard, path, parts, counts, copy_ready))

    def __exit__(self, error_type: Any, *_: Any) -> None:
        self.pool.shutdown()
        if error_type is None:
            for future in self.pending:
                future.result()

    def _write_shard(
        self,
        path: Path,
        parts: dict[str, list[torch.Tensor]],
        counts: dict[str, list[torch.Tensor]],
        copy_ready: torch.cuda.Event | None,
    ) -> None:
        try:
            tensors = _copy_to_host(parts, copy_ready)
            totals = {name: str(sum(int(count) for count in values)) for name, values in counts.items()}
            with atomic_file(path) as staging:
                save_file(tensors, staging, totals)
        finally:
            self.slots.release()


def _copy_to_host(parts: dict[str, list[torch.Tensor]], copy_ready: torch.cuda.Event | None) -> dict[str, torch.Tensor]:
    """Concatenate the pieces of each tensor in host memory; from a GPU, asynchronously through pinned memory."""
    if copy_ready is None:
        return {name: torch.cat(pieces) for name, pieces in parts.items()}
    tensors: dict[str, torch.Tensor] = {}
    stream = torch.cuda.Stream()
    stream.wait_event(copy_ready)
    with torch.cuda.stream(stream):
        for name, pieces in parts.items():
            tensors[name] = torch.empty(
                sum(map(len, pieces)), pieces[0].shape[1], dtype=ACTIVATION_DTYPE, pin_memory=True
            )
            for target, piece in zip(tensors[name].split([len(p) for p in pieces]), pieces, strict=True):
                target.copy_(piece, non_blocking=True)
    stream.synchronize()
    return tensors


@dataclass(frozen=True)
class ActivationStream:
    """Batches of one layer's activations; each epoch shuffles the tokens of SHARDS_PER_BUFFER shards at a time.

    The tokens at the end of such a buffer that do not fill a batch are dropped for that epoch. The order depends only
    on `seed`. With `skip`, `iter_batches` continues an interrupted stream without reading the earlier buffers.
    """

    store: ActivationStore
    layer: int
    batch: int
    epochs: int
    seed: int

    def plan_buffers(self) -> list[tuple[list[int], int]]:
        """List (shard numbers, number of batches) for each buffer of all epochs."""
        counts = self.store.shard_sizes(self.layer)
        buffers = []
        for epoch in range(self.epochs):
            order = torch.randperm(len(counts), generator=_generator(self.seed, epoch, 0)).tolist()
            for start in range(0, len(order), SHARDS_PER_BUFFER):
                shard_ids = order[start : start + SHARDS_PER_BUFFER]
                buffers.append((shard_ids, sum(counts[i] for i in shard_ids) // self.batch))
        return buffers

    def count_batches(self) -> int:
        """Count the batches of all epochs."""
        return sum(count for _, count in self.plan_buffers())

    def iter_batches(self, device: torch.device, skip: int = 0) -> Iterator[torch.Tensor]:
        """Yield fp32 tensors (batch, hidden) on the device; a thread loads the next buffer in the meantime."""
        files, buffers = self.store.files(), []
        for buffer, (shard_ids, count) in enumerate(self.plan_buffers()):
            if skip >= count:
                skip -= count
                continue
            buffers.append((buffer, shard_ids, count, skip))
            skip = 0

        def load_buffers() -> Iterator[tuple[torch.Tensor, int, int]]:
            for buffer, shard_ids, count, first in buffers:
                activations = torch.cat([self.store.tensor(files[i], self.layer) for i in shard_ids])
                order = torch.randperm(len(activations), generator=_generator(self.seed, buffer, 1))
                yield activations[order], count, first

        with Prefetcher(load_buffers(), depth=1) as loaded:
            for activations, count, first in loaded:
                activations = activations.to(device)
                for n in range(first, count):
                    yield activations[n * self.batch : (n + 1) * self.batch].float()


def _generator(seed: int, number: int, kind: int) -> torch.Generator:
    return torch.Generator().manual_seed((seed * 1_000_003 + number) * 2 + kind)
