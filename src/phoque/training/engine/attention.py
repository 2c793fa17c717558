"""Attention over packed rows: no position sees another conversation. Chosen once, with its reason."""

import inspect
from collections.abc import Callable, Generator
from contextlib import contextmanager
from importlib.metadata import distributions
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from phoque.training.engine.flash_attn4 import flash_4

Attention = Callable[..., tuple[Tensor, None]]
NAME = "phoque_packed"  # transformers sends any name with 'flash' in it to its own loader
LENGTHS = (0, 70, 71, 200, 200, 200)  # borders of the row that kernels are compared on, with segments of no length
AGREES = 0.02  # largest relative difference of two kernels in bf16
AMPERE = (8, 0)  # the least compute capability of FlashAttention
FLASH_4_TOKENS = 2**24  # of short conversations, on an H100: benchmarks/train_speed.py


def choose(
    device: torch.device, config: Any, dtype: torch.dtype, tokens: float, traced: bool = False
) -> tuple[str, str]:
    """Register the packed attention for this device and a model's config; return its name for transformers, and why.

    `dtype` is that of queries, keys and values. `tokens` are those that the run is going to read: kernels that take
    long to build must pay. `traced` asks for one that torch.compile can follow, which needs borders to stay where they
    are: on the device.
    """
    from transformers import AttentionInterface, AttentionMaskInterface

    cuda = device.type == "cuda"
    attend, reason = _by_conversation, "SDPA a conversation at a time: no mask is built, no padding attended"
    if cuda and dtype != torch.float32 and torch.cuda.get_device_capability(device) >= AMPERE:
        attend, reason = _on_cuda(device, config, tokens)
    elif cuda:
        attend, reason = _by_mask, "SDPA with a mask: kernels without one want 16 bits and an Ampere GPU or later"
    elif traced:
        attend, reason = _by_mask, "SDPA with a mask: no length is read while the layers run"
    AttentionInterface.register(NAME, attend)
    # the borders arrive as cu_seq_lens_q, so transformers has no mask to build
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
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: None,
    scaling: float,
    cu_seq_lens_q: Tensor,
    dropout: float = 0.0,
    **_: Any,
) -> tuple[Tensor, None]:
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
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: None,
    scaling: float,
    cu_seq_lens_q: Tensor,
    dropout: float = 0.0,
    **_: Any,
) -> tuple[Tensor, None]:
    """As `_by_conversation`, with the borders as a mask."""
    places = torch.arange(query.shape[2], device=query.device)
    segment = torch.searchsorted(cu_seq_lens_q, places.int(), right=True)
    seen = (segment[:, None] == segment) & (places[:, None] >= places)
    groups = query.shape[1] // key.shape[1]  # CUDA's kernels that take a mask take no groups
    key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    out = scaled_dot_product_attention(query, key, value, attn_mask=seen, scale=scaling)
    return out.transpose(1, 2), None


def _on_cuda(device: torch.device, config: Any, tokens: float) -> tuple[Attention, str]:
    """FlashAttention 4 where it is installed, right and worth its build, else torch's kernel: FlashAttention 2."""
    own, reason = _varlen(), "torch.nn.attention.varlen: one kernel over all conversations of a row"
    if not [*distributions(name="flash-attn-4")]:  # FlashAttention 2 has modules of the same name
        return own, reason
    if tokens < FLASH_4_TOKENS:
        return own, f"{reason}; flash-attn-4 takes 15 s to build, which {tokens / 1e6:.1f} M tokens do not win back"
    try:
        far = _difference(flash_4, own, device, config.get_text_config())
    except Exception as error:  # kernels of another package can fail in many ways, none of which ends a run
        return own, f"{reason}; flash-attn-4 is installed and fails: {' '.join(str(error).split())[:120]}"
    if not far <= AGREES:
        return own, f"{reason}; flash-attn-4 is installed and {far:.1%} off"
    return flash_4, "flash-attn-4: one kernel over all conversations of a row, and heads in groups"


def _difference(one: Attention, other: Attention, device: torch.device, config: Any) -> float:
    """The largest relative difference of what two attentions make of a short row, and of their gradients."""
    heads, size = config.num_attention_heads, config.hidden_size // config.num_attention_heads
    shared, size = config.num_key_value_heads, getattr(config, "head_dim", None) or size
    drawn = torch.Generator(device).manual_seed(0)
    q, k, v, slope = (
        torch.randn(1, n, LENGTHS[-1], size, generator=drawn, device=device, dtype=torch.bfloat16, requires_grad=True)
        for n in (heads, shared, shared, heads)
    )
    borders = torch.tensor(LENGTHS, dtype=torch.int32, device=device)
    found = []
    for attend in (one, other):
        out, _ = attend(None, q, k, v, None, scaling=size**-0.5, cu_seq_lens_q=borders, max_length_q=LENGTHS[-1])
        found.append([out.detach(), *torch.autograd.grad(out, (q, k, v), slope.transpose(1, 2))])
    return max(float((a - b).float().norm() / b.float().norm()) for a, b in zip(*found, strict=True))


def _varlen() -> Attention:
    """As `_by_conversation`, in one kernel; torch before 2.12 takes no groups, so heads are repeated there."""
    from torch.nn.attention import varlen

    attend: Any = varlen.varlen_attn
    grouped = "enable_gqa" in inspect.signature(attend).parameters

    def attention(
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
