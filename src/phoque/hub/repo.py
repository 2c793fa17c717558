"""A repository on the Hub: what is pushed goes as one commit and is read back; what is fetched is verified."""

import hashlib
import json
import re
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from phoque.errors import PhoqueError
from phoque.files import sha256
from phoque.errors import IntegrityError, PublicRepoError
from phoque.hub.client import Hub

MARKER, CARD = "fresh_start.json", "README.md"
CHECKPOINT = re.compile(r"(checkpoint-\d+|last-checkpoint)/")
NEVER = re.compile(r"(^|/)(\.env[^/]*|training_args\.bin)$")  # where tokens leak


@dataclass(frozen=True)
class Snapshot:
    """A repository at one commit: its files, as the tree lists them."""

    sha: str
    files: dict[str, Any]

    def folders(self) -> dict[str, list[Any]]:
        """The checkpoint folders with the files in them."""
        found: dict[str, list[Any]] = {}
        for path, file in self.files.items():
            if folder := CHECKPOINT.match(path):
                found.setdefault(folder[1], []).append(file)
        return found


class Repo:
    """The repository that a run is kept in; `kind` is model or dataset."""

    def __init__(self, hub: Hub, name: str, kind: str = "model") -> None:
        self.hub, self.name, self.kind = hub, name, kind
        self.commits = 0  # that were made here
        self._marker: str | None = None

    def pin(self, there: Snapshot) -> None:
        """Remember the fresh-start marker: a push after somebody else's fresh start is refused from now on."""
        self._marker = _blob(there)

    def open(self, public: bool, warn: Callable[[str], None]) -> None:
        """Make the repository if there is none, private unless `public`.

        Raises PhoqueError (2) for one that anybody can read, if that was not asked for.
        """

        def make() -> None:
            self.hub.api.create_repo(self.name, repo_type=self.kind, private=not public, exist_ok=True)

        self.hub.retry(self.name, make)
        from huggingface_hub import CommitOperationAdd

        def ask() -> None:  # it writes nothing, and is refused to a token that may not write
            self.hub.api.preupload_lfs_files(self.name, [CommitOperationAdd(CARD, b"")], repo_type=self.kind)

        self.hub.retry(f"asking to write to {self.name}", ask)
        private = self.private()
        if not private and public:
            warn(f"{self.name} is public: anyone can see what this run makes and load it")
        if not private and not public:
            raise PublicRepoError(self.name)

    def private(self) -> bool:
        """Whether only its owners can read the repository. Raises the Hub's error if there is none."""
        return bool(self.hub.retry(self.name, lambda: self.hub.api.repo_info(self.name, repo_type=self.kind)).private)

    def snapshot(self, revision: str | None = None) -> Snapshot:
        """The files at a commit, the newest by default."""

        def listed() -> Snapshot:
            sha = revision or str(self.hub.api.repo_info(self.name, repo_type=self.kind).sha)
            entries = self.hub.api.list_repo_tree(self.name, recursive=True, revision=sha, repo_type=self.kind)
            return Snapshot(sha, {entry.path: entry for entry in entries if hasattr(entry, "blob_id")})

        return self.hub.retry(f"listing {self.name}", listed)

    def push(
        self,
        files: dict[str, Path],
        message: str,
        stale: Callable[[Snapshot], list[str]],
        wait: Callable[[float], None] = time.sleep,
    ) -> str:
        """Bring `files` (path in the repository -> file here) into the repository; return the commit that has them.

        One commit, which also deletes the `stale` files and folders; none if all is there already, as after a lost
        reply. The tree is read back and every hash compared. A try that fails is followed by one with new operations.
        """
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete

        local = {path: _Hashes(file) for path, file in files.items() if not NEVER.search(path)}

        def once() -> str:
            before = self.snapshot()
            if self._marker is not None and MARKER not in local and _blob(before) != self._marker:
                raise PhoqueError(
                    f"{self.name} was begun afresh by somebody else.",
                    "What this run has made does not belong there any more.",
                    "Stop one of the two, or give one another --hub-model-id.",
                )
            missing = [path for path, file in local.items() if not file.same_as(before.files.get(path))]
            gone = stale(before)
            if not missing and not gone:
                return before.sha
            operations: list[Any] = [CommitOperationAdd(path, str(local[path].file)) for path in missing]
            operations += [
                CommitOperationDelete(name)
                if name in before.files
                else CommitOperationDelete(f"{name}/", is_folder=True)
                for name in gone
            ]
            made = self.hub.api.create_commit(
                self.name, operations, commit_message=message, parent_commit=before.sha, repo_type=self.kind
            )
            self.commits += 1
            after = self.snapshot(made.oid)
            for path, file in local.items():
                if not file.same_as(after.files.get(path)):
                    raise IntegrityError(f"{path} is not in {self.name} as it was sent")
            return str(made.oid)

        return self.hub.retry(f"pushing to {self.name}", once, wait)

    def fetch(self, snapshot: Snapshot, path: str, into: Path) -> Path:
        """One file at the snapshot's commit, its hash compared with the tree's. Raises Damaged, or the Hub's error."""
        from huggingface_hub import hf_hub_download

        def once() -> Path:
            got = Path(
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
            if not _Hashes(got).same_as(snapshot.files[path]):
                got.unlink()
                raise IntegrityError(f"{path} arrived damaged")
            return got

        return self.hub.retry(f"fetching {path}", once)

    def clear(self, marker: dict[str, Any], staging: Path) -> None:
        """Delete every checkpoint and write the fresh-start marker, in one commit."""
        staging.mkdir(parents=True, exist_ok=True)
        file = staging / MARKER
        file.write_text(json.dumps(marker))
        try:
            self.push({MARKER: file}, "Fresh start: delete all checkpoints", lambda s: sorted(s.folders()))
            self.pin(self.snapshot())
        finally:
            shutil.rmtree(staging, ignore_errors=True)


def _blob(there: Snapshot) -> str:
    return there.files[MARKER].blob_id if MARKER in there.files else ""


class _Hashes:
    """A local file's size and hashes, each computed once and only if it is asked for."""

    def __init__(self, file: Path) -> None:
        self.file, self._size = file, file.stat().st_size
        self._sha256: str | None = None
        self._sha1: str | None = None

    def same_as(self, remote: Any) -> bool:
        """Whether the tree's entry is this file: by SHA-256 if it lies in LFS, else by git's SHA-1."""
        if remote is None or remote.size != self._size:
            return False
        if remote.lfs:
            self._sha256 = self._sha256 or sha256(self.file)
            return remote.lfs.sha256 == self._sha256
        self._sha1 = self._sha1 or hashlib.sha1(b"blob %d\0" % self._size + self.file.read_bytes()).hexdigest()
        return remote.blob_id == self._sha1
