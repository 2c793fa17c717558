"""Qwen 2, 2.5 and 3, dense, and the text part of Qwen 3.5, which has gated delta rules in most blocks."""

from phoque.models.architectures.base import VISION_FULL_NAMES, VISION_TEXT_KEYS, Architecture, GgufFormat

NO_ENGINE = "its linear attention carries a state across the conversations of a packed row"
NO_GGUF = "phoque does not write the states of its linear attention to a GGUF file."
NO_EXPORT = "Its linear attention keeps a state that phoque's exporter does not trace."
DELTA_TARGETS = (
    r"(?:.*\.)?layers\.\d+\."
    r"(?:(?:self_attn|mlp)\.(?:q|k|v|o|gate|up|down)_proj|linear_attn\.(?:in_proj_qkv|in_proj_z|out_proj))"
)

QWEN2 = Architecture("qwen2", "Qwen2ForCausalLM", in_optimum=True, gguf=GgufFormat("qwen2"))
QWEN3 = Architecture("qwen3", "Qwen3ForCausalLM", in_optimum=True, gguf=GgufFormat("qwen3"))
QWEN3_5_TEXT = Architecture(
    "qwen3_5_text",
    "Qwen3_5ForCausalLM",
    lora_targets=DELTA_TARGETS,
    is_recurrent=True,
    no_gguf=NO_GGUF,
    no_engine=NO_ENGINE,
    no_export=NO_EXPORT,
)
QWEN3_5 = Architecture(
    "qwen3_5",
    "Qwen3_5ForCausalLM",
    lora_targets=DELTA_TARGETS,
    text_keys=VISION_TEXT_KEYS,
    full_names=VISION_FULL_NAMES,
    auto_class="AutoModelForImageTextToText",
    is_recurrent=True,
    no_gguf=NO_GGUF,
    no_engine=NO_ENGINE,
    no_export=NO_EXPORT,
)
