"""Adapter name -> folder on this machine: a folder, a run folder, or a Hub repository at one commit; and its base."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from phoque.errors import PhoqueError, UsageError
from phoque.files import expand_user, local_path, read_json_object, sha256
from phoque.hub.refs import fetch_to_cache, hub_id, suggest_path
from phoque.hub.repo import Repo
from phoque.models.source import PACKAGED_MODELS, Source, find_model
from phoque.services import Services

WEIGHTS, PICKLED = "adapter_model.safetensors", "adapter_model.bin"
LORA = "LORA"  # the peft_type of the adapters that phoque runs
RUN_RECORD = "run.json"
ADAPTER_FILES = (
    *("adapter_", "tokenizer", "special_tokens", "chat_template", "added_tokens"),
    *("vocab", "merges", "tekken", "spiece.model", "sentencepiece", RUN_RECORD),
)


@dataclass(frozen=True)
class AdapterSource:
    """A folder with an adapter's files, the name it was given by, and its commit if it came from the Hub."""

    name: str
    folder: Path
    commit: str = ""

    def run_record(self) -> dict[str, Any] | None:
        """The run.json of the run that trained it, if phoque did."""
        return find_run_record(self.folder)

    @property
    def label(self) -> str:
        """The name, with the commit behind an @ if there is one."""
        return f"{self.name}@{self.commit[:8]}" if self.commit else self.name


def find_run_record(adapter: Path) -> dict[str, Any] | None:
    """The run.json of the run that trained an adapter; it lies beside the adapter, or one folder above."""
    return read_run_record(adapter) or read_run_record(adapter.parent)


def training_system(record: dict[str, Any] | None) -> str | None:
    """The most common system message of a run's training data, by its run.json; None if there is none."""
    return ((record or {}).get("data") or {}).get("system") or None


def read_run_record(folder: Path) -> dict[str, Any] | None:
    """The run.json in a folder, or None if there is none that phoque wrote."""
    try:
        record = read_json_object(folder / RUN_RECORD)
    except UsageError:
        return None
    return record if {"settings", "fingerprint", "data"} <= record.keys() else None


def find_adapter(name: str, revision: str | None, services: Services) -> AdapterSource:
    """Find an adapter's folder, or its `adapter/` inside a run folder, or download it from the Hub at one commit.

    Raises UsageError if there is none of that name.
    """
    check_adapter_name(name)
    if hub_id(name) is None:
        return AdapterSource(name, find_local_adapter(expand_user(name)))
    repo = Repo(services.hub, name)
    snapshot = repo.snapshot(revision)
    paths = [path for path in snapshot.files if "/" not in path and path.startswith(ADAPTER_FILES)]
    if WEIGHTS not in paths:
        raise UsageError(
            what=f"{name} holds no adapter.", why=f"There is no {WEIGHTS} at its root.", fix="Check its name."
        )
    folder = fetch_to_cache(repo, snapshot, paths, services.cache, "adapters")
    check_lora(folder, name)
    return AdapterSource(name, folder, snapshot.sha)


def find_controls(adapter: AdapterSource, services: Services) -> list[AdapterSource]:
    """The controls that `phoque train --with-control` trained beside an adapter, here or on the Hub."""
    controls = []
    for control in (adapter.run_record() or {}).get("controls") or []:
        run = adapter.folder if (adapter.folder / RUN_RECORD).is_file() else adapter.folder.parent
        place = run / Path(control["folder"]).name
        local = place if (place / WEIGHTS).is_file() else place / "adapter"
        if (local / WEIGHTS).is_file():
            controls.append(AdapterSource(str(place), local))
        elif control["repo"]:
            try:
                controls.append(find_adapter(control["repo"], None, services))
            except PhoqueError as error:  # another's run may keep its controls private
                services.console.warn(f"the control {control['repo']} is left out: {error.why}")
        else:
            services.console.warn(f"the control {control['folder']} is left out: there is no {local}")
    return controls


def find_named_controls(
    names: Sequence[str], tuned: AdapterSource | None, services: Services
) -> dict[str, AdapterSource]:
    """The controls by these names, or without any those of the adapter's own run: see `name_controls`."""
    controls = [find_adapter(name, None, services) for name in names]
    return name_controls(controls or (find_controls(tuned, services) if tuned else []))


def name_controls(controls: Sequence[AdapterSource]) -> dict[str, AdapterSource]:
    """The controls as the probes call them: control, control-2, control-3. Raises UsageError if one is there twice."""
    if len({sha256(adapter.folder / WEIGHTS) for adapter in controls}) < len(controls):  # also as copies of one run
        raise UsageError(
            what="One control is given twice.",
            why="The same run has no spread to another one.",
            fix="Give each run of the control once, or train several: phoque train --with-control --control-seeds 3.",
        )
    return {f"control-{n}" if n > 1 else "control": adapter for n, adapter in enumerate(controls, 1)}


def check_adapter_name(name: str) -> None:
    """Raise UsageError if no adapter is named."""
    if not name:
        raise UsageError(
            what="No adapter was given.",
            why="Neither --adapter-source nor ADAPTER_SOURCE is set.",
            fix="Name a run folder, an adapter's folder or a Hub repository.",
        )


def find_local_adapter(path: Path, flag: str = "The command") -> Path:
    """The folder of an adapter: the path, or `adapter/` in a run folder. Raises UsageError if it has none."""
    for folder in (path, path / "adapter"):
        if (folder / WEIGHTS).is_file():
            check_lora(folder, path)
            return folder
    if (path / PICKLED).is_file():
        raise UsageError(
            what=f"The adapter in {path} is pickled.",
            why=f"It has {PICKLED}, which can run code when it is read; phoque reads {WEIGHTS} alone.",
            fix="Save it again with peft and safe_serialization=True, where you trust it.",
        )
    steps = [int(folder.name[11:]) for folder in path.glob("checkpoint-*") if folder.name[11:].isdigit()]
    if (path / "run.json").is_file() or steps:
        newest = path / f"checkpoint-{max(steps)}" if steps else None
        raise UsageError(
            what=f"The run {path} has not finished.",
            why=f"It has no adapter yet; its newest checkpoint is {newest.name}."
            if newest
            else "It has a run.json, but no adapter and no checkpoint.",
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
        fix=suggest_path(str(path)),
    )


def check_lora(folder: Path, name: Path | str) -> None:
    """Raise UsageError if the adapter in a folder is of another kind than LoRA."""
    config = folder / "adapter_config.json"
    kind = read_json_object(config).get("peft_type") if config.is_file() else None
    if kind and str(kind).upper() != LORA:
        raise UsageError(
            what=f"{name} is a {kind} adapter.",
            why="phoque runs, merges, exports and probes LoRA adapters.",
            fix="Use it with the library that created it.",
        )


def find_base(adapter: Path, name: str, revision: str | None, services: Services, *, weights: bool = True) -> Source:
    """Find the base model `name`, or else the one that the adapter's config names, at the revision it names.

    Raises UsageError as `read_base_name` does.
    """
    if not name:
        name, recorded = read_base_name(adapter)
        revision = revision or recorded
    return find_model(name, revision, services, weights=weights)


def _is_trained_on_gguf(adapter: Path) -> bool:
    """Whether phoque trained an adapter on the dequantized weights of a GGUF file."""
    base = (find_run_record(adapter) or {}).get("base") or {}
    return str(base.get("origin", "")).startswith("GGUF")


def read_base_name(adapter: Path) -> tuple[str, str | None]:
    """The base model that an adapter's config names, and its revision there.

    Raises UsageError if it names none, a folder that is not here, or a base that bitsandbytes quantized.
    """
    config = read_json_object(adapter / "adapter_config.json")
    name, revision = str(config.get("base_model_name_or_path") or ""), config.get("revision")
    if _is_trained_on_gguf(adapter):  # of a wheel, which the config names by its Hub id
        name = next((wheel for wheel, hub_id in PACKAGED_MODELS.items() if hub_id == name), name)
    if not name:
        raise UsageError(
            what="No base model was given.", why="The adapter does not name one.", fix="Name it with --base-model."
        )
    if hub_id(name) is None and name not in PACKAGED_MODELS and local_path(name) is None:
        raise UsageError(
            what=f"There is no model at {name}.",
            why="The adapter's config names it as its base; it is probably a folder of another machine.",
            fix="Name the base model with --base-model.",
        )
    published = re.sub(r"-(?:unsloth-)?bnb-(?:4|8)bit$", "", name, flags=re.IGNORECASE)
    if published != name:
        raise UsageError(
            what=f"The adapter's config names {name}, which is quantized by bitsandbytes.",
            why="phoque needs the weights before they were quantized.",
            fix=f"Name that model, such as --base-model {published}.",
        )
    return name, revision
