"""What differs between model families, as one record; each family's file fills it in."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

# published as a model with a vision tower: the text model's keys start with `language_model.` or
# `model.language_model.`, depending on the version of transformers that saved them
VISION_TEXT_KEYS = (
    (r"^language_model\.", ""),
    (r"^model\.language_model\.", "model."),
    (r"^lm_head\.", "lm_head."),
)
VISION_FULL_NAMES = ("model.layers.", "model.language_model.layers.")
# pixtral, Mistral3's vision tower, names its projections `attention.` and `feed_forward.`, so this never matches it.
LLAMA_PROJECTIONS = r"(?:.*\.)?layers\.\d+\.(?:self_attn|mlp)\.(?:q|k|v|o|gate|up|down)_proj"


@dataclass(frozen=True)
class VisionTower:
    """How a vision tower is exported.

    - `projector`: the module and the class in transformers that map the tower's outputs to the text model's width.
    - `processor`, `image_processor`: the classes of Transformers.js that prepare a chat and an image.
    - `image_tokens`: the tokens around an image, as processor_config.json names them.
    """

    projector: tuple[str, str]
    processor: str
    image_processor: str
    image_tokens: dict[str, str]


@dataclass(frozen=True)
class GgufFormat:
    """How llama.cpp stores a family.

    - `name`: `general.architecture` in the file.
    - `interleaves_rope`: whether llama.cpp rotates neighboring channels, where transformers rotates the two halves of
      a head; the rows of q and k are then permuted.
    - `norm_offset`: what is added to the weights of norms.
    - `has_windows`: whether llama.cpp knows the family's sliding windows; otherwise a file allows no longer context.
    - `keys`: given the text config, the family's entries in the metadata beyond those that all have.
    - `find_limit`: given the text config, why llama.cpp cannot run this model of the family; empty if it can.
    """

    name: str
    interleaves_rope: bool = False
    norm_offset: float = 0.0
    has_windows: bool = False
    keys: Callable[[Any], dict[str, Any]] = lambda config: {}
    find_limit: Callable[[Any], str] = lambda config: ""


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
      alone reads them (https://arxiv.org/abs/2211.10438); None where no single module can be divided.
    - `final_norm`: the norm after the last block, in the decoder.
    - `embedding_scale`: given the text config, the factor by which the embedding module multiplies its rows.
    - `layer_lists`: lists in the config with one entry per block; blocks with different entries compute differently.
    - `is_recurrent`: whether blocks carry a state from token to token. In training, the conversations of a packed row
      then run one at a time, because the state would pass from one to the next.
    - `transformers_js_class`: the class of Transformers.js that runs an export of the full model.
    - `transformers_js_config`: given config.json of the text model, the same as Transformers.js reads it.
    - `vision`: how an export runs the vision tower (the `multimodal` layout); None if it exports the text model alone.
    - `in_optimum`: whether optimum-onnx 0.1 with transformers 4.57 knows the model type.
    - `gguf`: how llama.cpp stores it; None if export-gguf does not support it, for the reason `no_gguf`.
    - `no_engine`, `no_export`: why the fast engine and export-onnx do not support this architecture; empty if they do.
    - `find_limit`: given the text config, why phoque does not support this model of the family; empty if it does.
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
    smooth_sources: tuple[str | None, ...] = (
        "input_layernorm",
        "self_attn.v_proj",
        "post_attention_layernorm",
        "mlp.up_proj",
    )
    final_norm: str = "norm"
    layer_lists: tuple[str, ...] = ("layer_types",)
    is_recurrent: bool = False
    vision: VisionTower | None = None
    in_optimum: bool = False
    gguf: GgufFormat | None = None
    no_gguf: str = ""
    no_engine: str = ""
    no_export: str = ""
    find_limit: Callable[[Any], str] = lambda config: ""
    embedding_scale: Callable[[Any], float] = lambda config: 1.0
    transformers_js_config: Callable[[dict[str, Any]], dict[str, Any]] = lambda config: config

    def text_key(self, key: str) -> str | None:
        """The text-only model's name of a checkpoint's tensor, or None if the text model does not have it."""
        for pattern, replacement in self.text_keys:
            if re.match(pattern, key):
                return re.sub(pattern, replacement, key, count=1)
        return None
