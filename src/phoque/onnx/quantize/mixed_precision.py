"""Mixed precision: linear layers in 4 bits, those that 4 bits hurt most in 8, until KL and agreement are in limits."""

from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any

import torch

from phoque.inference.accuracy import Ids
from phoque.inference.likelihood import sum_kl
from phoque.onnx.component import Weights
from phoque.onnx.quantize.block_format import Quantizer, round_to_nearest, split_groups
from phoque.onnx.quantize.gptq import quantize_model, search_scales
from phoque.onnx.quantize.linear_groups import hook_linear_inputs, linear_groups_of, replace_weight

COST_CHATS = 8  # conversations that the cost of 4 bits is estimated on
RAISED_SHARE = 0.1  # share of the linear groups that is raised to 8 bits at a time


def quantize_mixed_precision(
    weights: Weights, model: Any, chats: Ids, limits: tuple[float, float], show: Callable[[int, str], None]
) -> tuple[Quantizer, dict[str, Any]]:
    """Quantize linear layers to 4 bits with GPTQ, and raise them to 8 until the limits are met.

    Embeddings and head get 8 bits. `model` has the unquantized `weights`, and is overwritten. `limits` are the largest
    KL(unquantized || quantized), in nats per token, and the least share of tokens for which both predict the same most
    likely next token. `chats` are token ids [1, length]: every fourth conversation measures these, the others
    calibrate. Returns the quantizer and {raised, groups}, the numbers of linear groups in 8 bits and in all.
    """
    held_out, calibration = chats[::4], [ids for number, ids in enumerate(chats) if number % 4] or chats
    expected = [_compute_log_probs(model, ids) for ids in held_out]
    costs = _estimate_costs(model, held_out[:COST_CHATS])
    matrices = quantize_model(model, calibration, show)
    by_cost = sorted(costs, key=lambda group: -costs[group])
    raised: list[tuple[str, ...]] = []
    while True:
        with _round_activations(model):
            kl, agreement = _measure_accuracy(model, held_out, expected)
        show(
            model.config.num_hidden_layers, f"KL {kl:.3f} nats, {len(raised)} of {len(by_cost)} linear groups in 8 bits"
        )
        if (kl <= limits[0] and agreement >= limits[1]) or len(raised) == len(by_cost):
            break
        batch = by_cost[len(raised) : len(raised) + max(1, round(RAISED_SHARE * len(by_cost)))]
        for name in (name for group in batch for name in group):
            matrices[name] = round_to_nearest(weights.read(f"{name}.weight"))
            replace_weight(model, name, matrices[name])
        raised += batch
    by_parameter = {f"{name}.weight": matrix for name, matrix in matrices.items()}
    quantizer = Quantizer(
        lambda name: by_parameter[name] if name in by_parameter else round_to_nearest(weights.read(name)),
        lambda name: (
            (by_parameter[name].bits, by_parameter[name].zeros is not None) if name in by_parameter else (8, False)
        ),
    )
    return quantizer, {"raised": len(raised), "groups": len(by_cost)}


@contextmanager
def _round_activations(model: Any) -> Generator[None]:
    """Inside the `with`, round the inputs of all linear layers to 8 bits per group, as ONNX Runtime's kernels do."""

    def round_to_8_bits(name: str, x: torch.Tensor) -> torch.Tensor:
        groups = split_groups(x)
        scale = (groups.abs().amax(-1, keepdim=True) / 127).clamp(min=1e-12)
        return ((groups / scale).round() * scale).flatten(-2)

    with hook_linear_inputs(
        model, [*(name for group in linear_groups_of(model) for name in group), "lm_head"], round_to_8_bits
    ):
        yield


@torch.no_grad()
def _compute_log_probs(model: Any, ids: torch.Tensor) -> torch.Tensor:
    return model(input_ids=ids.to(model.device)).logits[0].float().log_softmax(-1).cpu()


def _measure_accuracy(model: Any, chats: Ids, expected: Ids) -> tuple[float, float]:
    """Return KL(expected || model) in nats per token, and the share of tokens with the same most likely next token.

    `expected` has log-probabilities [length, vocabulary] for each conversation.
    """
    kl, agreed, tokens = 0.0, 0, 0
    for ids, target in zip(chats, expected, strict=True):
        log_probs = _compute_log_probs(model, ids)
        kl += sum_kl(target, log_probs)
        agreed += int((target.argmax(-1) == log_probs.argmax(-1)).sum())
        tokens += len(target)
    return kl / tokens, agreed / tokens


def _estimate_costs(model: Any, chats: Ids) -> dict[tuple[str, ...], float]:
    """Estimate for each linear group what 4 bits in it alone would cost, to second order, per weight.

    The cost is half of (gradient . error)^2, summed over tokens and divided by the number of weights. The gradient is
    that of the log-probability of a token sampled from the model itself (Fisher information).
    """
    groups = linear_groups_of(model)
    activations: dict[str, Any] = {}
    costs = dict.fromkeys(groups, 0.0)
    errors = {
        name: search_scales(model.get_submodule(name).weight.float(), None)[0] for group in groups for name in group
    }
    hooks = []
    for name in errors:

        def record(module: Any, inputs: Any, output: torch.Tensor, name: str = name) -> None:
            output.retain_grad()
            activations[name] = inputs[0].detach(), output

        hooks.append(model.get_submodule(name).register_forward_hook(record))
    generator = torch.Generator(model.device).manual_seed(0)
    for ids in chats:
        embeds = model.get_input_embeddings()(ids.to(model.device)).detach().requires_grad_()
        log_probs = model(inputs_embeds=embeds).logits[0].float().log_softmax(-1)
        sampled = torch.multinomial(log_probs.detach().exp(), 1, generator=generator)
        log_probs.gather(1, sampled).sum().backward()
        for group in groups:
            for name in group:
                hidden, output = activations[name]
                output_error = hidden[0].float() @ errors[name].T
                costs[group] += 0.5 * (output.grad[0].float() * output_error).sum(-1).square().sum().item()
        activations.clear()
    for hook in hooks:
        hook.remove()
    return {group: cost / sum(errors[name].numel() for name in group) for group, cost in costs.items()}
