"""Which attention kernel is taken, and flash-attn-4 as one operator: a stand-in has the names of its kernels."""

import sys
from pathlib import Path

import pytest
import torch
from tests import tiny
from transformers import AttentionInterface, AutoConfig, LlamaConfig

from phoque.training.engine import attention
from phoque.training.engine.flash_attn4 import flash_attention_4

BORDERS = torch.tensor([0, 5, 6, 19], dtype=torch.int32)


@pytest.fixture
def stand_in(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent / "flash_stand_in"))
    monkeypatch.setattr(
        attention, "_make_varlen_attention", lambda: attention._sdpa_per_conversation
    )  # torch's own needs a GPU as well
    yield AutoConfig.for_model("llama", **tiny.SIZES)
    for name in [name for name in sys.modules if name.partition(".")[0] == "flash_attn"]:
        del sys.modules[name]


def run_attention(attend, query, key, value):
    out, _ = attend(None, query, key, value, None, scaling=0.3, cu_seq_lens_q=BORDERS, max_length_q=16)
    slope = torch.linspace(-1, 1, out.numel()).view_as(out)
    return [out, *torch.autograd.grad(out, (query, key, value), slope)]


@pytest.mark.parametrize("compiled", [False, True])
def test_the_operator_hands_tensors_and_gradients_to_the_right_places(stand_in, compiled):
    torch.manual_seed(0)
    given = [torch.randn(1, heads, 19, 8, requires_grad=True) for heads in (6, 2, 2)]
    operator = torch.compile(flash_attention_4, fullgraph=True) if compiled else flash_attention_4
    found, wanted = run_attention(operator, *given), run_attention(attention._sdpa_per_conversation, *given)
    for ours, plain in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, plain)


def test_it_is_taken_where_it_is_installed_right_and_pays(stand_in, monkeypatch):
    cpu, long, mean_length = torch.device("cpu"), float("inf"), 9000
    assert attention._select_on_cuda(cpu, stand_in, long, mean_length) == (
        flash_attention_4,
        "flash-attn-4: one kernel for all conversations of a row, with grouped heads",
    )
    attend, reason = attention._select_on_cuda(cpu, stand_in, 2.1e6, mean_length)
    assert attend is attention._sdpa_per_conversation and "takes 15 s to build, too long for 2.1 M tokens" in reason
    monkeypatch.setenv("FLASH_STAND_IN", "wrong")
    attend, reason = attention._select_on_cuda(cpu, stand_in, long, mean_length)
    assert attend is attention._sdpa_per_conversation and reason.endswith("% from torch's kernel")
    monkeypatch.setenv("FLASH_STAND_IN", "fails")
    attend, reason = attention._select_on_cuda(cpu, stand_in, long, mean_length)
    assert attend is attention._sdpa_per_conversation and reason.endswith(
        "cannot be used: no kernel image is available"
    )


@pytest.mark.parametrize("dtype, capability", [(torch.float32, (9, 0)), (torch.bfloat16, (7, 5))])
def test_a_gpu_s_fp32_and_old_gpus_get_a_mask(monkeypatch, dtype, capability):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda on: capability)
    name, reason = attention.select_attention(torch.device("cuda"), LlamaConfig(), dtype, float("inf"), 100)
    assert AttentionInterface()[name] is attention._sdpa_with_mask and "Ampere" in reason
    given = [torch.randn(1, heads, 19, 8, requires_grad=True) for heads in (6, 2, 2)]
    found, wanted = (
        run_attention(attention._sdpa_with_mask, *given),
        run_attention(attention._sdpa_per_conversation, *given),
    )
    for ours, plain in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, plain)


def test_short_conversations_get_kernels_of_their_own_where_compiling_pays(stand_in, monkeypatch):
    cpu, long = torch.device("cpu"), float("inf")
    monkeypatch.setattr(attention, "_load_packed_attention", lambda: attention._sdpa_with_mask)
    attend, reason = attention._select_on_cuda(cpu, stand_in, long, 120.4)
    assert attend is attention._sdpa_with_mask
    assert reason == "phoque's kernels for short conversations, which have 120 tokens on average"
    attend, reason = attention._select_on_cuda(cpu, stand_in, 0.9e6, 120)
    assert attend is attention._sdpa_per_conversation and "take 3 s to compile, too long for 0.9 M tokens" in reason
    assert attention._select_on_cuda(cpu, stand_in, long, 2000)[0] is flash_attention_4
    monkeypatch.setattr(attention, "distributions", lambda name: [])
    assert attention._select_on_cuda(cpu, stand_in, long, 2000)[0] is attention._sdpa_with_mask
    monkeypatch.setattr(attention, "_load_packed_attention", lambda: 1 / 0)
    attend, reason = attention._select_on_cuda(cpu, stand_in, long, 120)
    assert attend is attention._sdpa_per_conversation and reason.endswith("cannot be used: division by zero")


def test_without_it_torch_s_kernel_is_taken(monkeypatch):
    monkeypatch.setattr(attention, "distributions", lambda name: [])
    monkeypatch.setattr(attention, "_make_varlen_attention", lambda: attention._sdpa_per_conversation)
    attend, reason = attention._select_on_cuda(torch.device("cpu"), LlamaConfig(), float("inf"), 9000)
    assert attend is attention._sdpa_per_conversation and "flash" not in reason
