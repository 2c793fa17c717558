"""As few bits as keep what the model says: 4, and 8 where 4 cost the most, by what it computes on real chats."""

from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any

import torch

from phoque.onnx.accuracy import Ids
from phoque.onnx.component import Weights
from phoque.onnx.quantize.block_format import Quantised, in_blocks, rounded
from phoque.onnx.quantize.gptq import fitted, search
from phoque.onnx.quantize.linear_groups import entering_products, groups_of, hold

COSTED = 8  # chats that tell what 4 bits cost where
RAISED = 0.1  # share of the groups that go to 8 bits at a time


def four_bits(
    weights: Weights, model: Any, chats: Ids, limits: tuple[float, float], show: Callable[[int, str], None]
) -> tuple[Quantised, dict[str, Any]]:
    """Every product in 4 bits, embeddings and head in 8, and as many products in 8 as the limits need.

    `model` holds the weights in full, and is overwritten. `limits` are the largest KL, the mean over tokens in nats of
    the quantised model to the whole one, and the smallest share of tokens with the same likeliest successor. `chats`
    are token ids [1, length]: every fourth measures, the others calibrate. Returns also {raised, groups}.
    """
    test, train = chats[::4], [ids for number, ids in enumerate(chats) if number % 4] or chats
    wanted = [_log_probs(model, ids) for ids in test]
    costs = _costs(model, test[:COSTED])
    blocks = fitted(model, train, show)
    order = sorted(costs, key=lambda group: -costs[group])
    raised: list[tuple[str, ...]] = []
    while True:
        with _rounding(model):
            kl, agreement = _distance(model, test, wanted)
        show(model.config.num_hidden_layers, f"KL {kl:.3f}, {len(raised)} of {len(order)} products in 8 bits")
        if (kl <= limits[0] and agreement >= limits[1]) or len(raised) == len(order):
            break
        new = order[len(raised) : len(raised) + max(1, round(RAISED * len(order)))]
        for name in (name for group in new for name in group):
            blocks[name] = rounded(weights.text(f"{name}.weight"))
            hold(model, name, blocks[name])
        raised += new
    kept = {f"{name}.weight": held for name, held in blocks.items()}
    made = Quantised(
        lambda name: kept[name] if name in kept else rounded(weights.text(name)),
        lambda name: (kept[name].bits, kept[name].zeros is not None) if name in kept else (8, False),
    )
    return made, {"raised": len(raised), "groups": len(order)}


@contextmanager
def _rounding(model: Any) -> Generator[None]:
    """Every product reads activations in 8 bits while the block runs, as ONNX Runtime's kernels round them."""

    def nearest(name: str, x: torch.Tensor) -> torch.Tensor:
        blocks = in_blocks(x)
        scale = (blocks.abs().amax(-1, keepdim=True) / 127).clamp(min=1e-12)
        return ((blocks / scale).round() * scale).flatten(-2)

    with entering_products(model, [*(name for group in groups_of(model) for name in group), "lm_head"], nearest):
        yield


@torch.no_grad()
def _log_probs(model: Any, ids: torch.Tensor) -> torch.Tensor:
    return model(input_ids=ids.to(model.device)).logits[0].float().log_softmax(-1).cpu()


def _distance(model: Any, chats: Ids, wanted: Ids) -> tuple[float, float]:
    """Mean KL(whole model || this one) over tokens, in nats, and the share of tokens with the same likeliest next."""
    kl, same, tokens = 0.0, 0, 0
    for ids, whole in zip(chats, wanted, strict=True):
        found = _log_probs(model, ids)
        kl += (whole.exp() * (whole - found)).sum().item()
        same += int((whole.argmax(-1) == found.argmax(-1)).sum())
        tokens += len(whole)
    return kl / tokens, same / tokens


def _costs(model: Any, chats: Ids) -> dict[tuple[str, ...], float]:
    """What 4 bits in each group alone would cost, to second order: half of (gradient . error)^2, over its size.

    The gradient is that of the log-probability of a token drawn from the model itself (the Fisher information).
    """
    groups = groups_of(model)
    seen: dict[str, Any] = {}
    costs = dict.fromkeys(groups, 0.0)
    errors = {name: search(model.get_submodule(name).weight.float(), None)[0] for group in groups for name in group}
    hooks = []
    for name in errors:

        def keep(module: Any, inputs: Any, output: torch.Tensor, name: str = name) -> None:
            output.retain_grad()
            seen[name] = inputs[0].detach(), output

        hooks.append(model.get_submodule(name).register_forward_hook(keep))
    generator = torch.Generator(model.device).manual_seed(0)
    for ids in chats:
        embeds = model.get_input_embeddings()(ids.to(model.device)).detach().requires_grad_()
        log_probs = model(inputs_embeds=embeds).logits[0].float().log_softmax(-1)
        drawn = torch.multinomial(log_probs.detach().exp(), 1, generator=generator)
        log_probs.gather(1, drawn).sum().backward()
        for group in groups:
            for name in group:
                hidden, output = seen[name]
                moved = hidden[0].float() @ errors[name].T
                costs[group] += 0.5 * (output.grad[0].float() * moved).sum(-1).square().sum().item()
        seen.clear()
    for hook in hooks:
        hook.remove()
    return {group: cost / sum(errors[name].numel() for name in group) for group, cost in costs.items()}
