"""Model families: one file each, and everything that differs between them is in it."""

from typing import TYPE_CHECKING

from phoque.errors import UsageError
from phoque.models.architectures.base import Architecture
from phoque.models.architectures.llama import LLAMA
from phoque.models.architectures.mistral import MINISTRAL, MINISTRAL3, MISTRAL, MISTRAL3
from phoque.models.architectures.qwen import QWEN2, QWEN3

if TYPE_CHECKING:
    from transformers import PretrainedConfig

__all__ = ["ARCHITECTURES", "Architecture", "architecture_of"]

ARCHITECTURES: dict[str, Architecture] = {
    architecture.model_type: architecture
    for architecture in (LLAMA, MISTRAL, MINISTRAL, MINISTRAL3, QWEN2, QWEN3, MISTRAL3)
}


def architecture_of(config: "PretrainedConfig") -> Architecture:
    """The architecture of a model config. Raises UsageError for a model type that phoque does not know."""
    if config.model_type not in ARCHITECTURES:
        raise UsageError(
            what=f"phoque does not support the architecture {config.model_type!r}.",
            why=f"It supports {', '.join(ARCHITECTURES)}.",
            fix="Use a model of one of these, or add a file to models/architectures/.",
        )
    return ARCHITECTURES[config.model_type]
