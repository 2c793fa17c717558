"""Logs metrics and samples to metrics.jsonl and samples.jsonl, and to services."""

import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from phoque.errors import disk_full, first_line
from phoque.files import split_lines, write_atomically
from phoque.training.report_to import Service
from phoque.training.run_files import METRICS, SAMPLES

SAMPLE_COLUMNS = ("step", "prompt", "response", "n_tokens", "latency_s")


class Tracker:
    """Appends to the run folder and reports to services, such as W&B; a failing service never stops a run.

    A resumed run repeats some steps, but services keep what they have: steps up to `logged`, and up to the last one
    that a service has, are not sent again.
    """

    def __init__(self, run: Path, services: list[Service], warn: Callable[[str], None], logged: int) -> None:
        self.run, self._services, self._warn, self._logged = run, services, warn, logged
        self._samples = read_lines(run / SAMPLES)

    def log_metrics(self, step: int, values: dict[str, float]) -> None:
        """Log one line of metrics for a step. Non-finite values are written as null, because JSON has no NaN."""
        finite = {k: v if math.isfinite(v) else None for k, v in values.items()}
        self._append(METRICS, {"step": step, **finite})
        self._report(step, lambda service: service.log_metrics(step, values))

    def log_samples(self, step: int, rows: list[dict[str, Any]]) -> None:
        """Log samples, each with SAMPLE_COLUMNS; services get the whole table so far."""
        for row in rows:
            self._append(SAMPLES, row)
        self._samples += rows
        table = [[row[column] for column in SAMPLE_COLUMNS] for row in self._samples]
        self._report(step, lambda service: service.log_samples(step, list(SAMPLE_COLUMNS), table))

    def log_adapter(self, folder: Path, step: int) -> None:
        """Log the adapter in `folder` as a new version of the run's model."""
        self._report(None, lambda service: service.log_adapter(folder, step))

    def finish(self, code: int) -> None:
        """Close the services with the exit code of the run."""
        self._report(None, lambda service: service.finish(code))

    def _append(self, name: str, row: dict[str, Any]) -> None:
        """Append a line to a file of the run. If the disk is full, the line is left out and training continues."""
        path = self.run / name
        size = path.stat().st_size if path.is_file() else 0
        try:
            with path.open("a", encoding="utf-8") as f:
                f.write(json.dumps(row, ensure_ascii=False) + "\n")
        except OSError as error:
            if not disk_full(error):
                raise
            if path.is_file():
                os.truncate(path, size)  # the beginning of the line may be there
            self._warn(f"step {row['step']} is not in {name}: the disk is full; training continues")

    def _report(self, step: int | None, send: Callable[[Service], None]) -> None:
        """Send to each service that does not have the step yet; one that fails gets nothing more."""
        for service in list(self._services):
            if step is not None and step <= max(self._logged, service.last_step):
                continue
            try:
                send(service)
            except Exception as error:  # no error of a service may stop a run
                self._warn(f"{service.name}: {first_line(error)}; the run continues without it")
                self._services.remove(service)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Read the rows of a JSONL file; an absent file has none."""
    return [json.loads(line) for line in _split_lines(path)]


def find_last_step(run: Path) -> int:
    """Return the last step in the folder's metrics, or -1 if there is none."""
    return max((row["step"] for row in _read_complete(run / METRICS)), default=-1)


def delete_after(run: Path, step: int) -> None:
    """Delete the lines after `step`, which a resumed run will write again."""
    for name in (METRICS, SAMPLES):
        path = run / name
        rows = [row for row in _read_complete(path) if row["step"] <= step]
        write_atomically(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def _read_complete(path: Path) -> list[dict[str, Any]]:
    """Read like `read_lines`, but skip a last line that a kill left incomplete."""
    lines = _split_lines(path)
    try:
        return [json.loads(line) for line in lines]
    except json.JSONDecodeError:
        return [json.loads(line) for line in lines[:-1]]


def _split_lines(path: Path) -> list[str]:
    return split_lines(path.read_text(encoding="utf-8")) if path.is_file() else []
