"""`phoque export-onnx`: find the model, merge it if need be, write each session in each precision, measure, verify."""

import gc
import json
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch

from phoque.console import Console
from phoque.errors import FAILED, PhoqueError
from phoque.files import sha256
from phoque.hub.client import Hub
from phoque.hub.repo import CARD, Repo
from phoque.merging.run import find_adapter, find_base, merge_into
from phoque.model_cards import onnx_card
from phoque.models.load import device, load_model, load_tokenizer
from phoque.models.source import INDEX, Source, resolve, wanted_files
from phoque.onnx import accuracy
from phoque.onnx.component import Component, Weights
from phoque.onnx.graph.decoder import decoder_component, embeddings_component
from phoque.onnx.graph.trace import Provider, decoder
from phoque.onnx.graph.vision import vision_component
from phoque.onnx.quantize import mixed_precision
from phoque.onnx.quantize.block_format import Quantised, eight_bits
from phoque.onnx.quantize.smoothquant import smoothed
from phoque.onnx.session import SUFFIXES
from phoque.onnx.transformers_js import SESSIONS, layout_of, write_side_files
from phoque.settings.export_onnx import ExportSettings
from phoque.settings.fields import Resolved
from phoque.settings.presets import PRESETS

RECORD = "export.json"
HALF = ("fp16", "q4f16")  # computed in 16 bits, and fused for WebGPU
WASM_BYTES = 3.5e9
BLOCKS = ("q8", "q4", "q4f16", "int8")


@dataclass(frozen=True)
class Export:
    """What is made of a source: the sessions of its layout in the precisions asked for."""

    weights: Weights
    layout: str
    dtypes: list[str]
    folder: Path
    fuse: bool


def exported(resolved: Resolved[ExportSettings], cache: Path, console: Console, dry_run: bool) -> dict[str, Any]:
    """Do what the settings ask for; return {output_dir, layout, dtypes, verdict, ...}.

    Raises PhoqueError (1) if the export does not verify, unless that is only to be a warning.
    """
    s = resolved.settings
    hub = Hub(resolved.secrets.hub, console.say, s.hub_patience)
    into = s.output_dir or Path(f"{_name(s)}-onnx")
    _refuse_others(into)
    repo = Repo(hub, s.push_repo_id) if s.push_repo_id else None
    source = find_source(resolved, hub, cache, console, dry_run)
    layout = _layout(source, s.layout)
    result: dict[str, Any] = {"output_dir": str(into), "source": source.name, "layout": layout, "engine": s.engine}
    if dry_run:
        return result | {"dtypes": dict.fromkeys(s.dtype), "settings": resolved.provenance()}
    if repo:
        repo.open(s.public, console.warn)
    staging = into.with_name(f".{into.name}.partial")
    shutil.rmtree(staging, ignore_errors=True)
    (staging / "onnx").mkdir(parents=True)
    begun = time.monotonic()
    try:
        result["dtypes"] = made = _made(source, layout, staging, resolved, console)
        result["seconds"] = round(time.monotonic() - begun, 1)
        result["bytes"] = sum(f.stat().st_size for f in (staging / "onnx").iterdir())
        _record(staging, source, result)
        result["verdict"] = _verified(staging, source, list(made), s, console)
        (staging / CARD).write_text(onnx_card(source, result, s.push_repo_id))
        shutil.rmtree(into, ignore_errors=True)
        staging.rename(into)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    if repo:
        files = {str(f.relative_to(into)): f for f in into.rglob("*") if f.is_file()}
        # graphs of an earlier export that this one does not declare would fail in a browser
        stale = lambda there: [path for path in there.files if path.startswith("onnx/") and path not in files]
        result |= {"repo": repo.name, "commit": repo.push(files, "ONNX export", stale)}
    return result


def find_source(resolved: Resolved[ExportSettings], hub: Hub, cache: Path, console: Console, dry_run: bool) -> Source:
    """The merged model: merged now, in a folder, or on the Hub in a model or dataset repository.

    Raises PhoqueError (2) if none is named, or two.
    """
    s = resolved.settings
    if s.adapter_source and s.merged_dir:
        raise PhoqueError(
            "Two sources were named.", "--adapter-source and --merged-dir exclude each other.", "Name one of them."
        )
    if s.adapter_source:
        adapter, commit = find_adapter(s.adapter_source, s.adapter_revision, hub, cache)
        base = find_base(adapter, s.base, s.revision, resolved.secrets, cache, console, weights=not dry_run)
        if dry_run:
            return base
        # kept where asked, else in the cache, under what it is made of, so that a second export finds it
        key = sha256(adapter / "adapter_model.safetensors")[:16]
        into = s.merged_out_dir or cache / "merged" / f"{base.revision[:16]}-{key}"
        into.parent.mkdir(parents=True, exist_ok=True)
        merge_into(base, adapter, into, "bf16", console, prove=False)
        return Source(f"{base.name} with {s.adapter_source}{commit}", into, base.revision, "merged")
    if s.merged_dir:
        return _merged_model(s, resolved.secrets.hub, hub, cache, console, dry_run)
    if s.base or resolved.origins["preset"].source != "default":  # the base itself, as it is
        name = s.base or PRESETS[s.preset]["base_model"]
        return resolve(name, s.revision, resolved.secrets.hub, cache, console.say, not dry_run)
    raise PhoqueError(
        "There is nothing to export.",
        "Neither an adapter nor a merged model is named.",
        "Name one with --adapter-source or --merged-dir.",
    )


def _merged_model(
    s: ExportSettings, token: str | None, hub: Hub, cache: Path, console: Console, dry_run: bool
) -> Source:
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        source = resolve(s.merged_dir, s.merged_revision, token, cache, console.say, not dry_run)
    except RepositoryNotFoundError:
        return _from_dataset(s, hub, cache, dry_run)
    if s.merged_out_dir and source.on_hub and not dry_run:
        shutil.copytree(source.folder, s.merged_out_dir, dirs_exist_ok=True)
        return Source(source.name, s.merged_out_dir, source.revision, source.origin)
    return source


def _from_dataset(s: ExportSettings, hub: Hub, cache: Path, dry_run: bool) -> Source:
    """A merged model that was kept in a dataset repository, at a pinned commit, each file's hash compared."""
    repo = Repo(hub, s.merged_dir, "dataset")
    there = repo.snapshot(s.merged_revision)
    folder = s.merged_out_dir or cache / "merged" / f"{repo.name.replace('/', '--')}-{there.sha[:12]}"
    folder.mkdir(parents=True, exist_ok=True)
    index = None
    if INDEX in there.files:
        index = json.loads(repo.fetch(there, INDEX, folder).read_text())
    if "config.json" not in there.files:
        raise PhoqueError(f"{repo.name} holds no model.", "There is no config.json at its root.", "Check --merged-dir.")
    for path in wanted_files(there.files, index):
        if dry_run and path.endswith(".safetensors"):
            continue
        repo.fetch(there, path, folder)
    return Source(repo.name, folder, there.sha, "dataset repository")


def _name(s: ExportSettings) -> str:
    named = s.adapter_source or s.merged_dir or s.base
    return named.rstrip("/").split("/")[-1] or "model"


def _refuse_others(into: Path) -> None:
    if into.exists() and not into.is_dir():
        raise PhoqueError(f"{into} is a file.", "The export is a folder.", "Choose another --output-dir.")
    if into.is_dir() and any(into.iterdir()) and not (into / RECORD).is_file():
        raise PhoqueError(
            f"{into} is not empty, and is no export.", "It would be replaced.", "Choose another --output-dir."
        )


def _layout(source: Source, asked: str) -> str:
    raw = json.loads((source.folder / "config.json").read_text())
    has_vision = raw["model_type"] == "mistral3" and "vision_config" in raw
    if asked == "multimodal" and not has_vision:
        raise PhoqueError(
            f"{source.name} has no vision tower.", f"It is a {raw['model_type']}.", "Use --layout text or auto."
        )
    return layout_of(raw, has_vision) if asked == "auto" else asked


def _made(
    source: Source, layout: str, folder: Path, resolved: Resolved[ExportSettings], console: Console
) -> dict[str, Any]:
    """Write the folder; return for each precision its bytes and how far it is from the checkpoint."""
    s = resolved.settings
    found: dict[str, dict[str, Any]] = {dtype: {} for dtype in s.dtype}
    load_tokenizer(source)  # a model without a template is refused before anything is computed
    fitting: accuracy.Ids = []
    held_out: accuracy.Ids = []
    if s.accuracy or set(BLOCKS) & set(s.dtype):
        fitting, held_out = accuracy.chats(source, s.chats, s.chats_split, resolved.secrets.hub)
    if s.engine == "optimum":
        from phoque.onnx.optimum import optimum_graphs

        chunks = optimum_graphs(source, folder, layout, s.dtype, s.onnx_export_python, console)
    else:
        export = Export(Weights(source), layout, s.dtype, folder, s.fuse)
        if "int8" in s.dtype and export.weights.whole_bytes > WASM_BYTES:
            console.warn(
                f"int8 becomes {export.weights.whole_bytes / 1e9:.1f} GB in memory, of which a page on wasm has 4: "
                "it will not load there"
            )
        fitted = _fitted(export, fitting, s, console, found)
        gc.collect()  # the model that was fitted: 13 GB of 3B parameters
        chunks = _graphs(export, *fitted, console)
    write_side_files(source.folder, folder, layout, chunks, s.dtype)
    if s.accuracy:
        console.say(
            f"comparing with the checkpoint on {sum(ids.shape[1] for ids in held_out)} tokens of held-out chats"
        )
        wanted = accuracy.reference(source, held_out)
        for dtype in s.dtype:
            found[dtype] |= accuracy.distance(folder, dtype, held_out, wanted)
    for dtype in s.dtype:
        files = [f for n in SESSIONS[layout] for f in (folder / "onnx").glob(f"{n}{SUFFIXES[dtype]}.onnx*")]
        found[dtype]["bytes"] = sum(file.stat().st_size for file in files)
    return found


def _fitted(
    export: Export, fitting: accuracy.Ids, s: ExportSettings, console: Console, found: dict[str, dict[str, Any]]
) -> tuple[Weights, Quantised | None]:
    """The weights that precisions in blocks are made of, and the parameters in 4 bits, if one of them needs these."""
    four = [dtype for dtype in ("q4", "q4f16") if dtype in export.dtypes]
    if not set(BLOCKS) & set(export.dtypes):
        return export.weights, None
    console.say("making the activations even")
    on = device()
    model = load_model(export.weights.source, "none" if on.type == "cpu" else "bf16", on=on)
    weights = smoothed(export.weights, model, fitting)
    if not four:
        return weights, None
    console.say(f"fitting 4 bits on {sum(ids.shape[1] for ids in fitting)} tokens of chats")
    with console.progress(model.config.num_hidden_layers) as show:
        made, said = mixed_precision.four_bits(weights, model, fitting, (s.largest_kl, s.least_agreement), show)
    for dtype in four:
        found[dtype] |= said
    return weights, made


def _graphs(export: Export, even: Weights, four: Quantised | None, console: Console) -> dict[str, int]:
    """Write every session in every precision, one after the other; return their chunks by file."""
    chunks: dict[str, int] = {}
    makers = _makers(export, even, four)
    with console.progress(len(makers)) as show:
        for number, (dtype, name, make) in enumerate(makers):
            show(number, f"{name} {dtype}: tracing")
            part = make()
            write = lambda text, at=number, label=f"{name} {dtype}": show(at, f"{label}: {text}")
            chunks[f"{name}{SUFFIXES[dtype]}.onnx"] = part.write(export.folder / "onnx", SUFFIXES[dtype], write)
        show(len(makers), "all graphs written")
    return chunks


def _makers(export: Export, even: Weights, four: Quantised | None) -> list[tuple[str, str, Callable[[], Component]]]:
    """What makes each session; `even` are the weights for precisions in blocks."""
    weights, text = export.weights, export.weights.config.get_text_config()
    eight = eight_bits(even.text)
    found: list[tuple[str, str, Callable[[], Component]]] = []
    providers: dict[torch.dtype, Provider] = {torch.float16: "webgpu", torch.float32: "cpu"} if export.fuse else {}
    traced = cache(lambda held: decoder(text, held, providers.get(held)))
    for dtype in export.dtypes:
        held = torch.float16 if dtype in HALF else torch.float32
        by = {"q8": eight, "q4": four, "q4f16": four, "int8": replace(eight, whole=True)}.get(dtype)
        apart = export.layout == "multimodal"
        name = "decoder_model_merged" if apart else "model"

        def chat(
            held: torch.dtype = held, by: Quantised | None = by, name: str = name, apart: bool = apart
        ) -> Component:
            return decoder_component(traced(held).copy(), even if by else weights, name, held, by, embeds=apart)

        found.append((dtype, name, chat))
        if apart:
            rows = eight if dtype in BLOCKS else None
            found.append((dtype, "embed_tokens", lambda h=held, r=rows: embeddings_component(weights, h, r)))
            found.append((dtype, "vision_encoder", lambda h=held, d=dtype: vision_component(weights, h, d in BLOCKS)))
    return found


def _record(folder: Path, source: Source, result: dict[str, Any]) -> None:
    from phoque import __version__

    said = {name: result[name] for name in ("layout", "engine", "dtypes", "bytes")}
    digests = {f"onnx/{file.name}": sha256(file) for file in sorted((folder / "onnx").iterdir())}
    record = {"schema_version": 1, "phoque": __version__, "source_revision": source.revision, **said, "sha256": digests}
    (folder / RECORD).write_text(json.dumps(record, indent=1))


def _verified(folder: Path, source: Source, dtypes: list[str], s: ExportSettings, console: Console) -> str:
    from phoque.onnx.verify.run import verified_folder

    verdict = verified_folder(folder, dtypes, "ort", console, source)
    failed = verdict.failed()
    for check in failed:
        console.warn(f"{check.level}: {check.said}")
    if failed and s.verify_strict:
        raise PhoqueError(
            "The export does not verify; it was not kept.",
            f"{failed[0].level}: {failed[0].said}",
            "Report it with the model's config.json, or look at it with --no-verify-strict.",
            FAILED,
        )
    return "FAIL" if failed else "PASS"
