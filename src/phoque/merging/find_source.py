"""Find the model to export: an adapter that is merged now, a merged model, or a base without an adapter."""

import json
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from phoque.errors import UsageError
from phoque.files import atomic_folder, find_file_in_the_way, lock, sha256
from phoque.hub.refs import hub_id
from phoque.hub.repo import Repo
from phoque.merging.run import merge_into
from phoque.models.adapter_source import find_adapter, find_base
from phoque.models.config import load_config
from phoque.models.safetensors_headers import INDEX
from phoque.models.source import Source, find_model, select_files
from phoque.services import Services
from phoque.settings.export import ModelExportSettings
from phoque.settings.presets import PRESETS

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def find_source(
    s: ModelExportSettings, services: Services, check: Callable[["PretrainedConfig"], object], *, dry_run: bool
) -> Source:
    """Return the model to export: an adapter is merged now; a merged model is a folder, or a repository on the Hub.

    That repository may be a model or a dataset repository. With a base and nothing else the base itself is exported.
    `check` raises an error for a config that cannot be exported, before any work.
    """
    if s.adapter_source:
        adapter = find_adapter(s.adapter_source, s.adapter_revision, services)
        base = find_base(adapter.folder, s.base, s.revision, services, weights=not dry_run)
        check(load_config(base))
        name = f"{base.name} with {adapter.label}"
        if dry_run:
            return replace(base, name=name)
        # without --merged-out-dir the merged model is cached under base revision and adapter hash, for later exports
        key = sha256(adapter.folder / "adapter_model.safetensors")[:16]
        target = s.merged_out_dir or services.cache / "merged" / f"{base.revision[:16]}-{key}"
        target.parent.mkdir(parents=True, exist_ok=True)
        with nullcontext() if s.merged_out_dir else lock(target.with_name(f".{target.name}.lock")):
            merge_into(base, adapter.folder, target, dtype="bf16", console=services.console, verify=False)
        return Source(name, target, base.revision, "merged")
    if s.merged_dir:
        source = _find_merged_model(s, services, dry_run)
        check(load_config(source))
        return source
    # the base without an adapter
    source = find_model(s.base or PRESETS[s.preset]["base_model"], s.revision, services, weights=not dry_run)
    check(load_config(source))
    return source


def _find_merged_model(s: ModelExportSettings, services: Services, dry_run: bool) -> Source:
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        source = find_model(s.merged_dir, s.merged_revision, services, weights=not dry_run)
    except RepositoryNotFoundError:
        source = _fetch_from_dataset(s, services, dry_run)
    if s.merged_out_dir and hub_id(s.merged_dir) and not dry_run:
        _copy_model(source.folder, s.merged_out_dir)
        return replace(source, folder=s.merged_out_dir)
    return source


def _copy_model(model: Path, folder: Path) -> None:
    """Copy a downloaded model to --merged-out-dir. Raises UsageError if the folder holds anything else."""
    if file := find_file_in_the_way(folder):
        raise UsageError(what=f"{file} is a file.", why="A folder is needed.", fix="Choose another --merged-out-dir.")
    if folder.is_dir() and _list_sizes(model).items() <= _list_sizes(folder).items():
        return
    if folder.is_dir() and any(folder.iterdir()):
        raise UsageError(
            what=f"{folder} is not empty, and it is not this model.",
            why="The downloaded model would be written over its files.",
            fix="Choose another --merged-out-dir.",
        )
    with atomic_folder(folder) as staging:
        shutil.copytree(model, staging, dirs_exist_ok=True)


def _list_sizes(folder: Path) -> dict[str, int]:
    """The sizes of the files in a folder."""
    return {file.name: file.stat().st_size for file in folder.iterdir() if file.is_file()}


def _fetch_from_dataset(s: ModelExportSettings, services: Services, dry_run: bool) -> Source:
    """Download a merged model from a dataset repository at a pinned commit; the hash of every file is checked."""
    repo = Repo(services.hub, s.merged_dir, "dataset")
    commit = repo.snapshot(s.merged_revision)
    folder = services.cache / "merged" / f"{repo.name.replace('/', '--')}-{commit.sha[:12]}"
    folder.mkdir(parents=True, exist_ok=True)
    index = None
    if INDEX in commit.files:
        index = json.loads(repo.fetch(commit, INDEX, folder).read_text())
    if "config.json" not in commit.files:
        raise UsageError(
            what=f"{repo.name} contains no model.", why="Its root has no config.json.", fix="Check --merged-dir."
        )
    for path in select_files(commit.files, index):
        if dry_run and path.endswith(".safetensors"):
            continue
        repo.fetch(commit, path, folder)
    return Source(repo.name, folder, commit.sha, "dataset repository")
