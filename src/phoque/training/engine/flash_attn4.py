"""The kernels of the flash-attn-4 package as one custom operator, which torch.compile does not trace into."""

from importlib import import_module
from typing import Any

import torch
from torch import Tensor


def flash_attention_4(
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
    """Compute causal attention within each segment of a row: (1, heads, T, head size) -> (1, T, heads, head size)."""
    q, k, v = (x.squeeze(0).transpose(0, 1) for x in (query, key, value))
    return _flash_forward(q, k, v, cu_seq_lens_q, max_length_q, scaling)[0][None], None


def _load_kernels() -> Any:
    return import_module("flash_attn.cute.interface")


# torch.compile cannot trace the package's functions, so forward and backward are one opaque operator each
@torch.library.custom_op("phoque::flash", mutates_args=())
def _flash_forward(
    q: Tensor, k: Tensor, v: Tensor, cu_seq_lens: Tensor, longest: int, scaling: float
) -> tuple[Tensor, Tensor]:
    """q (T, heads, size), k and v (T, kv heads, size) -> output like q, and the log-sum-exp (heads, T)."""
    out, lse = _load_kernels()._flash_attn_fwd(
        q,
        k,
        v,
        cu_seqlens_q=cu_seq_lens,
        cu_seqlens_k=cu_seq_lens,
        max_seqlen_q=longest,
        max_seqlen_k=longest,
        softmax_scale=scaling,
        causal=True,
        return_lse=True,
    )[:2]
    return out, lse


@_flash_forward.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, cu_seq_lens: Tensor, longest: int, scaling: float) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(q.shape[1], q.shape[0], dtype=torch.float32)


@torch.library.custom_op("phoque::flash_backward", mutates_args=())
def _flash_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seq_lens: Tensor,
    out: Tensor,
    lse: Tensor,
    longest: int,
    scaling: float,
) -> tuple[Tensor, Tensor, Tensor]:
    gradients = _load_kernels()._flash_attn_bwd(
        q,
        k,
        v,
        out,
        grad,
        lse,
        cu_seqlens_q=cu_seq_lens,
        cu_seqlens_k=cu_seq_lens,
        max_seqlen_q=longest,
        max_seqlen_k=longest,
        softmax_scale=scaling,
        causal=True,
    )[:3]
    grad_q, grad_k, grad_v = (
        gradient.contiguous() for gradient in gradients
    )  # they may have the strides of q, k and v
    return grad_q, grad_k, grad_v


@_flash_backward.register_fake
def _(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seq_lens: Tensor,
    out: Tensor,
    lse: Tensor,
    longest: int,
    scaling: float,
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, cu_seq_lens, ctx.longest, ctx.scaling = inputs
    ctx.save_for_backward(q, k, v, cu_seq_lens, *output)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad: Tensor, _: None) -> tuple[Any, ...]:
    return *_flash_backward(grad.contiguous(), *ctx.saved_tensors, ctx.longest, ctx.scaling), None, None, None


_flash_forward.register_autograd(_backward, setup_context=_setup_context)
