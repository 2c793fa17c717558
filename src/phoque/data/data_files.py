"""Which files belong to a split of a dataset, on disk and on the Hub, by the rules of the `datasets` library."""

import io
import json
import re
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from phoque.data.turns import TURNS
from phoque.errors import UsageError, first_line
from phoque.files import local_path
from phoque.hub.client import Hub

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

FORMATS = {
    ".jsonl": "json",
    ".ndjson": "json",
    ".json": "json",
    ".parquet": "parquet",
    ".csv": "csv",
    ".tsv": "csv",
    ".arrow": "arrow",
}
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd", ".bz2": "bz2"}
UNPACK, SAVE_AS_CSV = "Unpack it, and give a file or a folder of what was in it.", "Save the sheet as CSV."
WRITE_ROWS = f"Write a .jsonl file with one conversation per line: {TURNS}"
OTHER_FORMS = {  # what to do with files of other kinds
    **dict.fromkeys((".zip", ".tar", ".tgz", ".tar.gz", ".tar.zst", ".tar.bz2", ".7z", ".rar"), UNPACK),
    **dict.fromkeys((".xlsx", ".xls", ".ods", ".numbers"), SAVE_AS_CSV),
    **dict.fromkeys((".txt", ".md", ".log", ".html", ".docx", ".pdf"), WRITE_ROWS),
}
IGNORED = ("config.json", "dataset_info", "dataset_dict.json", "state.json", "cache-")  # files without rows
MODEL_FILES = {  # of a model or an adapter that lies in the same folder
    *("adapter_config.json", "config.json", "generation_config.json", "special_tokens_map.json"),
    *("tokenizer.json", "tokenizer_config.json", "trainer_state.json", "run.json", "MANIFEST.json"),
}
SAVED, SAVED_DICT = "state.json", "dataset_dict.json"  # what Dataset.save_to_disk and DatasetDict.save_to_disk write
HUB_BLOCK = 2**20  # bytes that are read at once
READ_PATIENCE_S = 300.0  # retry time of a failing read from the Hub, once a run has begun


class HubFile(io.RawIOBase):
    """A file on the Hub that is opened again where it stopped when a read fails, for up to READ_PATIENCE_S."""

    def __init__(self, filesystem: "AbstractFileSystem", path: str) -> None:
        self._filesystem, self._path = filesystem, path
        self._hub = Hub(getattr(filesystem, "token", None), lambda _: None, READ_PATIENCE_S, has_answered=True)
        self._file: Any = None
        self._position = 0

    def readable(self) -> bool:
        """Always."""
        return True

    def seekable(self) -> bool:
        """Always: Parquet is read from its end."""
        return True

    def tell(self) -> int:
        """The position of the next byte."""
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Move to another position."""
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size()}[whence]
        self._position = base + offset
        return self._position

    def readinto(self, buffer: Any) -> int:
        """Read into a buffer; return the number of bytes, 0 at the end."""
        data = self._hub.retry(self._path, lambda: self._read(len(buffer)))
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)

    def close(self) -> None:
        """Close the connection."""
        if self._file is not None:
            self._file.close()
        super().close()

    def _size(self) -> int:
        return int(self._hub.retry(self._path, self._open).size)

    def _open(self) -> Any:
        self._file = self._file or self._filesystem.open(self._path, "rb")
        return self._file

    def _read(self, size: int) -> bytes:
        file, self._file = self._open(), None  # a file whose read fails is not used again
        file.seek(self._position)
        data = file.read(size)
        self._file = file
        return data


@dataclass(frozen=True)
class DataFile:
    """One file of a dataset: its path inside the dataset, and where it is; `filesystem` is None for this machine."""

    name: str
    path: str
    filesystem: "AbstractFileSystem | None" = None

    def _open_raw(self) -> IO[bytes]:
        if self.filesystem is None:
            return Path(self.path).open("rb")
        return io.BufferedReader(HubFile(self.filesystem, self.path), HUB_BLOCK)

    @property
    def is_compressed(self) -> bool:
        """Whether the name ends in .gz, .zst or .bz2."""
        return Path(self.name).suffix in COMPRESSIONS

    @contextmanager
    def open(self) -> Generator[IO[bytes]]:
        """Open the file for reading, decompressed if its name ends in .gz, .zst or .bz2."""
        with self._open_raw() as raw:
            if not self.is_compressed:
                yield raw
                return
            import pyarrow as pa

            with pa.input_stream(raw, compression=COMPRESSIONS[Path(self.name).suffix]) as stream:
                yield stream


@dataclass(frozen=True)
class SplitFiles:
    """The files of one split, the names of all splits of the dataset, and its files that belong to no split."""

    files: list[DataFile]
    splits: tuple[str, ...]
    others: tuple[str, ...] = ()

    @property
    def local_bytes(self) -> int:
        """The size of all files of a local dataset."""
        return sum(Path(file.path).stat().st_size for file in self.files)


def format_of(name: str) -> str | None:
    """json, parquet, csv or arrow, by the suffix of a file name; None for any other file."""
    path = Path(name)
    path = path.with_suffix("") if path.suffix in COMPRESSIONS else path
    return FORMATS.get(path.suffix.lower())


def find_local_files(name: str, path: Path, config: str | None, split: str) -> SplitFiles:
    """The files of a split of a local file or folder. Raises UsageError if it has no such split or config."""
    if not path.is_file() and not path.is_dir():
        raise UsageError(
            what=f"{name} is not a file or folder.",
            why="A dataset is read several times, which a pipe or a device cannot be.",
            fix="Write it to a file first.",
        )
    if path.is_file():
        if format_of(path.name) is None:
            raise UsageError(
                what=f"{name} is not a dataset.",
                why=f"Its name does not end in one of {', '.join(FORMATS)}, nor in one of them with "
                f"{', '.join(COMPRESSIONS)}.",
                fix=suggest_other_form(path.name)
                or "Rename it to what it is (a table with tabs is .tsv), or convert it to JSON Lines.",
            )
        if config:
            raise _no_such("config", config, name, [])
        if split != "train" and split not in re.split(r"[-._ ]", path.name):
            raise _no_such("split", split, name, ["train"])
        return SplitFiles([DataFile(path.name, str(path))], (split,))
    return _find_files(name, str(path), config, split, None)


def suggest_other_form(name: str) -> str | None:
    """What to do with a file of a kind that is known and holds no rows, such as an archive or a spreadsheet."""
    return next((advice for ending, advice in OTHER_FORMS.items() if name.lower().endswith(ending)), None)


def find_hub_files(name: str, revision: str | None, hub: Hub, config: str | None, split: str) -> tuple[str, SplitFiles]:
    """The commit of a Hub dataset, and the files of a split of it. Raises UsageError for an unknown split or config."""
    from huggingface_hub import HfFileSystem

    sha = str(hub.retry(name, lambda: hub.api.dataset_info(name, revision=revision)).sha)
    filesystem = HfFileSystem(token=hub.token)
    return sha, hub.retry(name, lambda: _find_files(name, f"hf://datasets/{name}@{sha}", config, split, filesystem))


def _find_files(
    name: str, base: str, config: str | None, split: str, filesystem: "AbstractFileSystem | None"
) -> SplitFiles:
    from datasets import DownloadConfig
    from datasets.data_files import DataFilesDict, EmptyDatasetError, get_data_patterns, sanitize_patterns

    read = _text_reader(base, filesystem)
    if saved := _find_saved(base, read, split, name):
        return _as_split(name, base, saved, split, filesystem)
    download = DownloadConfig(token=getattr(filesystem, "token", None))
    configs = _read_configs(read)
    if config and config not in configs:
        raise _no_such("config", config, name, [*configs])
    if len(configs) > 1 and not config:
        config = next((key for key, value in configs.items() if value.get("default") or key == "default"), None)
        if config is None:
            raise UsageError(
                what=f"{name} has several configs.",
                why=f"They are {', '.join(configs)}.",
                fix=f"Choose one, for example with --dataset-config {next(iter(configs))}.",
            )
    chosen = configs.get(config or next(iter(configs), ""), {})
    if chosen.get("data_dir"):
        base = f"{base}/{chosen['data_dir']}"
    try:
        if chosen.get("data_files"):
            patterns = sanitize_patterns(chosen["data_files"])
        else:
            patterns = get_data_patterns(base, download_config=download)
        paths_by_split = DataFilesDict.from_local_or_remote(patterns, base_path=base, download_config=download)
    except (EmptyDatasetError, FileNotFoundError) as error:
        raise _no_data(name, first_line(error) if chosen.get("data_files") else "It contains no file") from error
    except ValueError as error:
        raise UsageError(
            what=f"The card of {name} is not valid.", why=first_line(error), fix="Correct `configs` in its README.md."
        ) from error
    splits = {str(key): [path for path in paths if _may_have_rows(path)] for key, paths in paths_by_split.items()}
    splits = {key: paths for key, paths in splits.items() if paths}
    if not splits:
        others = [path for paths in paths_by_split.values() for path in paths]
        raise _no_data(name, "It contains no such file", next(filter(None, map(suggest_other_form, others)), None))
    return _as_split(name, base, splits, split, filesystem)


def _as_split(
    name: str, base: str, splits: dict[str, list[str]], split: str, filesystem: "AbstractFileSystem | None"
) -> SplitFiles:
    if split not in splits:
        raise _no_such("split", split, name, [*splits])
    prefix = f"{base.rstrip('/')}/"
    root = prefix if filesystem else f"{Path(base).resolve()}/"
    files = [DataFile(path.removeprefix(prefix).removeprefix(root), path, filesystem) for path in splits[split]]
    every = filesystem.find(base) if filesystem else [str(path) for path in Path(base).rglob("*") if path.is_file()]
    in_splits = {_strip_protocol(path) for paths in splits.values() for path in paths}
    others = [path for path in every if _may_have_rows(path) and _strip_protocol(path) not in in_splits]
    names = [Path(path).name for path in others if not Path(path).name.startswith((".", *IGNORED))]
    return SplitFiles(files, tuple(splits), tuple(sorted(names)))


def _may_have_rows(path: str) -> bool:
    return bool(format_of(path)) and Path(path).name not in MODEL_FILES


def _strip_protocol(path: str) -> str:
    return path.removeprefix("hf://") if path.startswith(("hf://", "datasets/")) else str(Path(path).resolve())


def _text_reader(base: str, filesystem: "AbstractFileSystem | None") -> Callable[[str], str | None]:
    """A function that reads a small text file of the dataset; it returns None if there is none."""

    def read(path: str) -> str | None:
        try:
            if filesystem:
                return filesystem.read_text(f"{base}/{path}")
            return (Path(base) / path).read_text("utf-8", errors="replace")
        except FileNotFoundError:
            return None

    return read


def _find_saved(base: str, read: Callable[[str], str | None], split: str, name: str) -> dict[str, list[str]] | None:
    """The Arrow files of each split of a dataset that was written by save_to_disk, or None if it was not."""
    if (text := read(SAVED_DICT)) is not None:
        splits = json.loads(text)["splits"]
        folders = {key: f"{key}/" for key in splits}
    elif (text := read(SAVED)) is not None and "_data_files" in text:
        folders = {"train": ""}
    else:
        return None
    if split not in folders:
        raise _no_such("split", split, name, [*folders])
    paths_by_split = {}
    for key, folder in folders.items():
        state = json.loads(read(f"{folder}{SAVED}") or "{}")
        paths_by_split[key] = [f"{base}/{folder}{file['filename']}" for file in state.get("_data_files", [])]
    return paths_by_split


def _read_configs(read: Callable[[str], str | None]) -> dict[str, dict[str, Any]]:
    """The configs that the dataset's card names, each with its data_files; empty if it names none."""
    import yaml

    card = read("README.md") or ""
    if not card.startswith("---"):
        return {}
    try:
        data = yaml.safe_load(card.split("---", 2)[1]) or {}
    except yaml.YAMLError:
        return {}  # a card that is no YAML does not keep the files from being read
    configs = data.get("configs") if isinstance(data, dict) else None
    return {str(c["config_name"]): c for c in configs or [] if isinstance(c, dict) and "config_name" in c}


def _no_such(kind: str, value: str, name: str, existing: list[str]) -> UsageError:
    flag = "--dataset-config" if kind == "config" else "--split or --eval-split"
    return UsageError(
        what=f"{name} has no {kind} {value!r}.",
        why=f"It has {', '.join(existing)}." if existing else f"It has no {kind}s.",
        fix=f"Choose one of these with {flag}." if existing else f"Leave {flag} out.",
    )


def _no_data(name: str, why: str, fix: str | None = None) -> UsageError:
    return UsageError(
        what=f"{name} is not a dataset.",
        why=f"{why}: no {', '.join(FORMATS)} file is there.",
        fix=fix or ("Check the path." if local_path(name) else "Check its name, and that its data files are uploaded."),
    )
