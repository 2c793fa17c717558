"""A model's config as the metadata of a GGUF file."""

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gguf import GGUFWriter, LlamaFileType

from phoque.errors import UsageError
from phoque.models.architectures import Architecture, architecture_of
from phoque.models.architectures.base import GgufFormat
from phoque.models.architectures.llama_cpp_names import ROPE_TYPES
from phoque.models.config import head_dim_of, sliding_window_of

if TYPE_CHECKING:
    from transformers import PretrainedConfig

QUANTIZATION_VERSION = 2  # of the layout of quantized groups
FILE_TYPES = {
    "f32": LlamaFileType.ALL_F32,
    "f16": LlamaFileType.MOSTLY_F16,
    "bf16": LlamaFileType.MOSTLY_BF16,
}


def find_format(config: "PretrainedConfig") -> GgufFormat:
    """How llama.cpp stores a model of this config. Raises UsageError if it cannot run it, or phoque cannot write it."""
    architecture: Architecture = architecture_of(config)
    form = architecture.gguf
    text_config = config.get_text_config()
    why = architecture.no_gguf if form is None else form.find_limit(text_config) or _find_limit(text_config)
    if form is None or why:
        raise UsageError(
            what=f"phoque does not export this {config.model_type} to GGUF.",
            why=why,
            fix="Use a model of another architecture; merge works for this one.",
        )
    return form


def write_metadata(writer: GGUFWriter, config: "PretrainedConfig", form: GgufFormat, *, name: str, dtype: str) -> None:
    """Add general entries, the model's shape and its rotary embeddings."""
    text_config = config.get_text_config()
    writer.add_type("model")
    writer.add_name(name)
    writer.add_file_type(FILE_TYPES[dtype])
    writer.add_quantization_version(QUANTIZATION_VERSION)
    for key, value in model_keys(text_config, form).items():
        _write(writer, f"{form.name}.{key}", value)


def model_keys(config: Any, form: GgufFormat) -> dict[str, Any]:
    """The entries below `general.architecture` for a text config."""
    head_dim = head_dim_of(config)
    rope = _rope_parameters(config)
    context = config.max_position_embeddings
    if not form.has_windows and (window := sliding_window_of(config)):
        context = min(context, window)
    keys: dict[str, Any] = {
        "block_count": config.num_hidden_layers,
        "context_length": context,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": head_dim,
        "attention.value_length": head_dim,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "rope.dimension_count": int(head_dim * rope.get("partial_rotary_factor", 1.0)),
        "rope.freq_base": float(rope["rope_theta"]),
        "vocab_size": config.vocab_size,
    }
    if form.has_windows and (window := sliding_window_of(config)):
        keys["attention.sliding_window"] = window
    if local := config.rope_parameters.get("sliding_attention"):
        keys["rope.freq_base_swa"] = float(local["rope_theta"])
    return keys | _rope_scaling(config, rope) | form.keys(config)


def _find_limit(config: Any) -> str:
    kind = _rope_parameters(config).get("rope_type", "default")
    return (
        "" if kind in ROPE_TYPES else f"Its rotary embeddings are scaled by {kind!r}, which llama.cpp has no entry for."
    )


def _rope_parameters(config: Any) -> dict[str, Any]:
    """The rotary embeddings of a model, or of its blocks with full attention, where types of blocks have their own."""
    return config.rope_parameters.get("full_attention", config.rope_parameters)


def _rope_scaling(config: Any, rope: dict[str, Any]) -> dict[str, Any]:
    kind = rope.get("rope_type", "default")
    if kind == "linear":
        return {"rope.scaling.type": "linear", "rope.scaling.factor": float(rope["factor"])}
    if kind == "yarn":
        keys: dict[str, Any] = {
            "rope.scaling.type": "yarn",
            "rope.scaling.factor": float(rope["factor"]),
            "rope.scaling.original_context_length": int(rope["original_max_position_embeddings"]),
        }
        for name, key in (("attention_factor", "attn"), ("beta_fast", "beta_fast"), ("beta_slow", "beta_slow")):
            if rope.get(name) is not None:
                suffix = "attn_factor" if key == "attn" else key
                keys[f"rope.scaling.yarn_{suffix}"] = float(rope[name])
        return keys
    if kind == "longrope":
        return {"rope.scaling.type": "longrope", "rope.scaling.attn_factor": _attention_factor(config, rope)}
    return {}


def _attention_factor(config: Any, rope: dict[str, Any]) -> float:
    """What LongRoPE multiplies sines and cosines by: sqrt(1 + ln s / ln L) for a context s times the original L.

    https://arxiv.org/abs/2402.13753, as transformers computes it.
    """
    if rope.get("attention_factor"):
        return float(rope["attention_factor"])
    original = getattr(config, "original_max_position_embeddings", None) or rope.get("original_max_position_embeddings")
    scale = config.max_position_embeddings / original if original else 1.0
    return math.sqrt(1 + math.log(scale) / math.log(original)) if original and scale > 1 else 1.0


def _write(writer: GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, list):
        writer.add_array(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    else:
        writer.add_uint32(key, value)


def file_name(name: str, dtype: str) -> str:
    """The usual name of a GGUF file: MODEL-Q4_K_M.gguf."""
    return f"{Path(name).name}-{dtype.upper()}.gguf"
