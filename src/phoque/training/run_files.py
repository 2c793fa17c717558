"""The names of a run's files, and the check that a folder is a run's; it imports nothing heavy."""

from pathlib import Path

from phoque.errors import UsageError
from phoque.files import find_file_in_the_way

RECORD, MANIFEST, REPORT = "run.json", "MANIFEST.json", "report.html"
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
    if (run / RECORD).is_file() or any(run.glob(f"*checkpoint*/{MANIFEST}")):
        return
    for name in ("adapter", "merged", BEST, METRICS, SAMPLES, REPORT):
        if (run / name).exists():
            raise UsageError(
                what=f"{run} is not the folder of a run of phoque.",
                why=f"It has {name}, which training would replace, and no {RECORD}.",
                fix="Choose another --output-dir.",
            )
