"""Merges adapters during and after training, for EXPORT_MERGED_MODEL and EXPORT_INFERENCE_ON_SAVE."""

import shutil
from pathlib import Path
from typing import Any

from phoque.errors import FAILED, RESUMABLE, PhoqueError
from phoque.hub.client import describe_error, is_transient
from phoque.hub.repo import Repo
from phoque.merging.run import merge_into, push_merged
from phoque.training import checkpoints
from phoque.training.prepare import Run

FOLDER, TEMPORARY = "merged", ".merged"
DTYPE = "bf16"


def merge_final(run: Run) -> dict[str, Any]:
    """Merge the final adapter into the run folder, verify the result, and push it if a repository is set.

    Raises PhoqueError (1) if the verification fails; if the push fails, the error says where the merged model is.
    """
    output = run.folder / FOLDER
    result = merge_into(run.ready.source, run.folder / "adapter", output, DTYPE, run.console, prove=True)
    repo = _merged_repo(run)
    if repo is None:
        return {"merged": str(output), "proof": result["proof"]}
    try:
        repo.open(run.settings.public, run.console.warn)
        push_merged(repo, output)
    except PhoqueError:
        raise
    except Exception as error:
        raise PhoqueError(
            f"The merged model is complete, but it was not pushed to {repo.name}.",
            f"{describe_error(error)}. It is in {output}.",
            "Run the same command again, without --fresh-start: it only pushes.",
            RESUMABLE if is_transient(error) else FAILED,
        ) from error
    return {"merged": str(output), "proof": result["proof"], "merged_repo": repo.name}


def merge_checkpoint(run: Run, checkpoint: Path) -> None:
    """Merge a checkpoint, push it and delete the folder. The last step is skipped: `merge_final` handles it."""
    step = checkpoints.get_step(checkpoint)
    repo = _merged_repo(run)
    if step == run.settings.max_steps or repo is None:
        return
    output = run.folder / TEMPORARY
    shutil.rmtree(output, ignore_errors=True)
    try:
        repo.open(run.settings.public, run.console.warn)
        merge_into(run.ready.source, checkpoint, output, DTYPE, run.console, prove=False)
        push_merged(repo, output, f"Merged model of step {step}")
        run.console.say(f"the merged model of step {step} is in {repo.name}")
    finally:
        shutil.rmtree(output, ignore_errors=True)


def _merged_repo(run: Run) -> Repo | None:
    name = run.settings.merged_repo
    return Repo(run.hub, name) if name and run.hub else None
