"""Attention over packed rows: no position sees another conversation. Chosen once, with its reason."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

NAME = "phoque_packed"  # transformers sends any name with 'flash' in it to its own loader


def choose(device: torch.device) -> tuple[str, str]:
    """Register the packed attention for this device; return its name for transformers, and the reason."""
    from transformers import AttentionInterface, AttentionMaskInterface

    attend, reason = _by_conversation, "SDPA a conversation at a time: no mask is built, no padding attended"
    if device.type == "cuda":
        attend, reason = _varlen, "torch.nn.attention.varlen: one kernel over all conversations of a row"
    AttentionInterface.register(NAME, attend)
    # the borders arrive as cu_seq_lens_q, so there is no mask to build
    AttentionMaskInterface.register(NAME, lambda *args, **kwargs: None)
    return NAME, reason


@contextmanager
def plain_attention(model: Any) -> Iterator[None]:
    """SDPA with transformers' own masks, for generation, where rows are padded and not packed."""
    model.set_attn_implementation("sdpa")
    try:
        yield
    finally:
        model.set_attn_implementation(NAME)


def _by_conversation(
    module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: None,
    scaling: float, cu_seq_lens_q: torch.Tensor, dropout: float = 0.0, **_: Any,
) -> tuple[torch.Tensor, None]:  # fmt: skip
    """query, key, value: (1, heads, T, head size) -> (1, T, heads, head size)."""
    borders = cu_seq_lens_q.tolist()
    parts = [
        scaled_dot_product_attention(
            query[:, :, a:b], key[:, :, a:b], value[:, :, a:b], is_causal=True, scale=scaling, enable_gqa=True
        )
        for a, b in zip(borders, borders[1:], strict=False)
    ]
    return torch.cat(parts, dim=2).transpose(1, 2), None


def _varlen(
    module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: None,
    scaling: float, cu_seq_lens_q: torch.Tensor, max_length_q: int, dropout: float = 0.0, **_: Any,
) -> tuple[torch.Tensor, None]:  # fmt: skip
    """As `_by_conversation`, in one kernel; heads of a group are repeated, which varlen in torch 2.11 asks for."""
    from torch.nn.attention.varlen import varlen_attn

    groups = query.shape[1] // key.shape[1]
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    kernel: Callable[..., torch.Tensor] = varlen_attn
    out = kernel(
        q, k, v, cu_seq_lens_q, cu_seq_lens_q, max_length_q, max_length_q, scale=scaling, window_size=(-1, 0)
    )
    return out[None], None
