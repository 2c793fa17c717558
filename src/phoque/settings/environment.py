"""What the process itself can tell: whether it is a Job, when it is killed, and where phoque's cache is."""

import os
from pathlib import Path


def in_job() -> bool:
    """Whether this process runs in the container of an HF Job."""
    return "JOB_ID" in os.environ


def submission() -> str:
    """What all attempts of one Job, or of one `--attempts`, have in common; empty outside of Jobs."""
    return os.environ.get("PHOQUE_SUBMISSION") or os.environ.get("JOB_ID", "")


def deadline(seconds: float | None) -> float | None:
    """The time.time() at which this process is killed, if it is given so many seconds.

    In a Job they count from when its container began, which is when its first process did; else from our own start.
    """
    import psutil

    if seconds is None:
        return None
    own = psutil.Process().create_time()
    if not in_job():
        return own + seconds
    first = psutil.Process(1).create_time()
    # a first process that is older than all the time there is belongs to the machine, not to the container
    return (first if own - first < seconds else own) + seconds


def cache_folder() -> Path:
    """phoque's own cache: $XDG_CACHE_HOME/phoque, or ~/.cache/phoque."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "phoque"
