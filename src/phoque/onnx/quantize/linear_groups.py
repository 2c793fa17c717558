"""Linear groups, the linear layers of a decoder layer that read the same activations; hooks on their inputs."""

from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any

import torch

from phoque.models.architectures import architecture_of
from phoque.onnx.quantize.block_format import QuantizedMatrix


def linear_groups(model: Any) -> tuple[tuple[str, ...], ...]:
    """The linear layers of one decoder block; a group reads one input, is fused into one, and has one bit width."""
    return architecture_of(model.config).linear_groups


def linear_groups_of(model: Any) -> list[tuple[str, ...]]:
    """Return the names of the linear layers of a model, grouped by the activations they read, in layer order."""
    return [
        tuple(f"model.layers.{number}.{name}" for name in group)
        for number in range(model.config.num_hidden_layers)
        for group in linear_groups(model)
    ]


@contextmanager
def hook_linear_inputs(
    model: Any, names: list[str], on_input: Callable[[str, torch.Tensor], torch.Tensor | None]
) -> Generator[None]:
    """Inside the `with`, call `on_input(name, activations)` before each of these linear layers runs.

    If it returns a tensor, the linear layer reads that in place of its input.
    """

    def hook(name: str, inputs: Any) -> Any:
        replacement = on_input(name, inputs[0])
        return None if replacement is None else (replacement, *inputs[1:])

    handles = [
        model.get_submodule(name).register_forward_pre_hook(lambda _, inputs, name=name: hook(name, inputs))
        for name in names
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def replace_weight(model: Any, name: str, matrix: QuantizedMatrix) -> None:
    """Replace the weight of a linear layer, in place, by the dequantized matrix."""
    weight = model.get_submodule(name).weight
    weight.data.copy_(matrix.dequantize())
