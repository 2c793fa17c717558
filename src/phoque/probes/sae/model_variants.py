"""The models that are compared: the base, the updated model, a control, and the base in another precision."""

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import torch

from phoque.errors import UsageError
from phoque.inference.residual_stream import get_blocks, unwrap_model


class ModelVariants:
    """One base model with adapters (`tuned`, `control`, `control-2` ...), or a base and an updated model in memory."""

    def __init__(self, base: Any, updated: Any = None) -> None:
        self.model, self.updated = base, updated

    @contextmanager
    def activate(self, name: str) -> Generator[Any]:
        """Yield the model of one variant: base, tuned, control, or dtype (the base in another precision)."""
        if name == "tuned" and self.updated is not None:
            yield self.updated
        elif name == "tuned" or name.startswith("control"):
            self.model.set_adapter(name)
            yield self.model
        else:
            with _without_adapters(self.model), _in_other_precision(self.model, name == "dtype"):
                yield self.model


@contextmanager
def _without_adapters(model: Any) -> Generator[None]:
    if hasattr(model, "disable_adapter"):
        with model.disable_adapter():
            yield
    else:
        yield


@contextmanager
def _in_other_precision(model: Any, enabled: bool) -> Generator[None]:
    """Compute with the same weights in another precision: bf16 if the model is fp32, else fp32."""
    if not enabled:
        yield
        return
    parameters = [
        p for n, p in model.named_parameters() if p.is_floating_point() and "lora_" not in n and _is_unquantized(p)
    ]
    quantized_layers = [m for m in model.modules() if type(m).__name__ == "Linear4bit"]
    original, target = unwrap_model(model).dtype, torch.float32
    if original == torch.float32:
        target = torch.bfloat16
    copies = [p.data for p in parameters] if target == torch.bfloat16 else []  # a cast up to fp32 loses nothing
    for p in parameters:
        p.data = p.data.to(target)
    for module in quantized_layers:
        module.compute_dtype = target
    try:
        yield
    finally:
        for n, p in enumerate(parameters):
            p.data = copies[n] if copies else p.data.to(original)
        for module in quantized_layers:
            module.compute_dtype = original


def _is_unquantized(parameter: Any) -> bool:
    return type(parameter).__name__ != "Params4bit"


def check_compatible(base: Any, updated: Any, name: str) -> None:
    """Check that both models have the same shape; without it one dictionary cannot read both.

    Raises UsageError if the number of blocks, the hidden size or the vocabulary size differs.
    """
    for what, base_value, updated_value in (
        ("decoder blocks", len(get_blocks(base)), len(get_blocks(updated))),
        (
            "dimensions in its residual stream",
            unwrap_model(base).config.hidden_size,
            unwrap_model(updated).config.hidden_size,
        ),
        ("tokens in its vocabulary", unwrap_model(base).config.vocab_size, unwrap_model(updated).config.vocab_size),
    ):
        if base_value != updated_value:
            raise UsageError(
                what=f"{name} is not a fine-tune of the base model.",
                why=f"It has {updated_value} {what}; the base model has {base_value}.",
                fix="Compare a model with the base model that it was fine-tuned from.",
            )
