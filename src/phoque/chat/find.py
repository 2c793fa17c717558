"""Find what to talk to: which kind of thing a name stands for, and the models that it gives."""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from phoque.chat.models import ChatModel, LlamaCppChatModel, OnnxModel, TorchChatModel
from phoque.errors import UsageError
from phoque.files import EXPORT_RECORD, expand_user, read_json_object
from phoque.hub.refs import fetch_to_cache, hub_id, suggest_path
from phoque.hub.repo import Repo
from phoque.models.adapter_source import (
    RUN_RECORD,
    WEIGHTS,
    AdapterSource,
    find_adapter,
    find_base,
    find_controls,
    find_local_adapter,
    find_run_record,
    training_system,
)
from phoque.models.source import PACKAGED_MODELS, Source, find_model
from phoque.onnx.session import DECODER_NAMES, SUFFIXES
from phoque.onnx.transformers_js import WASM_PREFERENCE
from phoque.services import Services
from phoque.settings.chat import ChatSettings

BASE, TUNED = "base", "tuned"
NO_MODEL = re.compile(r"mmproj|imatrix")  # GGUF files that are no language models
LORA_FILE = re.compile(r"-lora(?:-(?:f32|f16|bf16|q8_0|auto))?$")  # the end of the name of an adapter alone
PART = re.compile(r"-(\d+)-of-\d+$")  # the end of the name of a part of a model in several files
MIN_CONTEXT = 4096  # tokens of a GGUF file's context; more if the answer may be longer


@dataclass(frozen=True)
class Found:
    """What a name stands for: its kind, where it is, and how to load its models.

    - `system`: the system message that a conversation begins with, or None.
    - `load`: loads the models, the tuned one last; with `compare` also the base and the controls.
    """

    kind: str
    name: str
    system: str | None
    load: Callable[[], list[ChatModel]]


def find_chat(s: ChatSettings, services: Services, *, fetch: bool = True) -> Found:
    """Find what --model names, without loading it. Raises UsageError if it is nothing that can be talked to.

    Without `fetch`, of a model on the Hub only what says what it is is downloaded.
    """
    if not s.model:
        raise UsageError(
            what="There is no model to talk to.",
            why="No model is named.",
            fix="Name one, such as `phoque chat runs/demo`.",
        )
    if hub_id(s.model) is not None and s.model not in PACKAGED_MODELS:
        return _find_on_hub(s, services, fetch)
    path = expand_user(s.model)
    if s.model in PACKAGED_MODELS:
        return _model(s, find_model(s.model, s.revision, services), services)
    if path.suffix == ".gguf":
        return _gguf(s, path, services)
    if (path / "onnx").is_dir():
        return _onnx(s, path, [f.relative_to(path).as_posix() for f in path.rglob("*") if f.is_file()])
    if files := sorted(path.glob("*.gguf")):
        sizes = {file.name: file.stat().st_size for file in files}
        return _gguf(s, path / _choose_gguf(sizes, s.dtype, models_only=_has_models_only(path)), services)
    if (path / "config.json").is_file() and not (path / WEIGHTS).is_file():
        return _model(s, find_model(s.model, s.revision, services), services)
    return _adapter(s, AdapterSource(s.model, _adapter_folder(path, services)), services, fetch)


def _find_on_hub(s: ChatSettings, services: Services, fetch: bool) -> Found:
    repo = Repo(services.hub, s.model)
    snapshot = repo.snapshot(s.revision)
    names, folder = list(snapshot.files), services.cache
    kind = find_kind(names, s.dtype)
    if kind == "adapter":
        return _adapter(s, find_adapter(s.model, snapshot.sha, services), services, fetch)
    if kind == "onnx":
        needed = _onnx_files(names, _choose_onnx(names, s.dtype, s.model))
        if fetch:
            folder = fetch_to_cache(repo, snapshot, needed, services.cache, "onnx")
        return _onnx(s, folder, needed)
    if kind == "gguf":
        record = [EXPORT_RECORD] if EXPORT_RECORD in names else []
        folder = fetch_to_cache(repo, snapshot, record, services.cache, "gguf")
        sizes = {name: snapshot.files[name].size for name in names if _is_gguf(name)}
        file = _choose_gguf(sizes, s.dtype, models_only=_has_models_only(folder))
        if fetch:
            fetch_to_cache(repo, snapshot, list_parts(file, sizes), services.cache, "gguf")
        return _gguf(s, folder / file, services, fetch=fetch)
    return _model(s, find_model(s.model, snapshot.sha, services, weights=fetch), services)


def find_kind(names: Sequence[str], dtype: str) -> str:
    """What a repository with files of these names holds: adapter, onnx, gguf or model; of two kinds `dtype` decides."""
    has_weights = "config.json" in names and any(n.endswith(".safetensors") and "/" not in n for n in names)
    has_onnx, has_gguf = any(name.startswith("onnx/") for name in names), any(map(_is_gguf, names))
    if WEIGHTS in names:
        return "adapter"
    if has_onnx and (dtype in SUFFIXES or not (has_weights or has_gguf)):
        return "onnx"
    return "gguf" if has_gguf and not has_weights else "model"


def _is_gguf(name: str) -> bool:
    return name.endswith(".gguf") and "/" not in name


def _adapter_folder(path: Path, services: Services) -> Path:
    """The folder of an adapter; of a run that has not finished, its newest checkpoint."""
    if path.is_dir() and not any((folder / WEIGHTS).is_file() for folder in (path, path / "adapter")):
        names = [folder.parent.name for folder in path.glob(f"checkpoint-*/{WEIGHTS}")]
        if steps := [int(name[11:]) for name in names if name[11:].isdigit()]:
            services.console.say(f"the run has not finished: talking to its checkpoint {max(steps)}")
            return path / f"checkpoint-{max(steps)}"
    if not any((path / name).exists() for name in (WEIGHTS, "adapter", RUN_RECORD)):
        raise _nothing_here_error(path)
    return find_local_adapter(path, "The command")


def _nothing_here_error(path: Path) -> UsageError:
    """The error for a path with no model, which names a folder that has one, if it is near."""
    if path.suffix == ".safetensors" and path.is_file():
        fix = f"Name the folder that it is in: phoque chat {path.parent}"
    elif not path.is_dir():
        fix = suggest_path(str(path))
    else:
        marks = (WEIGHTS, f"adapter/{WEIGHTS}", "config.json", "onnx")
        within = [child for child in sorted(path.iterdir()) if any((child / mark).exists() for mark in marks)]
        fix = f"Name a folder that has one of them{f', such as {within[0]}' if within else ''}."
    return UsageError(
        what=f"There is nothing to talk to in {'this folder' if path == Path() else path}.",
        why="It has no adapter, no model, no GGUF file and no ONNX export.",
        fix=fix,
    )


def _adapter(s: ChatSettings, adapter: AdapterSource, services: Services, fetch: bool) -> Found:
    record = adapter.run_record()
    base = find_base(adapter.folder, s.base_model, None, services, weights=fetch)
    controls = find_controls(adapter, services) if s.compare else []

    def load() -> list[ChatModel]:
        from phoque.inference.generate import find_end_tokens
        from phoque.models.architectures import architecture_of
        from phoque.models.config import load_config, load_tokenizer
        from phoque.models.lora import attach_adapter

        model = _load_torch(s, base, services)
        ends = find_end_tokens(model)
        tokenizer = load_tokenizer(base, adapter.folder)
        architecture = architecture_of(load_config(base))
        tuned = attach_adapter(model, adapter.folder, architecture)
        ends |= _stops(tokenizer)
        models: list[ChatModel] = [TorchChatModel(TUNED, tuned, tokenizer, ends, "default")]
        for number, control in enumerate(controls, 1):
            name = f"control-{number}"
            tuned = attach_adapter(tuned, control.folder, architecture, name)
            models.insert(number - 1, TorchChatModel(name, tuned, load_tokenizer(base, control.folder), ends, name))
        if s.compare:
            models.insert(0, TorchChatModel(BASE, tuned, load_tokenizer(base), ends, None))
        return models

    return Found("adapter", f"{adapter.label} on {base.name}", _system(s, record), load)


def _model(s: ChatSettings, source: Source, services: Services) -> Found:
    _refuse_compare(s, "a model without an adapter")

    def load() -> list[ChatModel]:
        from phoque.inference.generate import find_end_tokens
        from phoque.models.config import load_tokenizer

        model, tokenizer = _load_torch(s, source, services), load_tokenizer(source)
        return [TorchChatModel(TUNED, model, tokenizer, find_end_tokens(model) | _stops(tokenizer))]

    return Found("model", source.name, _system(s, find_run_record(source.folder)), load)


def _load_torch(s: ChatSettings, source: Source, services: Services) -> Any:
    from phoque.models.load import default_device, load_model

    on = default_device()
    if s.dtype:
        services.console.warn(f"--dtype {s.dtype} chooses a file of an export; --quantization sets the precision here")
    precision = s.quantization if s.quantization != "auto" else "bf16" if on.type == "cuda" else "fp32"
    services.console.stage(f"loading {source.name} as {precision}")
    return load_model(source, precision, on=on).eval()


def _stops(tokenizer: Any) -> set[int]:
    from phoque.models.stop_tokens import find_stop_token

    return {token for token in (tokenizer.eos_token_id, find_stop_token(tokenizer)) if token is not None}


def _gguf(s: ChatSettings, file: Path, services: Services, *, fetch: bool = True) -> Found:
    _refuse_compare(s, "a GGUF file")
    if fetch and not file.is_file():
        raise UsageError(what=f"There is no GGUF file {file}.", why="The command names it.", fix="Check the path.")

    def load() -> list[ChatModel]:
        from phoque.gguf.llama_cpp import load_library

        library = load_library(services, install=s.install)
        services.console.stage(f"loading {file.name} in llama.cpp")
        return [LlamaCppChatModel(TUNED, library, file, max(MIN_CONTEXT, 4 * s.max_new_tokens))]

    return Found("gguf", file.name, _exported_system(s, file.parent), load)


def _has_models_only(folder: Path) -> bool:
    """Whether a folder is phoque's export of a model, in which no file is an adapter, whatever its name."""
    return _read_export_record(folder).get("kind") == "model"


def _read_export_record(folder: Path) -> dict[str, Any]:
    """The record of an export; empty if the folder has none that can be read."""
    try:
        return read_json_object(folder / EXPORT_RECORD)
    except UsageError:
        return {}


def list_parts(file: str, names: Iterable[str]) -> list[str]:
    """The files that a model consists of, by the name of its first."""
    whole, is_part = PART.subn("", Path(file).stem)
    return sorted(name for name in names if _whole_stem(name) == whole) if is_part else [file]


def _whole_stem(name: str) -> str:
    """The name of a file without its ending, and without the number of its part."""
    return PART.sub("", Path(name).stem)


def _choose_gguf(sizes: dict[str, int], dtype: str, *, models_only: bool = False) -> str:
    """The file of a precision, or the smallest, which is the fastest. Raises UsageError if there is no model of it.

    Vision projectors, importance matrices and, unless `models_only`, LoRA files are no models; of a model in parts, the
    first is loaded.
    """
    adapters = [] if models_only else [name for name in sizes if LORA_FILE.search(_whole_stem(name).lower())]
    models: dict[str, int] = {}
    for name in sizes.keys() - adapters:
        part = PART.search(Path(name).stem)
        if not NO_MODEL.search(name.lower()) and (part is None or int(part[1]) == 1):
            models[name] = sum(sizes[one] for one in list_parts(name, sizes))
    chosen = [(size, name) for name, size in models.items() if _whole_stem(name).lower().endswith(dtype.lower())]
    if not chosen:
        lora = adapters[0] if adapters else None
        raise UsageError(
            what=f"There is no {dtype or 'model'} in this export.",
            why=f"{lora} is an adapter alone, for its base model."
            if lora
            else f"It has {', '.join(sizes) or 'no GGUF file'}.",
            fix="Talk to the run folder, or export it without --lora." if lora else "Give another --dtype, or none.",
        )
    return min(chosen)[1]


def _onnx(s: ChatSettings, folder: Path, names: list[str]) -> Found:
    _refuse_compare(s, "an ONNX export")
    dtype = _choose_onnx(names, s.dtype, str(folder))

    def load() -> list[ChatModel]:
        from transformers import PreTrainedTokenizerFast

        from phoque.models.stop_tokens import list_stop_tokens

        tokenizer: Any = PreTrainedTokenizerFast.from_pretrained(folder)
        return [OnnxModel(TUNED, folder, dtype, tokenizer, {*list_stop_tokens(tokenizer, folder)})]

    return Found("onnx", f"{folder.name} in {dtype}", _exported_system(s, folder), load)


def _choose_onnx(names: list[str], dtype: str, where: str) -> str:
    """The precision to run: the one that is asked for, or the fastest on a CPU."""
    present = [one for one in WASM_PREFERENCE if any(f"onnx/{d}{SUFFIXES[one]}.onnx" in names for d in DECODER_NAMES)]
    if not present or (dtype and dtype not in present):
        raise UsageError(
            what=f"There is no {dtype or 'decoder'} in {where}.",
            why=f"It has {', '.join(present) or 'no file that can be run'}.",
            fix="Give one of them as --dtype, or leave it out.",
        )
    return dtype or present[0]


def _onnx_files(names: list[str], dtype: str) -> list[str]:
    """The files that one precision needs: its graphs with their data, the tokenizer and the configs."""
    graphs = tuple(f"onnx/{name}{SUFFIXES[dtype]}.onnx" for name in (*DECODER_NAMES, "embed_tokens"))
    return [n for n in names if n.startswith(graphs) or ("/" not in n and n.endswith((".json", ".jinja", ".model")))]


def _exported_system(s: ChatSettings, folder: Path) -> str | None:
    """The system message: --system, or the one of the training data, as the record of the export has it."""
    if s.system is not None:
        return s.system
    system = _read_export_record(folder).get("system")
    return str(system) if system else None


def _refuse_compare(s: ChatSettings, what: str) -> None:
    if s.compare:
        raise UsageError(
            what="There is nothing to compare with.",
            why=f"This is {what}; --compare shows an adapter beside its base.",
            fix="Name the adapter or its run folder.",
        )


def _system(s: ChatSettings, record: dict[str, Any] | None) -> str | None:
    """The system message: --system, or the most common one of the training data, by run.json."""
    return s.system if s.system is not None else training_system(record)
