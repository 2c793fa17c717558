"""The matrix products of a model's layers: which of them read the same activations, and what enters them."""

from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any

import torch

from phoque.onnx.quantize.block_format import Blocks

GROUPS = (  # products that read the same activations; what lies in one group becomes one product, so shares its bits
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.o_proj",),
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
)


def groups_of(model: Any) -> list[tuple[str, ...]]:
    """The names of all products, those together that read the same activations, in the order of their layers."""
    return [
        tuple(f"model.layers.{number}.{name}" for name in group)
        for number in range(model.config.num_hidden_layers)
        for group in GROUPS
    ]


@contextmanager
def entering_products(
    model: Any, names: list[str], seen: Callable[[str, torch.Tensor], torch.Tensor | None]
) -> Generator[None]:
    """Call `seen` with what enters each of these products while the block runs, and give them what it returns."""

    def hook(name: str, inputs: Any) -> Any:
        other = seen(name, inputs[0])
        return None if other is None else (other, *inputs[1:])

    hooks = [
        model.get_submodule(name).register_forward_pre_hook(lambda _, inputs, name=name: hook(name, inputs))
        for name in names
    ]
    try:
        yield
    finally:
        for one in hooks:
            one.remove()


def hold(model: Any, name: str, blocks: Blocks) -> None:
    """Put quantised blocks, in full, where the product's weight was."""
    weight = model.get_submodule(name).weight
    weight.data.copy_(blocks.dequantised())
