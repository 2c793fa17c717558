"""The strength of a LoRA adapter: 0 is the base model, 1 the adapter as it was trained; for a batch or row by row."""

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from phoque.errors import RunError


def find_lora_layers(model: Any, name: str) -> list[Any]:
    """The layers of a model that have this adapter."""
    from peft.tuners.lora import LoraLayer

    return [module for module in model.modules() if isinstance(module, LoraLayer) and name in module.scaling]


@contextmanager
def scale_adapter(model: Any, name: str, scale: float) -> Generator[None]:
    """Multiply an adapter's effect by `scale` within the context."""
    with _replace_scaling(model, name, lambda original: original * scale):
        yield


def is_scaled_by_row(model: Any, name: str) -> bool:
    """Whether the effect of this adapter is a plain product, which `RowScales` can change row by row; DoRA's is not."""
    return not any(name in layer.lora_variant for layer in find_lora_layers(model, name))


class RowScales:
    """Multiplies the active adapter's effect by a factor for each row of a batch; finished rows can be dropped."""

    def __init__(self, factors: Sequence[float], on: torch.device) -> None:
        self.factors = torch.tensor(list(factors), device=on)[:, None, None]

    def select_rows(self, rows: torch.Tensor) -> None:
        """Keep only these rows of the batch."""
        self.factors = self.factors[rows]

    @contextmanager
    def activate(self, model: Any) -> Generator[None]:
        """Scale the adapter of `model` inside the `with` statement."""
        with _replace_scaling(model, model.active_adapter, lambda original: _RowFactor(self, original)):
            yield


class _RowFactor:
    """A LoRA scale per row of an adapter's output (rows, tokens, out), which PEFT accepts in place of its number."""

    def __init__(self, scales: RowScales, original: float) -> None:
        self._scales, self._original = scales, original

    def __rmul__(self, output: torch.Tensor) -> torch.Tensor:
        factors = self._scales.factors
        if output.dim() != 3 or len(output) != len(factors):
            raise RunError(
                what="The doses of this adapter cannot be measured.",
                why=f"One of its layers gets {tuple(output.shape)}, not (rows, tokens, features).",
                fix="Run the command with --doses ''.",
            )
        return (output * (self._original * factors)).to(output.dtype)


@contextmanager
def _replace_scaling(model: Any, name: str, change: Any) -> Generator[None]:
    layers = find_lora_layers(model, name)
    originals = [layer.scaling[name] for layer in layers]
    for layer, original in zip(layers, originals, strict=True):
        layer.scaling[name] = change(original)
    try:
        yield
    finally:
        for layer, original in zip(layers, originals, strict=True):
            layer.scaling[name] = original
