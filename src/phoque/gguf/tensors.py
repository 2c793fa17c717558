"""A checkpoint's weights as the tensors of a GGUF file: names, values and types, one tensor at a time."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import gguf
import numpy as np
import torch

from phoque.errors import UsageError
from phoque.models.architectures.base import GgufFormat
from phoque.models.architectures.llama_cpp_names import ROPE_BY_WAVELENGTH
from phoque.models.checkpoint_reader import HEAD, CheckpointReader
from phoque.models.config import head_dim_of

NUMPY_TYPES = {"f32": np.dtype(np.float32), "f16": np.dtype(np.float16), "bf16": np.dtype(np.uint16)}
GGML_TYPES = {
    "f32": gguf.GGMLQuantizationType.F32,
    "f16": gguf.GGMLQuantizationType.F16,
    "bf16": gguf.GGMLQuantizationType.BF16,
}


@dataclass(frozen=True)
class TensorPlan:
    """A tensor of the file: its name, its shape [rows, columns] or [size], its type, and where its values are."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    source: str = ""  # the stored name in the checkpoint; "" for computed values
    values: np.ndarray | None = None


class GgufTensors:
    """The tensors of one model in `f32`, `f16` or `bf16`; vectors are always f32, as llama.cpp needs them."""

    def __init__(self, reader: CheckpointReader, form: GgufFormat, dtype: str) -> None:
        self._reader, self._form, self._dtype = reader, form, dtype
        self._config = reader.text_config
        self.names = name_map(form, self._config.num_hidden_layers)

    def plan(self) -> list[TensorPlan]:
        """Every tensor in the order in which the checkpoint stores them, computed ones last.

        Raises UsageError for a weight that llama.cpp has no place for.
        """
        plans = []
        for text_name, stored in self._reader.text_weights.items():
            if text_name == HEAD and self._config.tie_word_embeddings:
                continue
            shape = self._reader.stored[stored].shape
            plans.append(TensorPlan(self.translate(text_name), shape, self._type_of(shape), stored))
        return plans + [
            TensorPlan(name, values.shape, "f32", values=values) for name, values in self._rope_factors().items()
        ]

    def translate(self, text_name: str) -> str:
        """llama.cpp's name of a weight. Raises UsageError if it has none."""
        name = self.names.get_name(text_name, (".weight", ".bias"))
        if name is None:
            raise UsageError(
                what="This model cannot be written to a GGUF file.",
                why=f"llama.cpp has no place for {text_name} in the architecture {self._form.name}.",
                fix="Report it with the model's config.json; export-onnx may work for it.",
            )
        return name

    def values(self) -> Iterator[np.ndarray]:
        """The values of every tensor, in the order of `plan()`."""
        text_names = {stored: name for name, stored in self._reader.text_weights.items()}
        for plan in self.plan():
            if plan.values is not None:
                yield plan.values
                continue
            full = self._reader.read_full(plan.source)
            yield encode(self.transform(text_names[plan.source], full), plan.dtype)

    def transform(self, text_name: str, weight: torch.Tensor) -> torch.Tensor:
        """A weight with the rows in llama.cpp's order, and norms with their offset."""
        if self._form.norm_offset and text_name.endswith("norm.weight"):
            return weight + self._form.norm_offset
        return interleave_heads(self._form, self._config, text_name, weight)

    def _type_of(self, shape: tuple[int, ...]) -> str:
        return self._dtype if len(shape) > 1 else "f32"

    def _rope_factors(self) -> dict[str, np.ndarray]:
        rope = self._config.rope_parameters
        kind = rope.get("rope_type")
        if kind == ROPE_BY_WAVELENGTH:
            return {"rope_freqs.weight": stretch_factors(rope, head_dim_of(self._config))}
        if kind == "longrope":
            return {
                f"rope_factors_{name}.weight": np.array(rope[f"{name}_factor"], np.float32)
                for name in ("long", "short")
            }
        return {}


def name_map(form: GgufFormat, blocks: int) -> gguf.TensorNameMap:
    """gguf's table of tensor names for an architecture."""
    architecture = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == form.name)
    return gguf.get_tensor_name_map(architecture, blocks)


def interleave_heads(form: GgufFormat, config: Any, text_name: str, weight: torch.Tensor) -> torch.Tensor:
    """The rows of q and k so that channels which rotate together are neighbors, where llama.cpp expects that.

    transformers rotates channel n of a head with channel n + half; the first dimension of `weight` is heads x channels.
    """
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    module = text_name.rpartition(".")[0].rpartition(".")[2]
    if not form.interleaves_rope or module not in heads:
        return weight
    halves = weight.reshape(heads[module], 2, -1, *weight.shape[1:])
    return halves.transpose(1, 2).reshape(weight.shape)


def encode(weight: torch.Tensor, dtype: str) -> np.ndarray:
    """A weight as the numbers that the file holds; bf16 as its 16 bits."""
    if dtype == "bf16":
        return weight.to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)
    return weight.to(torch.float16 if dtype == "f16" else torch.float32).contiguous().numpy()


def stretch_factors(rope: dict[str, Any], head_dim: int) -> np.ndarray:
    """What each rotary frequency of Llama 3.1 is divided by, [head size / 2].

    Short wavelengths stay, long ones are stretched by `factor`, those between by a mix of both.
    """
    frequencies = 1.0 / rope["rope_theta"] ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    factor, low, high = (rope.get(key, default) for key, default in STRETCH_DEFAULTS.items())
    original = rope.get("original_max_position_embeddings", 8192)
    factors = []
    for wavelength in (2 * math.pi / frequencies).tolist():
        if wavelength < original / high:
            factors.append(1.0)
        elif wavelength > original / low:
            factors.append(factor)
        else:
            smooth = (original / wavelength - low) / (high - low)
            factors.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(factors, np.float32)


STRETCH_DEFAULTS = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
