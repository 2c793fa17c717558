"""Merged models while training and at its end, for EXPORT_MERGED_MODEL and EXPORT_INFERENCE_ON_SAVE."""

import shutil
from pathlib import Path
from typing import Any

from phoque.errors import FAILED, RESUMABLE, PhoqueError
from phoque.hub.client import is_transient, reason
from phoque.hub.repo import Repo
from phoque.merging.run import merge_into, push_merged
from phoque.training import checkpoints
from phoque.training.prepare import Run

FOLDER, PASSING = "merged", ".merged"
DTYPE = "bf16"


def export_final(run: Run) -> dict[str, Any]:
    """Merge the final adapter into the run folder, prove it, and push it if there is a repository for it.

    Raises PhoqueError (1) if the proof fails, or saying where the merged model is if it cannot be pushed.
    """
    into = run.folder / FOLDER
    made = merge_into(run.ready.source, run.folder / "adapter", into, DTYPE, run.console, prove=True)
    repo = _repo(run)
    if repo is None:
        return {"merged": str(into), "proof": made["proof"]}
    try:
        repo.open(run.settings.public, run.console.warn)
        push_merged(repo, into)
    except PhoqueError:
        raise
    except Exception as error:
        raise PhoqueError(
            f"The merged model is made, but it is not in {repo.name}.",
            f"{reason(error)}. It is in {into}.",
            "Run the same command again, without --fresh-start: it only pushes.",
            RESUMABLE if is_transient(error) else FAILED,
        ) from error
    return {"merged": str(into), "proof": made["proof"], "merged_repo": repo.name}


def export_passing(run: Run, saved: Path) -> None:
    """Merge a checkpoint and push it; the folder is gone afterwards. The last one is the final adapter's to make."""
    step = checkpoints.step_of(saved)
    repo = _repo(run)
    if step == run.settings.max_steps or repo is None:
        return
    into = run.folder / PASSING
    shutil.rmtree(into, ignore_errors=True)
    try:
        repo.open(run.settings.public, run.console.warn)
        merge_into(run.ready.source, saved, into, DTYPE, run.console, prove=False)
        push_merged(repo, into, f"Merged model of step {step}")
        run.console.say(f"the merged model of step {step} is in {repo.name}")
    finally:
        shutil.rmtree(into, ignore_errors=True)


def _repo(run: Run) -> Repo | None:
    name = run.settings.merged_repo
    return Repo(run.hub, name) if name and run.hub else None
