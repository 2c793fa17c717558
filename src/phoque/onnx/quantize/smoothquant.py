"""Activations that round well: no channel much larger than the others (SmoothQuant, Xiao et al. 2023, 2211.10438)."""

from itertools import accumulate
from typing import Any

import torch

from phoque.onnx.accuracy import Ids
from phoque.onnx.component import Factors, Weights, multiplied
from phoque.onnx.quantize.linear_groups import entering_products, groups_of

MAKERS = (  # of what each group reads: what is made smaller there, the group's weights make larger again
    "input_layernorm",
    "self_attn.v_proj",
    "post_attention_layernorm",
    "mlp.up_proj",
)
SMOOTHING = 0.6  # share of the difference between channels that goes from the activations to the weights
SMOOTHED_TOKENS = 2000
LARGEST = 64.0  # factor of a channel, and smallest its inverse: no half-precision number gets out of range


@torch.no_grad()
def smoothed(weights: Weights, model: Any, chats: Ids) -> Weights:
    """The same model, of whose activations no channel is much larger than the others; `model` is changed likewise.

    MatMulNBits rounds activations to 8 bits in the blocks of its weights, so that one large channel costs its block.
    """
    few, config = _first(chats, SMOOTHED_TOKENS), model.config
    factors: Factors = {}
    seen = _sizes(model, [group[0] for group in groups_of(model)], few)
    for group, maker in zip(groups_of(model), MAKERS * config.num_hidden_layers, strict=True):
        reads = [model.get_submodule(name).weight.float() for name in group]
        made = f"{group[0].rpartition('.')[0].rpartition('.')[0]}.{maker}"
        size, weight = seen[group[0]].clamp(min=1e-5), torch.stack([w.abs().amax(0) for w in reads]).amax(0)
        factor = size**SMOOTHING / weight.clamp(min=1e-5) ** (1 - SMOOTHING)
        spread = 1
        if maker == "self_attn.v_proj":  # several query heads read what one head of values makes
            heads = config.num_key_value_heads
            spread = len(factor) // len(model.get_submodule(made).weight)
            factor = factor.view(heads, spread, -1).amax(1).flatten()
        factor = (factor / factor.log().mean().exp()).clamp(1 / LARGEST, LARGEST)
        for name, _ in model.get_submodule(made).named_parameters():
            factors.setdefault(f"{made}.{name}", []).append((0, 1 / factor))
        if spread > 1:
            factor = factor.view(heads, 1, -1).expand(-1, spread, -1).flatten()
        for name in group:
            factors.setdefault(f"{name}.weight", []).append((1, factor))
    for name, found in factors.items():
        held = model.get_parameter(name).data
        held.copy_(multiplied(held.float(), found))
    return weights.scaled({name: [(at, factor.cpu()) for at, factor in found] for name, found in factors.items()})


def _first(chats: Ids, tokens: int) -> Ids:
    """As many of the chats as have so many tokens."""
    so_far = accumulate(ids.shape[1] for ids in chats)
    return [ids for ids, total in zip(chats, so_far, strict=True) if total - ids.shape[1] < tokens]


def _sizes(model: Any, names: list[str], chats: Ids) -> dict[str, torch.Tensor]:
    """Root mean square of every channel that enters these products."""
    sums: dict[str, torch.Tensor] = {}

    def gather(name: str, x: torch.Tensor) -> None:
        square = x.flatten(0, -2).float().square().sum(0)
        sums[name] = sums[name] + square if name in sums else square

    with entering_products(model, names, gather):
        for ids in chats:
            model(input_ids=ids.to(model.device))
    return {name: (total / sum(ids.shape[1] for ids in chats)).sqrt() for name, total in sums.items()}
