"""FP8 checkpoints: which scale belongs to which weight, and the weight in full precision.

Despite its name, `weight_scale_inv` is multiplied with the weight. `activation_scale` is for FP8 products and unused
here. Scales may be FP32 or BF16, one for a whole matrix or one for a block of it.
"""

from collections.abc import Iterable
from typing import Any

import torch

from phoque.errors import PhoqueError
from phoque.models.safetensors_files import StoredTensor

SCALE, ACTIVATION = "_scale_inv", "activation_scale"
CODES, LARGEST_CODE = torch.float8_e4m3fn, 448.0
GroupSize = tuple[int, int]
FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)


class Fp8Linear(torch.nn.Linear):
    """A frozen linear layer that holds its weight as FP8: codes (rows, columns), and a scale (rows, 1) of each row.

    Codes lie in `weight` as bytes: peft gives an adapter the dtype of the weight wherever that is a float.
    """

    scale: torch.Tensor

    def whole(self, dtype: torch.dtype) -> torch.Tensor:
        """The weight in full."""
        return self.weight.view(CODES).to(dtype) * self.scale.to(dtype)

    def largest(self) -> torch.Tensor:
        """A bound of the weight's magnitudes; NaN if a code is no number."""
        bound = self.scale.max() * LARGEST_CODE
        return torch.where((self.weight & 0x7F == 0x7F).any(), bound * float("nan"), bound)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(input, self.whole(input.dtype), self.bias)

    def hold(self, stored: torch.Tensor, scale: torch.Tensor | None, block: GroupSize | None = None) -> None:
        """Keep codes and the one scale of a checkpoint as they are; anything else is quantised row by row."""
        if stored.dtype == CODES and scale is not None and scale.numel() == 1:
            codes, scales = stored, scale.to(stored.device, torch.float32).reshape(1, 1).expand(len(stored), 1)
        else:
            full = stored.float() if scale is None else dequantize(stored, scale, block)
            scales = full.abs().amax(1, keepdim=True).clamp(min=1e-12) / LARGEST_CODE
            codes = (full / scales).to(CODES)
        self.weight = torch.nn.Parameter(codes.view(torch.uint8), requires_grad=False)
        self.register_buffer("scale", scales.contiguous(), persistent=False)


def declares_fp8(config: Any) -> bool:
    """Whether a model config says FP8. Raises PhoqueError (2) for any other quantisation."""
    declared = getattr(config, "quantization_config", None) or {}
    method = declared.get("quant_method") if isinstance(declared, dict) else declared.quant_method
    if method not in (None, "fp8"):
        raise PhoqueError(
            f"The checkpoint is quantised with {method}.", "phoque reads FP8, BF16, FP16 and FP32.", "Use another copy."
        )
    return method == "fp8"


def group_size_of(config: Any) -> GroupSize | None:
    """Rows and columns of a weight that share a scale, where an FP8 config names them; None is one for all."""
    declared = getattr(config, "quantization_config", None) or {}
    size = declared.get("weight_block_size") if isinstance(declared, dict) else declared.weight_block_size
    return (int(size[0]), int(size[1])) if size else None


def is_scale(name: str) -> bool:
    """Whether a tensor is only there to undo the quantisation of another."""
    return name.endswith((SCALE, ACTIVATION))


def find_scales(tensors: dict[str, StoredTensor], wanted: Iterable[str], declared: bool) -> dict[str, str]:
    """The name of the scale of each FP8 weight among `wanted`.

    Raises PhoqueError (2) for an FP8 weight without its scale, a scale without its FP8 weight, and a checkpoint whose
    config declares FP8 (`declared`) but holds none: each would train on other weights than were published.
    """
    wanted = set(wanted)
    quantised = {name for name in wanted if tensors[name].dtype in FP8}
    for name in sorted(quantised):
        if name + SCALE not in tensors:
            raise PhoqueError(
                f"{name} is FP8 and has no scale.", f"{name + SCALE} is missing.", "The checkpoint is incomplete."
            )
    for name in sorted(tensors):
        if name.endswith(SCALE) and name.removesuffix(SCALE) in wanted - quantised:
            raise PhoqueError(
                f"{name} is a scale, but its weight is not FP8.",
                "The shards are of two checkpoints.",
                "Fetch it again.",
            )
    if declared and not quantised:
        raise PhoqueError(
            "The config says FP8, but no weight is FP8.",
            "The config and the weights are of two checkpoints.",
            "Remove quantization_config from config.json, or fetch the checkpoint again.",
        )
    return {name: name + SCALE for name in quantised}


def dequantize(weight: torch.Tensor, scale: torch.Tensor, block: GroupSize | None) -> torch.Tensor:
    """`weight` (rows, columns) times its scale, in FP32; `scale` is one number or a grid of blocks.

    The last of `block` rows or columns may be cut off; without `block` all are of one size.
    """
    full, scale = weight.to(torch.float32), scale.to(weight.device, torch.float32)
    if scale.numel() == 1:
        return full.mul_(scale.reshape(()))
    for axis in (0, 1):
        size = block[axis] if block else -(-full.shape[axis] // scale.shape[axis])
        scale = scale.repeat_interleave(size, axis)
    return full.mul_(scale[: full.shape[0], : full.shape[1]])


def check_fp8_support(on: torch.device) -> None:
    """Raise PhoqueError (2) on a GPU without FP8 units (Ampere and older)."""
    if on.type == "cuda" and torch.cuda.get_device_capability(on) < (8, 9):
        raise PhoqueError(
            f"{torch.cuda.get_device_name(on)} has no FP8 units.",
            "They came with compute capability 8.9 (L4, L40S, H100 and later).",
            "Use --quantization nf4, or another GPU.",
        )
