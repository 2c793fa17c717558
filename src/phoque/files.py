"""Files that are complete or absent, locks between processes, checksums, and values that JSON can hold."""

import csv
import errno
import fcntl
import glob
import hashlib
import json
import os
import shutil
import time
import uuid
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from phoque.errors import UsageError, first_line

if TYPE_CHECKING:
    from filelock import BaseFileLock


MERGE_RECORD = "merge.json"  # in the folder of a merged model: what it was made from, and the proof
EXPORT_RECORD = "export.json"  # in the folder of an export: what it was made from, and the hashes of its files


def split_lines(text: str) -> list[str]:
    """The lines of a text that are not empty; str.splitlines also splits at U+2028 and others, which JSON may hold."""
    return [line for line in text.split("\n") if line.strip()]


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


def expand_user(name: str | Path) -> Path:
    """The path with the home folder in place of `~`; `~nobody`, of a user who does not exist, stays as it is."""
    try:
        return Path(name).expanduser()
    except RuntimeError:
        return Path(name)


def exists(path: Path) -> bool:
    """Whether there is such a file or folder; there is none of a name that is too long."""
    try:
        return path.exists()
    except (OSError, ValueError):
        return False


def local_path(name: str) -> Path | None:
    """The file or folder of this name on this machine, or None if there is none."""
    path = expand_user(name)
    return path if exists(path) else None


def find_file_in_the_way(folder: Path) -> Path | None:
    """The file that stands where the folder, or one above it, would be; None if there is none."""
    return next((place for place in (folder, *folder.parents) if exists(place) and not place.is_dir()), None)


def check_output_folder(folder: Path, record: str, kind: str) -> None:
    """Raise UsageError if a folder cannot be replaced by output: a file, the current folder, or not ours.

    A folder is ours if it is empty or holds the file `record`; `kind` names what such a folder holds.
    """
    if file := find_file_in_the_way(folder):
        raise UsageError(what=f"{file} is a file.", why="A folder is needed.", fix="Choose another --output-dir.")
    if Path.cwd().is_relative_to(folder.resolve()):
        raise UsageError(
            what=f"--output-dir {folder} is the current folder, or contains it.",
            why="The folder is replaced as a whole.",
            fix=f"Name a new folder, such as --output-dir {Path.cwd().name}-{kind.split()[0]}.",
        )
    if folder.is_dir() and any(folder.iterdir()) and not (folder / record).is_file():
        raise UsageError(
            what=f"{folder} is not empty, and it is not {kind}.",
            why="It would be replaced, and its files would be lost.",
            fix="Choose another --output-dir.",
        )


@contextmanager
def atomic_folder(path: Path) -> Generator[Path]:
    """Yield an empty folder beside `path`; it replaces `path` if the block ends without error, else it is deleted.

    Each process has a folder of its own: of two that write the same output, the last one to finish wins. What killed
    processes have left is deleted.
    """
    path = path.resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    for left in path.parent.glob(f".{glob.escape(path.name)}.*partial"):
        with _locked_folder(left) as is_left:
            if is_left:  # its process has ended
                shutil.rmtree(left, ignore_errors=True)
    new = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.new")
    new.mkdir()
    with _locked_folder(new):  # before it gets the name by which another process would find and delete it
        staging = new.rename(new.with_suffix(".partial"))
        try:
            yield staging
            _replace_folder(staging, path)
        finally:
            shutil.rmtree(staging, ignore_errors=True)


def _replace_folder(new: Path, old: Path) -> None:
    """Rename a folder to the name of another, which is deleted."""
    while True:
        shutil.rmtree(old, ignore_errors=True)
        try:
            new.rename(old)
        except OSError as error:  # another process has just put its own there
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
        else:
            return


@contextmanager
def _locked_folder(folder: Path) -> Generator[bool]:
    """Lock a folder inside the `with` statement, and yield whether that worked: no other process has locked it.

    The lock ends with the process, whatever ends it.
    """
    try:
        opened = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except OSError:
        yield False
        return
    try:
        try:
            fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
            is_locked = True
        except OSError:  # it is another's, or the file system has no locks
            is_locked = False
        yield is_locked
    finally:
        os.close(opened)


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


def read_json_object(file: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises UsageError if it is missing or damaged."""
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            raise ValueError("It is not a JSON object.")
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else first_line(error)
        raise UsageError(what=f"{file} cannot be read.", why=f"{reason}", fix="Download it again.") from error
    return config


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
