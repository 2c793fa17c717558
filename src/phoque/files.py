"""Files: their checksums, what JSON can hold, and the folder of a run, which is whole or not there."""

import hashlib
import shutil
import time
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def sha256(path: Path) -> str:
    """The hex SHA-256 of a file, read in pieces."""
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


@contextmanager
def run_folder(root: Path, kind: str) -> Generator[tuple[Path, Path]]:
    """(a folder to write into, where it will be): `root/<kind>_<time>`, moved there if the block ends without error."""
    root.mkdir(parents=True, exist_ok=True)
    stamp = time.strftime(f"{kind}_%Y%m%d_%H%M%S")
    names = [stamp, *(f"{stamp}_{n}" for n in range(2, 100))]
    folder = next(root / name for name in names if not (root / name).exists())
    staging = root / f".{folder.name}.partial"
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir()
    try:
        yield staging, folder
        staging.rename(folder)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def to_jsonable(value: Any) -> Any:
    """Numbers, texts, lists and objects alone, as JSON has them; NaN becomes null."""
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
