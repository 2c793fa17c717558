"""SmoothQuant (Xiao et al. 2023, arXiv 2211.10438): move outlier channels from the activations into the weights."""

from itertools import accumulate
from typing import Any

import torch

from phoque.inference.accuracy import Ids
from phoque.models.architectures import architecture_of
from phoque.onnx.component import Factors, Weights, apply_factors
from phoque.onnx.quantize.linear_groups import hook_linear_inputs, linear_groups_of

SMOOTHING = 0.6  # migration strength (alpha): 0 leaves all outliers in the activations, 1 moves them to the weights
CALIBRATION_TOKENS = 2000
MAX_FACTOR = 64.0  # largest factor of a channel, and the inverse of the smallest: fp16 values stay in range


@torch.no_grad()
def smooth_activations(weights: Weights, model: Any, chats: Ids) -> Weights:
    """Return the same model with smoothed activations, in which few channels are outliers; `model` is changed in place.

    The outputs of the model do not change. MatMulNBits rounds activations to 8 bits with one scale per group of
    channels, so that an outlier channel makes the rest of its group inaccurate. `chats` are token ids [1, length].
    """
    sample, config = _take_tokens(chats, CALIBRATION_TOKENS), model.config
    factors: Factors = {}
    channel_rms = _measure_channel_rms(model, [group[0] for group in linear_groups_of(model)], sample)
    for group, source in zip(
        linear_groups_of(model), architecture_of(config).smooth_sources * config.num_hidden_layers, strict=True
    ):
        if source is None:
            continue
        group_weights = [model.get_submodule(name).weight.float() for name in group]
        source_name = f"{group[0].rpartition('.')[0].rpartition('.')[0]}.{source}"
        rms, weight_max = (
            channel_rms[group[0]].clamp(min=1e-5),
            torch.stack([w.abs().amax(0) for w in group_weights]).amax(0),
        )
        factor = rms**SMOOTHING / weight_max.clamp(min=1e-5) ** (1 - SMOOTHING)
        repeats = 1
        if source == "self_attn.v_proj":  # with grouped-query attention several query heads share a value head
            heads = config.num_key_value_heads
            repeats = len(factor) // len(model.get_submodule(source_name).weight)
            factor = factor.view(heads, repeats, -1).amax(1).flatten()
        factor = (factor / factor.log().mean().exp()).clamp(1 / MAX_FACTOR, MAX_FACTOR)
        for name, _ in model.get_submodule(source_name).named_parameters():
            factors.setdefault(f"{source_name}.{name}", []).append((0, 1 / factor))
        if repeats > 1:
            factor = factor.view(heads, 1, -1).expand(-1, repeats, -1).flatten()
        for name in group:
            factors.setdefault(f"{name}.weight", []).append((1, factor))
    for name, channel_factors in factors.items():
        parameter = model.get_parameter(name).data
        parameter.copy_(apply_factors(parameter.float(), channel_factors))
    return weights.with_factors(
        {
            name: [(dimension, factor.cpu()) for dimension, factor in channel_factors]
            for name, channel_factors in factors.items()
        }
    )


def _take_tokens(chats: Ids, tokens: int) -> Ids:
    """Return the first conversations that together have at least `tokens` tokens, or all of them."""
    cumulative = accumulate(ids.shape[1] for ids in chats)
    return [ids for ids, total in zip(chats, cumulative, strict=True) if total - ids.shape[1] < tokens]


def _measure_channel_rms(model: Any, names: list[str], chats: Ids) -> dict[str, torch.Tensor]:
    """Return the root mean square of every input channel of these linear layers, over all tokens."""
    square_sums: dict[str, torch.Tensor] = {}

    def add_squares(name: str, x: torch.Tensor) -> None:
        square = x.flatten(0, -2).float().square().sum(0)
        square_sums[name] = square_sums[name] + square if name in square_sums else square

    with hook_linear_inputs(model, names, add_squares):
        for ids in chats:
            model(input_ids=ids.to(model.device))
    return {name: (total / sum(ids.shape[1] for ids in chats)).sqrt() for name, total in square_sums.items()}
