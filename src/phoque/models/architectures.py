"""All that differs between architectures. A new family is one entry here."""

import re
from dataclasses import dataclass
from typing import Any

from phoque.errors import PhoqueError

# pixtral, Mistral3's vision tower, names its projections `attention.` and `feed_forward.`, so this never reaches it.
LLAMA_PROJECTIONS = r"(?:.*\.)?layers\.\d+\.(?:self_attn|mlp)\.(?:q|k|v|o|gate|up|down)_proj"


@dataclass(frozen=True)
class Architecture:
    """How one architecture is loaded for text, and where its adapter goes.

    `lora_targets` is a regex that is matched against whole module names: the seven projections of every layer.
    `text_keys` are (pattern, replacement) pairs that turn a checkpoint's key into the text-only model's; a key that
    none matches is not of the text model. `full_names` is what the text model's layers are called in the full one.
    `auto_class` is the class of transformers that loads the full model.
    """

    lora_targets: str = LLAMA_PROJECTIONS
    text_keys: tuple[tuple[str, str], ...] = (("^", ""),)
    full_names: tuple[str, str] = ("", "")
    auto_class: str = "AutoModelForCausalLM"

    def text_key(self, key: str) -> str | None:
        """The text-only model's name of a checkpoint's tensor, or None if it has none."""
        for pattern, replacement in self.text_keys:
            if re.match(pattern, key):
                return re.sub(pattern, replacement, key, count=1)
        return None


LLAMA_LIKE = Architecture()
MISTRAL3 = Architecture(
    text_keys=(
        (r"^language_model\.", ""),  # as published
        (r"^model\.language_model\.", "model."),  # as transformers 5 may save it
        (r"^lm_head\.", "lm_head."),
    ),
    full_names=("model.layers.", "model.language_model.layers."),
    auto_class="AutoModelForImageTextToText",
)

FAMILIES: dict[str, Architecture] = {
    "llama": LLAMA_LIKE,
    "mistral": LLAMA_LIKE,
    "ministral": LLAMA_LIKE,
    "ministral3": LLAMA_LIKE,
    "qwen2": LLAMA_LIKE,
    "qwen3": LLAMA_LIKE,
    "mistral3": MISTRAL3,
}


def architecture_of(config: Any) -> Architecture:
    """The family of a model config. Raises PhoqueError (2) for an architecture that has no entry."""
    if config.model_type not in FAMILIES:
        raise PhoqueError(
            f"phoque has no entry for the architecture {config.model_type!r}.",
            f"It knows {', '.join(FAMILIES)}.",
            "An entry in models/families.py needs its text weights' names and the regex of its LoRA targets.",
        )
    return FAMILIES[config.model_type]
