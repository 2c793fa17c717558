"""Where a run keeps its checkpoints: the interface that a Hub repository and a folder on another disk share."""

import hashlib
import json
import re
import shutil
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from phoque.errors import UsageError
from phoque.files import sha256
from phoque.settings.job import Access

MARKER, CARD = "fresh_start.json", "README.md"
CHECKPOINT = re.compile(r"(checkpoint-\d+|last-checkpoint)/")
NEVER_UPLOADED = re.compile(r"(^|/)(\.env[^/]*|training_args\.bin)$")  # never uploaded, because they can contain tokens


@dataclass(frozen=True)
class Snapshot:
    """What a store holds: `sha`, the commit of a repository or "", and `files` from path to {size, lfs, blob_id}."""

    sha: str
    files: dict[str, Any]

    def checkpoint_folders(self) -> dict[str, list[Any]]:
        """Return the checkpoint folders and the entries of their files."""
        by_folder: dict[str, list[Any]] = {}
        for path, file in self.files.items():
            if folder := CHECKPOINT.match(path):
                by_folder.setdefault(folder[1], []).append(file)
        return by_folder


class Store(ABC):
    """A place for the output of a run, under `name`; `place` says where for a sentence, as in "is on the Hub".

    `commits` counts the pushes of this object that changed something, `commits_per_hour` how many are allowed, and
    `flag` names the setting that chose the store. `is_atomic`: a push is there as a whole or not at all, and earlier
    ones can be restored. `has_own_name`: no other store has this name anywhere.
    """

    name: str
    place: str
    flag: str
    commits_per_hour: int | None = None
    is_atomic = False
    has_own_name = False

    def __init__(self) -> None:
        self.commits = 0
        self._marker: str | None = None

    @abstractmethod
    def open(self, access: Access, warn: Callable[[str], None]) -> None:
        """Create the store if it does not exist, and check that it can be written."""

    @abstractmethod
    def private(self) -> bool:
        """Whether only its owner can read the store."""

    @abstractmethod
    def snapshot(self) -> Snapshot:
        """List the files."""

    @abstractmethod
    def push(
        self,
        files: dict[str, Path],
        message: str,
        stale: Callable[[Snapshot], list[str]],
        wait: Callable[[float], None] = time.sleep,
    ) -> str:
        """Store `files` (path -> local file), then delete the `stale` files and folders; return the commit or ""."""

    @abstractmethod
    def fetch(self, snapshot: Snapshot, path: str, into: Path) -> Path:
        """Copy one file of the snapshot to `into/path` and return that."""

    @abstractmethod
    def squash(self, message: str) -> str:
        """Forget earlier contents, if the store keeps them."""

    def read_json(self, snapshot: Snapshot, path: str, into: Path) -> dict[str, Any] | None:
        """Fetch a file to `into/path` and parse it; None if it was cut off, which an atomic store does not know."""
        try:
            return json.loads(self.fetch(snapshot, path, into).read_text(encoding="utf-8"))
        except ValueError:
            if self.is_atomic:
                raise
            return None

    def pin(self, current: Snapshot) -> None:
        """Remember the fresh-start marker. Later pushes are refused if another run has replaced it."""
        self._marker = _marker_id(current)

    def check_same_run(self, before: Snapshot, pushed: Sequence[str]) -> None:
        """Raise UsageError if another run has made a fresh start since `pin`."""
        if self._marker is not None and MARKER not in pushed and _marker_id(before) != self._marker:
            raise UsageError(
                what=f"{self.name} was restarted by another run.",
                why="A fresh start has deleted the checkpoints that this run continues.",
                fix=f"Stop one of the two runs, or give one of them another {self.flag}.",
            )

    def clear(self, marker: dict[str, Any], staging: Path, root_files: Sequence[str]) -> None:
        """Delete every checkpoint and `root_files` of the old run, and write the fresh-start marker, in one push."""
        staging.mkdir(parents=True, exist_ok=True)
        file = staging / MARKER
        file.write_text(json.dumps(marker))

        def find_stale(snapshot: Snapshot) -> list[str]:
            return sorted(snapshot.checkpoint_folders()) + [name for name in root_files if name in snapshot.files]

        try:
            self.push({MARKER: file}, "Fresh start: delete all checkpoints", find_stale)
            self.pin(self.snapshot())
        finally:
            shutil.rmtree(staging, ignore_errors=True)


def _marker_id(snapshot: Snapshot) -> str:
    return snapshot.files[MARKER].blob_id if MARKER in snapshot.files else ""


def git_blob_id(file: Path) -> str:
    """Git's name for the content of a file, which the Hub gives for files that are not in LFS."""
    digest = hashlib.sha1(b"blob %d\0" % file.stat().st_size)
    with file.open("rb") as content:
        while block := content.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


class FileHashes:
    """The size and the hashes of a local file; each hash is computed at most once, when it is needed."""

    def __init__(self, file: Path) -> None:
        self.file, self._size = file, file.stat().st_size

    @cached_property
    def sha256(self) -> str:
        """SHA-256 of the content, as LFS names it."""
        return sha256(self.file)

    @cached_property
    def blob_id(self) -> str:
        """Git's hash of the content."""
        return git_blob_id(self.file)

    def matches(self, stored: Any) -> bool:
        """Whether a stored file has the same content: by SHA-256 for LFS files, else by git's blob SHA-1."""
        if stored is None or stored.size != self._size:
            return False
        return stored.lfs.sha256 == self.sha256 if stored.lfs else stored.blob_id == self.blob_id
