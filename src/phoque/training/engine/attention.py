"""Attention over packed rows: no token attends to another conversation, nor beyond its layer's sliding window.

The kernel is selected once per run. `sliding_window` counts tokens, the attending one included; None means all.
"""

import inspect
from collections.abc import Callable, Generator
from contextlib import contextmanager
from importlib.metadata import distributions
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from phoque.models.architectures import architecture_of
from phoque.models.config import head_dim_of, sliding_window_of
from phoque.training.engine.flash_attn4 import flash_attention_4

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

Attention = Callable[..., tuple[Tensor, None]]
NAME = "phoque_packed"  # transformers sends any name with 'flash' in it to its own loader
TEST_CU_SEQ_LENS = (
    0,
    70,
    71,
    200,
    200,
    200,
)  # cumulative lengths of the row that kernels are compared on; some are empty
MAX_DIFFERENCE = 0.02  # largest relative difference of two kernels in bf16
AMPERE = (8, 0)  # the lowest compute capability that FlashAttention supports
MIN_FLASH_4_TOKENS = 2**24  # fewer do not pay for its build (H100: benchmarks/train_speed.py)


def select_attention(
    device: torch.device, config: "PretrainedConfig", dtype: torch.dtype, tokens: float, compiled: bool = False
) -> tuple[str, str]:
    """Register packed attention for this device and model config; return its name in transformers and the reason.

    `dtype` is the dtype of queries, keys and values. `tokens` is the number of tokens that the run will process: a
    kernel that is slow to build must save more time than its build takes. `compiled` requires an implementation that
    torch.compile can trace, which must not copy the sequence lengths to the CPU.
    """
    if architecture_of(config).is_recurrent:
        return "sdpa", "SDPA: its recurrent layers run one conversation at a time, so attention does, too"
    from transformers import AttentionInterface, AttentionMaskInterface

    is_cuda = device.type == "cuda"
    attend, reason = (
        _sdpa_per_conversation,
        "SDPA, one conversation at a time: it builds no mask and computes no padding",
    )
    if is_cuda and dtype != torch.float32 and torch.cuda.get_device_capability(device) >= AMPERE:
        attend, reason = _select_on_cuda(device, config, tokens)
    elif is_cuda:
        attend, reason = (
            _sdpa_with_mask,
            "SDPA with a mask: varlen kernels need a 16-bit dtype and an Ampere GPU or later",
        )
    elif compiled:
        attend, reason = _sdpa_with_mask, "SDPA with a mask: torch.compile can trace it"
    AttentionInterface.register(NAME, attend)
    # segments are given by cu_seq_lens_q, so transformers need not build a mask
    AttentionMaskInterface.register(NAME, lambda *args, **kwargs: None)
    return NAME, reason


@contextmanager
def plain_attention(model: "PreTrainedModel") -> Generator[None]:
    """Use SDPA with transformers' own masks in the `with` block: for generation, where rows are padded."""
    previous = str(model.config._attn_implementation)
    model.set_attn_implementation("sdpa")
    try:
        yield
    finally:
        model.set_attn_implementation(previous)


def _sdpa_per_conversation(
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
    """Run SDPA once per conversation: query, key, value (1, heads, T, head size) -> (1, T, heads, head size)."""
    bounds = cu_seq_lens_q.tolist()
    parts = []
    for start, end in pairwise(bounds):
        visible = None
        if sliding_window and end - start > sliding_window:  # otherwise the window is the whole conversation
            visible = _in_window(torch.arange(end - start, device=query.device), sliding_window)
        part = scaled_dot_product_attention(
            query[:, :, start:end],
            key[:, :, start:end],
            value[:, :, start:end],
            attn_mask=visible,
            is_causal=visible is None,
            scale=scaling,
            enable_gqa=True,
        )
        parts.append(part)
    return torch.cat(parts, dim=2).transpose(1, 2), None


def _sdpa_with_mask(
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
    """Compute the same as `_sdpa_per_conversation` with one SDPA call and a block-diagonal causal mask."""
    positions = torch.arange(query.shape[2], device=query.device)
    segment = torch.searchsorted(cu_seq_lens_q, positions.int(), right=True)
    visible = (segment[:, None] == segment) & _in_window(positions, sliding_window)
    repeats = query.shape[1] // key.shape[1]  # SDPA's CUDA kernels with a mask do not support grouped heads
    key, value = (x.repeat_interleave(repeats, dim=1) for x in (key, value))
    out = scaled_dot_product_attention(query, key, value, attn_mask=visible, scale=scaling)
    return out.transpose(1, 2), None


def _in_window(positions: Tensor, sliding_window: int | None) -> Tensor:
    """Return (T, T) booleans: whether the token of each row may attend to the token of each column."""
    distance = positions[:, None] - positions
    is_causal = distance >= 0
    return is_causal & (distance < sliding_window) if sliding_window else is_causal


def _select_on_cuda(device: torch.device, config: "PretrainedConfig", tokens: float) -> tuple[Attention, str]:
    """Select FlashAttention 4 if it is installed, correct and worth its build time, else torch's varlen kernel."""
    varlen, reason = _make_varlen_attention(), "torch.nn.attention.varlen: one kernel for all conversations of a row"
    if not [*distributions(name="flash-attn-4")]:  # FlashAttention 2 installs modules of the same name
        return varlen, reason
    if sliding_window_of(config.get_text_config()):
        return varlen, f"{reason}; flash-attn-4 is used for models without a sliding window only"
    if tokens < MIN_FLASH_4_TOKENS:
        return varlen, f"{reason}; flash-attn-4 takes 15 s to build, too long for {tokens / 1e6:.1f} M tokens"
    try:
        difference = _measure_difference(flash_attention_4, varlen, device, config.get_text_config())
    except Exception as error:  # an optional package must not end the run, however it fails
        return varlen, f"{reason}; flash-attn-4 is installed but fails: {' '.join(str(error).split())[:120]}"
    if not difference <= MAX_DIFFERENCE:
        return varlen, f"{reason}; flash-attn-4 is installed but differs by {difference:.1%} from torch's kernel"
    return flash_attention_4, "flash-attn-4: one kernel for all conversations of a row, with grouped heads"


def _measure_difference(
    candidate: Attention, reference: Attention, device: torch.device, config: "PretrainedConfig"
) -> float:
    """Return the largest relative difference between two kernels' outputs and gradients on a short row."""
    heads, kv_heads, size = config.num_attention_heads, config.num_key_value_heads, head_dim_of(config)
    rng = torch.Generator(device).manual_seed(0)
    q, k, v, grad_out = (
        torch.randn(
            1, n, TEST_CU_SEQ_LENS[-1], size, generator=rng, device=device, dtype=torch.bfloat16, requires_grad=True
        )
        for n in (heads, kv_heads, kv_heads, heads)
    )
    cu_seq_lens = torch.tensor(TEST_CU_SEQ_LENS, dtype=torch.int32, device=device)
    results = []
    for attend in (candidate, reference):
        out, _ = attend(
            None, q, k, v, None, scaling=size**-0.5, cu_seq_lens_q=cu_seq_lens, max_length_q=TEST_CU_SEQ_LENS[-1]
        )
        results.append([out.detach(), *torch.autograd.grad(out, (q, k, v), grad_out.transpose(1, 2))])
    return max(float((a - b).float().norm() / b.float().norm()) for a, b in zip(*results, strict=True))


def _make_varlen_attention() -> Attention:
    """Return attention with torch's varlen kernel; before torch 2.12 it has no grouped heads, so heads are repeated."""
    from torch.nn.attention import varlen

    attend: Any = varlen.varlen_attn
    supports_gqa = "enable_gqa" in inspect.signature(attend).parameters

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
        sliding_window: int | None = None,
        **_: Any,
    ) -> tuple[Tensor, None]:
        q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
        options: dict[str, Any] = {"scale": scaling, "window_size": (sliding_window - 1 if sliding_window else -1, 0)}
        if supports_gqa:
            options["enable_gqa"] = True
        else:
            repeats = query.shape[1] // key.shape[1]
            k, v = k.repeat_interleave(repeats, dim=1), v.repeat_interleave(repeats, dim=1)
        out = attend(q, k, v, cu_seq_lens_q, cu_seq_lens_q, max_length_q, max_length_q, **options)
        return out[None], None

    return attention
