"""The trial before the first step: one row through the engine and through the plain layers, which must agree."""

import math
from contextlib import nullcontext

import torch
from torch import Tensor

from phoque.training.engine.cuda_graphs import PackedRow
from phoque.training.engine.engine import Engine, run_layer

# standard deviation of B during the trial: the adapter then contributes at least as much as a trained one
TRIAL_NOISE = 0.05
# largest relative difference of one layer that rounding explains: in bf16, and with FP8 products
MAX_DIFFERENCE, MAX_DIFFERENCE_FP8 = 0.05, 0.2
RESIDUAL_ROUNDING = 2**-8  # of the sum of a residual stream and what a layer adds to it, in bf16
MAX_DIFFERENCE_CAPTURED = 0.5  # a graph replays the same kernels; if it reads other memory, nothing agrees


def check_against_plain(engine: Engine, row: PackedRow, n_real: int) -> str:
    """Compare the engine with the plain layers on one row; return what differs too much, or "".

    Each layer gets the input that the plain layers give it, so rounding does not add up over the depth: its output,
    the gradient of its input and those of its adapter must agree. Then the whole row runs, forward and backward, as
    in a step; captured graphs are compared with the same pass uncaptured. Only the first `n_real` positions are
    compared; the rest is padding. B is random during the trial, because a new adapter contributes nothing; weights
    and gradients are restored. With dropout no two passes agree: layers are then compared without dropout, as fused
    linear layers, and the row runs with it once, to see that it works.
    """
    with engine.flat.randomize_b(TRIAL_NOISE):
        with engine.without_dropout() if engine.has_dropout else nullcontext():
            number, difference = _compare_layers(engine, row, n_real)
        if not difference <= _max_difference(engine):
            return f"layer {number} differs by {difference:.1%} from the plain layer"
        out = _run_trial_step(engine, row, n_real)[:, :n_real]
        if not engine.captured:
            return ""
        uncaptured = engine.take_uncaptured_output()[:, :n_real]
        if not engine.has_dropout and not _relative(out - uncaptured, uncaptured) <= MAX_DIFFERENCE_CAPTURED:
            return "the captured graphs compute something else"
        return ""


def _max_difference(engine: Engine) -> float:
    """The largest difference of one layer from the plain one that rounding explains."""
    return MAX_DIFFERENCE_FP8 if engine.is_fp8 else MAX_DIFFERENCE


def _run_trial_step(engine: Engine, row: PackedRow, n_real: int) -> Tensor:
    """Run a row forward and backward; return its hidden states. Raises RuntimeError if gradients are not finite.

    As in a step, the padding has no gradient: where a model embeds its padding token as zeros, each norm would
    multiply the gradient by up to 1,000.
    """
    out = engine.compute_hidden(row)
    grad = torch.ones_like(out)
    grad[:, n_real:] = 0
    out.backward(grad)
    are_finite = engine.flat.gradients.isfinite().all()
    engine.flat.gradients.zero_()
    engine.model.zero_grad()
    if not bool(are_finite):
        raise RuntimeError("gradients are not finite")
    return out.detach().clone()


def _compare_layers(engine: Engine, row: PackedRow, n_real: int) -> tuple[int, float]:
    """Return the number of the layer that differs most from the plain one, and its difference.

    Differences are relative to what the layer adds to its input, or to its gradient; what the residual stream's own
    rounding explains is left out.
    """
    engine.flat.refresh()
    hidden, angles, *rest = engine.prepare_inputs(row)
    rng = torch.Generator(hidden.device).manual_seed(0)
    upstream = torch.zeros_like(hidden)
    upstream[:, :n_real] = torch.randn(
        hidden[:, :n_real].shape, generator=rng, device=hidden.device, dtype=hidden.dtype
    )
    groups_per_layer = len(engine.groups) // len(engine.layers)
    differences = []
    for number, layer in enumerate(engine.layers):
        numbers = range(number * groups_per_layer, (number + 1) * groups_per_layer)
        groups = [engine.groups[n] for n in numbers]
        weights = [
            getattr(module, name)[module.active_adapters[0]].weight
            for name in ("lora_A", "lora_B")
            for group in groups
            for module in group
        ]
        leaves = [engine.flat.a[n] for n in numbers] + [engine.flat.b[n] for n in numbers]
        inputs = hidden.detach().requires_grad_(True)
        # as the plain layers run in the trainer
        autocast = torch.autocast(hidden.device.type, torch.bfloat16, engine.dtype == torch.bfloat16)
        with engine.plain_modules(), torch.enable_grad(), autocast:
            plain = run_layer(layer, inputs, angles[number], *rest)
            expected, *expected_adapter = torch.autograd.grad(plain, [inputs, *weights], upstream)
        own_inputs = hidden.detach().requires_grad_(True)
        with torch.enable_grad(), torch.autocast(hidden.device.type, enabled=False):
            own_output = engine.layer_function(layer, own_inputs, angles[number], *rest)
            gradient, *own_adapter = torch.autograd.grad(own_output, [own_inputs, *leaves], upstream)
        added, added_gradient = plain - inputs, expected - upstream
        rounding = RESIDUAL_ROUNDING if engine.dtype == torch.bfloat16 else 0.0
        differences += (
            _relative((own_output - plain)[:, :n_real], added[:, :n_real], rounding * plain[:, :n_real]),
            _relative(gradient - expected, added_gradient, rounding * expected),
            _relative(*_adapter_difference(engine, own_adapter, expected_adapter)),
        )
        hidden = plain.detach().to(hidden.dtype)
    # read only now: reading a number waits for the GPU, and the next layer is launched meanwhile
    per_layer = torch.stack(differences).view(len(engine.layers), -1).amax(1).tolist()
    worst = max(range(len(per_layer)), key=per_layer.__getitem__)
    return worst, per_layer[worst]


def _adapter_difference(engine: Engine, gradients: list[Tensor], expected: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Return the difference of one layer's adapter gradients from the plain ones, and the plain ones, as vectors.

    `gradients` are those of the flat copy, whose B is multiplied by the LoRA scaling.
    """
    half = len(gradients) // 2
    parts = [gradient.float().flatten() for gradient in gradients[:half]]
    parts += [gradient.float().flatten() * engine.flat.scaling for gradient in gradients[half:]]
    plain = torch.cat([gradient.float().flatten() for gradient in expected])
    return torch.cat(parts) - plain, plain


def _relative(difference: Tensor, reference: Tensor, rounding: Tensor | None = None) -> Tensor:
    """Return the norm of a difference beyond that of `rounding`, relative to the norm of the reference."""
    with torch.no_grad():
        excess = _norm(difference) - (0.0 if rounding is None else _norm(rounding))
        value = excess / _norm(reference)
        return value.nan_to_num(nan=math.inf, posinf=math.inf).clamp(min=0.0)  # NaN is no agreement


def _norm(tensor: Tensor) -> Tensor:
    return torch.linalg.vector_norm(tensor, dtype=torch.float32)
