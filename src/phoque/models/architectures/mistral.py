"""Mistral, Ministral, and Mistral 3 with its vision tower (Ministral-3-3B-Instruct-2512, Mistral Small 3.1 and 3.2)."""

from typing import Any

from phoque.models.architectures.base import (
    VISION_FULL_NAMES,
    VISION_TEXT_KEYS,
    Architecture,
    GgufFormat,
    VisionTower,
)


def _gguf_keys(config: Any) -> dict[str, Any]:
    """Queries grow with the logarithm of the position, and YaRN scales the attention (mscale)."""
    rope = config.rope_parameters
    keys: dict[str, Any] = {}
    if rope.get("rope_type") == "yarn":
        keys["rope.scaling.yarn_log_multiplier"] = float(rope.get("mscale_all_dim") or 0.0)
    if beta := rope.get("llama_4_scaling_beta"):
        keys["attention.temperature_scale"] = float(beta)
    return keys


MISTRAL = Architecture(
    "mistral", "MistralForCausalLM", in_optimum=True, gguf=GgufFormat("llama", interleaves_rope=True)
)
MINISTRAL = Architecture("ministral", "MinistralForCausalLM", no_gguf="llama.cpp does not know this architecture.")
MISTRAL3_GGUF = GgufFormat("mistral3", interleaves_rope=True, keys=_gguf_keys)
MINISTRAL3 = Architecture("ministral3", "Ministral3ForCausalLM", gguf=MISTRAL3_GGUF)
MISTRAL3 = Architecture(
    "mistral3",
    "Mistral3ForConditionalGeneration",
    text_keys=VISION_TEXT_KEYS,
    full_names=VISION_FULL_NAMES,
    auto_class="AutoModelForImageTextToText",
    gguf=MISTRAL3_GGUF,
    vision=VisionTower(
        projector=("transformers.models.mistral3.modeling_mistral3", "Mistral3MultiModalProjector"),
        processor="PixtralProcessor",
        image_processor="PixtralImageProcessor",
        image_tokens={"image_token": "[IMG]", "image_break_token": "[IMG_BREAK]", "image_end_token": "[IMG_END]"},
    ),
)
