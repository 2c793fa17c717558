"""Gemma 3: text models (270M, 1B), and the text part of the models with a vision tower (4B, 12B, 27B)."""

from typing import Any

from phoque.models.architectures.base import VISION_FULL_NAMES, VISION_TEXT_KEYS, Architecture

# Gemma's norms multiply by 1 + weight, so a division of their output is not a division of the weight
SMOOTH_SOURCES = (None, "self_attn.v_proj", None, "mlp.up_proj")


def _embedding_scale(config: Any) -> float:
    return config.hidden_size**0.5


GEMMA3_TEXT = Architecture(
    "gemma3_text", "Gemma3ForCausalLM", smooth_sources=SMOOTH_SOURCES, embedding_scale=_embedding_scale
)
GEMMA3 = Architecture(
    "gemma3",
    "Gemma3ForCausalLM",
    text_keys=VISION_TEXT_KEYS,
    full_names=VISION_FULL_NAMES,
    auto_class="AutoModelForImageTextToText",
    smooth_sources=SMOOTH_SOURCES,
    embedding_scale=_embedding_scale,
)
