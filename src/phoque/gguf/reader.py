"""Read a GGUF file: its metadata and its tensors, which stay on disk until they are used."""

import mmap
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from phoque.checks import CheckFailed

MAGIC = b"GGUF"
VERSIONS = (2, 3)
STRING, ARRAY = 8, 9  # types of entries; an array of arrays is none that llama.cpp reads
VALUE_BYTES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}  # of the other types
MAX_DIMENSIONS = 4
LFS_POINTER = b"version https://git-lfs"


@dataclass(frozen=True)
class GgufFile:
    """The metadata of a file by key, and its tensors by name."""

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, Any]

    @property
    def architecture(self) -> str:
        """`general.architecture`, or ""."""
        return str(self.metadata.get("general.architecture", ""))

    def key(self, name: str) -> Any:
        """An entry below the architecture's name. Raises CheckFailed if it is missing."""
        full = f"{self.architecture}.{name}"
        if full not in self.metadata:
            raise CheckFailed(f"its metadata have no {full}, which llama.cpp needs")
        return self.metadata[full]

    @property
    def tokens(self) -> list[str]:
        """The vocabulary. Raises CheckFailed if there is none."""
        tokens = self.metadata.get("tokenizer.ggml.tokens")
        if not isinstance(tokens, list) or not tokens or not all(isinstance(token, str) for token in tokens):
            raise CheckFailed("it has no tokenizer.ggml.tokens")
        return tokens

    def shape(self, name: str) -> tuple[int, ...]:
        """A tensor's shape as [rows, columns] or [size]. Raises CheckFailed if there is no such tensor."""
        if name not in self.tensors:
            raise CheckFailed(f"there is no tensor {name}")
        return tuple(int(n) for n in reversed(self.tensors[name].shape))

    def blocks_of_values(self, name: str, rows: int = 4096) -> Iterator[np.ndarray]:
        """A tensor's values in fp32, some rows at a time."""
        tensor = self.tensors[name]
        data = tensor.data if tensor.data.ndim > 1 else tensor.data[None]
        for start in range(0, len(data), rows):
            yield gguf.dequantize(data[start : start + rows], tensor.tensor_type)

    @property
    def precision(self) -> str:
        """The precision by `general.file_type`, such as q4_k_m; "" if it is none that has a name."""
        try:
            name = gguf.LlamaFileType(self.metadata.get("general.file_type", -1)).name
        except ValueError:
            return ""
        return name.removeprefix("MOSTLY_").removeprefix("ALL_").lower()


def _scan_header(path: Path) -> None:
    """Raise CheckFailed if a count or length in the header is more than the rest of the file can hold.

    gguf's reader believes every count, and would read for ever, or fill the memory.
    """
    size = path.stat().st_size
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        at = 8

        def take(kind: str) -> int:
            nonlocal at
            length = struct.calcsize(kind)
            if at + length > size:
                raise CheckFailed("its header is damaged, or the file is cut short")
            (value,) = struct.unpack_from(kind, data, at)
            at += length
            return value

        def skip(count: int, each: int = 1) -> None:
            nonlocal at
            if count * each > size - at:
                raise CheckFailed(f"its header is damaged: it counts {count:,} entries, more than the file has bytes")
            at += count * each

        tensors, entries = take("<Q"), take("<Q")
        for _ in range(entries):
            skip(take("<Q"))
            kind = take("<I")
            if kind == ARRAY:
                kind, count = take("<I"), take("<Q")
                if kind == STRING:
                    for _ in range(count):
                        skip(take("<Q"))
                    continue
                skip(count, _size_of(kind))
            else:
                skip(take("<Q") if kind == STRING else _size_of(kind))
        for _ in range(tensors):
            skip(take("<Q"))
            if (dimensions := take("<I")) > MAX_DIMENSIONS:
                raise CheckFailed(f"its header is damaged: a tensor has {dimensions} dimensions")
            skip(dimensions, 8)
            skip(4 + 8)


def _size_of(kind: int) -> int:
    if kind not in VALUE_BYTES:
        raise CheckFailed(f"its header is damaged: an entry has the type {kind}")
    return VALUE_BYTES[kind]


def read_gguf(path: Path) -> GgufFile:
    """Read a file's header. Raises CheckFailed if it is none, is cut short, or is damaged."""
    with path.open("rb") as file:
        start = file.read(64)
    if start.startswith(LFS_POINTER):
        raise CheckFailed("it is a Git LFS pointer, not the file: download it with `git lfs pull` or from the Hub")
    if not start.startswith(MAGIC):
        raise CheckFailed("it is not a GGUF file: it does not begin with GGUF")
    if (version := int.from_bytes(start[4:8], "little")) not in VERSIONS:
        raise CheckFailed(f"it has GGUF version {version}; llama.cpp reads {' and '.join(map(str, VERSIONS))}")
    _scan_header(path)
    try:
        reader: Any = gguf.GGUFReader(path)
        metadata = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    except Exception as error:  # a damaged length or type raises whatever NumPy does with it
        reason = " ".join(str(error).split())[:200]
        raise CheckFailed(
            f"its header is damaged, or the file is cut short: {reason or type(error).__name__}"
        ) from None
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    size = path.stat().st_size
    for name, tensor in tensors.items():
        if (end := int(tensor.data_offset) + int(tensor.n_bytes)) > size:
            raise CheckFailed(f"it is cut short: {name} ends at byte {end:,}, and the file has {size:,}")
    return GgufFile(path, metadata, tensors)
