"""Phi 3, 3.5 and 4 mini: q, k and v are one linear layer, gate and up another."""

from phoque.models.architectures.base import Architecture

PHI3 = Architecture(
    "phi3",
    "Phi3ForCausalLM",
    lora_targets=r"(?:.*\.)?layers\.\d+\.(?:self_attn|mlp)\.(?:qkv|o|gate_up|down)_proj",
    linear_groups=(("self_attn.qkv_proj",), ("self_attn.o_proj",), ("mlp.gate_up_proj",), ("mlp.down_proj",)),
    # v and up are parts of fused layers, so their output channels cannot be divided alone
    smooth_sources=("input_layernorm", None, "post_attention_layernorm", None),
)
