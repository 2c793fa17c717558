"""A frozen product and its LoRA adapter as one operator: y = x W^T + s (x A^T) B^T, with a backward pass of its own.

The weight stays as it is held (NF4, FP8 or plain) and is made whole for each product; the input and the thin product
with A are all that is kept for the backward pass. The adapter's share is added in place. To torch.compile it is opaque.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

BLOCK = 64  # weights that share one absolute maximum in NF4


@dataclass(frozen=True)
class Held:
    """A frozen weight of shape (rows, columns): its values as they are held, their scales, and which kind it is."""

    kind: str
    values: Tensor
    scales: Tensor | None
    rows: int
    columns: int


def held(base: Any) -> Held:
    """How a linear layer holds its weight; NF4's scales of scales are undone once, for 4 bytes every 64 weights."""
    weight = base.weight
    if type(base).__name__ == "Linear4bit":
        state = weight.quant_state
        scales = state.absmax
        if state.nested:
            from bitsandbytes.functional import dequantize_blockwise

            scales = dequantize_blockwise(state.absmax, state.state2).float() + state.offset
        return Held("nf4", weight.data, scales, base.out_features, base.in_features)
    if weight.dtype == torch.float8_e4m3fn:
        return Held("fp8", weight.data, base.scale, base.out_features, base.in_features)
    return Held("plain", weight.data, None, base.out_features, base.in_features)


def adapted(x: Tensor, dropped: Tensor | None, a: Tensor, b: Tensor, weight: Held, scaling: float) -> Tensor:
    """x (..., columns) times the weight, and the adapter's share from `dropped`, or from x if that is None."""
    flat = x.reshape(-1, weight.columns)
    beside = None if dropped is None else dropped.reshape(-1, weight.columns)
    out, _ = _adapted(
        flat, beside, a, b, weight.values, weight.scales, weight.kind, weight.rows, weight.columns, scaling
    )  # fmt: skip
    return out.view(*x.shape[:-1], weight.rows)


def _whole(values: Tensor, scales: Tensor | None, kind: str, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    if kind == "nf4":
        return torch.ops.bitsandbytes.dequantize_4bit(values, scales, BLOCK, "nf4", [rows, columns], dtype)
    if scales is not None:
        return values.to(dtype) * scales.to(dtype)
    return values


@torch.library.custom_op("phoque::adapted", mutates_args=())
def _adapted(
    x: Tensor, dropped: Tensor | None, a: Tensor, b: Tensor, values: Tensor, scales: Tensor | None, kind: str,
    rows: int, columns: int, scaling: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The product with its adapter (T, rows), and x A^T (T, rank)."""
    thin = (x if dropped is None else dropped) @ a.T
    out = x @ _whole(values, scales, kind, rows, columns, x.dtype).T
    return out.addmm_(thin, b.T, alpha=scaling), thin


@_adapted.register_fake
def _(x: Tensor, dropped: Tensor | None, a: Tensor, b: Tensor, values: Tensor, scales: Tensor | None, kind: str,
      rows: int, columns: int, scaling: float) -> tuple[Tensor, Tensor]:  # fmt: skip
    return x.new_empty(x.shape[0], rows), x.new_empty(x.shape[0], a.shape[0])


@torch.library.custom_op("phoque::adapted_backward", mutates_args=())
def _adapted_backward(
    grad: Tensor, seen: Tensor, thin: Tensor, a: Tensor, b: Tensor, values: Tensor, scales: Tensor | None, kind: str,
    rows: int, columns: int, scaling: float, apart: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of x, of what the adapter saw if that was something else (`apart`), of A and of B."""
    back = (grad @ b) * scaling
    to_x = grad @ _whole(values, scales, kind, rows, columns, grad.dtype)
    to_seen = back @ a if apart else grad.new_empty(0)
    if not apart:
        to_x.addmm_(back, a)
    return to_x, to_seen, back.T @ seen, (grad.T @ thin) * scaling


@_adapted_backward.register_fake
def _(grad: Tensor, seen: Tensor, thin: Tensor, a: Tensor, b: Tensor, values: Tensor, scales: Tensor | None, kind: str,
      rows: int, columns: int, scaling: float, apart: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    beside = torch.empty_like(seen) if apart else grad.new_empty(0)
    return grad.new_empty(grad.shape[0], columns), beside, torch.empty_like(a), torch.empty_like(b)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, dropped, a, b, values, scales, *ctx.rest = inputs
    ctx.apart = dropped is not None
    ctx.save_for_backward(x if dropped is None else dropped, output[1], a, b, values, scales)
    ctx.set_materialize_grads(False)


def _back(ctx: Any, grad: Tensor, _: None) -> tuple[Any, ...]:
    to_x, to_seen, to_a, to_b = _adapted_backward(grad.contiguous(), *ctx.saved_tensors, *ctx.rest, ctx.apart)
    return to_x, to_seen if ctx.apart else None, to_a, to_b, *[None] * 6


_adapted.register_autograd(_back, setup_context=_keep)
