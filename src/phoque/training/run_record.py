"""run.json, and the folder that it describes."""

import hashlib
import json
import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from phoque import __version__
from phoque.errors import PhoqueError
from phoque.models.architectures import architecture_of
from phoque.settings.fields import Resolved
from phoque.settings.train import TrainSettings
from phoque.training import checkpoints, report
from phoque.training.metrics_log import METRICS, SAMPLES

if TYPE_CHECKING:
    from phoque.training.prepare import Prepared

RUN = checkpoints.RECORD


def check_writable(run: Path) -> None:
    """Make the folder and write to it once; clear away what a killed save left. Raises OSError."""
    run.mkdir(parents=True, exist_ok=True)
    probe = run / ".writable"
    probe.write_text("")
    probe.unlink()
    shutil.rmtree(run / checkpoints.STAGING, ignore_errors=True)


def forget(run: Path) -> None:
    """Delete everything of the run that is in the folder."""
    for name in (*checkpoints.in_order(p.name for p in run.glob("*checkpoint*")), "adapter", "merged"):
        shutil.rmtree(run / name, ignore_errors=True)
    for name in (RUN, METRICS, SAMPLES, report.NAME):
        (run / name).unlink(missing_ok=True)


def read_record(run: Path) -> dict[str, Any] | None:
    """run.json, or None in a new folder. Raises PhoqueError (2) if it cannot be read."""
    path = run / RUN
    if not path.is_file():
        return None
    try:
        record = json.loads(path.read_text())
        if not {"run_id", "fingerprint"} <= set(record):
            raise ValueError("it names no run")
        return record
    except (ValueError, TypeError) as error:
        raise PhoqueError(
            f"{path} cannot be read.",
            f"It is no record of a run: {str(error)[:80]}.",
            "Delete it: the newest checkpoint holds a copy. Or begin anew with --fresh-start.",
        ) from error


def derived_id(repo: str, start: str) -> str:
    """The id of the run in a repository since a fresh start, the same on whatever machine goes on with it."""
    return hashlib.sha256(f"{repo}\n{start}".encode()).hexdigest()[:12]


def new_record(
    resolved: Resolved[TrainSettings],
    ready: "Prepared",
    same: dict[str, Any],
    run_id: str,
    marker: dict[str, Any] | None,
) -> dict[str, Any]:
    """What is known when a run begins: settings with provenance, fingerprint, versions, base and data; no secret."""
    from importlib.metadata import version

    libraries = ("torch", "transformers", "trl", "peft", "bitsandbytes", "datasets")
    return {
        "phoque": __version__,
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "settings": resolved.provenance(),
        "fingerprint": same,
        "run_id": run_id,
        "fresh_start": marker,
        "versions": {name: version(name) for name in libraries},
        "base": {
            "name": ready.source.name,
            "hub_id": ready.source.hub_id,
            "auto_class": architecture_of(ready.config).auto_class,
            "revision": ready.source.revision,
            "origin": ready.source.origin,
        },
        "data": {"name": ready.dataset.name, "revision": ready.dataset.revision, **ready.scan.summary()},
    }


def write_record(run: Path, record: dict[str, Any]) -> None:
    """Write run.json if it says something new, whole or not at all."""
    text = json.dumps(record, indent=1, ensure_ascii=False, default=str)
    if (run / RUN).is_file() and (run / RUN).read_text() == text:
        return
    staging = run / f".{RUN}"
    staging.write_text(text)
    staging.rename(run / RUN)
