"""Attention over packed rows: no position sees another conversation. Chosen once, with its reason."""

import inspect
from collections.abc import Callable, Generator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

NAME = "phoque_packed"  # transformers sends any name with 'flash' in it to its own loader


def choose(device: torch.device, traced: bool = False) -> tuple[str, str]:
    """Register the packed attention for this device; return its name for transformers, and the reason.

    `traced` asks for one that torch.compile can follow, which needs borders to stay where they are: on the device.
    """
    from transformers import AttentionInterface, AttentionMaskInterface

    attend, reason = _by_conversation, "SDPA a conversation at a time: no mask is built, no padding attended"
    if device.type == "cuda":
        attend, reason = _varlen(), "torch.nn.attention.varlen: one kernel over all conversations of a row"
    elif traced:
        attend, reason = _by_mask, "SDPA with a mask: no length is read while the layers run"
    AttentionInterface.register(NAME, attend)
    # the borders arrive as cu_seq_lens_q, so there is no mask to build
    AttentionMaskInterface.register(NAME, lambda *args, **kwargs: None)
    return NAME, reason


@contextmanager
def plain_attention(model: Any) -> Generator[None]:
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
        for a, b in pairwise(borders)
    ]
    return torch.cat(parts, dim=2).transpose(1, 2), None


def _by_mask(
    module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: None,
    scaling: float, cu_seq_lens_q: torch.Tensor, dropout: float = 0.0, **_: Any,
) -> tuple[torch.Tensor, None]:  # fmt: skip
    """As `_by_conversation`, with the borders as a mask."""
    places = torch.arange(query.shape[2], device=query.device)
    segment = torch.searchsorted(cu_seq_lens_q, places.int(), right=True)
    seen = (segment[:, None] == segment) & (places[:, None] >= places)
    out = scaled_dot_product_attention(query, key, value, attn_mask=seen, scale=scaling, enable_gqa=True)
    return out.transpose(1, 2), None


def _varlen() -> Callable[..., tuple[torch.Tensor, None]]:
    """As `_by_conversation`, in one kernel; torch before 2.12 takes no groups, so heads are repeated there."""
    from torch.nn.attention import varlen

    attend: Any = varlen.varlen_attn
    grouped = "enable_gqa" in inspect.signature(attend).parameters

    def attention(
        module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: None,
        scaling: float, cu_seq_lens_q: torch.Tensor, max_length_q: int, dropout: float = 0.0, **_: Any,
    ) -> tuple[torch.Tensor, None]:  # fmt: skip
        q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
        options: dict[str, Any] = {"scale": scaling, "window_size": (-1, 0)}
        if grouped:
            options["enable_gqa"] = True
        else:
            groups = query.shape[1] // key.shape[1]
            k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
        out = attend(q, k, v, cu_seq_lens_q, cu_seq_lens_q, max_length_q, max_length_q, **options)
        return out[None], None

    return attention
