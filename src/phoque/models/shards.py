"""The tensors of a checkpoint, known by their headers and read one by one, never mapped or loaded whole."""

import json
import queue
import threading
from collections.abc import Generator, Iterable
from contextlib import suppress
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
READ_AHEAD = 3  # tensors; the largest of a 3B model is an embedding of 0.8 GB


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
        """One tensor in host memory; pinned where there is a GPU to copy it to."""
        stored = self.tensors[name]
        raw = torch.empty(stored.end - stored.start, dtype=torch.uint8, pin_memory=torch.cuda.is_available())
        with stored.file.open("rb", buffering=0) as f:
            f.seek(stored.start)
            view, done = memoryview(raw.numpy()), 0
            while done < len(view):  # one read gives at most 2 GiB
                done += f.readinto(view[done:])
        return raw.view(stored.dtype).reshape(stored.shape)

    def stream(self, names: Iterable[str]) -> Generator[tuple[str, torch.Tensor]]:
        """The tensors of these names in the order they lie on disk, read ahead by a thread while the caller works."""
        ordered = sorted(names, key=lambda n: (self.tensors[n].file, self.tensors[n].start))
        ready: queue.Queue[Any] = queue.Queue(READ_AHEAD)
        stopped = threading.Event()

        def fill() -> None:
            try:
                for name in ordered:
                    item = (name, self.read(name))
                    while not stopped.is_set():
                        with suppress(queue.Full):
                            ready.put(item, timeout=0.1)
                            break
            except BaseException as error:  # it belongs to the caller, who waits for the next tensor
                ready.put(error)

        reader = threading.Thread(target=fill, daemon=True)
        reader.start()
        try:
            for _ in ordered:
                item = ready.get()
                if isinstance(item, BaseException):
                    raise item
                yield item
        finally:
            stopped.set()
            reader.join()


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
                f"{name} in {file.name} has the type {entry['dtype']}.", f"phoque reads {', '.join(DTYPES)}.",
                "Use another copy of the model.",
            )  # fmt: skip
        found[name] = Stored(file, DTYPES[entry["dtype"]], tuple(entry["shape"]), start, end)
    return found
