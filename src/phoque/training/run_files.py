"""The names of a run's files, and the check that a folder is a run's; it imports nothing heavy."""

import json
from pathlib import Path

from phoque.errors import UsageError
from phoque.files import find_file_in_the_way

RECORD, MANIFEST, REPORT = "run.json", "MANIFEST.json", "report.html"
RECORD_KEYS = {"run_id", "fingerprint"}  # that every run.json of phoque has
METRICS, SAMPLES = "metrics.jsonl", "samples.jsonl"
BEST = "best"  # folder of the adapter with the lowest held-out loss so far, in the run folder and in each checkpoint


def check_own_folder(run: Path) -> None:
    """Raise UsageError if the folder holds files with the names of a run's, and no run of phoque made them.

    A folder of plain Trainer, which holds checkpoints alone, is accepted. A file of that name is not.
    """
    if file := find_file_in_the_way(run):
        raise UsageError(
            what=f"{run} cannot be the folder of a run.", why=f"{file} is a file.", fix="Choose another --output-dir."
        )
    if _is_record(run / RECORD) or any(run.glob(f"*checkpoint*/{MANIFEST}")):
        return
    for name in (RECORD, "adapter", "merged", BEST, METRICS, SAMPLES, REPORT):
        if (run / name).exists():
            raise UsageError(
                what=f"{run} is not the folder of a run of phoque.",
                why=f"It has {name}, which training would replace, and no {RECORD} of phoque.",
                fix="Choose another --output-dir.",
            )


def _is_record(file: Path) -> bool:
    """Whether a run.json is phoque's, or damaged: other tools write files of that name, too."""
    if not file.is_file():
        return False
    try:
        record = json.loads(file.read_text())
    except ValueError:
        return True  # who reads it says so
    return isinstance(record, dict) and record.keys() >= RECORD_KEYS
