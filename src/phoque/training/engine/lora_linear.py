"""Frozen products and their LoRA adapters as one operator: y = x W^T + (x A^T) B^T, with a backward pass of its own.

Products that share their input (queries, keys and values; gate and up) are one product. Their weight stays as it is
held (NF4, FP8 or plain), and is made whole for each product; the input and the thin product with A are all that is
kept for the backward pass. A product is added to the adapters' share in place (in FP8 the share to the product). To
torch.compile it is opaque.
"""

from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
from torch import Tensor

from phoque.models.fp8 import CODES, LARGEST_CODE

BLOCK = 64  # weights that share one absolute maximum in NF4
SHARING = (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",))


@dataclass(frozen=True)
class FrozenWeight:
    """A frozen weight of (sum of `parts` rows, columns): its values as they are held, their scales, and their kind.

    `turned` is an FP8 weight laid out column by column, which the product of the backward pass needs.
    """

    kind: str
    values: Tensor
    scales: Tensor | None
    parts: tuple[int, ...]
    columns: int
    turned: Tensor | None = None

    @property
    def rows(self) -> int:
        """Outputs of all parts."""
        return sum(self.parts)


def held(bases: list[Any], whole: bool) -> FrozenWeight:
    """How linear layers that share an input hold their weights: as one, of which each then holds a slice.

    `whole` keeps NF4 weights in the dtype of the products, and FP8 weights turned as well: the same numbers, sooner.
    """
    parts, columns = tuple(base.out_features for base in bases), bases[0].in_features
    kind = {"Linear4bit": "nf4", "Fp8Linear": "fp8"}.get(type(bases[0]).__name__, "plain")
    if kind == "fp8":
        values = _joined(bases)
        codes = values.view(CODES)
        scales = torch.cat([base.scale for base in bases]).contiguous()
        return FrozenWeight(kind, codes, scales, parts, columns, codes.T.contiguous().T if whole else None)
    if kind == "plain":
        return FrozenWeight(kind, _joined(bases), None, parts, columns)
    scales = torch.cat([_scales(base.weight.quant_state) for base in bases])
    if whole:
        dtype = bases[0].compute_dtype
        made = [
            _whole(base.weight.data, _scales(base.weight.quant_state), kind, base.out_features, columns, dtype)
            for base in bases
        ]
        return FrozenWeight("plain", torch.cat(made), None, parts, columns)
    return FrozenWeight(kind, _joined(bases), scales, parts, columns)


def _joined(bases: list[Any]) -> Tensor:
    """The weights of the layers as one tensor, in which theirs now lie."""
    if len(bases) == 1:
        return bases[0].weight.data
    values = torch.cat([base.weight.data for base in bases])
    for base, part in zip(bases, values.split([len(base.weight.data) for base in bases]), strict=True):
        base.weight.data = part
    return values


def _scales(state: Any) -> Tensor:
    """The absolute maximum of each block of NF4; where they are quantised themselves, that is undone."""
    if not state.nested:
        return state.absmax
    from bitsandbytes.functional import dequantize_blockwise

    return dequantize_blockwise(state.absmax, state.state2).float() + state.offset


def sharing(layer: Any, apart: bool) -> list[list[Any]]:
    """The adapted projections of a decoder layer, those together that share an input, in the order of their calls."""
    found = {name.rpartition(".")[2]: module for name, module in layer.named_modules() if hasattr(module, "lora_A")}
    groups = [[found[name] for name in names] for names in SHARING]
    return [[module] for group in groups for module in group] if apart else groups


def speed_up(group: list[Any], a: Tensor, b: Tensor, whole: bool) -> None:
    """Let peft layers that share an input run as one operator wherever gradients are wanted; else they stay as is."""
    weight = held([module.base_layer for module in group], whole)
    drop = group[0].lora_dropout[group[0].active_adapters[0]]
    dropping = isinstance(drop, torch.nn.Dropout)
    made: list[Tensor] = []  # by the call of the first, for the others

    def forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if not torch.is_grad_enabled():
            return type(self).forward(self, x, *args, **kwargs)
        if self is group[0]:
            made.clear()  # a pass that was broken off may have left some
            made.extend(adapted(x, drop(x) if dropping else None, a, b, weight))
        out = made.pop(0)
        return out if self.base_layer.bias is None else out + self.base_layer.bias

    for module in group:
        module.forward = MethodType(forward, module)


def adapted(x: Tensor, dropped: Tensor | None, a: Tensor, b: Tensor, weight: FrozenWeight) -> tuple[Tensor, ...]:
    """What each part of the weight makes of x (..., columns), with its adapter's share.

    That is made from `dropped`, or from x if it is None. `a` (parts x rank, columns) and `b` (rows, rank) are the
    adapters of the parts laid end to end, `b` times its scaling.
    """
    flat = x.reshape(-1, weight.columns)
    beside = None if dropped is None else dropped.reshape(-1, weight.columns)
    codes, factors = in_fp8(flat) if weight.kind == "fp8" else (None, None)
    out, _ = _adapted(
        flat, codes, factors, beside, a, b, weight.values, weight.scales, weight.turned, weight.kind, [*weight.parts]
    )
    return out.view(*x.shape[:-1], weight.rows).split(weight.parts, -1)


def in_fp8(x: Tensor) -> tuple[Tensor, Tensor]:
    """x (T, columns) as FP8 codes, and the factor (T, 1) of each row that makes the most of their range."""
    full = x.float()
    factors = full.abs().amax(-1, keepdim=True).clamp(min=1e-12) / LARGEST_CODE
    return (full / factors).to(CODES), factors


def _whole(values: Tensor, scales: Tensor | None, kind: str, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    if scales is None:
        return values
    if kind == "nf4":
        return torch.ops.bitsandbytes.dequantize_4bit(values, scales, BLOCK, "nf4", [rows, columns], dtype)
    return values.to(dtype) * scales.to(dtype)


def _scaled(codes: Tensor, factors: Tensor, other: Tensor, others: Tensor, dtype: torch.dtype) -> Tensor:
    """(codes x factors) (other x others), as one product of FP8 where there are units for it."""
    if codes.is_cuda:
        return torch._scaled_mm(codes, other, factors, others, out_dtype=dtype, use_fast_accum=True)
    return ((codes.float() * factors) @ (other.float() * others)).to(dtype)


@torch.library.custom_op("phoque::adapted", mutates_args=())
def _adapted(
    x: Tensor,
    codes: Tensor | None,
    factors: Tensor | None,
    dropped: Tensor | None,
    a: Tensor,
    b: Tensor,
    values: Tensor,
    scales: Tensor | None,
    turned: Tensor | None,
    kind: str,
    parts: list[int],
) -> tuple[Tensor, Tensor]:
    """The products with their adapters (T, rows), and x A^T (T, parts x rank)."""
    thin = (x if dropped is None else dropped) @ a.T
    in_codes = codes is not None and factors is not None and scales is not None
    # products of FP8 write their result; others add to what is there, which costs less than to add to theirs
    out = _scaled(codes, factors, values.T, scales.T, x.dtype) if in_codes else x.new_empty(len(x), sum(parts))
    for share, seen, beside in zip(out.split(parts, 1), thin.split(b.shape[1], 1), b.split(parts), strict=True):
        if in_codes:
            share.addmm_(seen, beside.T)
        else:
            torch.mm(seen, beside.T, out=share)
    if not in_codes:
        out.addmm_(x, _whole(values, scales, kind, sum(parts), x.shape[1], x.dtype).T)
    return out, thin


@_adapted.register_fake
def _(
    x: Tensor,
    codes: Tensor | None,
    factors: Tensor | None,
    dropped: Tensor | None,
    a: Tensor,
    b: Tensor,
    values: Tensor,
    scales: Tensor | None,
    turned: Tensor | None,
    kind: str,
    parts: list[int],
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape[0], sum(parts)), x.new_empty(x.shape[0], a.shape[0])


@torch.library.custom_op("phoque::adapted_backward", mutates_args=())
def _adapted_backward(
    grad: Tensor,
    codes: Tensor | None,
    factors: Tensor | None,
    seen: Tensor,
    thin: Tensor,
    a: Tensor,
    b: Tensor,
    values: Tensor,
    scales: Tensor | None,
    turned: Tensor | None,
    kind: str,
    parts: list[int],
    apart: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, of what the adapters saw if that was something else (`apart`), of A and of B."""
    rank = b.shape[1]
    back, to_b = torch.empty_like(thin), torch.empty_like(b)
    for number, (part, beside, into) in enumerate(
        zip(grad.split(parts, 1), b.split(parts), to_b.split(parts), strict=True)
    ):
        at = slice(number * rank, (number + 1) * rank)
        torch.mm(part, beside, out=back[:, at])
        torch.mm(part.T, thin[:, at], out=into)
    if codes is not None and factors is not None and turned is not None:
        to_x = _scaled(codes, factors, turned, factors.new_ones(1, turned.shape[1]), grad.dtype)
        to_seen = back @ a if apart else to_x.addmm_(back, a)
    else:
        whole, to_seen = _whole(values, scales, kind, sum(parts), seen.shape[1], grad.dtype), back @ a
        to_x = grad @ whole if apart else to_seen.addmm_(grad, whole)
    return to_x, to_seen if apart else grad.new_empty(0), back.T @ seen, to_b


@_adapted_backward.register_fake
def _(
    grad: Tensor,
    codes: Tensor | None,
    factors: Tensor | None,
    seen: Tensor,
    thin: Tensor,
    a: Tensor,
    b: Tensor,
    values: Tensor,
    scales: Tensor | None,
    turned: Tensor | None,
    kind: str,
    parts: list[int],
    apart: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    beside = torch.empty_like(seen) if apart else grad.new_empty(0)
    return grad.new_empty(seen.shape), beside, torch.empty_like(a), torch.empty_like(b)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, _, _, dropped, a, b, values, scales, turned, ctx.kind, ctx.parts = inputs
    ctx.apart = dropped is not None
    ctx.save_for_backward(x if dropped is None else dropped, output[1], a, b, values, scales, turned)
    ctx.set_materialize_grads(False)


def _back(ctx: Any, grad: Tensor, _: None) -> tuple[Any, ...]:
    *saved, scales, turned = ctx.saved_tensors
    # a row of FP8 weights has its scale; here rows are what is summed over, so the gradient takes it along
    codes, factors = (None, None) if turned is None else in_fp8(grad * scales.T)
    to_x, to_seen, to_a, to_b = _adapted_backward(
        grad.contiguous(), codes, factors, *saved, scales, turned, ctx.kind, ctx.parts, ctx.apart
    )
    return to_x, None, None, to_seen if ctx.apart else None, to_a, to_b, *[None] * 5


_adapted.register_autograd(_back, setup_context=_keep)
