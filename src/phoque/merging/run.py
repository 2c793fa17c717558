"""`phoque merge`: find the adapter and its base, merge, verify, push."""

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from phoque.console import Console
from phoque.errors import RunError
from phoque.files import MERGE_RECORD
from phoque.hub.repo import Repo
from phoque.hub.store import CARD, Snapshot
from phoque.merging.verify import compare_with_adapter
from phoque.merging.writer import write_merged
from phoque.model_cards import render_merged_card
from phoque.models.adapter_source import RUN_RECORD, find_adapter, find_base, find_run_record
from phoque.models.checkpoint_reader import CheckpointReader
from phoque.models.source import Source
from phoque.results import DryRun
from phoque.services import Services
from phoque.settings.fields import Resolved
from phoque.settings.job import Access
from phoque.settings.merge import MergeSettings

SHARDS = re.compile(r"model(-\d+-of-\d+)?\.safetensors(\.index\.json)?")


@dataclass(frozen=True, kw_only=True)
class MergeResult:
    """A merged model: its folder, how much was written, and `proof`, the comparison with base plus adapter."""

    output_dir: str
    tensors: int
    changed: int
    bytes: int
    shards: int
    base: str = ""
    adapter: str = ""
    proof: dict[str, Any] | None = None
    repo: str | None = None
    commit: str | None = None

    def to_json(self) -> dict[str, Any]:
        """For --json; what does not apply is left out."""
        return {name: value for name, value in asdict(self).items() if value is not None}


def merge(resolved: Resolved[MergeSettings], services: Services, *, dry_run: bool) -> MergeResult | DryRun:
    """Merge an adapter into its base, verify the result and push it. Raises RunError if the verification fails."""
    s, console = resolved.settings, services.console
    adapter = find_adapter(s.adapter_source, s.adapter_revision, services)
    base = find_base(adapter.folder, s.base_model, s.revision, services, weights=not dry_run)
    folder = s.folder
    if dry_run:
        facts = {"output_dir": str(folder), "base": base.name, "adapter": adapter.label}
        return DryRun(facts, resolved.provenance())
    repo = Repo(services.hub, s.push_repo_id) if s.push_repo_id else None
    if repo:
        open_merged_repo(repo, s.access, console.warn)
        if (run := adapter.run_record()) and s.public:
            console.warn(
                f"{repo.name} is public, and its run.json tells how the adapter was trained: on {run['data']['name']}, "
                "with which settings, and the most common system message of the data"
            )
    result = merge_into(base, adapter.folder, folder, dtype=s.dtype, console=console, verify=s.proof)
    result = replace(result, base=base.name, adapter=adapter.label)
    return replace(result, repo=repo.name, commit=push_merged(repo, folder)) if repo else result


def merge_into(base: Source, adapter: Path, folder: Path, *, dtype: str, console: Console, verify: bool) -> MergeResult:
    """Write the merged model and verify it; a folder that holds this merge already is not written again.

    The comparison is kept in merge.json, so a second call still returns it. Raises RunError if it fails.
    """
    reader = CheckpointReader(base)
    with console.progress(len(reader.weights)) as show:
        written = write_merged(reader, adapter, folder, dtype, show)
    if written is None:
        console.say(f"{folder} is this merge already; nothing to do")
    record = json.loads((folder / MERGE_RECORD).read_text())
    if verify and "proof" not in record:
        console.stage("comparing the merged model with the base and its adapter")
        record["proof"] = compare_with_adapter(base, adapter, folder, dtype)
        (folder / MERGE_RECORD).write_text(json.dumps(record, indent=1))
    if run := find_run_record(adapter):  # psm-probe finds the persona's data in it
        (folder / RUN_RECORD).write_text(json.dumps(run, indent=1), encoding="utf-8")
    if not (folder / CARD).is_file():
        (folder / CARD).write_text(render_merged_card(base, record))
    proof = record.get("proof")
    if proof and not proof["holds"]:
        shutil.rmtree(folder.resolve())
        raise RunError(
            what="The merged model does not compute what the base with its adapter computes; it was deleted.",
            why=f"The logits differ by {proof['mean_difference']:.2g} on average; the adapter changes them by "
            f"{proof['adapter_effect']:.2g}.",
            fix="Check that the adapter was trained on this base; if it was, report a bug.",
        )
    return MergeResult(output_dir=str(folder), **record["made"], proof=proof)


def open_merged_repo(repo: Repo, access: Access, warn: Callable[[str], None]) -> None:
    """Open the repository of a merged model; warn if it has weights that phoque did not write."""
    repo.open(access, warn)
    repo.warn_of_foreign(SHARDS.pattern, MERGE_RECORD, warn)


def push_merged(repo: Repo, folder: Path, message: str = "Merged model") -> str:
    """Push a merged model to its repository; return the commit."""
    files = {f.name: f for f in folder.iterdir() if f.is_file()}

    def find_old_shards(snapshot: Snapshot) -> list[str]:
        return [name for name in snapshot.files if SHARDS.fullmatch(name) and name not in files]

    return repo.push(files, message, find_old_shards)
