"""Few bits that keep what the model says, by what it computes on real chats.

Activations are made to round well (SmoothQuant, Xiao et al. 2023, arXiv 2211.10438); 4 bits are fitted layer by layer,
and 8 stay where 4 cost the most (GPTQ, Frantar et al. 2023, arXiv 2210.17323, here with the order of columns by their
activations, and a scale for each block that is fixed beforehand by a weighted search).
"""

from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack, contextmanager
from itertools import accumulate
from typing import Any

import torch

from phoque.onnx.blocks import Blocks, Quantised, block_size, in_blocks, packed, rounded
from phoque.onnx.weights import Factors, Weights, multiplied

GROUPS = (  # products that read the same activations; what lies in one group becomes one product, so shares its bits
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.o_proj",),
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
)
MAKERS = (  # of what each group reads: what is made smaller there, the group's weights make larger again
    "input_layernorm",
    "self_attn.v_proj",
    "post_attention_layernorm",
    "mlp.up_proj",
)
SMOOTHING = 0.6  # share of the difference between channels that goes from the activations to the weights
SMOOTHED_TOKENS = 2000
LARGEST = 64.0  # factor of a channel, and smallest its inverse: no half-precision number gets out of range
DAMPING = 0.01  # of the mean of the Hessian's diagonal
SHRINKS = 20  # candidates of the scale search, down to half the range
STEP = 128  # columns between two updates of all that follow
COSTED = 8  # chats that tell what 4 bits cost where
RAISED = 0.1  # share of the groups that go to 8 bits at a time
Ids = list[torch.Tensor]


@torch.no_grad()
def smoothed(weights: Weights, model: Any, chats: Ids) -> Weights:
    """The same model, of whose activations no channel is much larger than the others; `model` is changed likewise.

    MatMulNBits rounds activations to 8 bits in the blocks of its weights, so that one large channel costs its block.
    """
    few, config = _first(chats, SMOOTHED_TOKENS), model.config
    factors: Factors = {}
    seen = _sizes(model, [group[0] for group in _groups(model)], few)
    for group, maker in zip(_groups(model), MAKERS * config.num_hidden_layers, strict=True):
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
    blocks = _gptq(model, train, show)
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
            _set(model, name, blocks[name])
        raised += new
    kept = {f"{name}.weight": held for name, held in blocks.items()}
    made = Quantised(
        lambda name: kept[name] if name in kept else rounded(weights.text(name)),
        lambda name: (kept[name].bits, kept[name].zeros is not None) if name in kept else (8, False),
    )
    return made, {"raised": len(raised), "groups": len(order)}


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

    with _entering_products(model, names, gather):
        for ids in chats:
            model(input_ids=ids.to(model.device))
    return {name: (total / sum(ids.shape[1] for ids in chats)).sqrt() for name, total in sums.items()}


@contextmanager
def _rounding(model: Any) -> Generator[None]:
    """Every product reads activations in 8 bits while the block runs, as ONNX Runtime's kernels round them."""

    def nearest(name: str, x: torch.Tensor) -> torch.Tensor:
        blocks = in_blocks(x)
        scale = (blocks.abs().amax(-1, keepdim=True) / 127).clamp(min=1e-12)
        return ((blocks / scale).round() * scale).flatten(-2)

    with _entering_products(model, [*(name for group in _groups(model) for name in group), "lm_head"], nearest):
        yield


@contextmanager
def _entering_products(
    model: Any, names: list[str], seen: Callable[[str, torch.Tensor], torch.Tensor | None]
) -> Generator[None]:
    """Call `seen` with what enters each of these products while the block runs, and give them what it returns."""

    def hook(name: str, inputs: Any) -> Any:
        other = seen(name, inputs[0])
        return None if other is None else (other, *inputs[1:])

    hooks = [
        model.get_submodule(name).register_forward_pre_hook(lambda _, inputs, name=name: hook(name, inputs))
        for name in names
    ]  # fmt: skip
    try:
        yield
    finally:
        for one in hooks:
            one.remove()


def _groups(model: Any) -> list[tuple[str, ...]]:
    return [
        tuple(f"model.layers.{number}.{name}" for name in group)
        for number in range(model.config.num_hidden_layers)
        for group in GROUPS
    ]


def _set(model: Any, name: str, blocks: Blocks) -> None:
    weight = model.get_submodule(name).weight
    weight.data.copy_(blocks.dequantised())


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
    groups = _groups(model)
    seen: dict[str, Any] = {}
    costs = dict.fromkeys(groups, 0.0)
    errors = {
        name: search(model.get_submodule(name).weight.float(), None)[0] for group in groups for name in group
    }  # fmt: skip
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


def search(weight: torch.Tensor, importance: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The error, and scales and zeros [rows, blocks] whose rounding errs least, weighted by `importance` [columns]."""
    blocks = in_blocks(weight)
    weighing = torch.ones_like(blocks[:1]) if importance is None else in_blocks(importance[None])
    low, high = blocks.amin(-1).clamp(max=0), blocks.amax(-1).clamp(min=0)
    best = torch.full_like(low, torch.inf)
    scales, zeros, errors = torch.ones_like(low), torch.zeros_like(low), torch.zeros_like(blocks)
    for shrink in torch.linspace(1, 0.5, SHRINKS if importance is not None else 1).tolist():
        scale = ((high - low) * shrink / 15).clamp(min=1e-9)
        zero = (-low * shrink / scale).round().clamp(0, 15)
        off = ((blocks / scale[..., None]).round() + zero[..., None]).clamp(0, 15)
        off = (off - zero[..., None]) * scale[..., None] - blocks
        cost = (off.square() * weighing).sum(-1)
        better = cost < best
        best = torch.where(better, cost, best)
        scales, zeros = torch.where(better, scale, scales), torch.where(better, zero, zeros)
        errors = torch.where(better[..., None], off, errors)
    return errors.flatten(1), scales, zeros


def quantised(weight: torch.Tensor, hessian: torch.Tensor) -> Blocks:
    """A matrix in 4 bits by GPTQ: each column's error is made good by the columns that follow.

    `hessian` is the sum of x xᵀ over the activations x that the matrix is multiplied with, fp32 [columns, columns].
    """
    rows, columns = weight.shape
    work, diagonal = weight.float().clone(), hessian.diagonal().clone()
    hessian = hessian + torch.eye(columns, device=hessian.device) * (DAMPING * diagonal.mean()).clamp(min=1e-6)
    _, scales, zeros = search(work, diagonal + DAMPING * diagonal.mean())
    order = diagonal.argsort(descending=True)
    work = work[:, order]
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian[order][:, order]))
    factor = torch.linalg.cholesky(inverse, upper=True)
    codes = torch.empty(rows, columns, device=work.device)
    block = (order // block_size(columns)).tolist()
    for start in range(0, columns, STEP):
        end = min(start + STEP, columns)
        errors = torch.empty(rows, end - start, device=work.device)
        for at in range(start, end):
            column, scale, zero = work[:, at], scales[:, block[at]], zeros[:, block[at]]
            code = ((column / scale).round() + zero).clamp(0, 15)
            codes[:, at] = code
            error = (column - (code - zero) * scale) / factor[at, at]
            work[:, at:end].addr_(error, factor[at, at:end], alpha=-1)
            errors[:, at - start] = error
        work[:, end:].addmm_(errors, factor[start:end, end:], alpha=-1)
    back = torch.empty_like(codes)
    back[:, order] = codes
    return Blocks(4, packed(back, 4).cpu(), scales.cpu(), zeros.to(torch.uint8).cpu())


@torch.no_grad()
def _gptq(model: Any, chats: Ids, show: Callable[[int, str], None]) -> dict[str, Blocks]:
    """Quantise a model in place, layer by layer, each on what the quantised layers before it make of the chats."""
    found: dict[str, Blocks] = {}
    arriving = list(_entering(model, chats))
    for number, layer in enumerate(model.model.layers):
        prefix = f"model.layers.{number}."
        with ExitStack() as stack:
            hessians = [stack.enter_context(_gathering(layer.get_submodule(group[0]))) for group in GROUPS]
            for hidden, context in arriving:
                layer(hidden, **context)
        for group, hessian in zip(GROUPS, hessians, strict=True):
            for name in group:
                found[prefix + name] = quantised(layer.get_submodule(name).weight, hessian[0])
                _set(model, prefix + name, found[prefix + name])
        arriving = [(layer(hidden, **context), context) for hidden, context in arriving]
        show(number + 1, f"layer {number} in 4 bits")
    return found


class _Entered(Exception):
    """The first layer was reached: there is nothing more to compute."""


def _entering(model: Any, chats: Ids) -> Iterator[tuple[torch.Tensor, dict[str, Any]]]:
    """What the first layer is given for each chat: hidden states, and masks and positions."""
    first, given = model.model.layers[0], {}

    def stop(module: Any, inputs: Any, context: dict[str, Any]) -> None:
        given["it"] = inputs[0], context
        raise _Entered

    hook = first.register_forward_pre_hook(stop, with_kwargs=True)
    for ids in chats:
        try:
            model(input_ids=ids.to(model.device))
        except _Entered:
            yield given.pop("it")
    hook.remove()


@contextmanager
def _gathering(module: Any) -> Generator[list[torch.Tensor]]:
    """The sum of x xᵀ over what enters a product while the block runs, in the one element of the list."""
    held: list[torch.Tensor] = []

    def gather(_: Any, inputs: Any, output: Any) -> None:
        x = inputs[0].flatten(0, -2).float()
        held[:] = [x.T @ x + (held[0] if held else 0)]

    hook = module.register_forward_hook(gather)
    try:
        yield held
    finally:
        hook.remove()
