"""Triton kernels of a gated activation between adapted linear layers: h = act(gate) * up, and its gradients.

`gate` and `up` are the halves of a frozen linear layer's output, without their adapters: what the adapters add is
computed here from x A^T, which has a few columns, so the wide output is not read and written once more to add it. In
FP8, the kernels also find each row's largest value, which its scale is computed from.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from phoque.models.fp8 import CODE_DTYPE, MAX_CODE

ROWS, FEATURES, WARPS = 16, 128, 4  # tokens and features per tile, and warps: the fastest of those tried on an H100
QUANTIZED_ROWS, QUANTIZED_COLUMNS = 8, 1024


@dataclass(frozen=True)
class Quantized:
    """A matrix in FP8 with one scale per row, `factors` (rows, 1)."""

    codes: Tensor
    factors: Tensor


@dataclass(frozen=True)
class GatedGradients:
    """Gradient of a linear layer's output (T, 2 features), in FP8 if asked for, and h if it was not kept."""

    base: Tensor
    quantized: Quantized | None
    hidden: Tensor | None


def gate(base: Tensor, xa: Tensor, b: Tensor, activation: str, quantize: bool) -> tuple[Tensor, Quantized | None]:
    """Return act(gate) * up (T, features), and the same in FP8 if `quantize`.

    `base` (T, 2 features) is the linear layer's output; its adapter adds `xa` (T, 2 rank) times `b` (2 features, rank).
    """
    (tokens, features), rank = (len(base), base.shape[1] // 2), b.shape[1]
    hidden = base.new_empty(tokens, features)
    blocks = triton.cdiv(features, FEATURES)
    largest = base.new_empty(blocks, tokens, dtype=torch.float32) if quantize else None
    _gate[(blocks, triton.cdiv(tokens, ROWS))](
        base,
        xa,
        b,
        hidden,
        hidden if largest is None else largest,
        tokens,
        features,
        **_constants(rank, activation),
        QUANTIZE=quantize,
        num_warps=WARPS,
    )
    return hidden, None if largest is None else _quantize_rows(hidden, None, largest)


def gate_backward(
    grad: Tensor,
    grad_xa: Tensor,
    base: Tensor,
    xa: Tensor,
    b: Tensor,
    down_a: Tensor,
    activation: str,
    scales: Tensor | None,
    recompute: bool,
) -> GatedGradients:
    """Return the gradient of `base`, and h if `recompute`.

    The gradient of h is `grad` (T, features), which comes through the frozen weight of the down projection, plus
    `grad_xa` (T, rank) times `down_a` (rank, features), which comes through its adapter. `scales` (2 features) multiply
    the columns of the gradient that is returned in FP8.
    """
    (tokens, features), rank = grad.shape, b.shape[1]
    blocks = triton.cdiv(features, FEATURES)
    grad_base = torch.empty_like(base)
    hidden = torch.empty_like(grad) if recompute else None
    largest = None if scales is None else grad.new_empty(blocks, tokens, dtype=torch.float32)
    _gate_backward[(blocks, triton.cdiv(tokens, ROWS))](
        grad,
        grad_xa,
        base,
        xa,
        b,
        down_a,
        base if scales is None else scales,
        grad_base,
        grad_base if hidden is None else hidden,
        grad_base if largest is None else largest,
        tokens,
        features,
        **_constants(rank, activation),
        QUANTIZE=largest is not None,
        RECOMPUTE=recompute,
        num_warps=WARPS,
    )
    return GatedGradients(grad_base, None if largest is None else _quantize_rows(grad_base, scales, largest), hidden)


def _constants(rank: int, activation: str) -> dict[str, int | str]:
    return {
        "RANK": rank,
        "BLOCK_RANK": max(16, triton.next_power_of_2(rank)),
        "BLOCK_ROWS": ROWS,
        "BLOCK_FEATURES": FEATURES,
        "ACTIVATION": activation,
    }


def _quantize_rows(values: Tensor, scales: Tensor | None, largest: Tensor) -> Quantized:
    """Quantize values (T, columns) times the columns' scales; `largest` (parts, T) has the maxima of parts of rows."""
    rows, columns = values.shape
    factors = largest.amax(0)[:, None].clamp(min=1e-12) / MAX_CODE
    codes = torch.empty_like(values, dtype=CODE_DTYPE)
    _quantize[(triton.cdiv(rows, QUANTIZED_ROWS), triton.cdiv(columns, QUANTIZED_COLUMNS))](
        values,
        factors if scales is None else scales,
        factors,
        codes,
        rows,
        columns,
        HAS_SCALES=scales is not None,
        BLOCK_ROWS=QUANTIZED_ROWS,
        BLOCK_COLUMNS=QUANTIZED_COLUMNS,
    )
    return Quantized(codes, factors)


@triton.jit
def _load(pointer, rows, columns, stride, row_count, column_count):
    """Load a tile as stored; zeros beyond the matrix."""
    mask = (rows < row_count)[:, None] & (columns < column_count)[None, :]
    return tl.load(pointer + rows.to(tl.int64)[:, None] * stride + columns[None, :], mask=mask, other=0.0)


@triton.jit
def _store(pointer, rows, columns, stride, row_count, column_count, values):
    mask = (rows < row_count)[:, None] & (columns < column_count)[None, :]
    offsets = rows.to(tl.int64)[:, None] * stride + columns[None, :]
    tl.store(pointer + offsets, values.to(pointer.dtype.element_ty), mask=mask)


@triton.jit
def _activate(x, ACTIVATION: tl.constexpr):
    """Return act(x) and its derivative."""
    if ACTIVATION == "silu":
        sigmoid = tl.sigmoid(x)
        return x * sigmoid, sigmoid * (1 + x * (1 - sigmoid))
    # gelu_pytorch_tanh: x (1 + tanh(u)) / 2 = x sigmoid(2u)
    sigmoid = tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    slope = 1.5957691216057308 * (1 + 0.134145 * x * x)
    return x * sigmoid, sigmoid + x * sigmoid * (1 - sigmoid) * slope


@triton.jit
def _load_adapted(base, xa, b, rows, columns, ranks, tokens, features, RANK: tl.constexpr):
    """Return a tile of gate or up with its adapter, rounded as the linear layer rounds it."""
    part_xa = _load(xa, rows, ranks, 2 * RANK, tokens, RANK)
    part_b = _load(b, columns, ranks, RANK, features, RANK)
    values = _load(base, rows, columns, 2 * features, tokens, features)
    return (values.to(tl.float32) + tl.dot(part_xa, tl.trans(part_b))).to(values.dtype).to(tl.float32)


@triton.jit
def _gate(
    base,
    xa,
    b,
    hidden,
    largest,
    tokens,
    features,
    RANK: tl.constexpr,
    BLOCK_RANK: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_FEATURES: tl.constexpr,
    ACTIVATION: tl.constexpr,
    QUANTIZE: tl.constexpr,
):
    block = tl.program_id(0)
    rows = tl.program_id(1) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    columns = block * BLOCK_FEATURES + tl.arange(0, BLOCK_FEATURES)
    ranks = tl.arange(0, BLOCK_RANK)
    gates = _load_adapted(base, xa, b, rows, columns, ranks, tokens, features, RANK)
    ups = _load_adapted(base + features, xa + RANK, b + features * RANK, rows, columns, ranks, tokens, features, RANK)
    active, _ = _activate(gates, ACTIVATION)
    values = (active * ups).to(hidden.dtype.element_ty)
    _store(hidden, rows, columns, features, tokens, features, values)
    if QUANTIZE:
        most = tl.max(tl.abs(values.to(tl.float32)), 1)
        tl.store(largest + block * tokens + rows, most, mask=rows < tokens)


@triton.jit
def _gate_backward(
    grad,
    grad_xa,
    base,
    xa,
    b,
    down_a,
    scales,
    grad_base,
    hidden,
    largest,
    tokens,
    features,
    RANK: tl.constexpr,
    BLOCK_RANK: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_FEATURES: tl.constexpr,
    ACTIVATION: tl.constexpr,
    QUANTIZE: tl.constexpr,
    RECOMPUTE: tl.constexpr,
):
    block = tl.program_id(0)
    rows = tl.program_id(1) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    columns = block * BLOCK_FEATURES + tl.arange(0, BLOCK_FEATURES)
    ranks = tl.arange(0, BLOCK_RANK)
    upstream_xa = _load(grad_xa, rows, ranks, RANK, tokens, RANK)
    weights = _load(down_a, ranks, columns, features, RANK, features)
    upstream = _load(grad, rows, columns, features, tokens, features).to(tl.float32)
    upstream += tl.dot(upstream_xa, weights)
    gates = _load_adapted(base, xa, b, rows, columns, ranks, tokens, features, RANK)
    ups = _load_adapted(base + features, xa + RANK, b + features * RANK, rows, columns, ranks, tokens, features, RANK)
    active, slope = _activate(gates, ACTIVATION)
    grad_gates = (upstream * ups * slope).to(grad_base.dtype.element_ty)
    grad_ups = (upstream * active).to(grad_base.dtype.element_ty)
    _store(grad_base, rows, columns, 2 * features, tokens, features, grad_gates)
    _store(grad_base + features, rows, columns, 2 * features, tokens, features, grad_ups)
    if RECOMPUTE:
        _store(hidden, rows, columns, features, tokens, features, active * ups)
    if QUANTIZE:
        gate_scales = tl.load(scales + columns, mask=columns < features, other=0.0)
        up_scales = tl.load(scales + features + columns, mask=columns < features, other=0.0)
        scaled_gates = tl.max(tl.abs(grad_gates.to(tl.float32) * gate_scales[None, :]), 1)
        scaled_ups = tl.max(tl.abs(grad_ups.to(tl.float32) * up_scales[None, :]), 1)
        tl.store(largest + block * tokens + rows, tl.maximum(scaled_gates, scaled_ups), mask=rows < tokens)


@triton.jit
def _quantize(
    values,
    scales,
    factors,
    codes,
    row_count,
    column_count,
    HAS_SCALES: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """Write values * scales / factors in FP8; scales are those of columns, factors those of rows."""
    rows = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    columns = tl.program_id(1) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    tile = _load(values, rows, columns, column_count, row_count, column_count).to(tl.float32)
    if HAS_SCALES:
        tile = tile * tl.load(scales + columns, mask=columns < column_count, other=0.0)[None, :]
    factor = tl.load(factors + rows, mask=rows < row_count, other=1.0)
    _store(codes, rows, columns, column_count, row_count, column_count, tile / factor[:, None])
