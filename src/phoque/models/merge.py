"""Adapter + base -> a standalone checkpoint, tensor by tensor: what is not changed is copied, nothing is held whole."""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from phoque.errors import PhoqueError
from phoque.files import sha256
from phoque.models.adapter import WEIGHTS
from phoque.models.families import Family, family_of
from phoque.models.fp8 import dequantised, is_scale, scales_of
from phoque.models.load import load_config, refuse_insane
from phoque.models.shards import DTYPES, Shards
from phoque.models.source import INDEX, Source

RECORD = "merge.json"
SHARD_BYTES = 4 << 30
FLOATS = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
SIDE_FILES = ("processor_config.json", "preprocessor_config.json", "generation_config.json")
TOKENIZER_FILES = ("tokenizer", "special_tokens", "added_tokens", "vocab", "merges", "chat_template")


@dataclass
class Change:
    """What an adapter does to one weight: W + scale * B A, with DoRA's magnitude over the rows' norms; or another W."""

    scale: float = 0.0
    a: torch.Tensor | None = None
    b: torch.Tensor | None = None
    magnitude: torch.Tensor | None = None
    replacement: torch.Tensor | None = None
    names: list[str] = field(default_factory=list)  # of the adapter's tensors that it is made of

    def applied(self, weight: torch.Tensor) -> torch.Tensor:
        """The merged weight, in fp32; `weight` (rows, columns) is fp32 and is changed in place."""
        if self.replacement is not None:
            return self.replacement.float()
        assert self.a is not None and self.b is not None
        weight.addmm_(self.b.float(), self.a.float(), alpha=self.scale)
        if self.magnitude is not None:  # https://arxiv.org/abs/2402.09353, as peft computes it
            weight.mul_((self.magnitude.float() / torch.linalg.vector_norm(weight, dim=1)).unsqueeze(1))
        return weight


@dataclass(frozen=True)
class Written:
    """A tensor of the merged model: its name, dtype and shape."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Bytes."""
        count = 1
        for length in self.shape:
            count *= length
        return count * self.dtype.itemsize


def merge(
    base: Source, adapter: Path, into: Path, dtype: str, show: Callable[[int, str], None] = lambda done, text: None
) -> dict[str, Any]:
    """Write the merged model; return {tensors, changed, bytes, shards}, with `unchanged` if it was there already.

    Memory: a few tensors. Raises PhoqueError (2) if the adapter does not fit the base, (1) if the disk has no room;
    what is not finished never lies in `into`.
    """
    asked = {"base": base.revision, "adapter": sha256(adapter / WEIGHTS), "dtype": dtype}
    if (into / RECORD).is_file():
        there = json.loads((into / RECORD).read_text())
        if there["asked"] == asked:
            return there["made"] | {"unchanged": True}
    if into.exists() and any(into.iterdir()) and not (into / RECORD).is_file():
        raise PhoqueError(
            f"{into} is not empty, and is no merged model.", "It would be replaced.", "Choose another --output-dir."
        )
    config, shards = load_config(base), Shards(base.folder)
    family = family_of(config)
    changes = read_changes(adapter, config, family, shards)
    plan = _plan(shards, family, changes, FLOATS[dtype], config)
    _check_room(into, sum(w.size for w in plan))
    staging = into.with_name(f".{into.name}.partial")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    try:
        arriving = _merged(shards, plan, changes, _scales(config, shards, plan), show)
        files = _write(staging, plan, arriving)
        _write_side_files(base.folder, adapter, staging, config, dtype)
        made = {
            "tensors": len(plan), "changed": len(changes), "bytes": sum(w.size for w in plan), "shards": len(files)
        }  # fmt: skip
        (staging / RECORD).write_text(json.dumps({"asked": asked, "made": made}, indent=1))
        shutil.rmtree(into, ignore_errors=True)
        staging.rename(into)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return made


def read_changes(adapter: Path, config: Any, family: Family, shards: Shards) -> dict[str, Change]:
    """What an adapter changes, by the checkpoint's own tensor names; each of its tensors is used exactly once.

    It may have been trained on the full model, on the text model alone, or under Unsloth's names. Raises PhoqueError
    (2) for a kind of adapter that phoque does not merge, and naming the first tensor that does not fit.
    """
    from peft import LoraConfig

    lora: Any = LoraConfig.from_pretrained(str(adapter))
    _refuse_kinds(lora)
    by_text_name = {text: key for key in shards.tensors if (text := family.text_key(key)) and not is_scale(key)}
    changes: dict[str, Change] = {}
    weights = load_file(adapter / WEIGHTS)
    for name, tensor in weights.items():
        module, part = _split(name)
        leaf = "bias" if part == "bias" else "weight"
        key = _key_of(f"{module}.{leaf}", by_text_name, shards)
        if key is None:
            raise _unfit(name, "the base has no such weight", adapter)
        change = changes.setdefault(key, Change())
        change.names.append(name)
        if part in ("weight", "bias"):
            change.replacement = tensor
        elif part == "lora_magnitude_vector":
            change.magnitude = tensor.reshape(-1)
        else:
            setattr(change, part.removeprefix("lora_").lower(), tensor)
        change.scale = _scale(lora, module)
    for key, change in changes.items():
        _check_fit(key, change, shards.tensors[key].shape, adapter)
    tied = config.get_text_config().tie_word_embeddings
    if tied and any("embed_tokens" in key or "lm_head" in key for key in changes):
        raise _unfit("modules_to_save", "the base uses one matrix for input and output, and it would need two", adapter)
    assert sum(len(change.names) for change in changes.values()) == len(weights)
    return changes


def _refuse_kinds(lora: Any) -> None:
    refused = {
        f"a {lora.peft_type.value} adapter": lora.peft_type.value != "LORA",
        "lora_bias": lora.lora_bias,
        "fan_in_fan_out": lora.fan_in_fan_out,
        "target_parameters": bool(lora.target_parameters),
        f"init_lora_weights {lora.init_lora_weights}": isinstance(lora.init_lora_weights, str)
        and lora.init_lora_weights not in ("gaussian", "orthogonal", "eva"),
    }
    for kind, found in refused.items():
        if found:
            raise PhoqueError(
                f"phoque does not merge {kind}.", "It is not W + scale * B A on the base that was published.",
                "Merge it with the library that made it.",
            )  # fmt: skip


def _split(name: str) -> tuple[str, str]:
    """An adapter tensor's module, without peft's prefixes, and which part it is."""
    name = name.removeprefix("base_model.").removeprefix("model.") if name.startswith("base_model.") else name
    name = name.replace(".base_layer.", ".").replace(".default.", ".")
    for part in ("lora_A", "lora_B", "lora_magnitude_vector"):
        for ending in (f".{part}.weight", f".{part}"):
            if name.endswith(ending):
                return name.removesuffix(ending), part
    module, _, leaf = name.rpartition(".")
    return module, leaf


def _key_of(name: str, by_text_name: dict[str, str], shards: Shards) -> str | None:
    """The checkpoint's key of a weight that an adapter names as the full or as the text-only model does."""
    forms = [name]
    for prefix in ("model.language_model.model.", "language_model.model.", "model.language_model.", "language_model."):
        if name.startswith(prefix):
            forms += ["model." + name.removeprefix(prefix), name.removeprefix(prefix)]
            break
    for form in forms:
        if form in by_text_name:
            return by_text_name[form]
    return next((form for form in (name, name.removeprefix("model.")) if form in shards.tensors), None)


def _scale(lora: Any, module: str) -> float:
    from peft.utils.other import get_pattern_key

    rank = lora.rank_pattern.get(get_pattern_key(lora.rank_pattern, module), lora.r)
    alpha = lora.alpha_pattern.get(get_pattern_key(lora.alpha_pattern, module), lora.lora_alpha)
    return alpha / (rank**0.5 if lora.use_rslora else rank)


def _check_fit(key: str, change: Change, shape: tuple[int, ...], adapter: Path) -> None:
    if change.replacement is not None:
        made = tuple(change.replacement.shape)
    elif change.a is None or change.b is None:
        raise _unfit(change.names[0], "its other half is missing", adapter)
    else:
        made = (change.b.shape[0], change.a.shape[1]) if change.a.shape[0] == change.b.shape[1] else (0,)
    if made != shape:
        raise _unfit(change.names[0], f"{key} is {list(shape)}, and this makes {list(made)}", adapter)
    for tensor in (change.a, change.b, change.magnitude, change.replacement):
        if tensor is not None and not bool(torch.isfinite(tensor).all()):
            raise _unfit(change.names[0], "it holds NaN or infinity", adapter)


def _unfit(name: str, reason: str, adapter: Path) -> PhoqueError:
    return PhoqueError(
        f"The adapter in {adapter} does not fit the base.", f"{name}: {reason}.",
        "Name the base that it was trained on with --base-model.",
    )  # fmt: skip


def _plan(
    shards: Shards, family: Family, changes: dict[str, Change], dtype: torch.dtype, config: Any
) -> list[Written]:  # fmt: skip
    """Every tensor of the merged model, in the order of the base's files; beside the text model each keeps its type."""
    plan = []
    ordered = sorted(shards.tensors, key=lambda n: (shards.tensors[n].file, shards.tensors[n].start))
    for key in (k for k in ordered if not is_scale(k)):
        stored = shards.tensors[key]
        recast = family.text_key(key) is not None or key in changes or stored.dtype.itemsize == 1
        kept = not recast or not stored.dtype.is_floating_point
        plan.append(Written(key, stored.dtype if kept else dtype, stored.shape))
    return plan


def _scales(config: Any, shards: Shards, plan: list[Written]) -> dict[str, str]:
    declared = getattr(config, "quantization_config", None) or {}
    method = declared.get("quant_method") if isinstance(declared, dict) else declared.quant_method
    return scales_of(shards.tensors, [w.name for w in plan], method == "fp8")


def _merged(
    shards: Shards, plan: list[Written], changes: dict[str, Change], scales: dict[str, str],
    show: Callable[[int, str], None],
) -> Iterator[torch.Tensor]:  # fmt: skip
    with shards.stream([w.name for w in plan], torch.device("cpu")) as arriving:
        for number, (wanted, (name, stored)) in enumerate(zip(plan, arriving, strict=True), 1):
            assert wanted.name == name
            tensor = stored
            if name in scales:
                tensor = dequantised(stored, shards.read(scales[name]))
                refuse_insane({name: tensor.abs().max()})
            if name in changes:
                tensor = changes[name].applied(tensor.float())
            show(number, name)
            yield tensor.to(wanted.dtype)


def _check_room(into: Path, size: int) -> None:
    at = next(parent for parent in into.absolute().parents if parent.exists())
    free = shutil.disk_usage(at).free
    if free < 1.02 * size + (64 << 20):
        raise PhoqueError(
            f"The merged model needs {size / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free.",
            f"It is written to {into}.", "Free some space, or choose another --output-dir.", 1,
        )  # fmt: skip


def _write(folder: Path, plan: list[Written], arriving: Iterator[torch.Tensor]) -> list[str]:
    """Shards of at most SHARD_BYTES, and their index; headers are known before the tensors, so all is written once."""
    groups: list[list[Written]] = [[]]
    for wanted in plan:
        if groups[-1] and sum(w.size for w in groups[-1]) + wanted.size > SHARD_BYTES:
            groups.append([])
        groups[-1].append(wanted)
    alone = len(groups) == 1
    names = ["model.safetensors"] if alone else [f"model-{n:05}-of-{len(groups):05}.safetensors" for n in
                                                 range(1, len(groups) + 1)]  # fmt: skip
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


def _write_side_files(base: Path, adapter: Path, into: Path, config: Any, dtype: str) -> None:
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
