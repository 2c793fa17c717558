"""Level `files`: every file that Transformers.js needs exists, the files agree, and external data fits the graphs."""

from itertools import pairwise, product
from typing import Any

from phoque.checks import CheckFailed, Verdict
from phoque.files import EXPORT_RECORD
from phoque.models.architectures import ARCHITECTURES
from phoque.onnx.session import SUFFIXES
from phoque.onnx.transformers_js import SESSIONS
from phoque.onnx.verify.export_dir import ExportDir, read_json

LEVEL = "files"
MAX_FILE_BYTES = 2**31 - 1  # bytes; the limit of an ArrayBuffer
LFS_POINTER = b"version https://git-lfs"
# model_type -> class of Transformers.js 4.3.1 and the sessions it opens
CONFIG_CHECKS = ("root-files", "model-class")  # the graph level needs what these check
ROOT_FILES = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json")
IMAGE_FILES = ("preprocessor_config.json", "processor_config.json")
QUESTION = {"role": "user", "content": "What do the gulls want?"}
ANSWER = {"role": "assistant", "content": "Herring."}
DEFAULT_DTYPE = "q8"  # the precision that Transformers.js loads on wasm if nothing names one
ELEMENT_BYTES = {
    1: 4,
    2: 1,
    3: 1,
    5: 2,
    6: 4,
    7: 8,
    9: 1,
    10: 2,
    11: 8,
    16: 2,
}  # ONNX element type -> bytes per element


def check_files(export: ExportDir, verdict: Verdict) -> tuple[str, list[str]]:
    """Add this level's checks; return the layout and the precisions that exist."""
    with verdict.check(LEVEL, "no file is empty or a Git LFS pointer"):
        _check_no_pointers(export)
    config: dict[str, Any] = {}
    with verdict.check(LEVEL, "the root folder's files exist and are JSON", id="root-files"):
        contents = {name: read_json(export, name) for name in ROOT_FILES}
        config = contents["config.json"]
    layout = "text"
    with verdict.check(LEVEL, "Transformers.js has a class for this architecture", id="model-class") as notes:
        layout = _find_layout(config)
        notes.append(ARCHITECTURES[config["model_type"]].transformers_js_class)
    dtypes = _list_dtypes(export, layout)
    with verdict.check(LEVEL, "every session exists in each precision and in the default one") as notes:
        notes.append(_check_sessions(export, config, layout, dtypes))
    with verdict.check(LEVEL, "the chat template is where transformers and Transformers.js look, and renders"):
        _check_chat_template(export)
    with verdict.check(LEVEL, "the tokenizer loads, fits the model, and has an end token"):
        _check_tokenizer(export)
    if not verdict.failed_checks():  # it needs what they check
        with verdict.check(LEVEL, "a client stops where the chat template ends an answer"):
            _check_stop_token(export)
    if layout == "multimodal":
        with verdict.check(LEVEL, "the image processor's files exist and are complete"):
            _check_image_processor(export, config)
    with verdict.check(LEVEL, "external data is complete, and named as the graphs and config.json say") as notes:
        notes.append(_check_external_data(export, config))
    if EXPORT_RECORD in export.sizes:
        with verdict.check(LEVEL, "each graph and its weights are unchanged since the export"):
            _check_digests(export)
    else:
        verdict.skip(
            LEVEL,
            "each graph and its weights are unchanged since the export",
            "there is no export.json with their hashes",
        )
    return layout, dtypes


def _check_no_pointers(export: ExportDir) -> None:
    for path, size in export.sizes.items():
        if size < 1024 and export.fetch(path).read_bytes().startswith(LFS_POINTER):
            raise CheckFailed(
                f"{path} is a Git LFS pointer, not the file: download it with `git lfs pull` or from the Hub"
            )
        if size == 0:
            raise CheckFailed(f"{path} is empty")


def _find_layout(config: dict[str, Any]) -> str:
    model_type = config.get("model_type")
    if model_type not in ARCHITECTURES:
        raise CheckFailed(f"config.json has model_type {model_type!r}; phoque knows no Transformers.js class for it")
    architecture = ARCHITECTURES[model_type]
    class_name, layout = architecture.transformers_js_class, "multimodal" if architecture.vision else "text"
    if config.get("architectures") != [class_name]:
        raise CheckFailed(
            f"config.json has architectures {config.get('architectures')}; for {model_type} it must be [{class_name!r}]"
        )
    return layout


def _list_dtypes(export: ExportDir, layout: str) -> list[str]:
    decoder = SESSIONS[layout][0 if layout == "text" else 1]
    return [dtype for dtype, suffix in SUFFIXES.items() if f"onnx/{decoder}{suffix}.onnx" in export.sizes]


def _check_sessions(export: ExportDir, config: dict[str, Any], layout: str, dtypes: list[str]) -> str:
    if not dtypes:
        raise CheckFailed(f"there is no onnx/{SESSIONS[layout][-1]}*.onnx, so there is nothing to run")
    for dtype in dtypes:
        for name in SESSIONS[layout]:
            if f"onnx/{name}{SUFFIXES[dtype]}.onnx" not in export.sizes:
                raise CheckFailed(f"onnx/{name}{SUFFIXES[dtype]}.onnx is missing; precision {dtype} needs it")
    settings = config.get("transformers.js_config", {})
    device_settings = [settings, *settings.get("device_config", {}).values()]
    choices = [device["dtype"] for device in device_settings if "dtype" in device] or [DEFAULT_DTYPE]
    for name, choice in product(SESSIONS[layout], choices):
        dtype = choice.get(name, DEFAULT_DTYPE) if isinstance(choice, dict) else choice
        if dtype not in SUFFIXES:
            raise CheckFailed(f"config.json names the precision {dtype!r}, which Transformers.js does not know")
        if f"onnx/{name}{SUFFIXES[dtype]}.onnx" not in export.sizes:
            raise CheckFailed(
                f"a client that names no precision loads onnx/{name}{SUFFIXES[dtype]}.onnx, which is missing: "
                "set transformers.js_config.dtype in config.json"
            )
    return ", ".join(dtypes)


def _read_template(settings: dict[str, Any]) -> str | None:
    """The chat template in a tokenizer_config.json; of several by name the default one, which clients take."""
    template = settings.get("chat_template")
    if isinstance(template, list):
        template = {one["name"]: one["template"] for one in template}.get("default")
    return template if isinstance(template, str) else None


def _render(settings: dict[str, Any], messages: list[dict[str, str]]) -> str:
    """Render messages with the template and the control tokens of a tokenizer_config.json."""
    from transformers.utils.chat_template_utils import render_jinja_template

    tokens = {k: v for k, v in settings.items() if k.endswith("_token") and isinstance(v, str)}
    asks = messages[-1]["role"] == "user"
    (text, *_), _ = render_jinja_template(
        [messages], chat_template=_read_template(settings), add_generation_prompt=asks, **tokens
    )
    return text


def _check_chat_template(export: ExportDir) -> None:
    settings = read_json(export, "tokenizer_config.json")
    template, is_named = _read_template(settings), isinstance(settings.get("chat_template"), list)
    if template is None:
        raise CheckFailed("tokenizer_config.json has no chat_template: Transformers.js reads it only from there")
    if not is_named and "chat_template.jinja" not in export.sizes:
        raise CheckFailed("chat_template.jinja is missing: transformers 5 reads the template from there")
    if not is_named and export.fetch("chat_template.jinja").read_text(encoding="utf-8") != template:
        raise CheckFailed("chat_template.jinja and tokenizer_config.json contain different templates")
    try:
        text = _render(settings, [QUESTION])
    except Exception as error:  # a client would fail with whatever the template raises
        raise CheckFailed(f"the chat template does not render: {error}") from error
    if QUESTION["content"] not in text:
        raise CheckFailed("the chat template omits the user's message")


def _check_stop_token(export: ExportDir) -> None:
    """Check that a client stops at the first control token that the template writes after an answer."""
    from tokenizers import Tokenizer

    text = _render(read_json(export, "tokenizer_config.json"), [QUESTION, ANSWER])
    tokenizer = Tokenizer.from_file(str(export.fetch("tokenizer.json")))
    control = tokenizer.get_added_tokens_decoder()
    ids = tokenizer.encode(text.rpartition(ANSWER["content"])[2], add_special_tokens=False).ids
    stop = next((token for token in ids if token in control), None)
    ends = read_json(export, "generation_config.json").get("eos_token_id")
    if stop is not None and stop not in (ends if isinstance(ends, list) else [ends]):
        raise CheckFailed(
            f"the chat template ends an answer with {control[stop].content}, which is not in eos_token_id of "
            "generation_config.json: a client would not stop there"
        )


def _check_tokenizer(export: ExportDir) -> None:
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_file(str(export.fetch("tokenizer.json")))
    except Exception as error:  # tokenizers raises plain Exception
        raise CheckFailed(f"tokenizer.json does not load: {error}") from error
    size = tokenizer.get_vocab_size(with_added_tokens=True)
    config, generation = read_json(export, "config.json"), read_json(export, "generation_config.json")
    vocab_size = config.get("text_config", config)["vocab_size"]
    if size > vocab_size:
        raise CheckFailed(f"the tokenizer has {size} tokens, but the model has only {vocab_size} embeddings")
    eos = generation.get("eos_token_id")
    for number in [eos] if isinstance(eos, int) else eos or [None]:
        if number is None or not 0 <= number < vocab_size:
            raise CheckFailed(f"generation_config.json has eos_token_id {eos}: an answer would never end")


def _check_image_processor(export: ExportDir, config: dict[str, Any]) -> None:
    images, processor = (read_json(export, name) for name in IMAGE_FILES)
    for name in ("image_processor_type", "processor_class"):
        if not isinstance(images.get(name), str):
            raise CheckFailed(f"preprocessor_config.json has no {name}: Transformers.js cannot choose a processor")
    for file, content in (("preprocessor_config.json", images), ("processor_config.json", processor)):
        for name in ("patch_size", "spatial_merge_size"):
            if not isinstance(content.get(name), int):
                raise CheckFailed(f"{file} has {name} = {content.get(name)!r}; Transformers.js needs a number")
    if images["patch_size"] != config["vision_config"]["patch_size"]:
        raise CheckFailed("preprocessor_config.json and config.json have different patch_size")
    if not isinstance(images.get("size", {}).get("longest_edge"), int):
        raise CheckFailed("preprocessor_config.json has no size.longest_edge")
    for name in ("image_token", "image_break_token", "image_end_token"):
        if not isinstance(processor.get(name), str):
            raise CheckFailed(f"processor_config.json has no {name}")


def _check_external_data(export: ExportDir, config: dict[str, Any]) -> str:
    declared = config.get("transformers.js_config", {}).get("use_external_data_format", {})
    used: set[str] = set()
    for path in sorted(p for p in export.sizes if p.startswith("onnx/") and p.endswith(".onnx")):
        file_name = path.removeprefix("onnx/")
        chunks = _check_byte_ranges(export, path)
        session = next((n for names in SESSIONS.values() for n in names if file_name.startswith(n)), file_name)
        count = declared.get(file_name, declared.get(session, 0)) if isinstance(declared, dict) else int(declared or 0)
        if int(count) != len(chunks):
            raise CheckFailed(
                f"{path} has {len(chunks)} files of external data, but config.json declares {int(count)} in "
                "use_external_data_format: a browser downloads only declared files"
            )
        used |= chunks
        if export.sizes[path] > MAX_FILE_BYTES:
            raise CheckFailed(f"{path} is larger than 2 GiB, the most that a browser can load")
    for path, size in export.sizes.items():
        if path.startswith("onnx/") and ".onnx_data" in path:
            if size > MAX_FILE_BYTES:
                raise CheckFailed(f"{path} is larger than 2 GiB, the most that a browser can load")
            if path.removeprefix("onnx/") not in used:
                raise CheckFailed(f"{path} belongs to no graph: delete it")
    return f"{len(used)} files of external data"


def _check_byte_ranges(export: ExportDir, path: str) -> set[str]:
    """Return the files of external data that a graph points to, after checking each tensor's byte range."""
    file_name = path.removeprefix("onnx/")
    ranges: dict[str, list[tuple[int, int, str]]] = {}
    for tensor in load_graph(export, path).graph.initializer:
        if tensor.data_location != 1:  # stored in the graph itself
            continue
        entries = {entry.key: entry.value for entry in tensor.external_data}
        location = entries.get("location", "")
        if "/" in location or "\\" in location or ".." in location or not location:
            raise CheckFailed(f"{path} stores {tensor.name} in {location!r}, which is not a plain file name")
        is_expected_name = location == f"{file_name}_data" or (
            location.startswith(f"{file_name}_data_") and location.removeprefix(f"{file_name}_data_").isdigit()
        )
        if not is_expected_name:
            raise CheckFailed(f"{path} stores its weights in {location}; Transformers.js looks for {file_name}_data")
        if f"onnx/{location}" not in export.sizes:
            raise CheckFailed(f"onnx/{location} is missing; {path} needs it")
        start, length = int(entries.get("offset", 0)), int(entries.get("length", 0))
        expected = ELEMENT_BYTES.get(tensor.data_type, 1)
        for size in tensor.dims:
            expected *= size
        if length != expected:
            raise CheckFailed(f"{path}: {tensor.name} has {length} bytes of external data; its shape needs {expected}")
        if start + length > export.sizes[f"onnx/{location}"]:
            raise CheckFailed(f"onnx/{location} ends before the end of {tensor.name}: the file is cut short")
        ranges.setdefault(location, []).append((start, start + length, tensor.name))
    for location, spans in ranges.items():
        ordered = sorted(spans)
        for (_, end, first), (start, _, second) in pairwise(ordered):
            if start < end:
                raise CheckFailed(f"onnx/{location}: {first} and {second} use the same bytes")
    expected_names = {f"{file_name}_data{f'_{n}' if n else ''}" for n in range(len(ranges))}
    if set(ranges) != expected_names:
        raise CheckFailed(f"the data files of {path} are not numbered consecutively: {', '.join(sorted(ranges))}")
    return set(ranges)


def load_graph(export: ExportDir, path: str) -> Any:
    """Load a graph without its external data. Raises CheckFailed if it is not an ONNX file."""
    import onnx
    from google.protobuf.message import DecodeError

    try:
        return onnx.load(str(export.fetch(path)), load_external_data=False)
    except DecodeError as error:
        raise CheckFailed(f"{path} is not an ONNX file, or is cut short") from error


def _check_digests(export: ExportDir) -> None:
    for path, digest in read_json(export, EXPORT_RECORD).get("sha256", {}).items():
        if path not in export.sizes:
            raise CheckFailed(f"{path} is listed in export.json but missing")
        if export.digest(path) != digest:
            raise CheckFailed(f"{path} is not the file that was exported: its SHA-256 differs")
