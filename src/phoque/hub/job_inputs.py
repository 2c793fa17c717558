"""Local inputs of a Job: uploaded to a private bucket, mounted read-only, and deleted when the Job has ended.

A Job cannot read this machine. Its local datasets, personas, prompts, adapters and models go to the bucket
`<namespace>/jobs-artifacts`, which huggingface_hub uses for Jobs too. They are mounted under a name that follows from
their contents, so that a run whose data moved to another folder here still resumes.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from phoque.errors import UsageError
from phoque.files import sha256
from phoque.hub.client import Hub
from phoque.settings.fields import flag_names

MOUNT = "/inputs"
BUCKET = "jobs-artifacts"
FOLDER = "phoque"  # in the bucket; the folder of a submission is in it
ADAPTER_SETTINGS = ("adapter_source", "updated_adapter", "control_adapter")
# of a run folder, what the commands read of an adapter; checkpoints and merged models stay here
RUN_FILES = ("run.json", "adapter/*", "control-*/run.json", "control-*/adapter/*")


@dataclass(frozen=True)
class LocalInput:
    """A local file or folder that a setting names; `files` are its files, with their paths below `name`."""

    setting: str
    flag: str
    path: Path
    files: dict[str, Path]

    @property
    def size(self) -> int:
        """Bytes of all its files."""
        return sum(file.stat().st_size for file in self.files.values())

    @property
    def key(self) -> str:
        """A name that follows from the contents."""
        digest = hashlib.sha256()
        for name, file in sorted(self.files.items()):
            digest.update(f"{name}\n{sha256(file)}\n".encode())
        return digest.hexdigest()[:12]

    @property
    def name(self) -> str:
        """The name of the file or folder itself."""
        return self.path.resolve().name

    @property
    def mounted(self) -> str:
        """The path in the Job's container."""
        return f"{MOUNT}/{self.key}/{self.name}"

    def describe(self) -> str:
        """For a dry run: what is uploaded, and its size."""
        count = f", {len(self.files)} files" if len(self.files) > 1 else ""
        return f"{self.path} ({self.size / 1e6:,.1f} MB{count})"


def find_local_inputs(settings: Any) -> list[LocalInput]:
    """The inputs of a command that are on this machine. Raises UsageError for one without files."""
    found: dict[tuple[str, str], LocalInput] = {}
    for name in settings.reads:
        value = getattr(settings, name)
        for item in value if isinstance(value, list) else [value]:
            path = Path(item).expanduser() if item else None
            if path is not None and path.exists():
                flag = flag_names(type(settings), name)[0]
                found[name, str(item)] = LocalInput(name, flag, path, _list_files(name, flag, path))
    return list(found.values())


def _list_files(setting: str, flag: str, path: Path) -> dict[str, Path]:
    """The files of an input by their path from the input's parent."""
    if path.is_file():
        return {path.resolve().name: path}
    patterns = ("**/*",)
    if setting in ADAPTER_SETTINGS and (path / "adapter").is_dir():
        patterns = RUN_FILES
    files = sorted({file for pattern in patterns for file in path.glob(pattern) if file.is_file()})
    visible = [file for file in files if not any(part.startswith(".") for part in file.relative_to(path).parts)]
    if not visible:
        raise UsageError(what=f"{flag} {path} has no files.", why="A Job would get nothing.", fix="Check the path.")
    return {f"{path.resolve().name}/{file.relative_to(path)}": file for file in visible}


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
        from huggingface_hub.errors import HfHubHTTPError

        try:
            info = self._hub.retry(self.bucket, lambda: self._hub.api.bucket_info(self.bucket))
        except HfHubHTTPError as error:
            if error.response.status_code == 404:
                return
            raise
        if not info.private:
            raise UsageError(
                what=f"The bucket {self.bucket} is public.",
                why="Anyone could read the files that the Job is given.",
                fix="Make it private in its settings on the Hub, or give inputs that are in private repositories.",
            )

    def upload(self, say: Callable[[str], None]) -> None:
        """Upload all files; what the Hub has already is not sent again."""
        api = self._hub.api
        self._hub.retry(self.bucket, lambda: api.create_bucket(self.bucket, private=True, exist_ok=True))
        self.check()
        added = {f"{self._folder}/{one.key}/{name}": file for one in self._inputs for name, file in one.files.items()}
        say(f"uploading {sum(one.size for one in self._inputs) / 1e6:,.1f} MB to {self.place}")
        operations = [(file, name) for name, file in added.items()]
        self._hub.retry(self.bucket, lambda: api.batch_bucket_files(self.bucket, add=operations))

    def delete(self) -> None:
        """Delete the files of this submission."""
        delete_inputs(self._hub, self.bucket, self._folder)


def delete_inputs(hub: Hub, bucket: str, folder: str) -> int:
    """Delete a folder of a bucket; return how many files it had."""
    listed = hub.retry(bucket, lambda: list(hub.api.list_bucket_tree(bucket, prefix=f"{folder}/", recursive=True)))
    paths = [item.path for item in listed if item.type == "file"]
    if paths:
        hub.retry(bucket, lambda: hub.api.batch_bucket_files(bucket, delete=paths))
    return len(paths)


def with_mounted_paths(settings: Any, inputs: list[LocalInput]) -> Any:
    """The settings with the paths that the inputs have in the container."""
    mounted = {(one.setting, str(one.path)): one.mounted for one in inputs}
    changed: dict[str, Any] = {}
    for name in settings.reads:
        value = getattr(settings, name)
        replace = lambda item, name=name: mounted.get((name, str(Path(item).expanduser())), item) if item else item
        new = [replace(item) for item in value] if isinstance(value, list) else replace(value)
        if new != value:
            changed[name] = new
    return settings.model_copy(update=changed)
