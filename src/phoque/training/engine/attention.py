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
# cumulative lengths of the rows that kernels are compared on; some conversations are empty. Triton compiles one variant
# for rows whose length is a multiple of 16, as with an engine, and one for others
TEST_CU_SEQ_LENS = (0, 70, 71, 208, 208, 208), (0, 70, 71, 200, 200, 200)
MAX_DIFFERENCE = 0.02  # largest relative difference of two kernels in bf16
AMPERE = (8, 0)  # the lowest compute capability that FlashAttention supports
MIN_FLASH_4_TOKENS = 2**24  # fewer do not pay for its build (H100: benchmarks/train_speed.py)
MIN_PACKED_TOKENS = 2**20  # fewer do not pay for compiling the kernels of attention_kernels.py, 3 s
# mean lengths up to which those kernels are used. Torch 2.11's kernel, which repeats key heads, was slower up to 4,000
# tokens with 32 heads and 8 key heads of size 128; flash-attn-4 was not compared
LONGEST_PACKED_MEAN, LONGEST_PACKED_MEAN_BESIDE_FLASH_4 = 4096, 1024  # H100: benchmarks/attention.py


def select_attention(
    device: torch.device,
    config: "PretrainedConfig",
    dtype: torch.dtype,
    tokens: float,
    mean_length: float,
    compiled: bool = False,
) -> tuple[str, str]:
    """Register packed attention for this device and model config; return its name in transformers and the reason.

    `dtype` is the dtype of queries, keys and values. `tokens` is the number of tokens that the whole run processes, in
    conversations of `mean_length`: a kernel that is slow to build must save more time than its build takes. `compiled`
    requires an implementation that torch.compile can trace, which must not copy the sequence lengths to the CPU. The
    choice depends on no measured speed, so that a resumed run makes it again.
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
        attend, reason = _select_on_cuda(device, config, tokens, mean_length)
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


def _select_on_cuda(
    device: torch.device, config: "PretrainedConfig", tokens: float, mean_length: float
) -> tuple[Attention, str]:
    """Select the fastest kernel that works, agrees with torch's, and is worth the time that building it takes."""
    varlen, reason = _make_varlen_attention(), "torch.nn.attention.varlen: one kernel for all conversations of a row"
    text_config = config.get_text_config()
    has_flash_4 = bool([*distributions(name="flash-attn-4")])  # FlashAttention 2 installs modules of the same name
    if mean_length <= (LONGEST_PACKED_MEAN_BESIDE_FLASH_4 if has_flash_4 else LONGEST_PACKED_MEAN):
        name = "phoque's kernels for short conversations"
        if tokens < MIN_PACKED_TOKENS:
            return varlen, f"{reason}; {name} take 3 s to compile, too long for {tokens / 1e6:.1f} M tokens"
        if not (problem := _find_problem(_load_packed_attention, varlen, device, text_config)):
            return _load_packed_attention(), f"{name}, which have {mean_length:.0f} tokens on average"
        reason = f"{reason}; {name} cannot be used: {problem}"
    if not has_flash_4:
        return varlen, reason
    if sliding_window_of(text_config):
        return varlen, f"{reason}; flash-attn-4 is used for models without a sliding window only"
    if tokens < MIN_FLASH_4_TOKENS:
        return varlen, f"{reason}; flash-attn-4 takes 15 s to build, too long for {tokens / 1e6:.1f} M tokens"
    if problem := _find_problem(lambda: flash_attention_4, varlen, device, text_config):
        return varlen, f"{reason}; flash-attn-4 is installed and cannot be used: {problem}"
    return flash_attention_4, "flash-attn-4: one kernel for all conversations of a row, with grouped heads"


def _load_packed_attention() -> Attention:
    from phoque.training.engine.attention_kernels import attend_packed  # it imports Triton

    return attend_packed


def _find_problem(
    load: Callable[[], Attention], reference: Attention, device: torch.device, config: "PretrainedConfig"
) -> str:
    """Return why a kernel cannot be used on this device, or "" if it works and agrees with the reference."""
    try:
        difference = _measure_difference(load(), reference, device, config)
    except Exception as error:  # a kernel that is built on this machine must not end the run, however it fails
        return " ".join(str(error).split())[:120] or type(error).__name__
    return "" if difference <= MAX_DIFFERENCE else f"results differ by {difference:.1%} from torch's kernel"


def _measure_difference(
    candidate: Attention, reference: Attention, device: torch.device, config: "PretrainedConfig"
) -> float:
    """Return the largest relative difference between two kernels' outputs and gradients on a short row."""
    cases = [(borders, None) for borders in TEST_CU_SEQ_LENS]
    if window := sliding_window_of(config):
        cases.append((TEST_CU_SEQ_LENS[0], min(window, 64)))
    return max(_measure_row(candidate, reference, device, config, *case) for case in cases)


def _measure_row(
    candidate: Attention,
    reference: Attention,
    device: torch.device,
    config: "PretrainedConfig",
    borders: tuple[int, ...],
    window: int | None,
) -> float:
    heads, kv_heads, size = config.num_attention_heads, config.num_key_value_heads, head_dim_of(config)
    rng = torch.Generator(device).manual_seed(0)
    q, k, v, grad_out = (
        torch.randn(1, n, borders[-1], size, generator=rng, device=device, dtype=torch.bfloat16, requires_grad=True)
        for n in (heads, kv_heads, kv_heads, heads)
    )
    options: dict[str, Any] = {"cu_seq_lens_q": torch.tensor(borders, dtype=torch.int32, device=device)}
    options |= {"scaling": size**-0.5, "max_length_q": borders[-1], "sliding_window": window}
    results = []
    for attend in (candidate, reference):
        out, _ = attend(None, q, k, v, None, **options)
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
        q, k, v = (x.squeeze(0).transpose(0, 1) for x in (query, key, value))
        options: dict[str, Any] = {"scale": scaling, "window_size": (sliding_window - 1 if sliding_window else -1, 0)}
        if supports_gqa:
            options["enable_gqa"] = True
        else:
            repeats = query.shape[1] // key.shape[1]
            k, v = k.repeat_interleave(repeats, dim=1), v.repeat_interleave(repeats, dim=1)
        out = attend(q, k, v, cu_seq_lens_q, cu_seq_lens_q, max_length_q, max_length_q, **options)
        return out[None], None

    return attention
