"""The tensors of a checkpoint, known by their headers and read one by one, never mapped or loaded whole."""

import json
import queue
import threading
from collections.abc import Generator, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from phoque.errors import PhoqueError
from phoque.models.source import INDEX

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
READ_AHEAD = 16  # tensors; of a 3B model in FP8 about 0.4 GB
CHUNK = 32 << 20  # bytes of a pinned buffer


@dataclass(frozen=True)
class Stored:
    """Where one tensor lies: file, dtype, shape, and its bytes [start, end) in the file."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    end: int


class Shards:
    """A folder of safetensors shards; `tensors` maps each name to where it is stored.

    Only headers are read here. Raises PhoqueError (2) for a shard that is missing, cut short or no safetensors file.
    """

    def __init__(self, folder: Path) -> None:
        self.tensors: dict[str, Stored] = {}
        for file in _files(folder):
            self.tensors |= _header(file)

    def read(self, name: str) -> torch.Tensor:
        """One tensor in host memory."""
        return _to_host(self.tensors[name])

    @contextmanager
    def stream(self, names: Iterable[str], on: torch.device) -> Generator[Iterator[tuple[str, torch.Tensor]]]:
        """The tensors of these names on a device, in the order they lie on disk.

        A thread reads ahead from the start of the block, at most READ_AHEAD tensors, and on the way to a GPU through
        two pinned buffers that are used over and over, since pinning memory costs as much as reading it.
        """
        ordered = sorted(names, key=lambda n: (self.tensors[n].file, self.tensors[n].start))
        ready: queue.Queue[Any] = queue.Queue(READ_AHEAD)
        stopped = threading.Event()

        def put(item: Any) -> None:
            while not stopped.is_set():
                with suppress(queue.Full):
                    return ready.put(item, timeout=0.1)

        def fill() -> None:
            try:
                with ExitStack() as files:
                    fetch = _ThroughPinned(on, files).fetch if on.type == "cuda" else _to_host
                    for name in ordered:
                        if stopped.is_set():
                            return
                        put((name, fetch(self.tensors[name])))
            except BaseException as error:  # it belongs to the caller, who waits for the next tensor
                put(error)

        reader = threading.Thread(target=fill, daemon=True)
        reader.start()
        try:
            yield (_arrived(ready) for _ in ordered)
        finally:
            stopped.set()
            reader.join()


def _arrived(ready: "queue.Queue[Any]") -> tuple[str, torch.Tensor]:
    item = ready.get()
    if isinstance(item, BaseException):
        raise item
    return item


class _ThroughPinned:
    """Copies stored tensors to a GPU in chunks: one buffer is filled from the disk while the other is copied."""

    def __init__(self, on: torch.device, files: ExitStack) -> None:
        self._on, self._files = on, files
        self._open: dict[Path, Any] = {}
        self._buffers = [torch.empty(CHUNK, dtype=torch.uint8, pin_memory=True) for _ in range(2)]
        self._copied = [torch.cuda.Event() for _ in range(2)]

    def fetch(self, stored: Stored) -> torch.Tensor:
        if stored.file not in self._open:
            self._open[stored.file] = self._files.enter_context(stored.file.open("rb", buffering=0))
        f = self._open[stored.file]
        f.seek(stored.start)
        size = stored.end - stored.start
        raw = torch.empty(size, dtype=torch.uint8, device=self._on)
        for start in range(0, size, CHUNK):
            self._copied[0].synchronize()
            part = self._buffers[0][: min(CHUNK, size - start)]
            _read_into(f, part)
            raw[start : start + len(part)].copy_(part, non_blocking=True)
            self._copied[0].record()
            self._buffers.reverse()
            self._copied.reverse()
        return raw.view(stored.dtype).reshape(stored.shape)


def _to_host(stored: Stored) -> torch.Tensor:
    raw = torch.empty(stored.end - stored.start, dtype=torch.uint8)
    with stored.file.open("rb", buffering=0) as f:
        f.seek(stored.start)
        _read_into(f, raw)
    return raw.view(stored.dtype).reshape(stored.shape)


def _read_into(f: Any, raw: torch.Tensor) -> None:
    view, done = memoryview(raw.numpy()), 0
    while done < len(view):  # one read gives at most 2 GiB
        done += f.readinto(view[done:])


def _files(folder: Path) -> list[Path]:
    if (folder / INDEX).is_file():
        names = sorted(set(json.loads((folder / INDEX).read_text())["weight_map"].values()))
        files = [folder / name for name in names]
    else:
        files = [folder / "model.safetensors"]
    for file in files:
        if not file.is_file():
            raise PhoqueError(
                f"{file.name} is missing from {folder}.", "The checkpoint is incomplete.", "Fetch it again."
            )
    return files


def _header(file: Path) -> dict[str, Stored]:
    size = file.stat().st_size
    with file.open("rb") as f:
        length = int.from_bytes(f.read(8), "little")
        try:
            header = json.loads(f.read(length)) if length < size else None
        except (json.JSONDecodeError, UnicodeDecodeError):
            header = None
    if not isinstance(header, dict):
        raise PhoqueError(
            f"The weights in {file.name} cannot be read.", "It is no safetensors file, or cut short.", "Fetch it again."
        )
    header.pop("__metadata__", None)
    body = 8 + length
    found = {}
    for name, entry in header.items():
        start, end = (body + offset for offset in entry["data_offsets"])
        if end > size:
            raise PhoqueError(
                f"The weights in {file.name} cannot be read.",
                f"The file is cut short: {size} bytes, and {name} ends at byte {end}.",
                "Delete it and fetch it again.",
            )
        if entry["dtype"] not in DTYPES:
            raise PhoqueError(
                f"{name} in {file.name} has the type {entry['dtype']}.",
                f"phoque reads {', '.join(DTYPES)}.",
                "Use another copy of the model.",
            )
        found[name] = Stored(file, DTYPES[entry["dtype"]], tuple(entry["shape"]), start, end)
    return found
