"""A frozen linear layer and its LoRA adapter as one operator, y = x W^T + (x A^T) B^T, with its own backward pass.

Linear layers that share their input (queries, keys and values; gate and up) run as one. Their weight stays in its
storage format (NF4, FP8 or plain) and is dequantized for each use. Only the input and x A^T are kept for the backward
pass. The base output is added in place to the adapter output (in FP8 the adapter output to the base output).
torch.compile does not trace into the operator.
"""

from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
from torch import Tensor

from phoque.models.fp8 import CODE_DTYPE, MAX_CODE

GROUP_SIZE = 64  # NF4 weights that share one absolute maximum


@dataclass(frozen=True)
class FrozenWeight:
    """A frozen weight (sum of `parts`, columns): stored values, their scales, and their format, `kind`.

    `transposed` is an FP8 weight in column-major order, which the FP8 matmul of the backward pass needs.
    """

    kind: str
    values: Tensor
    scales: Tensor | None
    parts: tuple[int, ...]
    columns: int
    transposed: Tensor | None = None

    @property
    def rows(self) -> int:
        """Output features of all parts together."""
        return sum(self.parts)


def join_weights(bases: list[Any], cached: bool) -> FrozenWeight:
    """Join the weights of linear layers that share an input; each layer then holds a slice of the joined tensor.

    `cached` trades memory for speed: it keeps NF4 weights dequantized to the compute dtype, and a transposed copy of
    FP8 weights. The values are the same.
    """
    parts, columns = tuple(base.out_features for base in bases), bases[0].in_features
    kind = {"Linear4bit": "nf4", "Fp8Linear": "fp8"}.get(type(bases[0]).__name__, "plain")
    if kind == "fp8":
        values = _concatenate_weights(bases)
        codes = values.view(CODE_DTYPE)
        scales = torch.cat([base.scale for base in bases]).contiguous()
        return FrozenWeight(kind, codes, scales, parts, columns, codes.T.contiguous().T if cached else None)
    if kind == "plain":
        return FrozenWeight(kind, _concatenate_weights(bases), None, parts, columns)
    scales = torch.cat([_nf4_scales(base.weight.quant_state) for base in bases])
    if cached:
        dtype = bases[0].compute_dtype
        weights = [
            dequantize(base.weight.data, _nf4_scales(base.weight.quant_state), kind, base.out_features, columns, dtype)
            for base in bases
        ]
        return FrozenWeight("plain", torch.cat(weights), None, parts, columns)
    return FrozenWeight(kind, _concatenate_weights(bases), scales, parts, columns)


def _concatenate_weights(bases: list[Any]) -> Tensor:
    """Concatenate the weights of the layers; each layer's weight becomes a view of the result."""
    if len(bases) == 1:
        return bases[0].weight.data
    values = torch.cat([base.weight.data for base in bases])
    for base, view in zip(bases, values.split([len(base.weight.data) for base in bases]), strict=True):
        base.weight.data = view
    return values


def _nf4_scales(state: Any) -> Tensor:
    """Return the absolute maximum of each NF4 group, dequantized if double quantization was used."""
    if not state.nested:
        return state.absmax
    from bitsandbytes.functional import dequantize_blockwise

    return dequantize_blockwise(state.absmax, state.state2).float() + state.offset


def group_by_input(layer: Any, linear_groups: tuple[tuple[str, ...], ...], separate: bool) -> list[list[Any]]:
    """Group a decoder layer's LoRA projections by shared input, in call order; `separate` gives each its own group.

    Linear layers without an adapter are in no group: they run as plain modules.
    """
    modules = {name: module for name, module in layer.named_modules() if hasattr(module, "lora_A")}
    groups = [[modules[name] for name in names if name in modules] for names in linear_groups]
    groups = [group for group in groups if group]
    return [[module] for group in groups for module in group] if separate else groups


@dataclass(frozen=True)
class AdaptedWeight:
    """A frozen weight and its adapters: `a` (parts x rank, columns), and `b` (rows, rank) with the LoRA scaling."""

    a: Tensor
    b: Tensor
    frozen: FrozenWeight


def fuse_group(group: list[Any], a: Tensor, b: Tensor, cached: bool) -> AdaptedWeight:
    """Make peft layers that share an input run as one operator while gradients are enabled; else they run as before."""
    weight = join_weights([module.base_layer for module in group], cached)
    dropout = group[0].lora_dropout[group[0].active_adapters[0]]
    has_dropout = isinstance(dropout, torch.nn.Dropout)
    outputs: list[Tensor] = []  # the first layer of the group computes all outputs, the others take theirs

    def forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if not torch.is_grad_enabled():
            return type(self).forward(self, x, *args, **kwargs)
        if self is group[0]:
            outputs.clear()  # an interrupted pass may have left some
            outputs.extend(apply_lora_linear(x, dropout(x) if has_dropout else None, a, b, weight))
        out = outputs.pop(0)
        return out if self.base_layer.bias is None else out + self.base_layer.bias

    for module in group:
        module.forward = MethodType(forward, module)
    return AdaptedWeight(a, b, weight)


def apply_lora_linear(
    x: Tensor, dropped: Tensor | None, a: Tensor, b: Tensor, weight: FrozenWeight
) -> tuple[Tensor, ...]:
    """Return the output of each part for x (..., columns): the frozen linear layer plus its adapter.

    The adapter reads `dropped` (x after dropout), or x if that is None. `a` (parts x rank, columns) and `b` (rows,
    rank) are the concatenated adapters of the parts; `b` is multiplied by the LoRA scaling.
    """
    flat = x.reshape(-1, weight.columns)
    flat_dropped = None if dropped is None else dropped.reshape(-1, weight.columns)
    codes, factors = quantize_fp8(flat.detach()) if weight.kind == "fp8" else (None, None)  # autograd would keep copies
    out, _ = _lora_linear(
        flat,
        codes,
        factors,
        flat_dropped,
        a,
        b,
        weight.values,
        weight.scales,
        weight.transposed,
        weight.kind,
        [*weight.parts],
    )
    return out.view(*x.shape[:-1], weight.rows).split(weight.parts, -1)


def quantize_fp8(x: Tensor) -> tuple[Tensor, Tensor]:
    """Quantize x (T, columns) to FP8 with one scale per row; return the codes and the scales (T, 1)."""
    full = x.float()
    factors = full.abs().amax(-1, keepdim=True).clamp(min=1e-12) / MAX_CODE
    return (full / factors).to(CODE_DTYPE), factors


def dequantize(values: Tensor, scales: Tensor | None, kind: str, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """Return a frozen weight (rows, columns) in `dtype`; a plain one as it is."""
    if scales is None:
        return values
    if kind == "nf4":
        return torch.ops.bitsandbytes.dequantize_4bit(values, scales, GROUP_SIZE, "nf4", [rows, columns], dtype)
    return values.to(dtype) * scales.to(dtype)


def scaled_matmul(codes: Tensor, factors: Tensor, weight: Tensor, weight_scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Compute (codes * factors) @ (weight * weight_scales): one FP8 matmul on a GPU, emulated in FP32 on a CPU."""
    if codes.is_cuda:
        return torch._scaled_mm(codes, weight, factors, weight_scales, out_dtype=dtype, use_fast_accum=True)
    return ((codes.float() * factors) @ (weight.float() * weight_scales)).to(dtype)


@torch.library.custom_op("phoque::lora_linear", mutates_args=())
def _lora_linear(
    x: Tensor,
    codes: Tensor | None,
    factors: Tensor | None,
    dropped: Tensor | None,
    a: Tensor,
    b: Tensor,
    values: Tensor,
    scales: Tensor | None,
    transposed: Tensor | None,
    kind: str,
    parts: list[int],
) -> tuple[Tensor, Tensor]:
    """Return the output of all parts with their adapters (T, rows), and x A^T (T, parts x rank)."""
    xa = (x if dropped is None else dropped) @ a.T
    is_fp8 = codes is not None and factors is not None and scales is not None
    # the FP8 matmul cannot accumulate, so it goes first; others add to the adapters' output, which is cheaper
    out = scaled_matmul(codes, factors, values.T, scales.T, x.dtype) if is_fp8 else x.new_empty(len(x), sum(parts))
    for part_out, part_xa, part_b in zip(out.split(parts, 1), xa.split(b.shape[1], 1), b.split(parts), strict=True):
        if is_fp8:
            part_out.addmm_(part_xa, part_b.T)
        else:
            torch.mm(part_xa, part_b.T, out=part_out)
    if not is_fp8:
        out.addmm_(x, dequantize(values, scales, kind, sum(parts), x.shape[1], x.dtype).T)
    return out, xa


@_lora_linear.register_fake
def _(
    x: Tensor,
    codes: Tensor | None,
    factors: Tensor | None,
    dropped: Tensor | None,
    a: Tensor,
    b: Tensor,
    values: Tensor,
    scales: Tensor | None,
    transposed: Tensor | None,
    kind: str,
    parts: list[int],
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape[0], sum(parts)), x.new_empty(x.shape[0], a.shape[0])


@torch.library.custom_op("phoque::lora_linear_backward", mutates_args=())
def _lora_linear_backward(
    grad: Tensor,
    codes: Tensor | None,
    factors: Tensor | None,
    adapter_input: Tensor,
    xa: Tensor,
    a: Tensor,
    b: Tensor,
    values: Tensor,
    scales: Tensor | None,
    transposed: Tensor | None,
    kind: str,
    parts: list[int],
    has_dropout: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of x, of the dropped x if there is dropout (else an empty tensor), of A and of B."""
    rank = b.shape[1]
    grad_xa, grad_b = torch.empty_like(xa), torch.empty_like(b)
    for number, (part_grad, part_b, part_grad_b) in enumerate(
        zip(grad.split(parts, 1), b.split(parts), grad_b.split(parts), strict=True)
    ):
        columns = slice(number * rank, (number + 1) * rank)
        torch.mm(part_grad, part_b, out=grad_xa[:, columns])
        torch.mm(part_grad.T, xa[:, columns], out=part_grad_b)
    if codes is not None and factors is not None and transposed is not None:
        grad_x = scaled_matmul(codes, factors, transposed, factors.new_ones(1, transposed.shape[1]), grad.dtype)
        grad_dropped = grad_xa @ a if has_dropout else grad_x.addmm_(grad_xa, a)
    else:
        weight, grad_dropped = (
            dequantize(values, scales, kind, sum(parts), adapter_input.shape[1], grad.dtype),
            grad_xa @ a,
        )
        grad_x = grad @ weight if has_dropout else grad_dropped.addmm_(grad, weight)
    return grad_x, grad_dropped if has_dropout else grad.new_empty(0), grad_xa.T @ adapter_input, grad_b


@_lora_linear_backward.register_fake
def _(
    grad: Tensor,
    codes: Tensor | None,
    factors: Tensor | None,
    adapter_input: Tensor,
    xa: Tensor,
    a: Tensor,
    b: Tensor,
    values: Tensor,
    scales: Tensor | None,
    transposed: Tensor | None,
    kind: str,
    parts: list[int],
    has_dropout: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    grad_dropped = torch.empty_like(adapter_input) if has_dropout else grad.new_empty(0)
    return grad.new_empty(adapter_input.shape), grad_dropped, torch.empty_like(a), torch.empty_like(b)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, _, _, dropped, a, b, values, scales, transposed, ctx.kind, ctx.parts = inputs
    ctx.has_dropout = dropped is not None
    ctx.save_for_backward(x if dropped is None else dropped, output[1], a, b, values, scales, transposed)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad: Tensor, _: None) -> tuple[Any, ...]:
    *saved, scales, transposed = ctx.saved_tensors
    # FP8 weights have one scale per row; this matmul sums over rows, so the scales are folded into the gradient
    codes, factors = (None, None) if transposed is None else quantize_fp8(grad * scales.T)
    grad_x, grad_dropped, grad_a, grad_b = _lora_linear_backward(
        grad.contiguous(), codes, factors, *saved, scales, transposed, ctx.kind, ctx.parts, ctx.has_dropout
    )
    return grad_x, None, None, grad_dropped if ctx.has_dropout else None, grad_a, grad_b, *[None] * 5


_lora_linear.register_autograd(_backward, setup_context=_setup_context)
