"""What the process knows about itself: whether it is a Job, when it will be killed, and where phoque's cache is."""

import os
from pathlib import Path

# what phoque reads as secrets, and the older names that huggingface_hub reads
SECRET_VARIABLES = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HUGGINGFACE_TOKEN", "WANDB_API_KEY", "OPENAI_API_KEY")


def in_job() -> bool:
    """Whether this process runs in the container of an HF Job."""
    return "JOB_ID" in os.environ


def submission() -> str:
    """An id that all attempts of one Job share, and all that one `--attempts` submits; empty outside of Jobs."""
    return os.environ.get("PHOQUE_SUBMISSION") or os.environ.get("JOB_ID", "")


def deadline(seconds: float | None) -> float | None:
    """The time.time() at which this process will be killed, `seconds` after the start of its container or of itself.

    In a Job the time limit counts from the start of the container, which is the start of process 1.
    """
    import psutil

    if seconds is None:
        return None
    process_start = psutil.Process().create_time()
    if not in_job():
        return process_start + seconds
    container_start = psutil.Process(1).create_time()
    # if process 1 is older than the time limit, it is the host's init and not the container's
    start = container_start if process_start - container_start < seconds else process_start
    return start + seconds


def environment_without_secrets(**more: str) -> dict[str, str]:
    """The environment for a program that needs no secret (npm, Node, an exporter, a scorer), and `more` variables."""
    return {name: value for name, value in os.environ.items() if name.upper() not in SECRET_VARIABLES} | more


def let_threads_sleep() -> None:
    """Let OpenMP's threads sleep while they wait, unless the user has chosen otherwise; before torch is imported.

    By default they spin: on two cores at a load of 4, the demo trained at 19 to 42 tokens per second, and at 49 to 85
    with threads that sleep.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def cache_folder() -> Path:
    """phoque's own cache: $XDG_CACHE_HOME/phoque, or ~/.cache/phoque."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "phoque"
