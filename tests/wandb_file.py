"""Reads an offline W&B run back from its file: a LevelDB log of protobuf records."""

import json
import struct
from collections.abc import Iterator
from pathlib import Path

BLOCK, HEAD, FILE_HEAD = 32768, 7, 7
FULL, FIRST, MIDDLE, LAST = 1, 2, 3, 4


def chunks(data: bytes) -> Iterator[bytes]:
    at, parts = FILE_HEAD, []
    while at + HEAD <= len(data):
        if (left := BLOCK - at % BLOCK) < HEAD:
            at += left
            continue
        _, length, kind = struct.unpack_from("<IHB", data, at)
        parts.append(data[at + HEAD : at + HEAD + length])
        at += HEAD + length
        if kind in (FULL, LAST):
            yield b"".join(parts)
            parts = []


def records(run: Path, kind: str) -> list:
    """Every record of a kind, in order, of the offline runs below a folder: one for each time phoque was started."""
    from wandb.proto import wandb_internal_pb2

    found = []
    for file in sorted(run.rglob("*.wandb"), key=lambda f: f.stat().st_mtime):
        for chunk in chunks(file.read_bytes()):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(chunk)
            if record.WhichOneof("record_type") == kind:
                found.append(getattr(record, kind))
    return found


def history(run: Path) -> list[dict]:
    """Every logged row."""
    return [
        {i.key or ".".join(i.nested_key): json.loads(i.value_json) for i in row.item} for row in records(run, "history")
    ]
