"""Level `files`: everything that Transformers.js looks for is there, agrees with itself, and no weight is amiss."""

from itertools import pairwise, product
from typing import Any

from phoque.onnx.session import SUFFIXES
from phoque.onnx.transformers_js import SESSIONS
from phoque.onnx.verify.checks import CheckFailed, Verdict
from phoque.onnx.verify.export_dir import ExportDir, read_json

LEVEL = "files"
LARGEST = 2**31 - 1  # bytes of an ArrayBuffer
POINTER = b"version https://git-lfs"
# model_type -> class of Transformers.js 4.3.1 and the sessions it opens
CLASSES = {
    "llama": ("LlamaForCausalLM", "text"),
    "mistral": ("MistralForCausalLM", "text"),
    "ministral": ("MinistralForCausalLM", "text"),
    "ministral3": ("Ministral3ForCausalLM", "text"),
    "qwen2": ("Qwen2ForCausalLM", "text"),
    "qwen3": ("Qwen3ForCausalLM", "text"),
    "mistral3": ("Mistral3ForConditionalGeneration", "multimodal"),
}
ROOT = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json")
WITH_IMAGES = ("preprocessor_config.json", "processor_config.json")
DEFAULT = "q8"  # what Transformers.js takes on wasm where nothing names a precision
WIDTHS = {1: 4, 2: 1, 3: 1, 5: 2, 6: 4, 7: 8, 9: 1, 10: 2, 11: 8, 16: 2}  # bytes of ONNX's element types


def check_files(place: ExportDir, verdict: Verdict) -> tuple[str, list[str]]:
    """Add this level's checks; return the layout and the precisions that are there."""
    with verdict.check(LEVEL, "no file is a Git LFS pointer"):
        _no_pointers(place)
    config: dict[str, Any] = {}
    with verdict.check(LEVEL, "the root's files are there and are JSON"):
        found = {name: read_json(place, name) for name in ROOT}
        config = found["config.json"]
    layout = "text"
    with verdict.check(LEVEL, "Transformers.js has a class for this architecture") as said:
        layout = _layout(config)
        said.append(CLASSES[config["model_type"]][0])
    dtypes = _present(place, layout)
    with verdict.check(LEVEL, "the sessions of each precision are there, the default one's too") as said:
        said.append(_sessions(place, config, layout, dtypes))
    with verdict.check(LEVEL, "the chat template is where both libraries look, and renders"):
        _template(place)
    with verdict.check(LEVEL, "the tokenizer loads, and its special tokens exist"):
        _tokens(place)
    if layout == "multimodal":
        with verdict.check(LEVEL, "the image processor's files are there and complete"):
            _images(place, config)
    with verdict.check(LEVEL, "external data lies where each graph says, whole and named as declared") as said:
        said.append(_external(place, config))
    if "export.json" in place.sizes:
        with verdict.check(LEVEL, "each graph and its weights are the ones that were exported"):
            _digests(place)
    else:
        verdict.leave_out(
            LEVEL, "each graph and its weights are the ones that were exported", "there is no export.json"
        )
    return layout, dtypes


def _no_pointers(place: ExportDir) -> None:
    for path, size in place.sizes.items():
        if size < 1024 and place.fetch(path).read_bytes().startswith(POINTER):
            raise CheckFailed(
                f"{path} is a Git LFS pointer, not the file: fetch it with `git lfs pull` or from the Hub"
            )
        if size == 0:
            raise CheckFailed(f"{path} is empty")


def _layout(config: dict[str, Any]) -> str:
    kind = config.get("model_type")
    if kind not in CLASSES:
        raise CheckFailed(
            f"config.json has model_type {kind!r}, which no class of Transformers.js that phoque knows runs"
        )
    name, layout = CLASSES[kind]
    if config.get("architectures") != [name]:
        raise CheckFailed(f"config.json has architectures {config.get('architectures')}; for {kind} it is [{name!r}]")
    return layout


def _present(place: ExportDir, layout: str) -> list[str]:
    decoder = SESSIONS[layout][0 if layout == "text" else 1]
    return [dtype for dtype, suffix in SUFFIXES.items() if f"onnx/{decoder}{suffix}.onnx" in place.sizes]


def _sessions(place: ExportDir, config: dict[str, Any], layout: str, dtypes: list[str]) -> str:
    if not dtypes:
        raise CheckFailed(f"there is no onnx/{SESSIONS[layout][-1]}*.onnx: nothing to run")
    for dtype in dtypes:
        for name in SESSIONS[layout]:
            if f"onnx/{name}{SUFFIXES[dtype]}.onnx" not in place.sizes:
                raise CheckFailed(f"onnx/{name}{SUFFIXES[dtype]}.onnx is missing, which precision {dtype} needs")
    settings = config.get("transformers.js_config", {})
    devices = [settings, *settings.get("device_config", {}).values()]
    chosen = [device["dtype"] for device in devices if "dtype" in device] or [DEFAULT]
    for name, choice in product(SESSIONS[layout], chosen):
        dtype = choice.get(name, DEFAULT) if isinstance(choice, dict) else choice
        if dtype not in SUFFIXES:
            raise CheckFailed(f"config.json names precision {dtype!r}, which Transformers.js does not know")
        if f"onnx/{name}{SUFFIXES[dtype]}.onnx" not in place.sizes:
            raise CheckFailed(
                f"a client without a precision asks for onnx/{name}{SUFFIXES[dtype]}.onnx, which is missing: "
                "set transformers.js_config.dtype in config.json"
            )
    return ", ".join(dtypes)


def _template(place: ExportDir) -> None:
    settings = read_json(place, "tokenizer_config.json")
    inside = settings.get("chat_template")
    if not isinstance(inside, str):
        raise CheckFailed("tokenizer_config.json has no chat_template: Transformers.js reads it from there alone")
    if "chat_template.jinja" not in place.sizes:
        raise CheckFailed("chat_template.jinja is missing: transformers 5 reads the template from there")
    if place.fetch("chat_template.jinja").read_text(encoding="utf-8") != inside:
        raise CheckFailed("chat_template.jinja and tokenizer_config.json hold different templates")
    from transformers.utils.chat_template_utils import render_jinja_template

    tokens = {k: v for k, v in settings.items() if k.endswith("_token") and isinstance(v, str)}
    asked = [{"role": "user", "content": "What do the gulls want?"}]
    try:
        (text, *_), _ = render_jinja_template([asked], chat_template=inside, add_generation_prompt=True, **tokens)
    except Exception as error:  # whatever the template raises is what a client would meet
        raise CheckFailed(f"the chat template does not render: {error}") from error
    if "What do the gulls want?" not in text:
        raise CheckFailed("the chat template leaves out what the user says")


def _tokens(place: ExportDir) -> None:
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_file(str(place.fetch("tokenizer.json")))
    except Exception as error:  # tokenizers raises Exception itself
        raise CheckFailed(f"tokenizer.json does not load: {error}") from error
    size = tokenizer.get_vocab_size(with_added_tokens=True)
    config, generation = read_json(place, "config.json"), read_json(place, "generation_config.json")
    rows = config.get("text_config", config)["vocab_size"]
    if size > rows:
        raise CheckFailed(f"the tokenizer has {size} tokens, the model {rows}")
    stops = generation.get("eos_token_id")
    for number in [stops] if isinstance(stops, int) else stops or [None]:
        if number is None or not 0 <= number < rows:
            raise CheckFailed(f"generation_config.json has eos_token_id {stops}: an answer would never end")


def _images(place: ExportDir, config: dict[str, Any]) -> None:
    images, processor = (read_json(place, name) for name in WITH_IMAGES)
    for name in ("image_processor_type", "processor_class"):
        if not isinstance(images.get(name), str):
            raise CheckFailed(f"preprocessor_config.json has no {name}: Transformers.js cannot tell the processor")
    for where, found in (("preprocessor_config.json", images), ("processor_config.json", processor)):
        for name in ("patch_size", "spatial_merge_size"):
            if not isinstance(found.get(name), int):
                raise CheckFailed(f"{where} has {name} {found.get(name)!r}; Transformers.js needs a number")
    if images["patch_size"] != config["vision_config"]["patch_size"]:
        raise CheckFailed("preprocessor_config.json and config.json differ in patch_size")
    if not isinstance(images.get("size", {}).get("longest_edge"), int):
        raise CheckFailed("preprocessor_config.json has no size.longest_edge")
    for name in ("image_token", "image_break_token", "image_end_token"):
        if not isinstance(processor.get(name), str):
            raise CheckFailed(f"processor_config.json has no {name}")


def _external(place: ExportDir, config: dict[str, Any]) -> str:
    declared = config.get("transformers.js_config", {}).get("use_external_data_format", {})
    used: set[str] = set()
    for path in sorted(p for p in place.sizes if p.startswith("onnx/") and p.endswith(".onnx")):
        base = path.removeprefix("onnx/")
        chunks = _chunks_of(place, path)
        session = next((n for names in SESSIONS.values() for n in names if base.startswith(n)), base)
        count = declared.get(base, declared.get(session, 0)) if isinstance(declared, dict) else int(declared or 0)
        if int(count) != len(chunks):
            raise CheckFailed(
                f"{path} has {len(chunks)} files of external data, and config.json declares {int(count)} under "
                "use_external_data_format: a browser fetches only what is declared"
            )
        used |= chunks
        if place.sizes[path] > LARGEST:
            raise CheckFailed(f"{path} is larger than 2 GiB, which no browser can hold")
    for path, size in place.sizes.items():
        if path.startswith("onnx/") and ".onnx_data" in path:
            if size > LARGEST:
                raise CheckFailed(f"{path} is larger than 2 GiB, which no browser can hold")
            if path.removeprefix("onnx/") not in used:
                raise CheckFailed(f"{path} belongs to no graph")
    return f"{len(used)} files of external data"


def _chunks_of(place: ExportDir, path: str) -> set[str]:
    """The files of external data that a graph points into, each range checked."""
    base = path.removeprefix("onnx/")
    ranges: dict[str, list[tuple[int, int, str]]] = {}
    for tensor in load_graph(place, path).graph.initializer:
        if tensor.data_location != 1:  # in the graph itself
            continue
        entries = {entry.key: entry.value for entry in tensor.external_data}
        where = entries.get("location", "")
        if "/" in where or "\\" in where or ".." in where or not where:
            raise CheckFailed(f"{path} keeps {tensor.name} in {where!r}, which is no plain file name")
        allowed = where == f"{base}_data" or (
            where.startswith(f"{base}_data_") and where.removeprefix(f"{base}_data_").isdigit()
        )
        if not allowed:
            raise CheckFailed(f"{path} keeps its weights in {where}; Transformers.js looks for {base}_data")
        if f"onnx/{where}" not in place.sizes:
            raise CheckFailed(f"onnx/{where} is missing, which {path} needs")
        start, length = int(entries.get("offset", 0)), int(entries.get("length", 0))
        expected = WIDTHS.get(tensor.data_type, 1)
        for size in tensor.dims:
            expected *= size
        if length != expected:
            raise CheckFailed(f"{path}: {tensor.name} has {length} bytes of external data, its shape needs {expected}")
        if start + length > place.sizes[f"onnx/{where}"]:
            raise CheckFailed(f"onnx/{where} ends before {tensor.name} does: the file is cut short")
        ranges.setdefault(where, []).append((start, start + length, tensor.name))
    for where, spans in ranges.items():
        ordered = sorted(spans)
        for (_, end, first), (start, _, second) in pairwise(ordered):
            if start < end:
                raise CheckFailed(f"onnx/{where}: {first} and {second} lie on the same bytes")
    wanted = {f"{base}_data{f'_{n}' if n else ''}" for n in range(len(ranges))}
    if set(ranges) != wanted:
        raise CheckFailed(f"{path} skips a number in its files of external data: {', '.join(sorted(ranges))}")
    return set(ranges)


def load_graph(place: ExportDir, path: str) -> Any:
    """A graph without its external data. Raises Fails if it is no ONNX file."""
    import onnx
    from google.protobuf.message import DecodeError

    try:
        return onnx.load(str(place.fetch(path)), load_external_data=False)
    except DecodeError as error:
        raise CheckFailed(f"{path} is no ONNX file, or is cut short") from error


def _digests(place: ExportDir) -> None:
    for path, digest in read_json(place, "export.json").get("sha256", {}).items():
        if path not in place.sizes:
            raise CheckFailed(f"{path} was exported and is missing")
        if place.digest(path) != digest:
            raise CheckFailed(f"{path} is not the file that was exported: its SHA-256 differs")
