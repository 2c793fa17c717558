"""What differs between model families, as one record; each family's file fills it in."""

import re
from dataclasses import dataclass

# pixtral, Mistral3's vision tower, names its projections `attention.` and `feed_forward.`, so this never matches it.
LLAMA_PROJECTIONS = r"(?:.*\.)?layers\.\d+\.(?:self_attn|mlp)\.(?:q|k|v|o|gate|up|down)_proj"


@dataclass(frozen=True)
class Architecture:
    """How one family is loaded for text, adapted, quantized and exported.

    - `model_type`: the value in a config that this record is for.
    - `lora_targets`: a regular expression for whole module names, the linear layers that LoRA adapts.
    - `text_keys`: (pattern, replacement) pairs from a checkpoint's key to the text-only model's; a key that matches
      none is not part of the text model.
    - `full_names`: (text, full): what the text model's layers are called there and in the full model.
    - `auto_class`: the class of transformers that loads the full model.
    - `linear_groups`: linear layers of a decoder block, together where they read the same input: these run as one
      matrix product in training and share their bits in an export.
    - `smooth_sources`: for each linear group the module whose output channels SmoothQuant may divide, because the group
      alone reads them (https://arxiv.org/abs/2211.10438).
    - `transformers_js_class`: the class of Transformers.js that runs an export of the full model.
    - `vision_layout`: whether an export may have the vision tower (the `multimodal` layout).
    - `in_optimum`: whether optimum-onnx 0.1 with transformers 4.57 knows the model type.
    """

    model_type: str
    transformers_js_class: str
    lora_targets: str = LLAMA_PROJECTIONS
    text_keys: tuple[tuple[str, str], ...] = (("^", ""),)
    full_names: tuple[str, str] = ("", "")
    auto_class: str = "AutoModelForCausalLM"
    linear_groups: tuple[tuple[str, ...], ...] = (
        ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        ("self_attn.o_proj",),
        ("mlp.gate_proj", "mlp.up_proj"),
        ("mlp.down_proj",),
    )
    smooth_sources: tuple[str, ...] = (
        "input_layernorm",
        "self_attn.v_proj",
        "post_attention_layernorm",
        "mlp.up_proj",
    )
    vision_layout: bool = False
    in_optimum: bool = False

    def text_key(self, key: str) -> str | None:
        """The text-only model's name of a checkpoint's tensor, or None if the text model does not have it."""
        for pattern, replacement in self.text_keys:
            if re.match(pattern, key):
                return re.sub(pattern, replacement, key, count=1)
        return None
