"""A Hub repository. Pushes are one commit each and are read back; downloads are compared with the tree's hashes."""

import hashlib
import json
import re
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from phoque.errors import IntegrityError, PublicRepoError, UsageError
from phoque.files import sha256
from phoque.hub.client import Hub

MARKER, CARD = "fresh_start.json", "README.md"
CHECKPOINT = re.compile(r"(checkpoint-\d+|last-checkpoint)/")
COMMIT = re.compile(r"[0-9a-f]{40}")
NEVER_UPLOADED = re.compile(r"(^|/)(\.env[^/]*|training_args\.bin)$")  # never uploaded, because they can contain tokens


@dataclass(frozen=True)
class Snapshot:
    """A repository at one commit: `sha`, and `files` from path to the entry of the Hub's tree listing."""

    sha: str
    files: dict[str, Any]

    def checkpoint_folders(self) -> dict[str, list[Any]]:
        """Return the checkpoint folders and the tree entries of their files."""
        by_folder: dict[str, list[Any]] = {}
        for path, file in self.files.items():
            if folder := CHECKPOINT.match(path):
                by_folder.setdefault(folder[1], []).append(file)
        return by_folder


class Repo:
    """The Hub repository for the output of a run; `kind` is model or dataset."""

    def __init__(self, hub: Hub, name: str, kind: str = "model") -> None:
        self.hub, self.name, self.kind = hub, name, kind
        self.commits = 0  # number of commits that this object has created
        self._marker: str | None = None

    def pin(self, current: Snapshot) -> None:
        """Remember the fresh-start marker. Later pushes are refused if another run has replaced it."""
        self._marker = _marker_id(current)

    def open(self, public: bool, warn: Callable[[str], None]) -> None:
        """Create the repository if it does not exist, private unless `public`, and check that the token can write.

        Raises UsageError if it exists and is public, but `public` is not set.
        """

        def create() -> None:
            self.hub.api.create_repo(self.name, repo_type=self.kind, private=not public, exist_ok=True)

        self.hub.retry(self.name, create)
        from huggingface_hub import CommitOperationAdd

        def check_write_access() -> None:  # writes nothing, and fails if the token has no write access
            self.hub.api.preupload_lfs_files(self.name, [CommitOperationAdd(CARD, b"")], repo_type=self.kind)

        self.hub.retry(f"checking write access to {self.name}", check_write_access)
        private = self.private()
        if not private and public:
            warn(f"{self.name} is public: anyone can see and download the output of this run")
        if not private and not public:
            raise PublicRepoError(self.name)

    def private(self) -> bool:
        """Whether the repository is private. Raises the Hub's error if it does not exist."""
        return bool(self.hub.retry(self.name, lambda: self.hub.api.repo_info(self.name, repo_type=self.kind)).private)

    def _find_commit(self, revision: str | None) -> str:
        """The commit of a branch or tag, or the newest one: its files are kept under that name."""
        return str(self.hub.api.repo_info(self.name, revision=revision, repo_type=self.kind).sha)

    def is_current(self, snapshot: Snapshot, path: str, folder: Path) -> bool:
        """Whether a folder holds this file of the snapshot already."""
        return (folder / path).is_file() and _FileHashes(folder / path).matches(snapshot.files[path])

    def snapshot(self, revision: str | None = None) -> Snapshot:
        """List the files at a commit, by default the newest one."""

        def list_files() -> Snapshot:
            sha = revision if revision and COMMIT.fullmatch(revision) else self._find_commit(revision)
            entries = self.hub.api.list_repo_tree(self.name, recursive=True, revision=sha, repo_type=self.kind)
            return Snapshot(sha, {entry.path: entry for entry in entries if hasattr(entry, "blob_id")})

        return self.hub.retry(f"listing {self.name}", list_files)

    def push(
        self,
        files: dict[str, Path],
        message: str,
        stale: Callable[[Snapshot], list[str]],
        wait: Callable[[float], None] = time.sleep,
    ) -> str:
        """Upload `files` (path in the repository -> local file) and return the commit that contains them.

        One commit adds the files and deletes the `stale` files and folders. If the repository is in that state
        already, as after a lost reply, no commit is created. Afterwards the tree is read back and every hash compared.
        Each retry builds its operations again. Raises UsageError if another run has made a fresh start.
        """
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete

        local = {path: _FileHashes(file) for path, file in files.items() if not NEVER_UPLOADED.search(path)}

        def push_once() -> str:
            before = self.snapshot()
            if self._marker is not None and MARKER not in local and _marker_id(before) != self._marker:
                raise UsageError(
                    what=f"{self.name} was restarted by another run.",
                    why="A fresh start has deleted the checkpoints that this run continues.",
                    fix="Stop one of the two runs, or give one of them another --hub-model-id.",
                )
            missing = [path for path, file in local.items() if not file.matches(before.files.get(path))]
            deletions = stale(before)
            if not missing and not deletions:
                return before.sha
            operations: list[Any] = [CommitOperationAdd(path, str(local[path].file)) for path in missing]
            operations += [
                CommitOperationDelete(name)
                if name in before.files
                else CommitOperationDelete(f"{name}/", is_folder=True)
                for name in deletions
            ]
            commit = self.hub.api.create_commit(
                self.name, operations, commit_message=message, parent_commit=before.sha, repo_type=self.kind
            )
            self.commits += 1
            after = self.snapshot(commit.oid)
            for path, file in local.items():
                if not file.matches(after.files.get(path)):
                    raise IntegrityError(f"{path} in {self.name} differs from the file that was sent")
            return str(commit.oid)

        return self.hub.retry(f"pushing to {self.name}", push_once, wait)

    def fetch(self, snapshot: Snapshot, path: str, into: Path) -> Path:
        """Download one file at the snapshot's commit and check its hash. Raises IntegrityError, or the Hub's error."""
        from huggingface_hub import hf_hub_download

        def fetch_once() -> Path:
            file = Path(
                hf_hub_download(
                    self.name,
                    path,
                    repo_type=self.kind,
                    revision=snapshot.sha,
                    local_dir=into,
                    token=self.hub.api.token,
                    force_download=True,
                )
            )
            if not _FileHashes(file).matches(snapshot.files[path]):
                file.unlink()
                raise IntegrityError(f"{path} was damaged during the download")
            return file

        return self.hub.retry(f"fetching {path}", fetch_once)

    def squash(self, message: str) -> str:
        """Replace the repository's history by one commit with its present files; return the commit."""
        self.hub.retry(
            f"squashing the history of {self.name}",
            lambda: self.hub.api.super_squash_history(self.name, commit_message=message, repo_type=self.kind),
        )
        return self.snapshot().sha

    def clear(self, marker: dict[str, Any], staging: Path, root_files: Sequence[str]) -> None:
        """Delete every checkpoint and `root_files` of the old run, and write the fresh-start marker, in one commit."""
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
    content = file.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class _FileHashes:
    """The size and the hashes of a local file; each hash is computed at most once, when it is needed."""

    def __init__(self, file: Path) -> None:
        self.file, self._size = file, file.stat().st_size
        self._sha256: str | None = None
        self._sha1: str | None = None

    def matches(self, remote: Any) -> bool:
        """Whether a tree entry has the same content: by SHA-256 for LFS files, else by git's blob SHA-1."""
        if remote is None or remote.size != self._size:
            return False
        if remote.lfs:
            self._sha256 = self._sha256 or sha256(self.file)
            return remote.lfs.sha256 == self._sha256
        self._sha1 = self._sha1 or git_blob_id(self.file)
        return remote.blob_id == self._sha1
