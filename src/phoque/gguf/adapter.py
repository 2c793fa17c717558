"""An adapter alone as a LoRA GGUF file, which llama.cpp applies to the unchanged base model."""

from pathlib import Path

import numpy as np
import torch
from gguf import GGUFWriter

from phoque.errors import UsageError
from phoque.gguf.tensors import TensorPlan, encode, interleave_heads, name_map
from phoque.gguf.writer import write_file
from phoque.merging.deltas import WeightDelta, read_deltas
from phoque.models.architectures.base import GgufFormat
from phoque.models.checkpoint_reader import CheckpointReader


def write_lora(file: Path, reader: CheckpointReader, form: GgufFormat, adapter: Path, *, name: str, dtype: str) -> None:
    """Write the adapter's matrices. Raises UsageError for an adapter that is more than LoRA on linear layers.

    llama.cpp scales by alpha / rank; a scale of its own (rank patterns, rsLoRA) is multiplied into B.
    """
    changes = read_deltas(adapter, reader)
    if changes.unties or changes.new_head or changes.vocabulary:
        raise _error("It changes the vocabulary or the head, which a LoRA file cannot hold.")
    text_names = {stored: text for text, stored in reader.text_weights.items()}
    names = name_map(form, reader.text_config.num_hidden_layers)
    matrices: dict[str, torch.Tensor] = {}
    alpha = 0.0
    for stored, delta in changes.by_name.items():
        a, b = _matrices(stored, delta)
        alpha = alpha or delta.scale * len(a)
        base_name = names.get_name(text_names.get(stored, ""), (".weight",))
        if base_name is None:
            raise _error(f"It changes {stored}, which is not in the file of the base model.")
        matrices[f"{base_name}.lora_a"] = a
        scaled = b.float() * (delta.scale * len(a) / alpha)
        matrices[f"{base_name}.lora_b"] = interleave_heads(form, reader.text_config, text_names[stored], scaled)

    def add_metadata(writer: GGUFWriter) -> None:
        writer.add_type("adapter")
        writer.add_name(name)
        writer.add_string("adapter.type", "lora")
        writer.add_float32("adapter.lora.alpha", alpha)

    plan = [TensorPlan(name, tuple(matrix.shape), dtype) for name, matrix in matrices.items()]
    arrays = (np.ascontiguousarray(encode(matrix, dtype)) for matrix in matrices.values())
    write_file(file, form.name, add_metadata, plan, arrays)


def _matrices(stored: str, delta: WeightDelta) -> tuple[torch.Tensor, torch.Tensor]:
    others = {
        "a weight that replaces the base's": delta.replacement,
        "trained tokens": delta.rows,
        "DoRA's magnitudes": delta.magnitude,
        "a bias": delta.addend,
    }
    if unsupported := [name for name, value in others.items() if value is not None]:
        raise _error(f"For {stored} it has {unsupported[0]}, which a LoRA file cannot hold.")
    if delta.a is None or delta.b is None or delta.is_embedding:
        raise _error(f"It changes {stored}, which is not a linear layer.")
    return delta.a, delta.b


def _error(why: str) -> UsageError:
    return UsageError(
        what="This adapter cannot be exported alone.", why=why, fix="Leave --lora out: then it is merged first."
    )
