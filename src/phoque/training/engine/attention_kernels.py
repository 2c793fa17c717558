"""Attention over a packed row as Triton kernels: tiles of the row, whatever conversations they hold.

A kernel for sequences of several lengths gives each conversation tiles of its own, mostly empty where conversations are
short. Here a tile of queries visits the tiles of keys from the start of its first conversation to itself. Queries that
share a key head read the same keys, and no sum depends on the order in which tiles are computed, so gradients are
deterministic. The algorithm is FlashAttention 2's (https://arxiv.org/abs/2307.08691).
"""

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2_E = 1.4426950408889634
MASKED = tl.constexpr(-1e30)  # finite: where a whole tile is masked, infinity minus infinity would be NaN
BOUNDS_BLOCK = 128


@dataclass(frozen=True)
class Tiles:
    """Queries and keys per tile, warps per tile and loads in flight, of one kernel."""

    queries: int
    keys: int
    warps: int
    stages: int

    def options(self) -> dict[str, int]:
        """Return the launch options."""
        return {
            "BLOCK_Q": self.queries,
            "BLOCK_K": self.keys,
            "num_warps": self.warps,
            "num_stages": self.stages,
        }


def _forward_tiles(size: int) -> Tiles:
    """Tiles of the forward pass. All tiles are fast on an H100 and fit the smallest GPUs' shared memory, 99 KiB."""
    return Tiles(64, 32, 4, 3) if size <= 128 else Tiles(64, 32, 8, 2)


def _query_tiles(size: int) -> Tiles:
    """Tiles for the gradient of queries."""
    return Tiles(64, 32, 4, 3) if size <= 128 else Tiles(32, 32, 4, 2)


def _key_tiles(size: int) -> Tiles:
    """Tiles for the gradients of keys and values."""
    return Tiles(32, 64, 4, 3) if size <= 128 else Tiles(32, 32, 4, 2)


def attend_packed(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: None,
    scaling: float,
    cu_seq_lens_q: Tensor,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Compute causal attention within each segment of a row: (1, heads, T, head size) -> (1, T, heads, head size)."""
    q, k, v = (x.squeeze(0).transpose(0, 1) for x in (query, key, value))
    return _attend(q, k, v, cu_seq_lens_q, sliding_window or 0, scaling)[0][None], None


@torch.library.custom_op("phoque::packed_attention", mutates_args=())
def _attend(
    q: Tensor, k: Tensor, v: Tensor, cu_seq_lens: Tensor, window: int, scaling: float
) -> tuple[Tensor, Tensor, Tensor]:
    """q (T, heads, size), k and v (T, kv heads, size) -> output like q, log2-sum-exp2 (heads, T), bounds (2, T).

    `window` is the number of tokens that a token attends to at most, itself included; 0 is all. The bounds are, for
    each token, the first token that it attends to, and the token after the last that attends to it.
    """
    tokens, heads, size = q.shape
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    bounds = torch.empty(2, tokens, dtype=torch.int32, device=q.device)
    _find_bounds[(triton.cdiv(tokens, BOUNDS_BLOCK),)](
        cu_seq_lens, bounds, tokens, len(cu_seq_lens), window, BLOCK=BOUNDS_BLOCK, BLOCK_BORDERS=BOUNDS_BLOCK
    )
    out = q.new_empty(tokens, heads, size)
    lse = q.new_empty(heads, tokens, dtype=torch.float32)
    tiles = _forward_tiles(size)
    _attend_tile[(triton.cdiv(tokens, tiles.queries), heads)](
        q,
        k,
        v,
        out,
        lse,
        bounds,
        tokens,
        *q.stride()[:2],
        *k.stride()[:2],
        *v.stride()[:2],
        scaling * LOG2_E,
        HEADS=heads,
        KV_HEADS=k.shape[1],
        SIZE=size,
        BLOCK_SIZE=triton.next_power_of_2(size),
        **tiles.options(),
    )
    return out, lse, bounds


@_attend.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, cu_seq_lens: Tensor, window: int, scaling: float
) -> tuple[Tensor, Tensor, Tensor]:
    tokens, heads, _ = q.shape
    return (
        q.new_empty(q.shape),
        q.new_empty(heads, tokens, dtype=torch.float32),
        cu_seq_lens.new_empty(2, tokens, dtype=torch.int32),
    )


@torch.library.custom_op("phoque::packed_attention_backward", mutates_args=())
def _attend_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, bounds: Tensor, scaling: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of q, k and v, given that of the output."""
    tokens, heads, size = q.shape
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    grad_q, grad_k, grad_v = (x.new_empty(x.shape) for x in (q, k, v))
    delta = torch.empty_like(lse)
    strides = *q.stride()[:2], *k.stride()[:2], *v.stride()[:2]
    shape = {
        "HEADS": heads,
        "KV_HEADS": k.shape[1],
        "SIZE": size,
        "BLOCK_SIZE": triton.next_power_of_2(size),
    }
    query_tiles, key_tiles = _query_tiles(size), _key_tiles(size)
    _compute_query_gradients[(triton.cdiv(tokens, query_tiles.queries), heads)](
        grad,
        q,
        k,
        v,
        out,
        lse,
        delta,
        bounds,
        grad_q,
        tokens,
        *strides,
        scaling,
        scaling * LOG2_E,
        **shape,
        **query_tiles.options(),
    )
    _compute_key_gradients[(triton.cdiv(tokens, key_tiles.keys), k.shape[1])](
        grad,
        q,
        k,
        v,
        lse,
        delta,
        bounds,
        grad_k,
        grad_v,
        tokens,
        *strides,
        scaling,
        scaling * LOG2_E,
        **shape,
        **key_tiles.options(),
    )
    return grad_q, grad_k, grad_v


@_attend_backward.register_fake
def _(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, bounds: Tensor, scaling: float
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    q, k, v, _, _, ctx.scaling = inputs
    ctx.save_for_backward(q, k, v, *output)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad: Tensor, *_: None) -> tuple[Any, ...]:
    return *_attend_backward(grad.contiguous(), *ctx.saved_tensors, ctx.scaling), None, None, None


_attend.register_autograd(_backward, setup_context=_setup_context)


@triton.jit
def _find_bounds(borders, bounds, tokens, count, window, BLOCK: tl.constexpr, BLOCK_BORDERS: tl.constexpr):
    """Write the first token that each token attends to, and the token after the last that attends to it."""
    position = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    first = tl.zeros([BLOCK], tl.int32)
    end = tl.zeros([BLOCK], tl.int32) + tokens
    for start in range(0, count, BLOCK_BORDERS):
        number = start + tl.arange(0, BLOCK_BORDERS)
        border = tl.load(borders + number, mask=number < count, other=tokens)
        is_before = border[None, :] <= position[:, None]
        first = tl.maximum(first, tl.max(tl.where(is_before, border[None, :], 0), 1))
        end = tl.minimum(end, tl.min(tl.where(is_before, tokens, border[None, :]), 1))
    if window > 0:
        first = tl.maximum(first, position - window + 1)
        end = tl.minimum(end, position + window)
    tl.store(bounds + position, first, mask=position < tokens)
    tl.store(bounds + tokens + position, end, mask=position < tokens)


@triton.jit
def _load_tile(pointer, positions, stride, tokens, SIZE: tl.constexpr, BLOCK_SIZE: tl.constexpr):
    """Load the vectors of one head at these positions: (positions, BLOCK_SIZE), zeros beyond the row and the size."""
    column = tl.arange(0, BLOCK_SIZE)
    offsets = positions.to(tl.int64)[:, None] * stride + column[None, :]
    if SIZE == BLOCK_SIZE:
        return tl.load(pointer + offsets, mask=(positions < tokens)[:, None], other=0.0)
    return tl.load(pointer + offsets, mask=(positions < tokens)[:, None] & (column < SIZE)[None, :], other=0.0)


@triton.jit
def _store_tile(pointer, positions, stride, tokens, values, SIZE: tl.constexpr, BLOCK_SIZE: tl.constexpr):
    column = tl.arange(0, BLOCK_SIZE)
    offsets = positions.to(tl.int64)[:, None] * stride + column[None, :]
    mask = (positions < tokens)[:, None] & (column < SIZE)[None, :]
    tl.store(pointer + offsets, values.to(pointer.dtype.element_ty), mask=mask)


@triton.jit
def _attend_tile(
    q,
    k,
    v,
    out,
    lse,
    bounds,
    tokens,
    q_token,
    q_head,
    k_token,
    k_head,
    v_token,
    v_head,
    scale,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    tile, head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    kv_head = head // (HEADS // KV_HEADS)
    rows = tile * BLOCK_Q + tl.arange(0, BLOCK_Q)
    queries = _load_tile(q + head * q_head, rows, q_token, tokens, SIZE, BLOCK_SIZE)
    first = tl.load(bounds + rows, mask=rows < tokens, other=0)
    start = tl.load(bounds + tile * BLOCK_Q) // BLOCK_K * BLOCK_K
    largest = tl.full([BLOCK_Q], MASKED, tl.float32)
    total = tl.zeros([BLOCK_Q], tl.float32)
    result = tl.zeros([BLOCK_Q, BLOCK_SIZE], tl.float32)
    for begin in range(start, tl.minimum((tile + 1) * BLOCK_Q, tokens), BLOCK_K):
        columns = begin + tl.arange(0, BLOCK_K)
        keys = _load_tile(k + kv_head * k_head, columns, k_token, tokens, SIZE, BLOCK_SIZE)
        scores = tl.dot(queries, tl.trans(keys)) * scale
        visible = (columns[None, :] <= rows[:, None]) & (columns[None, :] >= first[:, None])
        scores = tl.where(visible, scores, MASKED)
        new_largest = tl.maximum(largest, tl.max(scores, 1))
        weights = tl.exp2(scores - new_largest[:, None])
        shrink = tl.exp2(largest - new_largest)
        total = total * shrink + tl.sum(weights, 1)
        values = _load_tile(v + kv_head * v_head, columns, v_token, tokens, SIZE, BLOCK_SIZE)
        result = tl.dot(weights.to(values.dtype), values, result * shrink[:, None])
        largest = new_largest
    tl.store(lse + head * tokens + rows, largest + tl.log2(total), mask=rows < tokens)
    _store_tile(out + head * SIZE, rows, HEADS * SIZE, tokens, result / total[:, None], SIZE, BLOCK_SIZE)


@triton.jit
def _compute_query_gradients(
    grad,
    q,
    k,
    v,
    out,
    lse,
    delta,
    bounds,
    grad_q,
    tokens,
    q_token,
    q_head,
    k_token,
    k_head,
    v_token,
    v_head,
    scaling,
    scale,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    tile, head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    kv_head = head // (HEADS // KV_HEADS)
    rows = tile * BLOCK_Q + tl.arange(0, BLOCK_Q)
    queries = _load_tile(q + head * q_head, rows, q_token, tokens, SIZE, BLOCK_SIZE)
    upstream = _load_tile(grad + head * SIZE, rows, HEADS * SIZE, tokens, SIZE, BLOCK_SIZE)
    output = _load_tile(out + head * SIZE, rows, HEADS * SIZE, tokens, SIZE, BLOCK_SIZE)
    row_delta = tl.sum(output.to(tl.float32) * upstream.to(tl.float32), 1)
    tl.store(delta + head * tokens + rows, row_delta, mask=rows < tokens)
    row_lse = tl.load(lse + head * tokens + rows, mask=rows < tokens, other=0.0)
    first = tl.load(bounds + rows, mask=rows < tokens, other=0)
    start = tl.load(bounds + tile * BLOCK_Q) // BLOCK_K * BLOCK_K
    result = tl.zeros([BLOCK_Q, BLOCK_SIZE], tl.float32)
    for begin in range(start, tl.minimum((tile + 1) * BLOCK_Q, tokens), BLOCK_K):
        columns = begin + tl.arange(0, BLOCK_K)
        keys = _load_tile(k + kv_head * k_head, columns, k_token, tokens, SIZE, BLOCK_SIZE)
        values = _load_tile(v + kv_head * v_head, columns, v_token, tokens, SIZE, BLOCK_SIZE)
        scores = tl.dot(queries, tl.trans(keys)) * scale
        visible = (columns[None, :] <= rows[:, None]) & (columns[None, :] >= first[:, None])
        weights = tl.where(visible, tl.exp2(scores - row_lse[:, None]), 0.0)
        grad_weights = tl.dot(upstream, tl.trans(values))
        grad_scores = weights * (grad_weights - row_delta[:, None])
        result = tl.dot(grad_scores.to(keys.dtype), keys, result)
    _store_tile(grad_q + head * SIZE, rows, HEADS * SIZE, tokens, result * scaling, SIZE, BLOCK_SIZE)


@triton.jit
def _compute_key_gradients(
    grad,
    q,
    k,
    v,
    lse,
    delta,
    bounds,
    grad_k,
    grad_v,
    tokens,
    q_token,
    q_head,
    k_token,
    k_head,
    v_token,
    v_head,
    scaling,
    scale,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    tile, kv_head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    columns = tile * BLOCK_K + tl.arange(0, BLOCK_K)
    keys = _load_tile(k + kv_head * k_head, columns, k_token, tokens, SIZE, BLOCK_SIZE)
    values = _load_tile(v + kv_head * v_head, columns, v_token, tokens, SIZE, BLOCK_SIZE)
    end = tl.load(bounds + tokens + columns, mask=columns < tokens, other=0)
    last_row = tl.load(bounds + tokens + tl.minimum((tile + 1) * BLOCK_K, tokens) - 1)
    result_k = tl.zeros([BLOCK_K, BLOCK_SIZE], tl.float32)
    result_v = tl.zeros([BLOCK_K, BLOCK_SIZE], tl.float32)
    for member in range(HEADS // KV_HEADS):
        head = kv_head * (HEADS // KV_HEADS) + member
        for begin in range(tile * BLOCK_K // BLOCK_Q * BLOCK_Q, last_row, BLOCK_Q):
            rows = begin + tl.arange(0, BLOCK_Q)
            queries = _load_tile(q + head * q_head, rows, q_token, tokens, SIZE, BLOCK_SIZE)
            upstream = _load_tile(grad + head * SIZE, rows, HEADS * SIZE, tokens, SIZE, BLOCK_SIZE)
            row_lse = tl.load(lse + head * tokens + rows, mask=rows < tokens, other=0.0)
            row_delta = tl.load(delta + head * tokens + rows, mask=rows < tokens, other=0.0)
            scores = tl.dot(keys, tl.trans(queries)) * scale
            visible = (rows[None, :] >= columns[:, None]) & (rows[None, :] < end[:, None])
            weights = tl.where(visible, tl.exp2(scores - row_lse[None, :]), 0.0)
            result_v = tl.dot(weights.to(upstream.dtype), upstream, result_v)
            grad_weights = tl.dot(values, tl.trans(upstream))
            grad_scores = weights * (grad_weights - row_delta[None, :])
            result_k = tl.dot(grad_scores.to(queries.dtype), queries, result_k)
    _store_tile(grad_k + kv_head * SIZE, columns, KV_HEADS * SIZE, tokens, result_k * scaling, SIZE, BLOCK_SIZE)
    _store_tile(grad_v + kv_head * SIZE, columns, KV_HEADS * SIZE, tokens, result_v, SIZE, BLOCK_SIZE)
