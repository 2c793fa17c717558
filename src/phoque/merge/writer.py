"""Adapter + base -> a standalone checkpoint, tensor by tensor: what is not changed is copied, nothing is held whole."""

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

from phoque.errors import PhoqueError
from phoque.files import sha256
from phoque.merge.deltas import Change, read_changes
from phoque.models.architectures import Architecture, architecture_of
from phoque.models.checkpoint_reader import DTYPES, Shards
from phoque.models.fp8 import GroupSize, declares_fp8, dequantize, group_size_of, is_scale, scales_of
from phoque.models.load import check_magnitudes, load_config
from phoque.models.lora import WEIGHTS
from phoque.models.source import INDEX, Source

RECORD = "merge.json"
SHARD_BYTES = 4 << 30
WORKERS = min(4, os.cpu_count() or 1)  # tensors merged at the same time
AT_WORK = 1 << 28  # bytes of them, but for one that is larger by itself
FLOATS = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
SIDE_FILES = ("processor_config.json", "preprocessor_config.json", "generation_config.json")
TOKENIZER_FILES = ("tokenizer", "special_tokens", "added_tokens", "vocab", "merges", "chat_template")


@dataclass(frozen=True)
class Written:
    """A tensor of the merged model: its name, dtype and shape."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


def merge(
    base: Source, adapter: Path, into: Path, dtype: str, show: Callable[[int, str], None] = lambda done, text: None
) -> dict[str, Any]:
    """Write the merged model; return {tensors, changed, bytes, shards}, with `unchanged` if it was there already.

    Memory: a few tensors. Raises PhoqueError (2) if the adapter does not fit the base, (1) if the disk has no room;
    what is not finished never lies in `into`.
    """
    adapts = {"adapter": sha256(adapter / WEIGHTS), "adapter_config": sha256(adapter / "adapter_config.json")}
    asked = {"base": base.weights, **adapts, "dtype": dtype}
    if (into / RECORD).is_file():
        there = json.loads((into / RECORD).read_text())
        if there["asked"] == asked:
            return there["made"] | {"unchanged": True}
    if into.exists() and any(into.iterdir()) and not (into / RECORD).is_file():
        raise PhoqueError(
            f"{into} is not empty, and is no merged model.", "It would be replaced.", "Choose another --output-dir."
        )
    config, shards = load_config(base), Shards(base.folder)
    family = architecture_of(config)
    changes = read_changes(adapter, config, family, shards)
    plan = _plan(shards, family, changes, FLOATS[dtype])
    _check_room(into, sum(w.size for w in plan))
    staging = into.with_name(f".{into.name}.partial")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    try:
        scales = scales_of(shards.tensors, [w.name for w in plan], declares_fp8(config))
        files = _write(staging, plan, _merged(shards, plan, changes, scales, group_size_of(config), show))
        _write_side_files(base.folder, adapter, staging, dtype)
        made = {"tensors": len(plan), "changed": len(changes), "bytes": sum(w.size for w in plan), "shards": len(files)}
        (staging / RECORD).write_text(json.dumps({"asked": asked, "made": made}, indent=1))
        shutil.rmtree(into, ignore_errors=True)
        staging.rename(into)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return made


def _plan(shards: Shards, family: Architecture, changes: dict[str, Change], dtype: torch.dtype) -> list[Written]:
    """Every tensor of the merged model, in the order of the base's files; beside the text model each keeps its type."""
    plan = []
    ordered = sorted(shards.tensors, key=lambda n: (shards.tensors[n].file, shards.tensors[n].start))
    for key in (k for k in ordered if not is_scale(k)):
        stored = shards.tensors[key]
        recast = family.text_key(key) is not None or key in changes or stored.dtype.itemsize == 1
        kept = not recast or not stored.dtype.is_floating_point
        plan.append(Written(key, stored.dtype if kept else dtype, stored.shape))
    return plan


def _merged(
    shards: Shards,
    plan: list[Written],
    changes: dict[str, Change],
    scales: dict[str, str],
    block: GroupSize | None,
    show: Callable[[int, str], None],
) -> Iterator[torch.Tensor]:
    """The merged tensors in the order of the plan; a few are made at the same time."""

    def made(wanted: Written, tensor: torch.Tensor) -> torch.Tensor:
        if wanted.name in scales:
            tensor = dequantize(tensor, shards.read(scales[wanted.name]), block)
            check_magnitudes({wanted.name: tensor.abs().max()})
        if wanted.name in changes:
            tensor = changes[wanted.name].applied(tensor.float())
        return tensor.to(wanted.dtype)

    at_work: deque[tuple[Written, Future[torch.Tensor]]] = deque()
    with shards.stream([w.name for w in plan], torch.device("cpu")) as arriving, ThreadPoolExecutor(WORKERS) as pool:
        for number, (wanted, (name, stored)) in enumerate(zip(plan, arriving, strict=True), 1):
            assert wanted.name == name
            while at_work and (len(at_work) == WORKERS or sum(w.size for w, _ in at_work) + wanted.size > AT_WORK):
                yield at_work.popleft()[1].result()
            at_work.append((wanted, pool.submit(made, wanted, stored)))
            show(number, name)
        while at_work:
            yield at_work.popleft()[1].result()


def _check_room(into: Path, size: int) -> None:
    at = next(parent for parent in into.absolute().parents if parent.exists())
    free = shutil.disk_usage(at).free
    if free < 1.02 * size + (64 << 20):
        raise PhoqueError(
            f"The merged model needs {size / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free.",
            f"It is written to {into}.",
            "Free some space, or choose another --output-dir.",
            1,
        )


def _write(folder: Path, plan: list[Written], arriving: Iterator[torch.Tensor]) -> list[str]:
    """Shards of at most SHARD_BYTES, and their index; headers are known before the tensors, so all is written once."""
    groups: list[list[Written]] = [[]]
    for wanted in plan:
        if groups[-1] and sum(w.size for w in groups[-1]) + wanted.size > SHARD_BYTES:
            groups.append([])
        groups[-1].append(wanted)
    alone = len(groups) == 1
    names = (
        ["model.safetensors"]
        if alone
        else [f"model-{n:05}-of-{len(groups):05}.safetensors" for n in range(1, len(groups) + 1)]
    )
    for name, group in zip(names, groups, strict=True):
        with (folder / name).open("wb") as f, ThreadPoolExecutor(1) as writer:
            f.write(_header(group))
            pending = None
            for _ in group:  # one tensor is written while the next is merged
                raw = memoryview(next(arriving).contiguous().reshape(-1).view(torch.uint8).numpy())
                if pending:
                    pending.result()
                pending = writer.submit(f.write, raw)
            if pending:
                pending.result()
            f.flush()
            os.fsync(f.fileno())
    if not alone:
        weight_map = {w.name: name for name, group in zip(names, groups, strict=True) for w in group}
        index = {"metadata": {"total_size": sum(w.size for w in plan)}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index, indent=1))
    next(arriving, None)  # past the last one, so that the reader is closed
    return names


def _header(group: list[Written]) -> bytes:
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for wanted in group:
        end = at + wanted.size
        entries[wanted.name] = {"dtype": NAMES[wanted.dtype], "shape": list(wanted.shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _write_side_files(base: Path, adapter: Path, into: Path, dtype: str) -> None:
    """Config without the quantisation that is gone, tokenizer, its template in both places, processor configs."""
    raw = json.loads((base / "config.json").read_text())
    for part in (raw, raw.get("text_config", {})):
        part.pop("quantization_config", None)
        for name in ("dtype", "torch_dtype"):
            if name in part:
                part[name] = str(FLOATS[dtype]).removeprefix("torch.")
    raw.setdefault("dtype", str(FLOATS[dtype]).removeprefix("torch."))
    (into / "config.json").write_text(json.dumps(raw, indent=2))
    for name in SIDE_FILES:
        if (base / name).is_file():
            shutil.copyfile(base / name, into / name)
    # the adapter's tokenizer is the one that it was trained with; an adapter alone may come without
    source = adapter if (adapter / "tokenizer_config.json").is_file() else base
    for file in source.iterdir():
        if file.is_file() and file.name.startswith(TOKENIZER_FILES):
            shutil.copyfile(file, into / file.name)
    settings = json.loads((into / "tokenizer_config.json").read_text())
    template = into / "chat_template.jinja"
    if template.is_file():
        settings["chat_template"] = template.read_text()
        (into / "tokenizer_config.json").write_text(json.dumps(settings, indent=2, ensure_ascii=False))
    elif isinstance(settings.get("chat_template"), str):
        template.write_text(settings["chat_template"])
