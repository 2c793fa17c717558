"""Checks of what a command reads, before anything heavy is imported: a wrong path is reported within a second."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from phoque.data.readers import RowStream, check_dataset, find_local
from phoque.errors import UsageError
from phoque.hub.refs import hub_id, hub_ref
from phoque.models.adapter_source import check_adapter_name, find_local_adapter
from phoque.models.source import PACKAGED_MODELS, check_local_model
from phoque.probes.persona import load_persona
from phoque.probes.roles import BUNDLED, NONE
from phoque.settings.fields import CommandSettings, Resolved, flag_names
from phoque.training.run_files import check_own_folder

SMALL_BYTES = 2**20  # of a dataset whose first row is read to see whether it can be


def check_run(resolved: Resolved[Any]) -> None:
    """Raise UsageError if a run has no token for its repository, or if it would replace files in its folder."""
    s = resolved.settings
    if s.hub_model_id and not s.run_dir:
        resolved.secrets.require_hub(s.hub_model_id)
    check_own_folder(s.folder)


def check_inputs(settings: CommandSettings) -> None:
    """Raise UsageError if an input that a setting names cannot exist: no such path here, and no Hub id.

    An input that the command cannot do without must be named.
    """
    if "dataset" in settings.required or getattr(settings, "dataset", ""):
        s: Any = settings
        split_files = check_dataset(s.dataset, s.split, s.dataset_config)
        if split_files and split_files.local_bytes < SMALL_BYTES:
            next(iter(RowStream(split_files.files)), None)
    for name, check in CHECKS.items():
        value = getattr(settings, name, None)
        for item in value if isinstance(value, list) else [value]:
            if item or name in settings.required:
                check(str(item or ""), flag_names(type(settings), name)[0])


def _check_chats(name: str, flag: str) -> None:
    ref = hub_ref(name)
    if ref is None or not ref.split:
        find_local(name, flag)


def _check_model(name: str, flag: str) -> None:
    if name not in PACKAGED_MODELS and hub_id(name) is None:
        check_local_model(Path(name).expanduser(), flag)


def _check_adapter(name: str, flag: str) -> None:
    check_adapter_name(name)
    if hub_id(name) is None:
        find_local_adapter(Path(name).expanduser(), flag)


def _check_persona(name: str, flag: str) -> None:
    ref = hub_ref(name)
    if ref is None or not ref.path:
        load_persona(name)


def _check_roles(name: str, flag: str) -> None:
    if name not in (BUNDLED, NONE):
        _check_file(name, flag)


def _check_file(name: str, flag: str) -> None:
    ref = hub_ref(name)
    if (ref is None or not ref.path) and not Path(name).expanduser().is_file():
        raise UsageError(what=f"There is no file {name}.", why=f"{flag} names it.", fix="Check the path.")


def _check_folder(name: str, flag: str) -> None:
    if hub_ref(name) is None and not Path(name).expanduser().is_dir():
        raise UsageError(
            what=f"There is no folder {name}.",
            why=f"{flag} names it, and it is not a Hub id (owner/name) either.",
            fix="Check the path.",
        )


def _check_folder_or_gguf(name: str, flag: str) -> None:
    if not (name.endswith(".gguf") and Path(name).expanduser().is_file()):
        _check_folder(name, flag)


def _check_chat_model(name: str, flag: str) -> None:
    path = Path(name).expanduser()
    if name not in PACKAGED_MODELS and hub_id(name) is None and not path.exists():
        raise UsageError(
            what=f"There is nothing to talk to at {name}.",
            why="It is not a folder or file here, and not a Hub id (owner/name).",
            fix="Check its name.",
        )


CHECKS: dict[str, Callable[[str, str], Any]] = {
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
    "prompts_file": _check_file,
    "merged_dir": _check_folder,
    "model": _check_chat_model,
    "local_dir": _check_folder_or_gguf,
}
