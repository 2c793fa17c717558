"""Model families: one file each, and everything that differs between them is in it."""

from typing import TYPE_CHECKING

from phoque.errors import UsageError
from phoque.models.architectures.base import Architecture
from phoque.models.architectures.gemma import GEMMA3, GEMMA3_TEXT
from phoque.models.architectures.granite import GRANITE, GRANITE_HYBRID
from phoque.models.architectures.lfm2 import LFM2
from phoque.models.architectures.llama import LLAMA
from phoque.models.architectures.mistral import MINISTRAL, MINISTRAL3, MISTRAL, MISTRAL3
from phoque.models.architectures.olmo import OLMO2, OLMO3
from phoque.models.architectures.phi import PHI3
from phoque.models.architectures.qwen import QWEN2, QWEN3, QWEN3_5, QWEN3_5_TEXT
from phoque.models.architectures.smollm3 import SMOLLM3

if TYPE_CHECKING:
    from transformers import PretrainedConfig

__all__ = ["ARCHITECTURES", "Architecture", "architecture_of"]

ARCHITECTURES: dict[str, Architecture] = {
    architecture.model_type: architecture
    for architecture in (
        LLAMA,
        MISTRAL,
        MINISTRAL,
        MINISTRAL3,
        MISTRAL3,
        QWEN2,
        QWEN3,
        QWEN3_5_TEXT,
        QWEN3_5,
        GEMMA3_TEXT,
        GEMMA3,
        SMOLLM3,
        PHI3,
        GRANITE,
        GRANITE_HYBRID,
        OLMO2,
        OLMO3,
        LFM2,
    )
}


def architecture_of(config: "PretrainedConfig") -> Architecture:
    """The architecture of a model config. Raises UsageError for a model that phoque does not support."""
    architecture = ARCHITECTURES.get(config.model_type)
    if architecture is None:
        raise UsageError(
            what=f"phoque does not support the architecture {config.model_type!r}.",
            why=f"It supports {', '.join(ARCHITECTURES)}.",
            fix="Use a model of one of these architectures.",
        )
    if limit := architecture.find_limit(config.get_text_config()):
        raise UsageError(
            what=f"phoque does not support this model of the architecture {config.model_type!r}.",
            why=f"{limit[0].upper()}{limit[1:]}.",
            fix="Use another model of the family.",
        )
    return architecture
