"""A Hub repository. Pushes are one commit each and are read back; downloads are compared with the tree's hashes."""

import re
import time
from collections.abc import Callable
from http import HTTPStatus
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from phoque.errors import IntegrityError, PublicRepoError, UsageError
from phoque.files import EXPORT_RECORD, read_json_object
from phoque.hub.client import Hub
from phoque.hub.store import CARD, NEVER_UPLOADED, FileHashes, Snapshot, Store
from phoque.settings.job import Access

GATES = {  # who can download a public repository, by the Hub's setting
    "manual": "anyone can see it, and download it if you approve their request on the Hub",
    "auto": "anyone can see it, and download it after sharing their name and e-mail address",
    "off": "anyone can see and download the output of this run",
}
COMMIT = re.compile(r"[0-9a-f]{40}")


class Repo(Store):
    """The Hub repository for the output of a run; `kind` is model or dataset."""

    place = "on the Hub"
    flag = "--hub-model-id"
    commits_per_hour = 128  # the Hub's limit per repository
    is_atomic = True
    has_own_name = True

    def __init__(self, hub: Hub, name: str, kind: str = "model") -> None:
        super().__init__()
        self.hub, self.name, self.kind = hub, name, kind

    def open(self, access: Access, warn: Callable[[str], None]) -> None:
        """Create the repository if it does not exist, with this access, and check that the token can write.

        It is created private. Then one request makes it public and gated, so it is never public without its gate.
        Raises PublicRepoError if it exists and is public, but `access.public` is not set.
        """
        self._create(access)
        self.check_write_access()
        info = self._read_info()
        if not info.private and not access.public:
            raise PublicRepoError(self.name)
        if info.private and access.public:
            warn(f"{self.name} exists and is private; --public does not change that: its settings on the Hub do")
        if not info.private:
            warn(f"{self.name} is public: {GATES[str(info.gated or 'off')]}")

    def warn_of_foreign(self, replaced: str, record: str, warn: Callable[[str], None]) -> None:
        """Warn if a push would replace or delete files that phoque did not write.

        `replaced` is a regular expression of their paths. Phoque writes the file `record` beside its own, and the
        record of an export lists them.
        """
        snapshot = self.snapshot()
        foreign = [path for path in snapshot.files if re.fullmatch(replaced, path)]
        if record == EXPORT_RECORD:
            own = self.list_recorded(snapshot)
            foreign = [path for path in foreign if path not in own]
        elif record in snapshot.files:
            foreign = []
        if foreign:
            warn(
                f"{self.name} has {foreign[0]}, which phoque did not write: the push replaces or deletes it. The "
                "repository's history keeps it"
            )

    def list_recorded(self, snapshot: Snapshot) -> set[str]:
        """The files of an export that the repository's own record of it lists; none if it has no such record."""
        if EXPORT_RECORD not in snapshot.files:
            return set()
        with TemporaryDirectory() as folder:
            try:
                record = read_json_object(self.fetch(snapshot, EXPORT_RECORD, Path(folder)))
            except UsageError:  # another program's file of that name
                return set()
        digests = record.get("sha256")
        return {*digests} if isinstance(digests, dict) else set()

    def check_write_access(self) -> None:
        """Raise the Hub's error if the token cannot write to the repository; writes nothing."""
        from huggingface_hub import CommitOperationAdd

        def ask() -> None:
            self.hub.api.preupload_lfs_files(self.name, [CommitOperationAdd(CARD, b"")], repo_type=self.kind)

        self.hub.retry(f"checking write access to {self.name}", ask)

    def _create(self, access: Access) -> None:
        from huggingface_hub.errors import HfHubHTTPError

        api = self.hub.api
        if self.hub.retry(self.name, lambda: api.repo_exists(self.name, repo_type=self.kind)):
            return
        attempts = 0

        def create_private() -> bool:
            nonlocal attempts
            attempts += 1
            try:
                api.create_repo(self.name, repo_type=self.kind, private=True)
            except HfHubHTTPError as error:
                if error.response.status_code != HTTPStatus.CONFLICT:
                    raise
                # this process, whose reply was lost, or another one, whose settings stay as they are
                return attempts > 1 and set(self.snapshot().files) <= {".gitattributes"}
            return True

        if self.hub.retry(self.name, create_private) and access.public:
            gate: Any = None if access.gated == "off" else access.gated
            self.hub.retry(
                self.name,
                lambda: api.update_repo_settings(self.name, repo_type=self.kind, visibility="public", gated=gate),
            )

    def private(self) -> bool:
        """Whether the repository is private. Raises the Hub's error if it does not exist."""
        return bool(self._read_info().private)

    def check_visibility(self, *, public: bool) -> bool:
        """Whether the repository is private. Raises PublicRepoError for a public one, unless it may be (`public`)."""
        private = self.private()
        if not private and not public:
            raise PublicRepoError(self.name)
        return private

    def _read_info(self) -> Any:
        return self.hub.retry(self.name, lambda: self.hub.api.repo_info(self.name, repo_type=self.kind))

    def _find_commit(self, revision: str | None) -> str:
        """The commit of a branch or tag, or the newest one: its files are kept under that name."""
        return str(self.hub.api.repo_info(self.name, revision=revision, repo_type=self.kind).sha)

    def is_current(self, snapshot: Snapshot, path: str, folder: Path) -> bool:
        """Whether a folder holds this file of the snapshot already."""
        return (folder / path).is_file() and FileHashes(folder / path).matches(snapshot.files[path])

    def snapshot(self, revision: str | None = None) -> Snapshot:
        """List the files at a commit, by default the newest one. Raises UsageError for a path that leads out of it."""

        def list_files() -> Snapshot:
            sha = revision if revision and COMMIT.fullmatch(revision) else self._find_commit(revision)
            entries = self.hub.api.list_repo_tree(self.name, recursive=True, revision=sha, repo_type=self.kind)
            return Snapshot(sha, {entry.path: entry for entry in entries if hasattr(entry, "blob_id")})

        listed = self.hub.retry(f"listing {self.name}", list_files)
        if outside := [path for path in listed.files if path.startswith("/") or ".." in Path(path).parts]:
            raise UsageError(
                what=f"{self.name} lists a file outside of itself: {outside[0]}.",
                why="Downloaded, it would be written outside of its folder. No git repository can hold such a path.",
                fix="Check HF_ENDPOINT, and do not use this repository.",
            )
        return listed

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

        local = {path: FileHashes(file) for path, file in files.items() if not NEVER_UPLOADED.search(path)}

        def push_once() -> str:
            before = self.snapshot()
            self.check_same_run(before, list(local))
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
            if not FileHashes(file).matches(snapshot.files[path]):
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
