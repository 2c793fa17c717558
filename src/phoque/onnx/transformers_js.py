"""Write the files that Transformers.js reads beside the graphs: configs, tokenizer, chat template, processor."""

import json
from pathlib import Path
from typing import Any

from phoque.models.architectures import ARCHITECTURES
from phoque.models.architectures.base import VisionTower
from phoque.models.config import copy_tokenizer, load_tokenizer
from phoque.models.source import Source
from phoque.models.stop_tokens import find_stop_token, with_stop_token

DTYPE_PREFERENCE = ("q4", "q8", "int8", "fp32", "fp16", "q4f16")  # the first of these in the export is the default
# the fastest on wasm first: SmolLM2 on two cores generates 9.5 tokens per second in int8, 1.9 in q8
WASM_PREFERENCE = ("int8", "q4", "q8", "fp32", "q4f16", "fp16")
CLIP = {"image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711]}
SESSIONS = {"text": ("model",), "multimodal": ("embed_tokens", "decoder_model_merged", "vision_encoder")}


def write_side_files(source: Path, folder: Path, layout: str, chunks: dict[str, int], dtypes: list[str]) -> None:
    """Write everything but the graphs; `chunks` maps each .onnx file to its number of external data files."""
    source_config = json.loads((source / "config.json").read_text())
    config = _build_config(source_config, layout)
    default = next(dtype for dtype in DTYPE_PREFERENCE if dtype in dtypes)
    per_session = lambda dtype: dtype if layout == "text" else dict.fromkeys(SESSIONS[layout], dtype)
    settings: dict[str, Any] = {"dtype": per_session(default), "use_external_data_format": chunks}
    if "int8" in dtypes:
        settings["device_config"] = {"wasm": {"dtype": per_session("int8")}}
    config["transformers.js_config"] = settings
    _write_json(folder / "config.json", config)
    generation = _build_generation_config(source, config)
    stop = find_stop_token(load_tokenizer(Source(str(source), source, "", "")))
    generation["eos_token_id"] = with_stop_token(generation.get("eos_token_id"), stop)
    _write_json(folder / "generation_config.json", generation)
    _write_tokenizer(source, folder, layout)
    if layout == "multimodal":
        _write_processor(source, folder, source_config)


def _build_config(source_config: dict[str, Any], layout: str) -> dict[str, Any]:
    config = json.loads(json.dumps(source_config))
    if layout == "text" and "text_config" in config:
        special_tokens = {
            name: config[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id") if name in config
        }
        config = (
            special_tokens
            | config["text_config"]
            | {"architectures": [ARCHITECTURES[config["text_config"]["model_type"]].transformers_js_class]}
        )
        config.setdefault("tie_word_embeddings", source_config.get("tie_word_embeddings", False))
    for section in (config, config.get("text_config", {})):
        section.pop("quantization_config", None)
    text = config.get("text_config", config)
    text.setdefault("head_dim", text["hidden_size"] // text["num_attention_heads"])
    text = ARCHITECTURES[text["model_type"]].transformers_js_config(text)
    return config | {"text_config": text} if "text_config" in config else text


def _build_generation_config(source: Path, config: dict[str, Any]) -> dict[str, Any]:
    file = source / "generation_config.json"
    settings = json.loads(file.read_text()) if file.is_file() else {}
    text = config.get("text_config", config)
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        value = config.get(name, text.get(name))
        if value is not None:
            settings.setdefault(name, value)
    return settings


def _write_tokenizer(source: Path, folder: Path, layout: str) -> None:
    """Write the tokenizer's files, under a class name that Transformers.js knows."""
    settings = copy_tokenizer(source, folder)
    if settings.get("tokenizer_class") in (None, "TokenizersBackend"):  # only transformers 5 knows that name
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    if layout == "multimodal":
        settings["processor_class"] = _vision_tower(source).processor
    _write_json(folder / "tokenizer_config.json", settings)


def _vision_tower(source: Path) -> VisionTower:
    vision = ARCHITECTURES[json.loads((source / "config.json").read_text())["model_type"]].vision
    assert vision, "export checks that the architecture has this layout"
    return vision


def _write_processor(source: Path, folder: Path, source_config: dict[str, Any]) -> None:
    """Write preprocessor_config.json and processor_config.json.

    transformers 5 stores the image processor in processor_config.json; Transformers.js reads a separate file.
    """
    configs: dict[str, Any] = {}
    for name in ("processor_config.json", "preprocessor_config.json"):
        if (source / name).is_file():
            configs[name] = json.loads((source / name).read_text())
    processor = configs.get("processor_config.json", {})
    image_settings = configs.get("preprocessor_config.json") or processor.get("image_processor") or {}
    vision = _vision_tower(source)
    patch, merge = source_config["vision_config"]["patch_size"], source_config.get("spatial_merge_size", 2)
    shared = {"patch_size": patch, "spatial_merge_size": merge, "processor_class": vision.processor}
    defaults = {
        "do_resize": True,
        "do_rescale": True,
        "do_normalize": True,
        "do_convert_rgb": True,
        "rescale_factor": 1 / 255,
        "resample": 3,
        "size": {"longest_edge": source_config["vision_config"]["image_size"]},
        **CLIP,
    }
    # Transformers.js needs patch_size as a number; some versions of transformers store {height, width}
    image_processor = defaults | image_settings | shared | {"image_processor_type": vision.image_processor}
    _write_json(folder / "preprocessor_config.json", image_processor)
    processor_config = {**vision.image_tokens, **processor, **shared} | {"image_processor": image_processor}
    _write_json(folder / "processor_config.json", processor_config)


def _write_json(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n")
