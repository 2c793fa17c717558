"""The files around the graphs, each where Transformers.js looks for it: configs, tokenizer, template, processor."""

import json
import shutil
from pathlib import Path
from typing import Any

from phoque.merging.writer import TOKENIZER_FILES
from phoque.onnx.session import SUFFIXES

PREFERRED = ("q4", "q8", "int8", "fp32", "fp16", "q4f16")  # what a client takes that names no precision
IMAGE_TOKENS = {"image_token": "[IMG]", "image_break_token": "[IMG_BREAK]", "image_end_token": "[IMG_END]"}
CLIP = {"image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711]}
SESSIONS = {"text": ("model",), "multimodal": ("embed_tokens", "decoder_model_merged", "vision_encoder")}


def layout_of(config: dict[str, Any], has_vision: bool) -> str:
    """`multimodal` for a Mistral3 that has its vision tower, else `text`."""
    return "multimodal" if config["model_type"] == "mistral3" and has_vision else "text"


def write_side_files(source: Path, into: Path, layout: str, chunks: dict[str, int], dtypes: list[str]) -> None:
    """Everything but the graphs; `chunks` is how many files of external data each .onnx has."""
    raw = json.loads((source / "config.json").read_text())
    config = _config(raw, layout)
    default = next(dtype for dtype in PREFERRED if dtype in dtypes)
    each = lambda dtype: dtype if layout == "text" else dict.fromkeys(SESSIONS[layout], dtype)
    settings: dict[str, Any] = {"dtype": each(default), "use_external_data_format": chunks}
    if "int8" in dtypes:
        settings["device_config"] = {"wasm": {"dtype": each("int8")}}
    config["transformers.js_config"] = settings
    _write(into / "config.json", config)
    _write(into / "generation_config.json", _generation(source, config))
    _tokenizer(source, into, layout)
    if layout == "multimodal":
        _processor(source, into, raw)


def _config(raw: dict[str, Any], layout: str) -> dict[str, Any]:
    config = json.loads(json.dumps(raw))
    if layout == "text" and "text_config" in config:
        kept = {name: config[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id") if name in config}
        config = kept | config["text_config"] | {"architectures": ["Ministral3ForCausalLM"]}
        config.setdefault("tie_word_embeddings", raw.get("tie_word_embeddings", False))
    for part in (config, config.get("text_config", {})):
        part.pop("quantization_config", None)
    text = config.get("text_config", config)
    text.setdefault("head_dim", text["hidden_size"] // text["num_attention_heads"])
    return config


def _generation(source: Path, config: dict[str, Any]) -> dict[str, Any]:
    file = source / "generation_config.json"
    found = json.loads(file.read_text()) if file.is_file() else {}
    text = config.get("text_config", config)
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        value = config.get(name, text.get(name))
        if value is not None:
            found.setdefault(name, value)
    return found


def _tokenizer(source: Path, into: Path, layout: str) -> None:
    """Transformers.js reads the template from tokenizer_config.json alone, transformers from the .jinja."""
    for file in source.iterdir():
        if file.is_file() and file.name.startswith(TOKENIZER_FILES):
            shutil.copyfile(file, into / file.name)
    settings = json.loads((into / "tokenizer_config.json").read_text())
    template = into / "chat_template.jinja"
    if template.is_file():
        settings["chat_template"] = template.read_text()
    elif isinstance(settings.get("chat_template"), str):
        template.write_text(settings["chat_template"])
    if settings.get("tokenizer_class") in (None, "TokenizersBackend"):  # transformers 5's own name, known nowhere else
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    if layout == "multimodal":
        settings["processor_class"] = "PixtralProcessor"
    _write(into / "tokenizer_config.json", settings)


def _processor(source: Path, into: Path, raw: dict[str, Any]) -> None:
    """Transformers 5 keeps the image processor in processor_config.json; Transformers.js wants a file for each."""
    known: dict[str, Any] = {}
    for name in ("processor_config.json", "preprocessor_config.json"):
        if (source / name).is_file():
            known[name] = json.loads((source / name).read_text())
    processor = known.get("processor_config.json", {})
    images = known.get("preprocessor_config.json") or processor.get("image_processor") or {}
    patch, merge = raw["vision_config"]["patch_size"], raw.get("spatial_merge_size", 2)
    shared = {"patch_size": patch, "spatial_merge_size": merge, "processor_class": "PixtralProcessor"}
    defaults = {
        "do_resize": True,
        "do_rescale": True,
        "do_normalize": True,
        "do_convert_rgb": True,
        "rescale_factor": 1 / 255,
        "resample": 3,
        "size": {"longest_edge": raw["vision_config"]["image_size"]},
        **CLIP,
    }
    # patch_size is a number to Transformers.js, and a height and width to some versions of transformers
    written = defaults | images | shared | {"image_processor_type": "PixtralImageProcessor"}
    _write(into / "preprocessor_config.json", written)
    _write(into / "processor_config.json", {**IMAGE_TOKENS, **processor, **shared} | {"image_processor": written})


def onnx_files(sessions: tuple[str, ...], dtype: str) -> list[str]:
    """The names of a precision's graphs, one a session."""
    return [f"{name}{SUFFIXES[dtype]}.onnx" for name in sessions]


def _write(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n")
