"""Files that are complete or absent, locks between processes, checksums, and values that JSON can hold."""

import csv
import hashlib
import os
import shutil
import time
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from filelock import BaseFileLock


def sha256(path: Path) -> str:
    """The hex SHA-256 of a file, read in chunks."""
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


@contextmanager
def atomic_file(path: Path) -> Generator[Path]:
    """Yield a temporary path beside `path`; it replaces `path` if the block ends without error, and is deleted if not.

    The parent folder is created. Concurrent writers do not disturb each other: the last one to finish wins.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    staging = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        yield staging
        staging.replace(path)
    finally:
        staging.unlink(missing_ok=True)


def write_atomically(path: Path, text: str) -> None:
    """Write a text file so that a reader, or a crash, sees the old content or the new content and nothing between."""
    with atomic_file(path) as staging:
        staging.write_text(text, encoding="utf-8")


@contextmanager
def atomic_folder(path: Path) -> Generator[Path]:
    """Yield an empty folder beside `path`; it replaces `path` if the block ends without error, else it is deleted."""
    staging = path.with_name(f".{path.name}.partial")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    try:
        yield staging
        shutil.rmtree(path, ignore_errors=True)
        staging.rename(path)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def lock(path: Path, timeout: float = -1) -> "BaseFileLock":
    """A lock between processes on the file `path`, held while the block runs.

    A second process waits for the first: for ever if `timeout` is -1, else for so many seconds. Raises
    filelock.Timeout then.
    """
    from filelock import FileLock

    path.parent.mkdir(parents=True, exist_ok=True)
    return FileLock(path, timeout=timeout)


@contextmanager
def run_folder(root: Path, kind: str) -> Generator[tuple[Path, Path]]:
    """Yield (a folder to write into, its final path `root/<kind>_<time>`); it is moved there if the block succeeds."""
    stamp = time.strftime(f"{kind}_%Y%m%d_%H%M%S")
    names = [stamp, *(f"{stamp}_{n}" for n in range(2, 100))]
    folder = next(root / name for name in names if not (root / name).exists())
    with atomic_folder(folder) as staging:
        yield staging, folder


def read_csv(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV file by the names in its first line."""
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def to_jsonable(value: Any) -> Any:
    """`value` as JSON types: NumPy arrays and scalars become lists and numbers, NaN and infinity become null."""
    if isinstance(value, dict):
        return {str(k): to_jsonable(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_jsonable(v) for v in value]
    import numpy

    if isinstance(value, numpy.ndarray):
        return to_jsonable(value.tolist())
    if isinstance(value, numpy.generic):
        value = value.item()
    return None if isinstance(value, float) and not numpy.isfinite(value) else value
