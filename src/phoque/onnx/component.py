"""One ONNX session and its weights, which are read from the checkpoint and written one tensor at a time."""

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch

from phoque.models.checkpoint_reader import EMBEDDINGS, HEAD, CheckpointReader

Factors = dict[str, list[tuple[int, torch.Tensor]]]  # by parameter: (dimension, factor for each index along it)
MAX_CHUNK_BYTES = 2_000_000_000  # bytes; a browser loads a file into an ArrayBuffer, which is limited to 2 GiB
PAGE_BYTES = 4096  # bytes; tensors are aligned to pages, so that ONNX Runtime can memory-map them
DTYPES = {
    torch.float32: ir.DataType.FLOAT,
    torch.float16: ir.DataType.FLOAT16,
    torch.uint8: ir.DataType.UINT8,
}


class Weights:
    """A checkpoint's tensors in fp32, by the names of the text model (`read`) or the stored names (`read_stored`)."""

    def __init__(self, reader: CheckpointReader) -> None:
        self.reader, self.source, self.config = reader, reader.source, reader.config
        names = dict(reader.text_weights)
        self.tied = reader.text_config.tie_word_embeddings or HEAD not in names
        if self.tied:
            names[HEAD] = names[EMBEDDINGS]
        self._names = names
        self._factors: Factors = {}

    def with_factors(self, factors: Factors) -> "Weights":
        """Return the same checkpoint with these parameters of the text model multiplied by the factors."""
        weights = copy.copy(self)
        weights._factors = factors
        return weights

    def read(self, name: str) -> torch.Tensor:
        """Return a parameter of the text model, in fp32."""
        return apply_factors(self.read_stored(self._names[name]), self._factors.get(name, []))

    def read_stored(self, key: str) -> torch.Tensor:
        """Return a tensor in fp32 by its stored name. Raises UsageError for NaN or implausibly large values."""
        return self.reader.read_full(key)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a parameter of the text model, read from the file header."""
        return self.reader.stored[self._names[name]].shape

    @property
    def fp32_bytes(self) -> int:
        """Size of the text model in fp32, in bytes."""
        return 4 * sum(prod(self.reader.stored[key].shape) for key in set(self._names.values()))

    def stored_names(self, prefix: str) -> dict[str, str]:
        """Map the parameter names within a module to their stored names, which may or may not start with `model.`."""
        return {
            name.removeprefix("model.").removeprefix(prefix): name
            for name in self.reader.weights
            if name.removeprefix("model.").startswith(prefix)
        }


def apply_factors(tensor: torch.Tensor, factors: list[tuple[int, torch.Tensor]]) -> torch.Tensor:
    """Multiply a tensor by factors, each a vector along one of its dimensions."""
    for dimension, factor in factors:
        shape = [1] * tensor.dim()
        shape[dimension] = -1
        tensor = tensor * factor.view(shape)
    return tensor


@dataclass
class Component:
    """One session of Transformers.js: a graph, and functions that compute its large initializers when it is written.

    `fills` pairs initializers with the function that returns their values, in the order in which they are written.
    `name` is the file name without the suffix for the precision.
    """

    name: str
    model: ir.Model
    weights: Weights
    fills: list[tuple[list[ir.Value], Callable[[], list[torch.Tensor]]]] = field(default_factory=list)

    def add_initializer(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> ir.Value:
        """Add an initializer whose values are computed when the component is written; add it to `fills` too."""
        value = ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(DTYPES[dtype]))
        value.const_value = ir.ExternalTensor("", 0, 0, DTYPES[dtype], shape=ir.Shape(shape), name=name)
        self.model.graph.register_initializer(value)
        return value

    def write(self, folder: Path, suffix: str, show: Callable[[str], None]) -> int:
        """Write `<name><suffix>.onnx` and its external data; return the number of data files."""
        file_name = f"{self.name}{suffix}.onnx"
        chunks = _ChunkWriter(folder, file_name)
        for values, compute in self.fills:
            for value, tensor in zip(values, compute(), strict=True):
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
        ir.save(self.model, folder / file_name)
        return count


class _ChunkWriter:
    """Write the external data files `<file name>_data`, `<file name>_data_1`, ... that Transformers.js expects."""

    def __init__(self, folder: Path, file_name: str) -> None:
        self._folder, self._file_name, self._count, self._offset = folder, file_name, 0, 0
        self._file: Any = None

    def add(self, tensor: torch.Tensor) -> tuple[str, int]:
        start = -self._offset % PAGE_BYTES + self._offset
        if self._file is None or start + tensor.nbytes > MAX_CHUNK_BYTES:
            self._open_next()
            start = 0
        self._file.write(b"\0" * (start - self._offset))
        self._file.write(memoryview(tensor.contiguous().view(-1).view(torch.uint8).numpy()))
        self._offset = start + tensor.nbytes
        return self._name, start

    def _open_next(self) -> None:
        if self._file:
            self._file.close()
        self._name = f"{self._file_name}_data{f'_{self._count}' if self._count else ''}"
        self._file, self._offset = (self._folder / self._name).open("wb"), 0
        self._count += 1

    def close(self) -> int:
        if self._file:
            self._file.close()
        return self._count
