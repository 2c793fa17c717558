"""Group-wise quantized weights, one scale per group, in the layout of ONNX Runtime's MatMulNBits.

A group is a run of 64 or 32 weights in a row; MatMulNBits calls it a block.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

GROUP_SIZES = (64, 32)  # weights per group, the first that divides the columns; 64 is up to 25% faster than 32


@dataclass(frozen=True)
class QuantizedMatrix:
    """A matrix [rows, columns] quantized to 4 or 8 bits: weight = (code - zero) * scale, per group.

    `codes` are unsigned integers. Without `zeros` the zero point of every group is 2^(bits-1).
    """

    bits: int
    codes: torch.Tensor  # uint8 [rows, groups, group size * bits / 8]; of two 4-bit codes the first is in the low half
    scales: torch.Tensor  # fp32 [rows, groups]
    zeros: torch.Tensor | None = None  # uint8 [rows, groups]

    def dequantize(self) -> torch.Tensor:
        """Return the matrix [rows, columns] in fp32."""
        codes = torch.stack([self.codes & 15, self.codes >> 4], -1).flatten(-2) if self.bits == 4 else self.codes
        zero = 2 ** (self.bits - 1) if self.zeros is None else self.zeros.float()[..., None]
        return ((codes.float() - zero) * self.scales[..., None]).flatten(1)

    def pack_zeros(self) -> torch.Tensor:
        """Return the zero points as MatMulNBits reads them: `bits` bits each, every row padded to whole bytes."""
        assert self.zeros is not None
        if self.bits == 8:
            return self.zeros
        padding = self.zeros.shape[1] % 2
        zeros = torch.nn.functional.pad(self.zeros, (0, padding)) if padding else self.zeros
        return zeros[:, 0::2] | (zeros[:, 1::2] << 4)


def choose_group_size(columns: int) -> int:
    """Return the number of weights in a row that share a scale."""
    return next(size for size in GROUP_SIZES if columns % size == 0)


def split_groups(matrix: torch.Tensor) -> torch.Tensor:
    """Reshape [..., columns] to [..., groups, group size]."""
    return matrix.unflatten(-1, (-1, choose_group_size(matrix.shape[-1])))


def pack_codes(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Pack codes [rows, columns] as MatMulNBits stores them: uint8 [rows, groups, group size * bits / 8]."""
    codes = split_groups(codes.to(torch.uint8))
    return codes if bits == 8 else codes[..., 0::2] | (codes[..., 1::2] << 4)


def round_to_nearest(weight: torch.Tensor, bits: int = 8) -> QuantizedMatrix:
    """Quantize a matrix [rows, columns] symmetrically by rounding to the nearest code."""
    groups = split_groups(weight)
    half_range = 2 ** (bits - 1)
    scales = (groups.abs().amax(-1) / (half_range - 1)).clamp(min=1e-12)
    codes = (groups / scales[..., None]).round().clamp(-half_range, half_range - 1) + half_range
    return QuantizedMatrix(bits, pack_codes(codes.flatten(1), bits), scales)


@dataclass(frozen=True)
class Quantizer:
    """How to quantize parameters, by name: `quantize` computes one, `format_of` returns its (bits, has zeros).

    With `dequantize_on_load` a runtime dequantizes the weights when it loads the graph, and multiplies in fp32.
    """

    quantize: Callable[[str], QuantizedMatrix]
    format_of: Callable[[str], tuple[int, bool]]
    dequantize_on_load: bool = False


def make_8_bit_quantizer(read: Callable[[str], torch.Tensor]) -> Quantizer:
    """Return a quantizer that rounds every parameter to the nearest 8-bit code; `read` returns a parameter by name."""
    return Quantizer(lambda name: round_to_nearest(read(name)), lambda name: (8, False))


def can_quantize(shape: tuple[int, ...]) -> bool:
    """Return whether a weight of this shape can be quantized: a matrix whose columns are a multiple of 32."""
    return len(shape) == 2 and shape[1] % GROUP_SIZES[-1] == 0
