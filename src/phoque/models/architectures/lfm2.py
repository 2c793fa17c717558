"""LFM2: short convolutions in most blocks, attention in the others."""

from phoque.models.architectures.base import Architecture

LFM2 = Architecture(
    "lfm2",
    "Lfm2ForCausalLM",
    lora_targets=(
        r"(?:.*\.)?layers\.\d+\."
        r"(?:self_attn\.(?:[qkv]_proj|out_proj)|conv\.(?:in|out)_proj|feed_forward\.w[123])"
    ),
    final_norm="embedding_norm",
    is_recurrent=True,
    no_gguf="phoque does not write its convolutions to a GGUF file.",
    no_engine="its convolutions would read across the conversations of a packed row",
    no_export="Its convolutions keep a state that phoque's exporter does not trace.",
)
