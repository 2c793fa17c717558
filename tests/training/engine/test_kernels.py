"""The engine's Triton kernels compute what PyTorch computes: here in Triton's interpreter, on a GPU in benchmarks/."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tests import tiny
from tests.training.engine.test_engine import (
    PACKING,
    adapted_model,
    family,
    relative_distance,
    run_engine,
    run_plain_layers,
)
from torch.nn.functional import gelu, silu

from phoque.training.engine import attention, attention_kernels, gated_kernels
from phoque.training.engine.engine import Engine
from phoque.training.engine.lora_linear import quantize_fp8
from phoque.training.engine.select import select_engine

ROWS = {  # heads, key heads, head size, cumulative lengths, window
    "short conversations": (4, 2, 32, (0, 5, 5, 6, 90, 90, 150, 150, 150), None),
    "a size between powers of two": (4, 4, 24, (0, 100, 150), None),
    "one conversation of several tiles": (6, 2, 64, (0, 200), None),
    "a window": (2, 1, 16, (0, 128, 130, 131), 3),
    "a window of more than a tile": (2, 2, 16, (0, 20, 190), 70),
    "wide heads": (2, 1, 256, (0, 30, 70), None),
}


@pytest.mark.parametrize("name", ROWS)
def test_attention_kernels_give_the_outputs_and_gradients_of_sdpa(name):
    heads, kv_heads, size, borders, window = ROWS[name]
    torch.manual_seed(0)
    tensors = [torch.randn(1, h, borders[-1], size, requires_grad=True) for h in (heads, kv_heads, kv_heads)]
    results = []
    for attend in (attention_kernels.attend_packed, attention._sdpa_per_conversation):
        cu_seq_lens = torch.tensor(borders, dtype=torch.int32)
        out, _ = attend(None, *tensors, None, scaling=0.3, cu_seq_lens_q=cu_seq_lens, sliding_window=window)
        slope = torch.linspace(-1, 1, out.numel()).view_as(out)
        results.append([out, *torch.autograd.grad(out, tensors, slope)])
    for ours, plain in zip(*results, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-4, atol=3e-5)


def gate_in_torch(base, xa, b, activation, quantize):
    """What gated_kernels.gate computes."""
    features, rank = base.shape[1] // 2, b.shape[1]
    adapted = base + torch.cat([xa[:, :rank] @ b[:features].T, xa[:, rank:] @ b[features:].T], 1)
    gates, ups = adapted.split(features, 1)
    hidden = (silu(gates) if activation == "silu" else gelu(gates, approximate="tanh")) * ups
    return hidden, gated_kernels.Quantized(*quantize_fp8(hidden)) if quantize else None


def gate_backward_in_torch(grad, grad_xa, base, xa, b, down_a, activation, scales, recompute):
    """What gated_kernels.gate_backward computes."""
    features, rank = base.shape[1] // 2, b.shape[1]
    adapted = base + torch.cat([xa[:, :rank] @ b[:features].T, xa[:, rank:] @ b[features:].T], 1)
    gates, ups = adapted.split(features, 1)
    upstream = grad + grad_xa @ down_a
    if activation == "silu":
        active, grad_gates = silu(gates), torch.ops.aten.silu_backward(upstream * ups, gates)
    else:
        active = gelu(gates, approximate="tanh")
        grad_gates = torch.ops.aten.gelu_backward(upstream * ups, gates, approximate="tanh")
    gradient, hidden = torch.cat([grad_gates, upstream * active], 1), active * ups
    quantized = None if scales is None else gated_kernels.Quantized(*quantize_fp8(gradient * scales))
    return gated_kernels.GatedGradients(gradient, quantized, hidden if recompute else None)


@pytest.mark.parametrize(
    ("tokens", "features", "rank", "activation"),
    [(70, 300, 4, "silu"), (40, 256, 16, "gelu_pytorch_tanh"), (33, 100, 20, "silu")],
)
@pytest.mark.parametrize("recompute", [False, True])
def test_gated_kernels_give_the_activation_and_its_gradients(tokens, features, rank, activation, recompute):
    torch.manual_seed(0)
    shapes = (tokens, 2 * features), (tokens, 2 * rank), (2 * features, rank), (rank, features)
    base, xa, b, down_a = (torch.randn(shape) for shape in shapes)
    scales, grad, grad_xa = torch.rand(2 * features), torch.randn(tokens, features), torch.randn(tokens, rank)
    assert gated_kernels.gate(base, xa, b, activation, False)[1] is None
    (hidden, quantized), (expected, expected_codes) = (
        run(base, xa, b, activation, True) for run in (gated_kernels.gate, gate_in_torch)
    )
    torch.testing.assert_close(hidden, expected, rtol=1e-4, atol=1e-4)
    check_quantized(quantized, expected_codes)
    found, wanted = (
        run(grad, grad_xa, base, xa, b, down_a, activation, scales, recompute)
        for run in (gated_kernels.gate_backward, gate_backward_in_torch)
    )
    torch.testing.assert_close(found.base, wanted.base, rtol=1e-4, atol=1e-4)
    check_quantized(found.quantized, wanted.quantized)
    if recompute:
        torch.testing.assert_close(found.hidden, wanted.hidden, rtol=1e-4, atol=1e-4)
    assert (found.hidden is None) == (wanted.hidden is None) == (not recompute)


def check_quantized(found, wanted):
    """The scales agree, and the codes but for the interpreter's errors: it loses the carry of a mantissa."""
    torch.testing.assert_close(found.factors, wanted.factors)
    values, expected = found.codes.float(), wanted.codes.float()
    assert ((values - expected).abs() <= expected.abs() / 8 + 2**-6).float().mean() > 0.9


def fuse_mlps(engine, saves_memory=False):
    """As on a GPU, without asking for one."""
    engine.recompute_pointwise, engine.fused_mlps = saves_memory, True
    engine.set_weight_cache(not saves_memory)
    return engine


@pytest.mark.parametrize("saves_memory", [False, True])
@pytest.mark.parametrize("compiled", [False, True])
def test_gated_mlps_as_one_operator_give_the_plain_hidden_states_and_gradients(tmp_path, compiled, saves_memory):
    tiny.fp8_mistral3(tmp_path)
    engine = fuse_mlps(Engine(adapted_model(tmp_path), compiled=compiled), saves_memory)
    assert engine._activation == "silu"
    assert relative_distance(run_engine(engine), run_plain_layers(tmp_path)) < 1e-5


@pytest.mark.parametrize("saves_memory", [False, True])
@pytest.mark.parametrize("quantization", ["nf4", "bf16", "fp8"])
def test_gated_mlps_as_one_operator_agree_with_their_linear_layers(monkeypatch, tmp_path, quantization, saves_memory):
    monkeypatch.setattr(gated_kernels, "gate", gate_in_torch)  # the interpreter multiplies no bf16
    monkeypatch.setattr(gated_kernels, "gate_backward", gate_backward_in_torch)
    tiny.fp8_mistral3(tmp_path)
    layer_by_layer = Engine(adapted_model(tmp_path, quantization))
    layer_by_layer.set_weight_cache(not saves_memory)
    fused = fuse_mlps(Engine(adapted_model(tmp_path, quantization)), saves_memory)
    # both round to bf16, in other places; either differs by 0.05 to 0.2 from the plain layers
    assert relative_distance(run_engine(fused), run_engine(layer_by_layer)) < 0.1


def test_gated_mlps_as_one_operator_know_gemmas_activation(tmp_path):
    folder = family(tmp_path, "gemma3_text")
    engine = fuse_mlps(Engine(adapted_model(folder)))
    assert engine._activation == "gelu_pytorch_tanh"
    assert relative_distance(run_engine(engine), run_plain_layers(folder)) < 1e-4


@pytest.mark.parametrize("modules", ["attention", "gate_proj", "gate_proj,up_proj"])
def test_mlps_without_all_adapters_run_layer_by_layer(tmp_path, modules):
    tiny.fp8_mistral3(tmp_path)
    assert Engine(adapted_model(tmp_path, modules=modules))._activation == ""


def test_gated_mlps_that_fail_in_the_trial_run_layer_by_layer_in_the_same_mode(monkeypatch, tmp_path):
    def set_fused_mlps(engine, enabled):
        engine.fused_mlps = enabled and bool(engine._activation)
        engine._fuse_mlps()
        return engine.fused_mlps

    def fail(*_):
        raise NotImplementedError("no such instruction on this gull")

    monkeypatch.setattr(Engine, "set_fused_mlps", set_fused_mlps)  # as on a GPU
    monkeypatch.setattr(gated_kernels, "gate", fail)
    tiny.fp8_mistral3(tmp_path)
    chosen = select_engine(adapted_model(tmp_path), "compile", PACKING, 10, recompute=False)
    assert chosen.mode == "compiled" and not chosen.record()["fused_mlps"]
    assert "compiled with gated MLPs as one operator failed: no such instruction" in chosen.reason
    assert relative_distance(run_engine(chosen.engine), run_plain_layers(tmp_path)) < 1e-5


@pytest.mark.parametrize("columns", [100, 1024, 2600])
@pytest.mark.parametrize("has_scales", [False, True])
def test_rows_are_quantized_by_their_largest_value(columns, has_scales):
    torch.manual_seed(0)
    values, scales = torch.randn(11, columns), torch.rand(columns) if has_scales else None
    scaled = values * scales if has_scales else values
    parts = torch.stack([part.abs().amax(1) for part in scaled.split(90, 1)])
    check_quantized(gated_kernels._quantize_rows(values, scales, parts), gated_kernels.Quantized(*quantize_fp8(scaled)))


@pytest.mark.thorough
def test_kernels_compile_for_every_gpu_and_fit_its_shared_memory(tmp_path):
    """Triton compiles without a GPU; it does not in a process that interprets."""
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    script = Path(__file__).with_name("compile_kernels.py")
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    needed = json.loads(done.stdout)
    gpus = {"sm80": 163, "sm86": 99, "sm89": 99, "sm90": 227, "sm100": 227, "sm120": 99}  # KiB per block of threads
    with_fp8 = [gpu for gpu in gpus if gpu not in ("sm80", "sm86")]
    assert len(needed) == (5 * 3 + 1) * len(gpus) + 2 * len(with_fp8)
    for kernel, kib in needed.items():
        assert kib <= gpus[kernel.split()[-1]], kernel
