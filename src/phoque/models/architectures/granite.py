"""Granite 3, and the dense models of Granite 4 (micro): Llama's layout with multipliers."""

from typing import Any

from phoque.models.architectures.base import Architecture, GgufFormat


def _find_limit(config: Any) -> str:
    if config.num_local_experts:
        return f"it has {config.num_local_experts} experts per block, and phoque supports dense models only"
    if "linear_attention" in config.layer_types or "mamba" in config.layer_types:
        return "some of its blocks are Mamba layers, and phoque supports its attention layers only"
    return ""


def _transformers_js_config(config: dict[str, Any]) -> dict[str, Any]:
    """transformers 5 names attention layers `full_attention`, and writes a limit of Mamba layers that is no JSON."""
    kept = {name: value for name, value in config.items() if name != "time_step_limit"}
    return kept | {"layer_types": ["attention"] * config["num_hidden_layers"]}


def _gguf_keys(config: Any) -> dict[str, Any]:
    return {
        "attention.scale": float(config.attention_multiplier),
        "embedding_scale": float(config.embedding_multiplier),
        "residual_scale": float(config.residual_multiplier),
        "logit_scale": float(config.logits_scaling),
    }


GRANITE = Architecture(
    "granite", "GraniteForCausalLM", gguf=GgufFormat("granite", interleaves_rope=True, keys=_gguf_keys)
)
GRANITE_HYBRID = Architecture(
    "granitemoehybrid",
    "GraniteMoeHybridForCausalLM",
    no_gguf="phoque does not split its fused projections into the ones that llama.cpp reads.",
    lora_targets=r"(?:.*\.)?layers\.\d+\.(?:self_attn\.[qkvo]_proj|shared_mlp\.(?:input|output)_linear)",
    linear_groups=(
        ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        ("self_attn.o_proj",),
        ("shared_mlp.input_linear",),
        ("shared_mlp.output_linear",),
    ),
    smooth_sources=("input_layernorm", "self_attn.v_proj", "post_attention_layernorm", None),
    find_limit=_find_limit,
    transformers_js_config=_transformers_js_config,
)
