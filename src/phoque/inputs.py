"""Checks of what a command reads, before anything heavy is imported: a wrong path is reported within a second."""

import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from phoque.data.readers import RowStream, check_dataset, find_local
from phoque.data.scan import check_rows
from phoque.errors import UsageError
from phoque.files import check_output_folder, exists, expand_user
from phoque.hub.refs import hub_id, hub_ref, suggest_path
from phoque.models.adapter_source import RUN_RECORD, WEIGHTS, check_adapter_name, find_local_adapter, read_base_name
from phoque.models.source import PACKAGED_MODELS, check_gguf, check_local_model, check_tokenizer, check_weights
from phoque.probes.persona import load_persona
from phoque.probes.roles import BUNDLED, NONE
from phoque.settings.export import ModelExportSettings
from phoque.settings.fields import CommandSettings, Resolved, flag_names
from phoque.settings.merge import MergeSettings
from phoque.settings.probe import check_scorer
from phoque.settings.verify_gguf import VerifyGgufSettings
from phoque.training.run_files import check_own_folder

SMALL_BYTES = 2**20  # of a dataset whose rows are checked before anything heavy is imported
MODEL_SETTINGS = ("merged_dir", "updated_model", "model_source")  # of a command that takes a model or an adapter
ADAPTER_SETTINGS = ("adapter_source", "updated_adapter")


@dataclass(frozen=True)
class Input:
    """What a setting of a command names."""

    name: str
    setting: str
    command: type[CommandSettings]
    has_adapter: bool = False  # whether the command merges one, whose tokenizer it then takes

    @property
    def path(self) -> Path:
        """The path on this machine, if it is one."""
        return expand_user(self.name)

    @property
    def flag(self) -> str:
        """The flag that it was given by, or could be."""
        return flag_names(self.command, self.setting)[0]

    def find_flag(self, settings: tuple[str, ...]) -> str | None:
        """The flag of the first of these settings that the command has."""
        return next((flag_names(self.command, name)[0] for name in settings if name in self.command.model_fields), None)


def check_run(resolved: Resolved[Any]) -> None:
    """Raise UsageError if a run has no token for its repository, or if it would replace files in its folder."""
    s = resolved.settings
    if s.hub_model_id and not s.run_dir:
        resolved.secrets.require_hub(s.hub_model_id)
    check_own_folder(s.folder)


def check_inputs(settings: CommandSettings, made_before: Sequence[Path] = ()) -> None:
    """Raise UsageError if an input that a setting names cannot exist: no such path here, and no Hub id.

    An input that the command cannot do without must be named. Folders that are `made_before` the command runs, and what
    is in them, need not be there yet.
    """
    _check_one_source(settings)
    if "dataset" in settings.required or getattr(settings, "dataset", ""):
        s: Any = settings
        split_files = check_dataset(s.dataset, s.split, s.dataset_config)
        if getattr(s, "eval_split", None):
            check_dataset(s.dataset, s.eval_split, s.dataset_config)
        if split_files and split_files.local_bytes < SMALL_BYTES:
            stream = RowStream(split_files.files)
            if "max_bad_rows" in type(s).model_fields:
                check_rows(s.dataset, stream, s.max_bad_rows)
            else:
                next(iter(stream), None)
    has_adapter = isinstance(settings, MergeSettings) or (
        isinstance(settings, ModelExportSettings) and bool(settings.adapter_source)
    )
    for name, check in CHECKS.items():
        value = getattr(settings, name, None)
        for item in value if isinstance(value, list) else [value]:
            if not _is_in(str(item or ""), made_before) and (item or name in settings.required):
                check(Input(str(item or ""), name, type(settings), has_adapter))
    adapter = getattr(settings, "adapter_source", "")
    given = any(getattr(settings, name, "") for name in ("base", "base_model", "model_source"))
    if adapter and not given and hub_id(adapter) is None and not _is_in(adapter, made_before):
        read_base_name(find_local_adapter(expand_user(adapter)))
    if settings.output_record and not getattr(settings, "on", None):
        check_output_folder(cast(Any, settings).folder, *settings.output_record)


def _is_in(name: str, folders: Sequence[Path]) -> bool:
    """Whether a path is one of these folders, or inside one of them."""
    path = expand_user(name).absolute()
    return bool(name) and any(path.is_relative_to(folder.absolute()) for folder in folders)


def _check_one_source(settings: CommandSettings) -> None:
    """Raise UsageError if a command that exports or verifies one thing is given none, or two."""
    s: Any = settings
    if {"repo_id", "local_dir"} <= type(s).model_fields.keys() and bool(s.repo_id) == bool(s.local_dir):
        raise UsageError(
            what="Two exports are given." if s.repo_id else "No export is given.",
            why="Exactly one of --repo-id and --local-dir must be set.",
            fix="Give --repo-id or --local-dir.",
        )
    if "merged_dir" not in type(s).model_fields:
        return
    if s.adapter_source and s.merged_dir:
        raise UsageError(
            what="Two sources are given.",
            why="--adapter-source and --merged-dir exclude each other.",
            fix="Give one of them.",
        )
    if not (s.adapter_source or s.merged_dir or s.base or s.preset):
        raise UsageError(
            what="There is nothing to export.",
            why="Neither an adapter nor a merged model is given.",
            fix="Give one with --adapter-source or --merged-dir.",
        )


def _check_chats(given: Input) -> None:
    ref = hub_ref(given.name)
    if ref is None or not ref.split:
        find_local(given.name, given.flag)


def _check_model(given: Input) -> None:
    if given.name in PACKAGED_MODELS or hub_id(given.name) is not None:
        return
    has_weights = any(file.name != WEIGHTS for file in given.path.glob("*.safetensors"))
    if _holds_adapter(given.path) and not has_weights:
        find_local_adapter(given.path, given.flag)  # of another kind than LoRA
        flag = given.find_flag(ADAPTER_SETTINGS)
        raise UsageError(
            what=f"{given.name} is {_describe_adapter(given.path)}, not a model.",
            why=f"It has the weights of an adapter and no others; {given.flag} names a model.",
            fix=f"Give it as {flag}."
            if flag
            else f"Merge it first: phoque merge --adapter-source {shlex.quote(given.name)}",
        )
    check_local_model(given.path, given.flag)
    if given.path.is_dir() and not given.has_adapter:
        check_tokenizer(given.path, given.name)


def _check_merged(given: Input) -> None:
    if hub_id(given.name) is None:
        _check_model(given)


def _check_adapter(given: Input) -> None:
    check_adapter_name(given.name)
    if hub_id(given.name) is not None:
        return
    is_model = (given.path / "config.json").is_file() and any(given.path.glob("*.safetensors"))
    if is_model and not _holds_adapter(given.path):
        flag = given.find_flag(MODEL_SETTINGS)
        raise UsageError(
            what=f"{given.name} is a model, not an adapter.",
            why=f"It has a config.json and weights, and no {WEIGHTS}; {given.flag} names an adapter or a run.",
            fix=f"Give it as {flag}." if flag else "Name the run folder or the adapter that it was made from.",
        )
    find_local_adapter(given.path, given.flag)


def _holds_adapter(path: Path) -> bool:
    return any((folder / WEIGHTS).is_file() for folder in (path, path / "adapter"))


def _describe_adapter(path: Path) -> str:
    return "a run of phoque train" if (path / RUN_RECORD).is_file() else "an adapter"


def _check_persona(given: Input) -> None:
    ref = hub_ref(given.name)
    if ref is None or not ref.path:
        load_persona(given.name)


def _check_roles(given: Input) -> None:
    if given.name not in (BUNDLED, NONE):
        _check_file(given)


def _check_file(given: Input) -> None:
    ref = hub_ref(given.name)
    if (ref is None or not ref.path) and not given.path.is_file():
        raise UsageError(
            what=f"There is no file {given.name}.", why=f"{given.flag} names it.", fix=suggest_path(given.name)
        )


def _check_export(given: Input) -> None:
    """An export in a folder, or a single GGUF file; each of the two verifications is told from the other."""
    wants_gguf = given.command is VerifyGgufSettings
    if exists(given.path) and not given.path.is_dir():
        if wants_gguf and given.path.suffix.lower() == ".gguf":
            return
        raise UsageError(
            what=f"{given.name} is a file, not the folder of an export.",
            why=f"{given.flag} names it.",
            fix="Name its folder, or a .gguf file." if wants_gguf else "Name its folder.",
        )
    if not exists(given.path):
        raise UsageError(
            what=f"There is no {'file' if given.path.suffix.lower() in ('.gguf', '.onnx') else 'folder'} {given.name}.",
            why=f"{given.flag} names it.",
            fix=suggest_path(given.name),
        )
    if _holds_adapter(given.path):
        export = "export-gguf" if wants_gguf else "export-onnx"
        raise UsageError(
            what=f"{given.name} is {_describe_adapter(given.path)}.",
            why=f"{given.flag} names an export.",
            fix=f"Export it first: phoque {export} --adapter-source {shlex.quote(given.name)}",
        )
    has_gguf, has_onnx = any(given.path.glob("*.gguf")), (given.path / "onnx").is_dir()
    if has_gguf != has_onnx and has_gguf != wants_gguf:
        other = "verify-gguf" if has_gguf else "verify-onnx"
        raise UsageError(
            what=f"{given.name} holds an export of the other kind.",
            why=f"It has {'GGUF files' if has_gguf else 'a folder onnx'}.",
            fix=f"Run phoque {other} --local-dir {shlex.quote(given.name)}",
        )


def _check_chat_model(given: Input) -> None:
    if given.name in PACKAGED_MODELS or hub_id(given.name) is not None:
        return
    if not exists(given.path):
        raise UsageError(
            what=f"There is nothing to talk to at {given.name}.",
            why="It is not a folder or file here, and not a Hub id (owner/name).",
            fix=suggest_path(given.name),
        )
    is_export = (given.path / "onnx").is_dir() or any(given.path.glob("*.gguf"))
    if given.path.suffix.lower() == ".gguf":
        check_gguf(given.path, given.flag)
    elif (given.path / "config.json").is_file() and not (given.path / WEIGHTS).is_file() and not is_export:
        check_weights(given.path)
        check_tokenizer(given.path, given.name)
    elif _holds_adapter(given.path) and not is_export:
        find_local_adapter(given.path, given.flag)


CHECKS: dict[str, Callable[[Input], Any]] = {
    "chats": _check_chats,
    "chat": _check_chats,
    "base_model": _check_model,
    "base": _check_model,
    "model_source": _check_model,
    "updated_model": _check_model,
    "adapter_source": _check_adapter,
    "updated_adapter": _check_adapter,
    "control_adapter": _check_adapter,
    "persona": _check_persona,
    "roles": _check_roles,
    "scorer": lambda given: check_scorer(given.name),
    "prompts_file": _check_file,
    "merged_dir": _check_merged,
    "model": _check_chat_model,
    "local_dir": _check_export,
}
