"""Which files a checkpoint has, and their headers; read without torch, so that a damaged copy is refused at once."""

import json
import math
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from phoque.errors import UsageError
from phoque.files import read_json_object

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "I64": 8, "I32": 4, "U8": 1, "BOOL": 1}


@dataclass(frozen=True)
class Entry:
    """A tensor of a file: its type, its shape, and its bytes [start, end) in the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


def list_weight_files(folder: Path) -> list[Path]:
    """The files of a checkpoint. Raises UsageError if its index is damaged, or a file is missing."""
    if (folder / INDEX).is_file():
        weight_map = read_json_object(folder / INDEX).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
            raise UsageError(
                what=f"{folder / INDEX} cannot be read.", why="It has no weight_map.", fix="Download it again."
            )
        # only the name: a repository must not name files outside of its folder
        files = [folder / Path(name).name for name in sorted(set(weight_map.values()))]
        if (folder / SINGLE).is_file() and not all(file.is_file() for file in files):
            files = [folder / SINGLE]  # the index is of an earlier copy, in shards
    else:
        files = [folder / SINGLE]
    for file in files:
        if not file.is_file():
            raise UsageError(
                what=f"{file.name} is missing from {folder}.",
                why="The checkpoint is incomplete.",
                fix="Download it again.",
            )
    return files


def read_header(file: Path) -> dict[str, Entry]:
    """The tensors of a file by name. Raises UsageError if it is damaged or cut short, or has a type unknown here."""
    size = file.stat().st_size
    with file.open("rb") as f:
        length = int.from_bytes(f.read(8), "little")
        try:
            header = json.loads(f.read(length)) if length < size else None
        except (ValueError, RecursionError):
            header = None
    if not isinstance(header, dict):
        raise UsageError(
            what=f"The weights in {file.name} cannot be read.",
            why="It is not a safetensors file, or it is cut short.",
            fix="Download it again.",
        )
    header.pop("__metadata__", None)
    body = 8 + length
    stored: dict[str, Entry] = {}
    for name, entry in header.items():
        dtype, shape, start, end = _check_entry(file, name, entry, body)
        if end > size:
            raise UsageError(
                what=f"The weights in {file.name} cannot be read.",
                why=f"The file is cut short: it has {size} bytes, and {name} ends at byte {end}.",
                fix="Delete it and download it again.",
            )
        if dtype not in BYTES:
            raise UsageError(
                what=f"{name} in {file.name} has the type {dtype}.",
                why=f"phoque reads {', '.join(BYTES)}.",
                fix="Use another copy of the model.",
            )
        stored[name] = Entry(dtype, shape, start, end)
        if end - start != math.prod(shape) * BYTES[dtype]:
            raise _bad_header(file, f"{name} has the shape {list(shape)}, and {end - start} bytes")
    ordered = sorted(stored.items(), key=lambda item: (item[1].start, item[1].end))
    for (one, first), (other, second) in pairwise(ordered):
        if second.start < first.end:
            raise _bad_header(file, f"{one} and {other} overlap")
    return stored


def _check_entry(file: Path, name: str, entry: Any, body: int) -> tuple[str, tuple[int, ...], int, int]:
    """The (dtype, shape, start, end) of a header's entry. Raises UsageError if they are not of the right kinds."""
    try:
        start, end = entry["data_offsets"]
        shape, dtype = entry["shape"], entry["dtype"]
        numbers = [start, end, *shape]
    except (KeyError, TypeError, ValueError) as error:
        raise _bad_header(file, f"the entry of {name} is not an entry of a tensor") from error
    if not all(type(number) is int and number >= 0 for number in numbers) or start > end or not isinstance(dtype, str):
        raise _bad_header(file, f"the entry of {name} has a shape or offsets that no tensor has")
    return dtype, tuple(shape), body + start, body + end


def _bad_header(file: Path, reason: str) -> UsageError:
    return UsageError(
        what=f"The weights in {file.name} cannot be read.",
        why=f"The file is damaged: {reason}.",
        fix="Delete it and download it again.",
    )
