"""From the checkpoint's tensors to external data beside a graph: read one by one, never all held."""

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch

from phoque.models.architectures import architecture_of
from phoque.models.checkpoint_reader import Shards
from phoque.models.fp8 import declares_fp8, dequantize, group_size_of, scales_of
from phoque.models.load import HEAD, check_magnitudes, load_config
from phoque.models.source import Source

Factors = dict[str, list[tuple[int, torch.Tensor]]]  # by parameter: a dimension, and what it is multiplied by
CHUNK = 2_000_000_000  # bytes; a browser holds a file in an ArrayBuffer, which ends at 2 GiB
PAGE = 4096  # large tensors begin at one, so that ONNX Runtime maps them instead of reading them
EMBEDDINGS = "model.embed_tokens.weight"
DTYPES = {
    torch.float32: ir.DataType.FLOAT,
    torch.float16: ir.DataType.FLOAT16,
    torch.uint8: ir.DataType.UINT8,
}


class Weights:
    """A checkpoint's tensors in fp32: `text` by the text-only model's names, `full` by their own."""

    def __init__(self, source: Source) -> None:
        self.source, self.config = source, load_config(source)
        self._shards = Shards(source.folder)
        family = architecture_of(self.config)
        keys = {text: key for key in self._shards.tensors if (text := family.text_key(key))}
        self._scales = scales_of(self._shards.tensors, list(self._shards.tensors), declares_fp8(self.config))
        self.tied = self.config.get_text_config().tie_word_embeddings or HEAD not in keys
        if self.tied:
            keys[HEAD] = keys[EMBEDDINGS]
        self._keys = keys
        self._factors: Factors = {}

    def scaled(self, factors: Factors) -> "Weights":
        """The same checkpoint, with these parameters of the text model multiplied."""
        other = copy.copy(self)
        other._factors = factors
        return other

    def text(self, name: str) -> torch.Tensor:
        """A parameter of the text model."""
        return multiplied(self.full(self._keys[name]), self._factors.get(name, []))

    def full(self, key: str) -> torch.Tensor:
        """A tensor by the name it is stored under. Raises PhoqueError (2) for NaN, or what no trained weight holds."""
        stored = self._shards.read(key)
        whole = stored.float()
        if key in self._scales:
            whole = dequantize(stored, self._shards.read(self._scales[key]), group_size_of(self.config))
        check_magnitudes({key: whole.abs().max() if whole.dim() > 1 else whole.sum() * 0})
        return whole

    def shape(self, name: str) -> tuple[int, ...]:
        """Of a parameter of the text model, from its header."""
        return self._shards.tensors[self._keys[name]].shape

    @property
    def whole_bytes(self) -> int:
        """What the text model takes in fp32."""
        return 4 * sum(prod(self._shards.tensors[key].shape) for key in set(self._keys.values()))

    def named(self, prefix: str) -> dict[str, str]:
        """The stored names below a module, keyed by their names within it; the published prefix may lack `model.`."""
        return {
            key.removeprefix("model.").removeprefix(prefix): key
            for key in self._shards.tensors
            if key.removeprefix("model.").startswith(prefix) and key not in self._scales.values()
        }


def multiplied(tensor: torch.Tensor, factors: list[tuple[int, torch.Tensor]]) -> torch.Tensor:
    """A tensor times a factor for each place along a dimension."""
    for dimension, factor in factors:
        shape = [1] * tensor.dim()
        shape[dimension] = -1
        tensor = tensor * factor.view(shape)
    return tensor


@dataclass
class Component:
    """One session of Transformers.js: a graph, and how its large initializers are made, in the order they are written.

    `fills` pairs initializers with a function that returns their values; `name` is the file's without its suffix.
    """

    name: str
    model: ir.Model
    weights: Weights
    fills: list[tuple[list[ir.Value], Callable[[], list[torch.Tensor]]]] = field(default_factory=list)

    def initializer(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> ir.Value:
        """A new initializer that is filled in when the component is written."""
        value = ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(DTYPES[dtype]))
        value.const_value = ir.ExternalTensor("", 0, 0, DTYPES[dtype], shape=ir.Shape(shape), name=name)
        self.model.graph.register_initializer(value)
        return value

    def write(self, folder: Path, suffix: str, show: Callable[[str], None]) -> int:
        """Write `<name><suffix>.onnx` and its external data; return how many chunks that took."""
        base = f"{self.name}{suffix}.onnx"
        chunks = _Chunks(folder, base)
        for values, make in self.fills:
            for value, tensor in zip(values, make(), strict=True):
                assert tuple(tensor.shape) == tuple(value.shape or ()), value.name
                location, offset = chunks.add(tensor)
                value.const_value = ir.ExternalTensor(
                    location,
                    offset,
                    tensor.nbytes,
                    DTYPES[tensor.dtype],
                    shape=ir.Shape(tuple(tensor.shape)),
                    name=str(value.name),
                    base_dir=folder,
                )
            show(str(values[0].name))
        count = chunks.close()
        ir.save(self.model, folder / base)
        return count


class _Chunks:
    """The files `<base>_data`, `<base>_data_1`, ... of Transformers.js."""

    def __init__(self, folder: Path, base: str) -> None:
        self._folder, self._base, self._count, self._at = folder, base, 0, 0
        self._file: Any = None

    def add(self, tensor: torch.Tensor) -> tuple[str, int]:
        start = -self._at % PAGE + self._at
        if self._file is None or start + tensor.nbytes > CHUNK:
            self._next()
            start = 0
        self._file.write(b"\0" * (start - self._at))
        self._file.write(memoryview(tensor.contiguous().view(-1).view(torch.uint8).numpy()))
        self._at = start + tensor.nbytes
        return self._name, start

    def _next(self) -> None:
        if self._file:
            self._file.close()
        self._name = f"{self._base}_data{f'_{self._count}' if self._count else ''}"
        self._file, self._at = (self._folder / self._name).open("wb"), 0
        self._count += 1

    def close(self) -> int:
        if self._file:
            self._file.close()
        return self._count
