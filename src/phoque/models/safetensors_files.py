"""Safetensors files: headers first, then tensors one by one, without mapping or loading a whole file."""

import os
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from phoque.models.safetensors_headers import list_weight_files, read_header
from phoque.prefetch import Prefetcher

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
READ_AHEAD = 16  # tensors: about 0.4 GB of a 3B model in FP8
CHUNK = 32 << 20  # bytes per pinned buffer
THREADS = 4  # that fill a buffer together: one thread copies from the page cache at a fraction of memory's speed


@dataclass(frozen=True)
class StoredTensor:
    """Where one tensor is stored: file, dtype, shape, and its bytes [start, end) in the file."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    end: int


class SafetensorsFiles:
    """The safetensors files of a folder; `tensors` maps each name to where it is stored.

    Only headers are read here. Raises UsageError for a file that is missing, cut short or not a safetensors file.
    """

    def __init__(self, folder: Path) -> None:
        self.tensors: dict[str, StoredTensor] = {}
        for file in list_weight_files(folder):
            self.tensors |= {
                name: StoredTensor(file, DTYPES[entry.dtype], entry.shape, entry.start, entry.end)
                for name, entry in read_header(file).items()
            }

    def in_disk_order(self, names: Iterable[str]) -> list[str]:
        """The names in the order in which their tensors are stored."""
        return sorted(names, key=lambda n: (self.tensors[n].file, self.tensors[n].start))

    def are_equal(self, name: str, other: str) -> bool:
        """Whether two tensors are stored with the same dtype, shape and bytes."""
        one, two = self.tensors[name], self.tensors[other]
        if (one.dtype, one.shape) != (two.dtype, two.shape):
            return False
        with one.file.open("rb") as first, two.file.open("rb") as second:
            first.seek(one.start)
            second.seek(two.start)
            sizes = (min(CHUNK, one.end - start) for start in range(one.start, one.end, CHUNK))
            return all(first.read(size) == second.read(size) for size in sizes)

    def read(self, name: str) -> torch.Tensor:
        """One tensor, in host memory."""
        return _read_to_host(self.tensors[name])

    @contextmanager
    def stream(self, names: Iterable[str], on: torch.device) -> Generator[Iterator[tuple[str, torch.Tensor]]]:
        """Yield an iterator of (name, tensor on the device) in the order in which the tensors are stored.

        A thread reads at most READ_AHEAD tensors ahead. To a GPU they go through two pinned buffers that are reused,
        because pinning memory takes as long as reading it.
        """
        ordered = self.in_disk_order(names)

        def read_all() -> Iterator[tuple[str, torch.Tensor]]:
            with ExitStack() as files:
                read = _PinnedReader(on, files).read if on.type == "cuda" else _read_to_host
                for name in ordered:
                    yield name, read(self.tensors[name])

        with Prefetcher(read_all(), READ_AHEAD) as tensors:
            yield iter(tensors)


class _PinnedReader:
    """Copies stored tensors to a GPU in chunks: one buffer is filled from the disk while the other is copied."""

    def __init__(self, on: torch.device, files: ExitStack) -> None:
        self._on, self._files = on, files
        self._open: dict[Path, int] = {}
        self._threads = files.enter_context(ThreadPoolExecutor(THREADS))
        self._buffers = [torch.empty(CHUNK, dtype=torch.uint8, pin_memory=True) for _ in range(2)]
        self._copied = [torch.cuda.Event() for _ in range(2)]

    def read(self, stored: StoredTensor) -> torch.Tensor:
        if stored.file not in self._open:
            self._open[stored.file] = self._files.enter_context(stored.file.open("rb", buffering=0)).fileno()
        file = self._open[stored.file]
        size = stored.end - stored.start
        raw = torch.empty(size, dtype=torch.uint8, device=self._on)
        for start in range(0, size, CHUNK):
            self._copied[0].synchronize()
            part = self._buffers[0][: min(CHUNK, size - start)]
            pieces = part.split(CHUNK // THREADS)
            offsets = range(stored.start + start, stored.end, CHUNK // THREADS)
            list(self._threads.map(partial(_read_into, file), pieces, offsets))
            raw[start : start + len(part)].copy_(part, non_blocking=True)
            self._copied[0].record()
            self._buffers.reverse()
            self._copied.reverse()
        return raw.view(stored.dtype).reshape(stored.shape)


def _read_to_host(stored: StoredTensor) -> torch.Tensor:
    raw = torch.empty(stored.end - stored.start, dtype=torch.uint8)
    with stored.file.open("rb", buffering=0) as f:
        _read_into(f.fileno(), raw, stored.start)
    return raw.view(stored.dtype).reshape(stored.shape)


def _read_into(file: int, raw: torch.Tensor, offset: int) -> None:
    view, done = memoryview(raw.numpy()), 0
    while done < len(view):  # one read gives at most 2 GiB
        done += os.preadv(file, [view[done:]], offset + done)
