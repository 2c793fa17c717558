"""Adapter + base -> a standalone checkpoint, tensor by tensor: unchanged tensors are copied, few are in memory."""

import hashlib
import json
import math
import os
import shutil
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from phoque.errors import RunError
from phoque.files import MERGE_RECORD, atomic_folder, check_output_folder, read_json_object, sha256
from phoque.merging.deltas import Deltas, WeightDelta, read_deltas
from phoque.models.adapter_source import WEIGHTS
from phoque.models.checkpoint_reader import EMBEDDINGS, HEAD, CheckpointReader
from phoque.models.config import copy_tokenizer, find_tokenizer_folder, load_tokenizer, read_chat_template
from phoque.models.safetensors_files import DTYPES
from phoque.models.safetensors_headers import INDEX
from phoque.models.source import Source, list_tokenizer_files
from phoque.models.stop_tokens import find_stop_token, with_stop_token

SHARD_BYTES = 4 << 30
WORKERS = min(4, os.cpu_count() or 1)  # number of tensors merged at the same time
MERGING_BYTES = 1 << 28  # at most so many bytes of them, unless one alone is larger
FLOAT_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
SIDE_FILE_RULES = "2"  # raised when other files are written from the same inputs: older merges are then made again
SIDE_FILES = ("processor_config.json", "preprocessor_config.json", "generation_config.json")


@dataclass(frozen=True)
class OutputTensor:
    """A tensor to write to the merged model."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    source: str  # the base's tensor that it is made from
    delta: WeightDelta | None = None

    @property
    def size(self) -> int:
        """Its size in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


def write_merged(
    reader: CheckpointReader,
    adapter: Path,
    folder: Path,
    dtype: str,
    show: Callable[[int, str], None] = lambda done, name: None,
) -> dict[str, Any] | None:
    """Write the merged model; return {tensors, changed, bytes, shards}, or None if the folder holds this merge already.

    Memory: a few tensors. Raises UsageError if the adapter does not fit the base or the folder holds something else,
    RunError if the disk has no room. An unfinished merge is never left in `folder`.
    """
    inputs = {
        "base": reader.source.weights,
        "adapter": sha256(adapter / WEIGHTS),
        "adapter_config": sha256(adapter / "adapter_config.json"),
        "side_files": _hash_side_files(reader.source.folder, adapter),
        "dtype": dtype,
    }
    check_output_folder(folder, MERGE_RECORD, "a merged model")
    if _holds_merge(folder, inputs):
        return None
    deltas = read_deltas(adapter, reader)
    plan = _plan_tensors(reader, deltas, FLOAT_DTYPES[dtype])
    size = sum(tensor.size for tensor in plan)
    _check_disk_space(folder, size)
    with atomic_folder(folder) as staging:
        files = _write_shards(staging, plan, _merge_tensors(reader, plan, show))
        _write_side_files(reader, adapter, staging, dtype, deltas)
        changed = sum(output.delta is not None for output in plan)
        written = {"tensors": len(plan), "changed": changed, "bytes": size, "shards": len(files)}
        (staging / MERGE_RECORD).write_text(json.dumps({"asked": inputs, "made": written}, indent=1))
    return written


def _holds_merge(folder: Path, inputs: dict[str, Any]) -> bool:
    """Whether a folder holds the merge of these inputs, with all of its weights."""
    if not (folder / MERGE_RECORD).is_file():
        return False
    record = json.loads((folder / MERGE_RECORD).read_text())
    shards = [file.stat().st_size for file in folder.glob("*.safetensors")]
    return (
        record["asked"] == inputs and len(shards) == record["made"]["shards"] and sum(shards) >= record["made"]["bytes"]
    )


def _hash_side_files(base: Path, adapter: Path) -> str:
    """A hash of the config and the tokenizer's files that a merge copies or reads."""
    tokenizer = list_tokenizer_files(find_tokenizer_folder(base, adapter))
    files = [base / name for name in ("config.json", *SIDE_FILES)] + list_tokenizer_files(adapter) + tokenizer
    digests = [[file.name, sha256(file)] for file in files if file.is_file()] + [["rules", SIDE_FILE_RULES]]
    return hashlib.sha256(json.dumps(digests).encode()).hexdigest()


def _plan_tensors(reader: CheckpointReader, deltas: Deltas, dtype: torch.dtype) -> list[OutputTensor]:
    """Every tensor of the merged model, in the order of the base's files.

    Tensors of the text model, changed ones and FP8 ones get `dtype`; all others keep theirs. A head that the base does
    not store follows the embeddings, from which it is made.
    """
    plan = []
    embeddings = reader.text_weights.get(EMBEDDINGS)
    for name in reader.weights:
        stored, delta = reader.stored[name], deltas.by_name.get(name)
        is_cast = reader.architecture.text_key(name) is not None or delta or stored.dtype.itemsize == 1
        keeps_dtype = not is_cast or not stored.dtype.is_floating_point
        replacement = delta.replacement if delta else None
        shape = stored.shape if replacement is None else tuple(replacement.shape)
        output = OutputTensor(name, stored.dtype if keeps_dtype else dtype, shape, name, delta)
        plan.append(output)
        if name == embeddings and deltas.new_head:
            prefix = "language_model." if name.startswith("language_model.") else ""
            plan.append(OutputTensor(prefix + HEAD, output.dtype, shape, name, deltas.new_head))
    return plan


def _merge_tensors(
    reader: CheckpointReader, plan: list[OutputTensor], show: Callable[[int, str], None]
) -> Iterator[torch.Tensor]:
    """The merged tensors in the order of the plan; up to WORKERS are computed at the same time."""

    def merge(output: OutputTensor, tensor: torch.Tensor) -> torch.Tensor:
        tensor = reader.dequantize(output.source, tensor)
        if output.delta:
            is_shared = len(outputs[output.source]) > 1  # apply() works in place
            tensor = output.delta.apply(tensor.float().clone() if is_shared else tensor.float())
        return tensor.to(output.dtype)

    pending: deque[tuple[OutputTensor, Future[torch.Tensor]]] = deque()
    outputs: dict[str, list[OutputTensor]] = {}
    for output in plan:
        outputs.setdefault(output.source, []).append(output)
    with reader.stream(outputs, torch.device("cpu")) as tensors, ThreadPoolExecutor(WORKERS) as pool:
        for number, (name, stored) in enumerate(tensors, 1):
            for output in outputs[name]:
                while pending and (
                    len(pending) == WORKERS or sum(o.size for o, _ in pending) + output.size > MERGING_BYTES
                ):
                    yield pending.popleft()[1].result()
                pending.append((output, pool.submit(merge, output, stored)))
            show(number, name)
        while pending:
            yield pending.popleft()[1].result()


def _check_disk_space(folder: Path, size: int) -> None:
    parent = next(parent for parent in folder.resolve().parents if parent.exists())
    free = shutil.disk_usage(parent).free
    if free < 1.02 * size + (64 << 20):
        raise RunError(
            what=f"The merged model needs {size / 1e9:.1f} GB, but only {free / 1e9:.1f} GB are free.",
            why=f"It is written to {folder}.",
            fix="Free some space, or choose another --output-dir.",
        )


def _write_shards(folder: Path, plan: list[OutputTensor], tensors: Iterator[torch.Tensor]) -> list[str]:
    """Write shards of at most SHARD_BYTES and their index; headers come from the plan, so each byte is written once."""
    shards: list[list[OutputTensor]] = [[]]
    for output in plan:
        if shards[-1] and sum(o.size for o in shards[-1]) + output.size > SHARD_BYTES:
            shards.append([])
        shards[-1].append(output)
    is_single = len(shards) == 1
    names = (
        ["model.safetensors"]
        if is_single
        else [f"model-{n:05}-of-{len(shards):05}.safetensors" for n in range(1, len(shards) + 1)]
    )
    for name, shard in zip(names, shards, strict=True):
        with (folder / name).open("wb") as f, ThreadPoolExecutor(1) as writer:
            f.write(_encode_header(shard))
            pending = None
            for output in shard:  # a tensor is written while the next one is merged
                raw = memoryview(next(tensors).contiguous().reshape(-1).view(torch.uint8).numpy())
                assert len(raw) == output.size, output.name  # else every later offset would be wrong
                if pending:
                    pending.result()
                pending = writer.submit(f.write, raw)
            if pending:
                pending.result()
            f.flush()
            os.fsync(f.fileno())
    if not is_single:
        weight_map = {o.name: name for name, shard in zip(names, shards, strict=True) for o in shard}
        index = {"metadata": {"total_size": sum(o.size for o in plan)}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index, indent=1))
    next(tensors, None)  # run the generator to its end, which closes the reader
    return names


def _encode_header(shard: list[OutputTensor]) -> bytes:
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    start = 0
    for output in shard:
        end = start + output.size
        entries[output.name] = {
            "dtype": DTYPE_NAMES[output.dtype],
            "shape": list(output.shape),
            "data_offsets": [start, end],
        }
        start = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _write_side_files(reader: CheckpointReader, adapter: Path, folder: Path, dtype: str, deltas: Deltas) -> None:
    """Write the config without its quantization, the tokenizer, its template in both places, and processor configs."""
    base = reader.source.folder
    raw = json.loads((base / "config.json").read_text())
    for part in filter(None, (raw, raw.get("text_config"))):
        part.pop("quantization_config", None)
        for name in ("dtype", "torch_dtype"):
            if name in part:
                part[name] = str(FLOAT_DTYPES[dtype]).removeprefix("torch.")
        if deltas.unties or reader.unties:
            part["tie_word_embeddings"] = False
        if deltas.vocabulary and "vocab_size" in part:
            part["vocab_size"] = deltas.vocabulary
    raw.setdefault("dtype", str(FLOAT_DTYPES[dtype]).removeprefix("torch."))
    (folder / "config.json").write_text(json.dumps(raw, indent=2))
    for name in SIDE_FILES:
        if (base / name).is_file():
            shutil.copyfile(base / name, folder / name)
    template = read_chat_template(adapter) or read_chat_template(base)
    copy_tokenizer(find_tokenizer_folder(base, adapter), folder, template)
    if template:
        _add_stop_token(folder, raw)


def _add_stop_token(folder: Path, config: dict[str, Any]) -> None:
    """Name the template's stop token in generation_config.json, if nothing does: answers would not end at it."""
    file = folder / "generation_config.json"
    settings = read_json_object(file) if file.is_file() else {}
    of_model = config.get("eos_token_id", config.get("text_config", {}).get("eos_token_id"))
    ends = settings.get("eos_token_id", of_model)
    found = with_stop_token(ends, find_stop_token(load_tokenizer(Source(str(folder), folder, "", ""))))
    if found != ends:
        file.write_text(json.dumps(settings | {"eos_token_id": found}, indent=2))
