"""Blocks of bits: what ONNX Runtime makes of them, and that GPTQ loses less than rounding."""

import numpy as np
import onnx_ir as ir
import pytest
import torch

from phoque.onnx.quantize.block_format import choose_group_size, pack_codes, round_to_nearest
from phoque.onnx.quantize.gptq import quantize_matrix, search_scales
from phoque.onnx.session import open_session


def multiply_in_onnxruntime(blocks, x, folder):
    """x @ weight.T by MatMulNBits."""
    rows, columns = blocks.scales.shape[0], x.shape[1]
    given = ir.Value(name="x", shape=ir.Shape([1, columns]), type=ir.TensorType(ir.DataType.FLOAT))
    held = [blocks.codes, blocks.scales] + ([] if blocks.zeros is None else [blocks.pack_zeros()])
    values = [ir.Value(name=f"w{n}", const_value=ir.tensor(t.numpy(), name=f"w{n}")) for n, t in enumerate(held)]
    for value in values:
        value.shape, value.type = value.const_value.shape, ir.TensorType(value.const_value.dtype)
    attributes = {"K": columns, "N": rows, "bits": blocks.bits, "block_size": choose_group_size(columns)}
    node = ir.node("MatMulNBits", [given, *values], attributes, domain="com.microsoft")
    node.outputs[0].name, node.outputs[0].type = "y", ir.TensorType(ir.DataType.FLOAT)
    graph = ir.Graph(
        [given], node.outputs, nodes=[node], initializers=values, name="g", opset_imports={"": 20, "com.microsoft": 1}
    )
    ir.save(ir.Model(graph, ir_version=10), folder / "g.onnx")
    return open_session(folder / "g.onnx").run(None, {"x": x})[0]


@pytest.mark.parametrize("columns", [96, 160, 192, 256])  # odd and even numbers of blocks, of 32 and of 64
@pytest.mark.parametrize("bits", [4, 8])
def test_onnxruntime_reads_blocks_as_they_are_meant(tmp_path, bits, columns):
    generator = torch.Generator().manual_seed(bits)
    weight = torch.randn(24, columns, generator=generator)
    blocks = round_to_nearest(weight, 8) if bits == 8 else quantize_matrix(weight, torch.eye(columns))
    x = torch.randn(1, columns, generator=generator)
    wanted = x @ blocks.dequantize().T
    assert np.abs(multiply_in_onnxruntime(blocks, x.numpy(), tmp_path) - wanted.numpy()).max() < 1e-4
    assert (blocks.dequantize() - weight).abs().max() < (0.05 if bits == 8 else 0.6)


def test_codes_are_packed_low_half_first():
    codes = torch.arange(64)[None] % 16
    assert pack_codes(codes, 4)[0, 0, :2].tolist() == [0 | 1 << 4, 2 | 3 << 4]


def test_gptq_errs_less_in_what_the_layer_says_than_rounding_does():
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(96, 96, generator=generator)
    x = torch.randn(2000, 96, generator=generator) @ mix  # activations that depend on each other, as real ones do
    weight = torch.randn(32, 96, generator=generator)
    found = quantize_matrix(weight, x.T @ x).dequantize()
    nearest = weight + search_scales(weight, None)[0]
    off = lambda other: ((other - weight) @ x.T).square().mean()
    assert off(found) < 0.6 * off(nearest)
