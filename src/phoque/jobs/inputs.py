"""Local inputs of a Job: uploaded to a private bucket, mounted read-only, and deleted when the Job has ended.

A Job cannot read this machine. Its local datasets, personas, prompts, adapters and models go to the bucket
`<namespace>/jobs-artifacts`, which huggingface_hub uses for Jobs too. They are mounted under a name that follows from
their contents, so that a run whose data moved to another folder here still resumes.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from phoque.data.data_files import COMPRESSIONS, FORMATS
from phoque.data.readers import BUNDLED as BUNDLED_DATASETS
from phoque.errors import UsageError
from phoque.files import expand_user, read_json_object, sha256
from phoque.hub.client import Hub
from phoque.hub.refs import hub_id
from phoque.jobs.buckets import check_private, delete_folder, writing
from phoque.models.adapter_source import ADAPTER_FILES, RUN_RECORD, WEIGHTS, find_local_adapter
from phoque.models.source import PACKAGED_MODELS
from phoque.probes.roles import BUNDLED, NONE
from phoque.settings.fields import Resolved, flag_names

MOUNT = "/inputs"
BUCKET = "jobs-artifacts"
FOLDER = "phoque"  # in the bucket; the folder of a submission is in it
DATASET_SETTINGS = ("dataset", "chat", "chats", "text")  # settings that name a dataset
ADAPTER_SETTINGS = ("adapter_source", "updated_adapter", "control_adapter")
RESERVED = {*BUNDLED_DATASETS, *PACKAGED_MODELS, BUNDLED, NONE, "python"}  # names that stand for no path
# of a run folder, what the commands read of an adapter; checkpoints and merged models stay here
RUN_FILES = (RUN_RECORD, "adapter/*", "control-*/run.json", "control-*/adapter/*")
STORED_FILES = tuple(
    f"{folder}{name}*" for folder in ("", "control-*/") for name in ADAPTER_FILES
)  # as in a repository
SKIPPED_FOLDERS = {"__pycache__", "node_modules", "venv", "wandb"}


@dataclass(frozen=True)
class LocalInput:
    """A local file or folder that a setting names.

    `value` is what the setting has, `path` the file or folder that is uploaded, `files` its files by their path below
    the parent of `path`. `inside` follows the path in the Job, where the setting names a folder of a run.
    """

    setting: str
    value: str
    path: Path
    files: dict[str, Path]
    inside: str = ""

    @property
    def size(self) -> int:
        """Bytes of all its files."""
        return sum(file.stat().st_size for file in self.files.values())

    @cached_property
    def key(self) -> str:
        """A name that follows from the contents."""
        digest = hashlib.sha256()
        for name, file in sorted(self.files.items()):
            digest.update(f"{name}\n{sha256(file)}\n".encode())
        return digest.hexdigest()[:12]

    @property
    def mounted(self) -> str:
        """The value of the setting in the Job."""
        return f"{MOUNT}/{self.key}/{self.path.name}{self.inside}"

    def describe(self) -> str:
        """For a dry run: what is uploaded, and its size."""
        count = f", {len(self.files)} files" if len(self.files) > 1 else ""
        return f"{self.path} ({self.size / 1e6:,.1f} MB{count})"


def find_local_inputs(resolved: Resolved[Any]) -> list[LocalInput]:
    """The inputs of a command that are on this machine.

    A preset's or default value is the same in a Job, so only what was given is looked for. Raises UsageError for one
    without files, with a link that leaves it, or for an adapter whose base model is here and was not given.
    """
    s = resolved.settings
    inputs = []
    for name, value in dict.fromkeys(s.list_inputs()):
        if resolved.origins[name].is_given and value not in RESERVED and (one := _find_input(s, name, value)):
            inputs.append(one)
    return inputs


def _find_input(s: Any, setting: str, value: str) -> LocalInput | None:
    flag = flag_names(type(s), setting)[0]
    inside = ""
    path = expand_user(value).absolute()  # not resolved: a link has the name that the user knows
    if not path.exists():
        return None
    if _names_adapter(setting, path):
        adapter = find_local_adapter(path)
        _check_base(s, adapter, flag)
        if (adapter.parent / RUN_RECORD).is_file():  # the run has its data, its system message and its controls
            path, inside = adapter.parent, f"/{adapter.name}" if path.name == adapter.name else ""
    return LocalInput(setting, value, path, _list_files(setting, flag, path), inside)


def _names_adapter(setting: str, path: Path) -> bool:
    is_adapter = (path / WEIGHTS).is_file() or (path / "adapter" / WEIGHTS).is_file()
    return setting in ADAPTER_SETTINGS or (setting == "model" and is_adapter)


def _list_files(setting: str, flag: str, path: Path) -> dict[str, Path]:
    """The files of an input by their path from the input's parent."""
    if path.is_file():
        return {path.name: path}
    patterns: tuple[str, ...] = ("**/*",)
    if _names_adapter(setting, path) and (path / RUN_RECORD).is_file():
        patterns = STORED_FILES if (path / WEIGHTS).is_file() else RUN_FILES
    files = sorted({file for pattern in patterns for file in path.glob(pattern) if file.is_file()})
    kept = [file for file in files if _is_needed_in_job(setting, file.relative_to(path))]
    if not kept:
        raise UsageError(what=f"{flag} {path} has no files to read.", why="A Job would get nothing.", fix="Check it.")
    for file in kept:
        real = file.resolve()
        if not real.is_relative_to(path.resolve()) and "blobs" not in real.parts:  # the Hub's cache links to its blobs
            raise UsageError(
                what=f"{flag} {path} has a link to a file outside of it.",
                why=f"{file.relative_to(path)} leads to {real}, which would be uploaded.",
                fix="Copy the file into the folder, or delete the link.",
            )
    return {f"{path.name}/{file.relative_to(path)}": file for file in kept}


def _is_needed_in_job(setting: str, file: Path) -> bool:
    """Whether a command may read the file, by its path in the input's folder."""
    if any(part.startswith(".") or part in SKIPPED_FOLDERS for part in file.parts):
        return False
    if setting not in DATASET_SETTINGS or file.name == "README.md":  # which may say what the splits are
        return True
    uncompressed = Path(file.stem) if file.suffix.lower() in COMPRESSIONS else file
    return uncompressed.suffix.lower() in FORMATS


def _check_base(s: Any, adapter: Path, flag: str) -> None:
    """Raise UsageError if an adapter names a base model on this machine, and the command gives no other."""
    base = str(read_json_object(adapter / "adapter_config.json").get("base_model_name_or_path") or "")
    given = any(getattr(s, name, None) for name in ("base_model", "base", "model_source"))
    if not given and base not in PACKAGED_MODELS and (hub_id(base) is None):
        raise UsageError(
            what=f"The base model of {flag} {adapter} is on this machine.",
            why=f"Its adapter_config.json names {base or 'none'}, which a Job cannot read.",
            fix="Give the base model's Hub id.",
        )


class JobInputs:
    """The uploaded inputs of one submission: `volumes` to mount them, and their deletion at the end."""

    def __init__(self, hub: Hub, namespace: str, submission: str, inputs: list[LocalInput]) -> None:
        self._hub, self.bucket = hub, f"{namespace}/{BUCKET}"
        self._folder, self._inputs = f"{FOLDER}/{submission}", inputs

    @property
    def place(self) -> str:
        """Where they are, as a URI of the Hub."""
        return f"hf://buckets/{self.bucket}/{self._folder}"

    def volumes(self) -> list[Any]:
        """The mounts of the inputs, read-only."""
        from huggingface_hub import Volume

        keys = dict.fromkeys(one.key for one in self._inputs)
        return [
            Volume(
                type="bucket",
                source=self.bucket,
                mount_path=f"{MOUNT}/{key}",
                path=f"{self._folder}/{key}",
                read_only=True,
            )
            for key in keys
        ]

    def check(self) -> None:
        """Raise UsageError if the bucket exists and is public: whoever finds it could read the data."""
        why = "Anyone could read the files that the Job is given."
        check_private(self._hub, self.bucket, why=why, fix="give inputs that are in private repositories")

    def upload(self, say: Callable[[str], None]) -> None:
        """Upload all files; what the Hub has already is not sent again. Raises UsageError if the token may not."""
        api = self._hub.api
        operations = [
            (file, f"{self._folder}/{one.key}/{name}") for one in self._inputs for name, file in one.files.items()
        ]
        say(f"uploading {sum(one.size for one in self._inputs) / 1e6:,.1f} MB to {self.place}")
        fix = "Use a token that may write in this namespace, or give inputs that are on the Hub."
        with writing(self.bucket, why="The Job's local inputs go there.", fix=fix):
            self._hub.retry(self.bucket, lambda: api.create_bucket(self.bucket, private=True, exist_ok=True))
            self.check()
            self._hub.retry(self.bucket, lambda: api.batch_bucket_files(self.bucket, add=operations))

    def delete(self) -> None:
        """Delete the files of this submission."""
        delete_folder(self._hub, self.bucket, self._folder)


def with_mounted_paths(settings: Any, inputs: list[LocalInput]) -> Any:
    """The settings with the paths that the inputs have in the container."""
    mounted = {(one.setting, one.value): one.mounted for one in inputs}
    changed: dict[str, Any] = {}
    for name in settings.reads:
        value = getattr(settings, name)
        replace = lambda item, name=name: mounted.get((name, str(item)), item)
        new = [replace(item) for item in value] if isinstance(value, list) else replace(value)
        if new != value:
            changed[name] = new
    return settings.model_copy(update=changed)
