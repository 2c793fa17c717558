"""Reads and writes run.json, the record of a run, and prepares the run folder."""

import hashlib
import json
import shutil
import time
from collections.abc import Generator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Any

from phoque.distributed.processes import current
from phoque.errors import UsageError
from phoque.files import lock, write_atomically
from phoque.models.architectures import architecture_of
from phoque.results import library_versions
from phoque.settings.fields import Resolved
from phoque.settings.train import TrainSettings
from phoque.training import checkpoints
from phoque.training.fingerprint import update_record
from phoque.training.prepare import Prepared
from phoque.training.run_files import BEST, METRICS, RECORD, RECORD_KEYS, REPORT, SAMPLES
from phoque.version import __version__

LOCK = ".lock"


def lock_run(run: Path) -> AbstractContextManager[Any]:
    """A lock on the run folder, for as long as a process trains in it. Raises UsageError if another process has it."""
    from filelock import Timeout

    try:
        return lock(run / LOCK, timeout=0).acquire()
    except Timeout:
        raise UsageError(
            what=f"Another process is training in {run}.",
            why=f"It holds the lock {run / LOCK}, which ends with it.",
            fix="Wait for it or stop it, or choose another --output-dir.",
        ) from None


def check_writable(run: Path) -> None:
    """Create the folder, check that it is writable, and delete what a killed save left. Raises OSError."""
    run.mkdir(parents=True, exist_ok=True)
    probe = run / ".writable"
    probe.write_text("")
    probe.unlink()
    shutil.rmtree(run / checkpoints.STAGING, ignore_errors=True)


@contextmanager
def remove_new_folder_on_error(run: Path) -> Generator[None]:
    """Leave no folder of a run that could not start, if it was not there before and holds nothing but the lock."""
    is_new = not run.exists()
    try:
        yield
    except BaseException:  # also Ctrl-C; it is raised again
        with suppress(OSError):
            if is_new and [file.name for file in run.iterdir()] == [LOCK]:
                (run / LOCK).unlink()
                run.rmdir()
        raise


def list_run_files(run: Path) -> list[str]:
    """The names of the run's files and folders that are there; last is the one that shows that it is a run's folder."""
    saved = checkpoints.sort_checkpoints(p.name for p in run.glob("*checkpoint*"))
    names = [*saved, "adapter", "merged", BEST, METRICS, SAMPLES, REPORT, RECORD]
    return [name for name in names if (run / name).exists()]


def delete_run(run: Path) -> None:
    """Delete all files of the run from the folder."""
    for name in list_run_files(run):
        if (run / name).is_dir():
            shutil.rmtree(run / name, ignore_errors=True)
        else:
            (run / name).unlink(missing_ok=True)


def read_record(run: Path) -> dict[str, Any] | None:
    """Read run.json; return None if there is none. Raises UsageError if it cannot be read."""
    path = run / RECORD
    if not path.is_file():
        return None
    try:
        record = json.loads(path.read_text())
        if not set(record) >= RECORD_KEYS:
            raise ValueError("run_id or fingerprint is missing")
        return update_record(record)
    except (ValueError, TypeError) as error:
        raise UsageError(
            what=f"{path} cannot be read.",
            why=f"It is not a valid run record: {str(error)[:80]}.",
            fix="Delete it (the newest checkpoint holds a copy), or start over with --fresh-start.",
        ) from error


def derive_run_id(repo: str, start: str) -> str:
    """Derive the run id from the repository and its last fresh start, so that every machine gets the same id."""
    return hashlib.sha256(f"{repo}\n{start}".encode()).hexdigest()[:12]


def create_record(
    resolved: Resolved[TrainSettings],
    prepared: Prepared,
    fingerprint: dict[str, Any],
    run_id: str,
    marker: dict[str, Any] | None,
) -> dict[str, Any]:
    """Create the record of a new run: settings with sources, fingerprint, versions, base and data; no secrets."""
    libraries = ("torch", "transformers", "trl", "peft", "bitsandbytes", "datasets")
    return {
        "phoque": __version__,
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "template_date": str(prepared.chat.today),
        "settings": resolved.provenance(),
        "fingerprint": fingerprint,
        "run_id": run_id,
        "fresh_start": marker,
        "versions": library_versions(*libraries),
        "base": {
            "name": prepared.source.name,
            "hub_id": prepared.source.hub_id,
            "auto_class": architecture_of(prepared.config).auto_class,
            "revision": prepared.source.revision,
            "origin": prepared.source.origin,
        },
        "data": {"name": prepared.dataset.name, "revision": prepared.dataset.revision, **prepared.scan.summary()},
    }


def write_record(run: Path, record: dict[str, Any]) -> None:
    """Write run.json atomically if its content has changed; of several processes, process 0 does."""
    if not current().is_main:
        return
    text = json.dumps(record, indent=1, ensure_ascii=False, default=str)
    if (run / RECORD).is_file() and (run / RECORD).read_text() == text:
        return
    write_atomically(run / RECORD, text)
