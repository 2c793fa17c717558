"""All that differs between architectures. A new family is one entry here."""

from dataclasses import dataclass, field
from typing import Any

from phoque.errors import PhoqueError

# pixtral, Mistral3's vision tower, names its projections `attention.` and `feed_forward.`, so this never reaches it.
LLAMA_PROJECTIONS = r"(?:.*\.)?layers\.\d+\.(?:self_attn|mlp)\.(?:q|k|v|o|gate|up|down)_proj"


@dataclass(frozen=True)
class Family:
    """How one architecture is loaded for text, and where its adapter goes.

    `lora_targets` is a regex that peft matches against whole module names: the seven projections of every layer.
    `text_prefix` is what the checkpoint puts before the text model's keys, and `full_names` renames the text-only
    model's modules to the full model's.
    """

    lora_targets: str = LLAMA_PROJECTIONS
    text_prefix: str = ""
    full_names: dict[str, str] = field(default_factory=dict)


LLAMA_LIKE = Family()

FAMILIES: dict[str, Family] = {
    "llama": LLAMA_LIKE,
    "mistral": LLAMA_LIKE,
    "ministral": LLAMA_LIKE,
    "ministral3": LLAMA_LIKE,
    "qwen2": LLAMA_LIKE,
    "qwen3": LLAMA_LIKE,
    "mistral3": Family(text_prefix="language_model.", full_names={"model.layers.": "model.language_model.layers."}),
}


def family_of(config: Any) -> Family:
    """The family of a model config. Raises PhoqueError (2) for an architecture that has no entry."""
    if config.model_type not in FAMILIES:
        raise PhoqueError(
            f"phoque has no entry for the architecture {config.model_type!r}.",
            f"It knows {', '.join(FAMILIES)}.",
            "An entry in models/families.py needs the regex of its LoRA targets and the prefix of its text weights.",
        )
    return FAMILIES[config.model_type]
