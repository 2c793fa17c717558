"""Levels `files` and `graph`: the metadata are complete and agree, and so are the tensors' names, shapes and values."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from jinja2 import TemplateError

from phoque.checks import CheckFailed, Verdict
from phoque.data.template_renderer import TemplateOnly, TemplateRenderer
from phoque.errors import PhoqueError, first_line
from phoque.files import EXPORT_RECORD, sha256
from phoque.gguf.reader import GgufFile, read_gguf
from phoque.models.architectures import ARCHITECTURES
from phoque.models.architectures.llama_cpp_names import BYTE_LEVEL, SENTENCEPIECE, TOKENIZERS

FILES, GRAPH = "files", "graph"
NEEDED_KEYS = (
    "block_count",
    "context_length",
    "embedding_length",
    "feed_forward_length",
    "attention.head_count",
    "attention.layer_norm_rms_epsilon",
)
COUNTS = NEEDED_KEYS[:-1]
OPTIONAL_SIZES = ("attention.head_count_kv", "attention.key_length", "attention.value_length")
SPECIAL = ("bos_token_id", "eos_token_id", "eot_token_id", "padding_token_id", "unknown_token_id")
QUESTION = [{"role": "user", "content": "What do the gulls want?"}]
ANSWER = {"role": "assistant", "content": "Herring."}
MAX_MAGNITUDE = 1e4  # of a value; a damaged scale of a quantized group gives more, or infinity
MODELFILE = "Modelfile"


def check_file(path: Path, verdict: Verdict, *, tensors: bool = True) -> GgufFile | None:
    """Add the level `files`, and with `tensors` `graph`, for one file; return it, or None if it cannot be read."""
    name, file = path.name, None
    with verdict.check(FILES, f"{name}: it is a whole GGUF file") as notes:
        file = read_gguf(path)
        notes.append(f"{len(file.tensors)} tensors, {len(file.metadata)} entries, {file.precision or 'mixed types'}")
    if file is None:
        return None
    if file.metadata.get("general.type") == "adapter":
        with verdict.check(FILES, f"{name}: it is a LoRA adapter with pairs of matrices") as notes:
            notes.append(_guard(_check_pairs, file))
        if tensors:
            _check_all_values(file, verdict)
        return file
    entries, tokenizer = f"{name} entries", f"{name} tokenizer"  # later checks use what these check
    with verdict.check(FILES, f"{name}: it has every entry that llama.cpp needs", id=entries) as notes:
        notes.append(_guard(_check_entries, file))
    with verdict.check(
        FILES, f"{name}: the tokenizer is complete, and its special tokens exist", id=tokenizer
    ) as notes:
        notes.append(_guard(_check_tokenizer, file))
    if not verdict.has_failed(tokenizer):
        with verdict.check(
            FILES, f"{name}: the chat template renders, and its answers end where llama.cpp stops"
        ) as notes:
            notes.append(_guard(_check_template, file))
    if not tensors:
        return file
    if not verdict.has_failed(entries, tokenizer):
        with verdict.check(GRAPH, f"{name}: every tensor exists, with the shape that the metadata say") as notes:
            notes.append(_guard(_check_shapes, file))
    _check_all_values(file, verdict)
    return file


def _guard(check: Callable[[GgufFile], str], file: GgufFile) -> str:
    """Run a check; whatever a damaged value raises fails it."""
    try:
        return check(file)
    except CheckFailed:
        raise
    except Exception as error:
        raise CheckFailed(f"an entry has an impossible value: {type(error).__name__}: {first_line(error)}") from error


def check_folder(folder: Path, files: list[Path], *, all_files: bool, verdict: Verdict) -> None:
    """Add the checks of the folder: hashes of `files`, and the Modelfile; `all_files` if none is left out."""
    if (folder / EXPORT_RECORD).is_file():
        with verdict.check(FILES, "each file is unchanged since the export"):
            present = {file.name for file in files}
            for name, digest in _read_digests(folder / EXPORT_RECORD).items():
                if name not in present and not all_files:
                    continue
                if Path(name).name != name or not (folder / name).is_file():
                    raise CheckFailed(f"{name} is listed in {EXPORT_RECORD} but missing")
                if sha256(folder / name) != digest:
                    raise CheckFailed(f"{name} is not the file that was exported: its SHA-256 differs")
    else:
        verdict.skip(FILES, "each file is unchanged since the export", f"there is no {EXPORT_RECORD} with their hashes")
    if (folder / MODELFILE).is_file() and all_files:
        with verdict.check(FILES, "the Modelfile names a file that exists"):
            for line in (folder / MODELFILE).read_text(encoding="utf-8", errors="replace").splitlines():
                keyword, _, value = line.partition(" ")
                if keyword in ("FROM", "ADAPTER") and value.startswith("./") and value != "./base.gguf":
                    _check_named(value, files)


def _read_digests(file: Path) -> dict[str, str]:
    try:
        digests = json.loads(file.read_text(encoding="utf-8"))["sha256"]
        return {str(name): str(digest) for name, digest in digests.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckFailed(f"{file.name} is not the record of an export: {first_line(error)}") from error


def _check_named(value: str, files: list[Path]) -> None:
    if value[2:] not in {file.name for file in files}:
        raise CheckFailed(f"it names {value}, which is not in the folder")


def _check_entries(file: GgufFile) -> str:
    known = {a.gguf.name for a in ARCHITECTURES.values() if a.gguf}
    if not file.architecture:
        raise CheckFailed("its metadata have no general.architecture")
    if file.architecture not in gguf.MODEL_ARCH_NAMES.values():
        raise CheckFailed(f"llama.cpp does not know the architecture {file.architecture!r}")
    if file.architecture not in known:
        raise CheckFailed(f"phoque knows {', '.join(sorted(known))}, and this file has {file.architecture!r}")
    for name in NEEDED_KEYS:
        value = file.key(name)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0:
            raise CheckFailed(f"{file.architecture}.{name} is {value!r}")
    for name in OPTIONAL_SIZES:
        value = file.metadata.get(f"{file.architecture}.{name}", 1)
        if not isinstance(value, int) or value <= 0:
            raise CheckFailed(f"{file.architecture}.{name} is {value!r}")
    for name in COUNTS:
        if not isinstance(file.key(name), int):
            raise CheckFailed(f"{file.architecture}.{name} is {file.key(name)!r}, which is no whole number")
    if (blocks := file.key("block_count")) > len(file.tensors):
        raise CheckFailed(f"{file.architecture}.block_count is {blocks:,}, and there are {len(file.tensors)} tensors")
    heads, kv_heads = file.key("attention.head_count"), _kv_heads(file)
    if heads % kv_heads:
        raise CheckFailed(f"{heads} heads cannot share {kv_heads!r} key-value heads")
    return f"{file.architecture}, {file.key('block_count')} blocks, {file.key('context_length'):,} tokens of context"


def _kv_heads(file: GgufFile) -> Any:
    name = f"{file.architecture}.attention.head_count_kv"
    return file.metadata.get(name, file.key("attention.head_count"))


def _check_tokenizer(file: GgufFile) -> str:
    metadata, tokens = file.metadata, file.tokens
    model = metadata.get("tokenizer.ggml.model")
    if model not in TOKENIZERS:
        raise CheckFailed(f"tokenizer.ggml.model is {model!r}; llama.cpp has {', '.join(TOKENIZERS)} for these models")
    if model == BYTE_LEVEL and not metadata.get("tokenizer.ggml.merges"):
        raise CheckFailed("it has no tokenizer.ggml.merges, so texts would not be split into its tokens")
    if model == BYTE_LEVEL and not metadata.get("tokenizer.ggml.pre"):
        raise CheckFailed("it has no tokenizer.ggml.pre: llama.cpp would guess how to split a text")
    if model == SENTENCEPIECE and len(metadata.get("tokenizer.ggml.scores") or []) != len(tokens):
        raise CheckFailed("it needs a score for each token in tokenizer.ggml.scores")
    types = metadata.get("tokenizer.ggml.token_type") or []
    if not isinstance(types, list) or len(types) != len(tokens):
        raise CheckFailed(f"it has {len(tokens)} tokens and not as many token types")
    rows = file.shape("token_embd.weight")[0]
    if rows != len(tokens):
        raise CheckFailed(f"it has {len(tokens)} tokens and {rows} embeddings")
    for name in SPECIAL:
        value = metadata.get(f"tokenizer.ggml.{name}")
        if value is not None and not (isinstance(value, int) and 0 <= value < len(tokens)):
            raise CheckFailed(f"tokenizer.ggml.{name} is {value}, and there are {len(tokens)} tokens")
    if metadata.get("tokenizer.ggml.eos_token_id") is None:
        raise CheckFailed("it has no tokenizer.ggml.eos_token_id, so an answer would never end")
    return f"{model}, {metadata.get('tokenizer.ggml.pre')}, {len(tokens):,} tokens"


def _check_template(file: GgufFile) -> str:
    stop = find_stop_token(file)
    ends = {file.metadata.get(f"tokenizer.ggml.{name}") for name in ("eos_token_id", "eot_token_id")}
    if stop not in {file.tokens[index] for index in ends if isinstance(index, int)}:
        raise CheckFailed(f"its answers end with {stop!r}, and neither eos_token_id nor eot_token_id is that token")
    return f"answers end with {stop}"


def find_stop_token(file: GgufFile) -> str:
    """The token that the chat template writes behind an answer. Raises CheckFailed if there is no such template."""
    if not isinstance(file.metadata.get("tokenizer.chat_template"), str):
        raise CheckFailed("it has no tokenizer.chat_template: clients would guess how a conversation is written")
    text = render(file, [*QUESTION, ANSWER])
    if ANSWER["content"] not in text or QUESTION[0]["content"] not in text:
        raise CheckFailed("its chat template leaves out what is said")
    rest = text.rpartition(ANSWER["content"])[2]
    token = max((t for t in _control_tokens(file) if rest.lstrip().startswith(t)), key=len, default="")
    if not token:
        raise CheckFailed("its chat template writes no control token behind an answer, so a model would not stop")
    return token


def render(file: GgufFile, messages: list[dict[str, Any]], *, add_generation_prompt: bool = False) -> str:
    """A conversation by the file's own template. Raises CheckFailed if the template fails."""
    try:
        renderer = TemplateRenderer(_template_of(file))
        return renderer.render(messages, add_generation_prompt=add_generation_prompt)
    except (TemplateError, PhoqueError) as error:
        reason = error.why if isinstance(error, PhoqueError) else str(error)
        raise CheckFailed(f"its chat template does not render: {reason}") from error


def _template_of(file: GgufFile) -> TemplateOnly:
    keys = {"bos_token": "bos_token_id", "eos_token": "eos_token_id", "unk_token": "unknown_token_id"}
    ids = {name: file.metadata.get(f"tokenizer.ggml.{key}") for name, key in keys.items()}
    special = {name: file.tokens[index] for name, index in ids.items() if isinstance(index, int)}
    return TemplateOnly(file.metadata["tokenizer.chat_template"], special)


def _control_tokens(file: GgufFile) -> list[str]:
    types = file.metadata.get("tokenizer.ggml.token_type") or []
    special = (gguf.TokenType.CONTROL, gguf.TokenType.USER_DEFINED)
    return [token for token, kind in zip(file.tokens, types, strict=False) if kind in special]


def _check_shapes(file: GgufFile) -> str:
    width, blocks = file.key("embedding_length"), file.key("block_count")
    heads, kv_heads = file.key("attention.head_count"), _kv_heads(file)
    prefix = f"{file.architecture}.attention."
    head_dim = file.metadata.get(f"{prefix}key_length", width // heads)
    inner, values = file.key("feed_forward_length"), kv_heads * file.metadata.get(f"{prefix}value_length", head_dim)
    expected: dict[str, tuple[int, ...]] = {
        "token_embd.weight": (len(file.tokens), width),
        "output_norm.weight": (width,),
    }
    fused = "blk.0.attn_qkv.weight" in file.tensors
    for n in range(blocks):
        block = f"blk.{n}."
        expected[f"{block}attn_output.weight"] = (width, heads * head_dim)
        expected[f"{block}ffn_down.weight"] = (width, inner)
        if fused:
            expected[f"{block}attn_qkv.weight"] = ((heads + kv_heads) * head_dim + values, width)
            expected[f"{block}ffn_up.weight"] = (2 * inner, width)
            continue
        expected[f"{block}attn_q.weight"] = (heads * head_dim, width)
        expected[f"{block}attn_k.weight"] = (kv_heads * head_dim, width)
        expected[f"{block}attn_v.weight"] = (values, width)
        expected[f"{block}ffn_gate.weight"] = expected[f"{block}ffn_up.weight"] = (inner, width)
    if "output.weight" in file.tensors:
        expected["output.weight"] = (len(file.tokens), width)
    for name, shape in expected.items():
        if (stored := file.shape(name)) != shape:
            raise CheckFailed(f"{name} is {_text(stored)}; the metadata say {_text(shape)}")
    last = [name for name in file.tensors if name.startswith(f"blk.{blocks}.")]
    if last:
        raise CheckFailed(f"it has {last[0]}, and the metadata say {blocks} blocks, from 0")
    return f"{len(file.tensors)} tensors"


def _check_values(file: GgufFile) -> str:
    largest = 0.0
    for name in file.tensors:
        for values in file.blocks_of_values(name):
            peak = float(np.abs(values).max())
            if not np.isfinite(peak):
                raise CheckFailed(f"{name} contains NaN or infinity")
            if peak > MAX_MAGNITUDE:
                raise CheckFailed(f"{name} has values up to {peak:.2g}; trained weights are far smaller")
            largest = max(largest, peak)
    return f"largest magnitude {largest:.3g}"


def _check_all_values(file: GgufFile, verdict: Verdict) -> None:
    asks = f"{file.path.name}: every value is finite and of a magnitude that weights have"
    with verdict.check(GRAPH, asks) as notes:
        notes.append(_guard(_check_values, file))


def _check_pairs(file: GgufFile) -> str:
    alpha = file.metadata.get("adapter.lora.alpha")
    if file.metadata.get("adapter.type") != "lora" or not isinstance(alpha, float) or not alpha > 0:
        raise CheckFailed("its metadata have no adapter.type lora, or no adapter.lora.alpha")
    modules = {name.rpartition(".lora_")[0] for name in file.tensors}
    for module in sorted(modules):
        a, b = file.shape(f"{module}.lora_a"), file.shape(f"{module}.lora_b")
        if len(a) != 2 or len(b) != 2 or a[0] != b[1]:
            raise CheckFailed(f"{module} has {_text(a)} values in A and {_text(b)} in B")
    return f"{len(modules)} weights, alpha {alpha:g}"


def _text(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))
