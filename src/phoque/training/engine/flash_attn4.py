"""The kernels of the package flash-attn-4, as one operator that torch.compile takes as it is."""

from importlib import import_module
from typing import Any

import torch
from torch import Tensor


def flash_4(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: None,
    scaling: float,
    cu_seq_lens_q: Tensor,
    max_length_q: int,
    dropout: float = 0.0,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention within the segments of a row: (1, heads, T, head size) -> (1, T, heads, head size)."""
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    return _flash(q, k, v, cu_seq_lens_q, max_length_q, scaling)[0][None], None


def _kernels() -> Any:
    return import_module("flash_attn.cute.interface")


# its own functions are not for torch.compile to look into, and its own autograd would be one more thing to compile
@torch.library.custom_op("phoque::flash", mutates_args=())
def _flash(q: Tensor, k: Tensor, v: Tensor, borders: Tensor, longest: int, scaling: float) -> tuple[Tensor, Tensor]:
    """q (T, heads, size), k and v (T, fewer heads, size) -> like q, and the logarithms of the sums (heads, T)."""
    out, sums = _kernels()._flash_attn_fwd(
        q,
        k,
        v,
        cu_seqlens_q=borders,
        cu_seqlens_k=borders,
        max_seqlen_q=longest,
        max_seqlen_k=longest,
        softmax_scale=scaling,
        causal=True,
        return_lse=True,
    )[:2]
    return out, sums


@_flash.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, borders: Tensor, longest: int, scaling: float) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(q.shape[1], q.shape[0], dtype=torch.float32)


@torch.library.custom_op("phoque::flash_backward", mutates_args=())
def _flash_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    borders: Tensor,
    out: Tensor,
    sums: Tensor,
    longest: int,
    scaling: float,
) -> tuple[Tensor, Tensor, Tensor]:
    found = _kernels()._flash_attn_bwd(
        q,
        k,
        v,
        out,
        grad,
        sums,
        cu_seqlens_q=borders,
        cu_seqlens_k=borders,
        max_seqlen_q=longest,
        max_seqlen_k=longest,
        softmax_scale=scaling,
        causal=True,
    )[:3]
    to_q, to_k, to_v = (gradient.contiguous() for gradient in found)  # they may be laid out as q, k and v are
    return to_q, to_k, to_v


@_flash_backward.register_fake
def _(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    borders: Tensor,
    out: Tensor,
    sums: Tensor,
    longest: int,
    scaling: float,
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, borders, ctx.longest, ctx.scaling = inputs
    ctx.save_for_backward(q, k, v, borders, *output)
    ctx.set_materialize_grads(False)


def _back(ctx: Any, grad: Tensor, _: None) -> tuple[Any, ...]:
    return *_flash_backward(grad.contiguous(), *ctx.saved_tensors, ctx.longest, ctx.scaling), None, None, None


_flash.register_autograd(_back, setup_context=_keep)
