"""Write a GGUF file tensor by tensor, so that no more than one weight is in memory."""

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from gguf import GGUFWriter

from phoque.gguf.tensors import GGML_TYPES, NUMPY_TYPES, TensorPlan


def write_file(
    file: Path,
    architecture: str,
    add_metadata: Callable[[GGUFWriter], None],
    plan: list[TensorPlan],
    values: Iterator[np.ndarray],
    show: Callable[[int, str], None] = lambda done, text: None,
) -> None:
    """Write header, metadata and tensors; `values` gives the arrays in the order of `plan`."""
    writer = GGUFWriter(file, architecture)
    add_metadata(writer)
    for tensor in plan:
        dtype = NUMPY_TYPES[tensor.dtype]
        size = dtype.itemsize * int(np.prod(tensor.shape))
        writer.add_tensor_info(tensor.name, tensor.shape, dtype, size, raw_dtype=GGML_TYPES[tensor.dtype])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for number, (tensor, array) in enumerate(zip(plan, values, strict=True)):
        show(number, tensor.name)
        writer.write_tensor_data(array)
    show(len(plan), "written")
    writer.close()
