"""An export in a folder or on the Hub; from the Hub, small files are downloaded on use and weights only when needed."""

import hashlib
import json
from pathlib import Path
from typing import Any

from phoque.checks import CheckFailed
from phoque.errors import UsageError
from phoque.files import sha256
from phoque.hub.repo import Repo

MAX_FETCH_BYTES = 64 << 20  # bytes; a graph with external data is far smaller


class LocalExport:
    """An export in a folder, which is called `name` if that is not the folder's."""

    def __init__(self, folder: Path, name: str = "") -> None:
        if not folder.is_dir():
            raise UsageError(
                what=f"There is no folder {folder}.",
                why="--local-dir must be an existing folder.",
                fix="Check the path.",
            )
        self.folder, self.name = folder, name or folder.name
        self.sizes = {str(f.relative_to(folder)): f.stat().st_size for f in folder.rglob("*") if f.is_file()}

    def fetch(self, path: str) -> Path:
        """Return the path of a file."""
        return self.folder / path

    def digest(self, path: str) -> str:
        """Return the SHA-256 of a file."""
        return sha256(self.folder / path)

    def fetch_all(self) -> Path:
        """Return the folder that holds all files."""
        return self.folder


class HubExport:
    """An export in a model repository, at one commit."""

    def __init__(self, repo: Repo, revision: str | None, cache: Path) -> None:
        self._repo, self._snapshot = repo, repo.snapshot(revision)
        self.name = repo.name
        self.folder = cache / "onnx" / f"{repo.name.replace('/', '--')}-{self._snapshot.sha[:12]}"
        self.sizes = {path: file.size for path, file in self._snapshot.files.items() if not path.startswith(".git")}

    def fetch(self, path: str) -> Path:
        """Download a file on first use; return its path. Raises CheckFailed if it is larger than MAX_FETCH_BYTES."""
        if self.sizes[path] > MAX_FETCH_BYTES:
            raise CheckFailed(
                f"{path} has {self.sizes[path] >> 20} MB: it contains its weights, so it is not downloaded"
            )
        return self._download(path)

    def _download(self, path: str) -> Path:
        file = self.folder / path
        return file if file.is_file() else self._repo.fetch(self._snapshot, path, self.folder)

    def digest(self, path: str) -> str:
        """Return the SHA-256 that the Hub lists for an LFS file; other files are downloaded and hashed."""
        lfs = self._snapshot.files[path].lfs
        return lfs.sha256 if lfs else hashlib.sha256(self._download(path).read_bytes()).hexdigest()

    def fetch_all(self) -> Path:
        """Download all files, compare them with the Hub's hashes, and return their folder."""
        for path in self.sizes:
            self._download(path)
        return self.folder


ExportDir = LocalExport | HubExport


def read_json(export: ExportDir, path: str) -> dict[str, Any]:
    """Read a JSON object from a file of the export. Raises CheckFailed if it is missing or not a JSON object."""
    if path not in export.sizes:
        raise CheckFailed(f"{path} is missing")
    try:
        content = json.loads(export.fetch(path).read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckFailed(f"{path} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise CheckFailed(f"{path} does not contain a JSON object")
    return content
