"""Checksums of files, which every room of the house pins things by."""

import hashlib
from pathlib import Path


def sha256(path: Path) -> str:
    """The hex SHA-256 of a file, read in pieces."""
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()
