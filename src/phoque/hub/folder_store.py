"""A folder on another disk, such as a mounted bucket, as the store of a run.

An object store that is mounted as a folder can replace a file as a whole, and little else: hf-mount, which mounts
buckets in HF Jobs, has no file locks, does not append to a file that exists, and uploads a file when it is closed
(https://github.com/huggingface/hf-mount). So every file is written once, from start to end, under its final name, and
never renamed. A checkpoint has a mark while it is written, and a run's record is written after its adapter: what was
cut off is not taken for whole.
"""

import contextlib
import shutil
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from phoque.errors import IntegrityError, Resumable, UsageError
from phoque.hub.store import CHECKPOINT, MARKER, NEVER_UPLOADED, FileHashes, Snapshot, Store, git_blob_id
from phoque.settings.job import Access

MARK = "phoque-run.txt"  # in a folder that is the store of a run
UNFINISHED = ".unfinished"  # in a checkpoint while it is written
MARK_TEXT = "phoque keeps the checkpoints and the adapter of a run here (phoque train --run-dir).\n"
WRITTEN_LAST = ("MANIFEST.json", "run.json", MARKER)


@dataclass
class StoredFile:
    """A file of the folder, as a repository's listing has it; its hash is computed when it is asked for."""

    path: Path
    size: int
    lfs: None = None

    @cached_property
    def blob_id(self) -> str:
        """Git's hash of the content."""
        return git_blob_id(self.path)


class FolderStore(Store):
    """The folder at `path`. Every method raises Resumable if the folder cannot be read or written."""

    flag = "--run-dir"

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._path, self.name, self.place = path, str(path), f"in {path}"

    def open(self, access: Access, warn: Callable[[str], None]) -> None:
        """Create the folder. Raises UsageError if it holds other files than a run's, or cannot be written."""
        try:
            self._path.mkdir(parents=True, exist_ok=True)
            present = {file.name for file in self._path.iterdir()}
            if present and MARK not in present:
                raise UsageError(
                    what=f"{self.name} is not the folder of a run.",
                    why=f"It has {sorted(present)[0]} and no {MARK}: a run would delete and replace files there.",
                    fix="Choose a new or empty folder for --run-dir.",
                )
            (self._path / MARK).write_text(MARK_TEXT)
        except OSError as error:
            raise UsageError(
                what=f"{self.name} cannot be written.",
                why=str(error.strerror),
                fix="Choose another --run-dir, or change its permissions.",
            ) from error

    def private(self) -> bool:
        """True: who can read a folder is not for phoque to find out, and a Job's bucket was checked before."""
        return True

    def snapshot(self) -> Snapshot:
        """List the files at the root and in the checkpoint folders, but for one that was cut off."""
        with self._access("read"):
            folders = [self._path, *(f for f in self._checkpoints() if not (f / UNFINISHED).exists())]
            paths = [file for folder in folders for file in folder.glob("*" if folder == self._path else "**/*")]
            files = {
                file.relative_to(self._path).as_posix(): StoredFile(file, file.stat().st_size)
                for file in sorted(paths)
                if file.is_file() and file.name != MARK
            }
        return Snapshot("", files)

    def _checkpoints(self) -> list[Path]:
        return [folder for folder in self._path.glob("checkpoint-*") if CHECKPOINT.match(f"{folder.name}/")]

    def push(
        self,
        files: dict[str, Path],
        message: str,
        stale: Callable[[Snapshot], list[str]],
        wait: Callable[[float], None] = time.sleep,
    ) -> str:
        """Write the files that differ, read them back, then delete what is stale.

        A checkpoint that was cut off is deleted first. A push that fails deletes what it has written, as far as it
        can. Raises UsageError if another run has made a fresh start.
        """
        local = {path: FileHashes(file) for path, file in files.items() if not NEVER_UPLOADED.search(path)}
        before = self.snapshot()
        self.check_same_run(before, list(local))
        with self._access("written"):
            missing = [path for path, file in local.items() if not file.matches(before.files.get(path))]
            deletions = stale(before)
            for folder in self._checkpoints():
                if (folder / UNFINISHED).exists():
                    shutil.rmtree(folder)
            marks = {self._path / match[1] / UNFINISHED for path in missing if (match := CHECKPOINT.match(path))}
            try:
                for mark in marks:
                    mark.parent.mkdir(exist_ok=True)
                    mark.write_text("")
                for path in sorted(missing, key=_writing_order):
                    self._write(path, local[path])
                for mark in marks:
                    mark.unlink()
            except BaseException:
                for path in missing:
                    if path not in before.files:
                        with contextlib.suppress(OSError):
                            (self._path / path).unlink(missing_ok=True)
                raise
            for name in deletions:
                if name in before.files:
                    (self._path / name).unlink(missing_ok=True)
                else:
                    shutil.rmtree(self._path / name)
        self.commits += bool(missing or deletions)
        return ""

    def _write(self, path: str, source: FileHashes) -> None:
        target = self._path / path
        target.parent.mkdir(parents=True, exist_ok=True)
        with source.file.open("rb") as read, target.open("wb") as written:
            shutil.copyfileobj(read, written, 1 << 20)
        if not source.matches(StoredFile(target, target.stat().st_size)):
            raise IntegrityError(f"{path} in {self.name} differs from the file that was written")

    def fetch(self, snapshot: Snapshot, path: str, into: Path) -> Path:
        """Copy one file; a checkpoint's manifest says later whether it is whole."""
        target = into / path
        target.parent.mkdir(parents=True, exist_ok=True)
        with self._access("read"):
            return Path(shutil.copyfile(snapshot.files[path].path, target))

    def clear(self, marker: dict[str, Any], staging: Path, root_files: Sequence[str]) -> None:
        """Delete first and write the marker then: cut off in between, the same command starts afresh again."""
        with self._access("written"):
            for folder in self._checkpoints():
                shutil.rmtree(folder)
            for name in root_files:
                (self._path / name).unlink(missing_ok=True)
        super().clear(marker, staging, ())

    def squash(self, message: str) -> str:
        """Nothing: a folder keeps no history."""
        return ""

    @contextmanager
    def _access(self, done: str) -> Generator[None]:
        try:
            yield
        except (OSError, IntegrityError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            raise Resumable(
                what=f"{self.name} could not be {done}.",
                why=f"{reason}.",
                fix="Check the disk or the mount, then run the same command again.",
            ) from error


def _writing_order(path: str) -> tuple[int, str]:
    name = Path(path).name
    return (WRITTEN_LAST.index(name) + 1 if name in WRITTEN_LAST else 0), path
