"""Where an export lies, in a folder or on the Hub; there its small files are fetched and its weights are not."""

import hashlib
import json
from pathlib import Path
from typing import Any

from phoque.errors import PhoqueError
from phoque.files import sha256
from phoque.hub.repo import Repo
from phoque.onnx.verify.checks import CheckFailed

SMALL = 64 << 20  # bytes; a graph whose weights lie beside it is far smaller


class Local:
    """An export in a folder."""

    def __init__(self, folder: Path) -> None:
        if not folder.is_dir():
            raise PhoqueError(f"There is no folder {folder}.", "--local-dir names it.", "Check the path.")
        self.folder, self.name = folder, folder.name
        self.sizes = {str(f.relative_to(folder)): f.stat().st_size for f in folder.rglob("*") if f.is_file()}

    def fetch(self, path: str) -> Path:
        """The file."""
        return self.folder / path

    def digest(self, path: str) -> str:
        """Its SHA-256."""
        return sha256(self.folder / path)

    def whole(self) -> Path:
        """The folder with all files."""
        return self.folder


class OnHub:
    """An export in a model repository, at one commit."""

    def __init__(self, repo: Repo, revision: str | None, cache: Path) -> None:
        self._repo, self._there = repo, repo.snapshot(revision)
        self.name = repo.name
        self.folder = cache / "onnx" / f"{repo.name.replace('/', '--')}-{self._there.sha[:12]}"
        self.sizes = {path: file.size for path, file in self._there.files.items() if not path.startswith(".git")}

    def fetch(self, path: str) -> Path:
        """The file, fetched on first use; large ones are not fetched for a look. Raises Fails for those."""
        if self.sizes[path] > SMALL:
            raise CheckFailed(
                f"{path} has {self.sizes[path] >> 20} MB: its weights are inside, so it cannot be looked at alone"
            )
        return self._fetched(path)

    def _fetched(self, path: str) -> Path:
        file = self.folder / path
        return file if file.is_file() else self._repo.fetch(self._there, path, self.folder)

    def digest(self, path: str) -> str:
        """The SHA-256 that the Hub lists for a file in LFS; of a small file, its own."""
        lfs = self._there.files[path].lfs
        return lfs.sha256 if lfs else hashlib.sha256(self._fetched(path).read_bytes()).hexdigest()

    def whole(self) -> Path:
        """The folder with all files, fetched and compared with the Hub's hashes."""
        for path in self.sizes:
            self._fetched(path)
        return self.folder


ExportDir = Local | OnHub


def read_json(place: ExportDir, path: str) -> dict[str, Any]:
    """A JSON file of the export. Raises Fails if it is missing or broken."""
    if path not in place.sizes:
        raise CheckFailed(f"{path} is missing")
    try:
        found = json.loads(place.fetch(path).read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckFailed(f"{path} is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise CheckFailed(f"{path} holds no JSON object")
    return found
