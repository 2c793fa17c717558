"""Weights in blocks with a scale each, in the layout of ONNX Runtime's MatMulNBits."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

SIZES = (64, 32)  # of a block, the first that divides a row; 64 is up to a quarter faster


@dataclass(frozen=True)
class Blocks:
    """A matrix [rows, columns] in 4 or 8 bits: `codes` are whole numbers, `scales` and `zeros` one for each block.

    Without `zeros` the zero is in the middle of the range, at 2^(bits-1).
    """

    bits: int
    codes: torch.Tensor  # uint8 [rows, blocks, block size * bits / 8], the first of two in the low half of a byte
    scales: torch.Tensor  # fp32 [rows, blocks]
    zeros: torch.Tensor | None = None  # uint8 [rows, blocks]

    def dequantised(self) -> torch.Tensor:
        """The matrix again, fp32."""
        codes = torch.stack([self.codes & 15, self.codes >> 4], -1).flatten(-2) if self.bits == 4 else self.codes
        zero = 2 ** (self.bits - 1) if self.zeros is None else self.zeros.float()[..., None]
        return ((codes.float() - zero) * self.scales[..., None]).flatten(1)

    def packed_zeros(self) -> torch.Tensor:
        """The zeros as MatMulNBits reads them: 4 bits each, a row padded to whole bytes."""
        assert self.zeros is not None
        if self.bits == 8:
            return self.zeros
        odd = self.zeros.shape[1] % 2
        zeros = torch.nn.functional.pad(self.zeros, (0, odd)) if odd else self.zeros
        return zeros[:, 0::2] | (zeros[:, 1::2] << 4)


def block_size(columns: int) -> int:
    """How many weights of a row share a scale."""
    return next(size for size in SIZES if columns % size == 0)


def in_blocks(matrix: torch.Tensor) -> torch.Tensor:
    """[rows, columns] as [rows, blocks, block size]."""
    return matrix.unflatten(-1, (-1, block_size(matrix.shape[-1])))


def packed(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Codes [rows, columns] as MatMulNBits holds them."""
    codes = in_blocks(codes.to(torch.uint8))
    return codes if bits == 8 else codes[..., 0::2] | (codes[..., 1::2] << 4)


def rounded(weight: torch.Tensor, bits: int = 8) -> Blocks:
    """A matrix rounded to the nearest, its zero in the middle."""
    blocks = in_blocks(weight)
    top = 2 ** (bits - 1)
    scales = (blocks.abs().amax(-1) / (top - 1)).clamp(min=1e-12)
    codes = (blocks / scales[..., None]).round().clamp(-top, top - 1) + top
    return Blocks(bits, packed(codes.flatten(1), bits), scales)


@dataclass(frozen=True)
class Quantised:
    """Parameters in blocks, by name: `make` gives one, `layout` says before that how many bits, and if it has zeros.

    `whole` ones are made whole when a runtime loads the graph, and multiplied in fp32.
    """

    make: Callable[[str], Blocks]
    layout: Callable[[str], tuple[int, bool]]
    whole: bool = False


def eight_bits(read: Callable[[str], torch.Tensor]) -> Quantised:
    """Every parameter in 8 bits, rounded to the nearest."""
    return Quantised(lambda name: rounded(read(name)), lambda name: (8, False))


def fits(shape: tuple[int, ...]) -> bool:
    """Whether a weight can be held in blocks."""
    return len(shape) == 2 and shape[1] % SIZES[-1] == 0
