"""Phi 3, 3.5 and 4 mini: q, k and v are one linear layer, gate and up another."""

from typing import Any

from phoque.models.architectures.base import Architecture, GgufFormat


def _gguf_keys(config: Any) -> dict[str, Any]:
    """llama.cpp does not use Phi's windows; a window of 0 says that there is none."""
    original = getattr(config, "original_max_position_embeddings", None) or config.max_position_embeddings
    return {"attention.sliding_window": 0, "rope.scaling.original_context_length": original}


PHI3 = Architecture(
    "phi3",
    "Phi3ForCausalLM",
    gguf=GgufFormat("phi3", keys=_gguf_keys),
    lora_targets=r"(?:.*\.)?layers\.\d+\.(?:self_attn|mlp)\.(?:qkv|o|gate_up|down)_proj",
    linear_groups=(("self_attn.qkv_proj",), ("self_attn.o_proj",), ("mlp.gate_up_proj",), ("mlp.down_proj",)),
    # v and up are parts of fused layers, so their output channels cannot be divided alone
    smooth_sources=("input_layernorm", None, "post_attention_layernorm", None),
)
