"""Merges adapters during and after training, for EXPORT_MERGED_MODEL and EXPORT_INFERENCE_ON_SAVE."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

from phoque.errors import UsageError
from phoque.hub.client import describe_error
from phoque.hub.repo import Repo
from phoque.merging.run import MergeResult, merge_into, open_merged_repo, push_merged
from phoque.training import checkpoints
from phoque.training.finish import TrainResult, push_error
from phoque.training.run_state import Run

FOLDER, TEMPORARY = "merged", ".merged"
DTYPE = "bf16"


def merge_final(run: Run, result: TrainResult) -> TrainResult:
    """Merge the final adapter into the run folder, verify the merged model, and push it if a repository is set.

    Raises RunError if the verification fails; if the push fails, the error says where the merged model is.
    """
    folder = run.folder / FOLDER
    merged = _merge(run, run.folder / "adapter", folder, verify=True)
    result = replace(result, merged=str(folder), proof=merged.proof)
    repo = _merged_repo(run)
    if repo is None:
        return result
    try:
        open_merged_repo(repo, run.settings.access, run.console.warn)
        push_merged(repo, folder)
    except UsageError:
        raise
    except Exception as error:
        raise push_error(error)(
            what=f"The merged model is complete, but it was not pushed to {repo.name}.",
            why=f"{describe_error(error)}. It is in {folder}.",
            fix="Run the same command again, without --fresh-start: it only pushes.",
        ) from error
    return replace(result, merged_repo=repo.name)


def merge_checkpoint(run: Run, checkpoint: Path) -> None:
    """Merge a checkpoint, push it and delete the folder. The run's last step is skipped: `merge_final` follows."""
    step, repo = checkpoints.get_step(checkpoint), _merged_repo(run)
    state = json.loads((checkpoint / checkpoints.TRAINER_STATE).read_text())
    if step == state["max_steps"] or repo is None:  # an early stop lowers it
        return
    output = run.folder / TEMPORARY
    shutil.rmtree(output, ignore_errors=True)
    try:
        open_merged_repo(repo, run.settings.access, run.console.warn)
        _merge(run, checkpoint, output, verify=False)
        push_merged(repo, output, f"Merged model of step {step}")
        run.console.say(f"the merged model of step {step} is in {repo.name}")
    finally:
        shutil.rmtree(output, ignore_errors=True)


def _merged_repo(run: Run) -> Repo | None:
    name = run.settings.merged_repo
    return Repo(run.services.hub, name) if name and run.services.secrets.hub else None


def _merge(run: Run, adapter: Path, folder: Path, *, verify: bool) -> MergeResult:
    return merge_into(run.prepared.source, adapter, folder, dtype=DTYPE, console=run.console, verify=verify)
