"""FP8 checkpoints: matching of scales to weights, dequantization, and a frozen FP8 linear layer.

Despite its name, `weight_scale_inv` is multiplied with the weight. `activation_scale` is for FP8 matmuls and is not
used here. Scales are FP32 or BF16, one per matrix or one per group (a rectangle of the matrix).
"""

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch

from phoque.errors import UsageError
from phoque.models.safetensors_files import StoredTensor

if TYPE_CHECKING:
    from transformers import PretrainedConfig

SCALE_SUFFIX, ACTIVATION_SCALE_SUFFIX = "_scale_inv", "activation_scale"
CODE_DTYPE, MAX_CODE = torch.float8_e4m3fn, 448.0
GroupSize = tuple[int, int]
FP8_DTYPES = (torch.float8_e4m3fn, torch.float8_e5m2)


class Fp8Linear(torch.nn.Linear):
    """A frozen linear layer with an FP8 weight: codes (rows, columns), and one scale per row (rows, 1).

    `weight` stores the codes as bytes, because peft gives an adapter the dtype of the weight if that is a float.
    """

    scale: torch.Tensor

    def dequantize(self, dtype: torch.dtype) -> torch.Tensor:
        """Return the dequantized weight (rows, columns)."""
        return self.weight.view(CODE_DTYPE).to(dtype) * self.scale.to(dtype)

    def max_magnitude(self) -> torch.Tensor:
        """Return an upper bound of the weight's magnitudes (a scalar tensor), or NaN if any code is NaN."""
        bound = self.scale.max() * MAX_CODE
        return torch.where((self.weight & 0x7F == 0x7F).any(), bound * float("nan"), bound)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(input, self.dequantize(input.dtype), self.bias)

    def set_weight(self, stored: torch.Tensor, scale: torch.Tensor | None, block: GroupSize | None = None) -> None:
        """Store a checkpoint weight: FP8 codes with a single scale unchanged, anything else quantized row by row.

        `block` is the group size of `scale`, or None.
        """
        if stored.dtype == CODE_DTYPE and scale is not None and scale.numel() == 1:
            codes, scales = stored, scale.to(stored.device, torch.float32).reshape(1, 1).expand(len(stored), 1)
        else:
            full = stored.float() if scale is None else dequantize(stored, scale, block)
            scales = full.abs().amax(1, keepdim=True).clamp(min=1e-12) / MAX_CODE
            codes = (full / scales).to(CODE_DTYPE)
        self.weight = torch.nn.Parameter(codes.view(torch.uint8), requires_grad=False)
        self.register_buffer("scale", scales.contiguous(), persistent=False)


def declares_fp8(config: "PretrainedConfig") -> bool:
    """Whether a model config declares FP8. Raises UsageError for any other quantization."""
    quantization = getattr(config, "quantization_config", None) or {}
    method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization.quant_method
    if method not in (None, "fp8"):
        raise UsageError(
            what=f"The checkpoint is quantized with {method}.",
            why="phoque reads FP8, BF16, FP16 and FP32.",
            fix="Use a copy in one of these.",
        )
    return method == "fp8"


def group_size_of(config: "PretrainedConfig") -> GroupSize | None:
    """Return the (rows, columns) of a weight that share one scale, or None if the FP8 config does not say."""
    quantization = getattr(config, "quantization_config", None) or {}
    size = quantization.get("weight_block_size") if isinstance(quantization, dict) else quantization.weight_block_size
    return (int(size[0]), int(size[1])) if size else None


def is_scale(name: str) -> bool:
    """Whether a tensor is a quantization scale of another tensor."""
    return name.endswith((SCALE_SUFFIX, ACTIVATION_SCALE_SUFFIX))


def find_scales(tensors: dict[str, StoredTensor], names: Iterable[str], declared: bool) -> dict[str, str]:
    """Return {weight name: scale name} of the FP8 weights among `names`.

    Raises UsageError for an FP8 weight without a scale, a scale whose weight is not FP8, and a checkpoint without
    FP8 weights whose config declares FP8 (`declared`): in each case the weights would differ from the published ones.
    """
    names = set(names)
    quantized = {name for name in names if tensors[name].dtype in FP8_DTYPES}
    for name in sorted(quantized):
        if name + SCALE_SUFFIX not in tensors:
            raise UsageError(
                what=f"{name} is FP8 but has no scale.",
                why=f"{name + SCALE_SUFFIX} is missing.",
                fix="Download the checkpoint again.",
            )
    for name in sorted(tensors):
        if name.endswith(SCALE_SUFFIX) and name.removesuffix(SCALE_SUFFIX) in names - quantized:
            raise UsageError(
                what=f"{name} is a scale, but its weight is not FP8.",
                why="The shards come from two different checkpoints.",
                fix="Download the checkpoint again.",
            )
    if declared and not quantized:
        raise UsageError(
            what="The config declares FP8, but no weight is FP8.",
            why="The config and the weights come from two different checkpoints.",
            fix="Remove quantization_config from config.json, or download the checkpoint again.",
        )
    return {name: name + SCALE_SUFFIX for name in quantized}


def dequantize(weight: torch.Tensor, scale: torch.Tensor, block: GroupSize | None) -> torch.Tensor:
    """Return `weight` (rows, columns) times its scale, in FP32; `scale` is a scalar or a grid with one value per group.

    `block` is the group size (rows, columns); the last group of an axis may be smaller. If it is None, all groups have
    the same size.
    """
    full, scale = weight.to(torch.float32), scale.to(weight.device, torch.float32)
    if scale.numel() == 1:
        return full.mul_(scale.reshape(()))
    for axis in (0, 1):
        size = block[axis] if block else -(-full.shape[axis] // scale.shape[axis])
        scale = scale.repeat_interleave(size, axis)
    return full.mul_(scale[: full.shape[0], : full.shape[1]])


def check_fp8_support(on: torch.device) -> None:
    """Raise UsageError on a GPU without FP8 units (Ampere and older)."""
    if on.type == "cuda" and torch.cuda.get_device_capability(on) < (8, 9):
        raise UsageError(
            what=f"{torch.cuda.get_device_name(on)} has no FP8 units.",
            why="FP8 needs compute capability 8.9 or higher (L4, L40S, H100 and later).",
            fix="Use --quantization nf4, or another GPU.",
        )
