"""A tiny random model of every family that phoque supports: the real layout, random weights, real chat templates.

Windows, multipliers and patterns are set so that each has an effect on conversations of 30 tokens.
"""

import re
from pathlib import Path
from typing import Any

import torch
import trl

from tests import tiny

SMALL = tiny.SIZES | {"num_hidden_layers": 4, "initializer_range": 0.2}
WINDOW = 8
ROPE = {"rope_type": "default", "rope_theta": 10_000.0}
PATTERN = ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"]
VISION = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2, "patch_size": 14, "image_size": 28}
DELTA = {
    "layer_types": ["linear_attention", "linear_attention", "full_attention", "linear_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "rope_parameters": ROPE | {"partial_rotary_factor": 0.5, "mrope_section": [2, 1, 1], "mrope_interleaved": True},
}
MULTIPLIERS = {
    "embedding_multiplier": 3.0,
    "residual_multiplier": 0.5,
    "attention_multiplier": 0.1,
    "logits_scaling": 2.0,
}
# family -> (model type, changes of the config, chat template of TRL or None for ChatML)
FAMILIES: dict[str, tuple[str, dict[str, Any], str | None]] = {
    "llama": ("llama", {}, "llama3_2"),
    "mistral": ("mistral", {"sliding_window": WINDOW}, None),
    "ministral": ("ministral", {"sliding_window": WINDOW, "layer_types": PATTERN}, None),
    "ministral3": ("ministral3", {"sliding_window": None}, None),
    "qwen2": ("qwen2", {}, "qwen2_5"),
    "qwen2 with windows": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 2},
        "qwen2_5",
    ),
    "qwen3": ("qwen3", {}, "qwen3"),
    "qwen3.5": ("qwen3_5_text", DELTA, "qwen3_5_nothink"),
    "qwen3.5 with vision": ("qwen3_5", DELTA, "qwen3_5_nothink"),
    "gemma3": (
        "gemma3_text",
        {
            "sliding_window": WINDOW,
            "layer_types": PATTERN,
            "query_pre_attn_scalar": 24,
            "rope_parameters": {
                "sliding_attention": ROPE,
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
            },
        },
        "gemma3",
    ),
    "gemma3 with vision": ("gemma3", {"sliding_window": WINDOW, "layer_types": PATTERN}, "gemma3"),
    "smollm3": ("smollm3", {"no_rope_layers": [1, 1, 0, 1]}, None),
    "phi3": (
        "phi3",
        {"rope_parameters": ROPE | {"partial_rotary_factor": 0.75}, "head_dim": 16, "sliding_window": WINDOW},
        "phi3",
    ),
    "granite": ("granite", MULTIPLIERS, None),
    "granite 4": (
        "granitemoehybrid",
        MULTIPLIERS
        | {
            "layer_types": ["full_attention"] * 4,
            "num_local_experts": 0,
            "shared_intermediate_size": 96,
            "position_embedding_type": "rope",
        },
        None,
    ),
    "olmo2": ("olmo2", {}, None),
    "olmo3": ("olmo3", {"sliding_window": WINDOW, "layer_types": PATTERN}, None),
    "lfm2": (
        "lfm2",
        {"layer_types": ["conv", "full_attention", "conv", "full_attention"], "block_auto_adjust_ff_dim": False},
        "lfm2",
    ),
}
SPECIAL = re.compile(r"<[|｜][^<>{}'\"\s]{1,30}[|｜]>|<(?:start|end)_of_turn>|</?s>")


def build(family: str, folder: Path, seed: int = 5) -> Path:
    """Save a model of the family with a byte-level tokenizer that has the family's template."""
    model_type, changes, template = FAMILIES[family]
    torch.manual_seed(seed)
    model = _from_config(model_type, SMALL | changes)
    for parameter in model.parameters():  # biases and norms start at 0 or 1, where a mistake would not show
        if parameter.dim() == 1:
            torch.nn.init.normal_(parameter, 1.0, 0.2)
    model.save_pretrained(folder)
    _tokenizer(template).save_pretrained(folder)
    return folder


def _from_config(model_type: str, text: dict[str, Any]) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

    if model_type not in ("gemma3", "qwen3_5"):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **text))
    vision: dict[str, Any] = VISION | {"num_hidden_layers": 1}
    if model_type == "qwen3_5":
        vision = {"depth": 1, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "out_hidden_size": 64}
    tied = {"tie_word_embeddings": True}
    config = AutoConfig.for_model(model_type, text_config=text, vision_config=vision, **tied)
    return AutoModelForImageTextToText.from_config(config)


def _tokenizer(template: str | None) -> Any:
    tokenizer = tiny.tokenizer()
    if template:
        text = (Path(trl.__file__).parent / "chat_templates" / f"{template}.jinja").read_text()
        tokens = sorted(set(SPECIAL.findall(text)) - {"<|endoftext|>", "<|im_start|>", "<|im_end|>"})
        tokenizer.add_special_tokens({"additional_special_tokens": tokens})
        tokenizer.chat_template = text
    return tokenizer
