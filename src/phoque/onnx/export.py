"""`phoque export-onnx`: find or merge the model, write every session in every precision, measure accuracy, verify."""

import gc
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from phoque.console import Console
from phoque.errors import RunError, UsageError
from phoque.files import EXPORT_RECORD, atomic_folder, sha256
from phoque.hub.repo import Repo
from phoque.hub.store import CARD, Snapshot
from phoque.inference import accuracy
from phoque.merging.find_source import find_source
from phoque.model_cards import render_onnx_card
from phoque.models.adapter_source import find_run_record, training_system
from phoque.models.architectures import ARCHITECTURES, architecture_of
from phoque.models.checkpoint_reader import CheckpointReader
from phoque.models.config import load_tokenizer
from phoque.models.load import default_device, load_model
from phoque.models.source import Source
from phoque.onnx.component import Component, Weights
from phoque.onnx.graph.decoder import decoder_component, embeddings_component
from phoque.onnx.graph.trace import Provider, trace_decoder
from phoque.onnx.graph.vision import vision_component
from phoque.onnx.quantize import mixed_precision
from phoque.onnx.quantize.block_format import Quantizer, make_8_bit_quantizer
from phoque.onnx.quantize.smoothquant import smooth_activations
from phoque.onnx.session import SUFFIXES, OnnxChatModel
from phoque.onnx.transformers_js import SESSIONS, write_side_files
from phoque.results import DryRun
from phoque.services import Services
from phoque.settings.export_onnx import ExportSettings
from phoque.settings.fields import Resolved

if TYPE_CHECKING:
    from transformers import PretrainedConfig

HALF_DTYPES = ("fp16", "q4f16")  # computed in fp16, with the operators that are fused for WebGPU
MAX_WASM_BYTES = 3.5e9  # a wasm page can address 4 GB, and needs some of that itself
QUANTIZED_DTYPES = ("q8", "q4", "q4f16", "int8")


@dataclass(frozen=True)
class Export:
    """What to export and where to: the weights, the layout (`text` or `multimodal`) and the precisions.

    With `fuse` the graphs use fused operators of ONNX Runtime, without it plain ONNX operators alone.
    """

    weights: Weights
    layout: str
    dtypes: list[str]
    folder: Path
    fuse: bool


@dataclass(frozen=True, kw_only=True)
class ExportResult:
    """An export: its folder, and for each precision its size and its distance from the checkpoint (KL, agreement)."""

    output_dir: str
    source: str
    layout: str
    engine: str
    dtypes: dict[str, dict[str, Any]]
    seconds: float = 0.0
    bytes: int = 0
    verdict: str = ""
    repo: str | None = None
    commit: str | None = None

    def to_json(self) -> dict[str, Any]:
        """For --json; `repo` and `commit` are left out if nothing was pushed."""
        return {name: value for name, value in asdict(self).items() if value is not None}


def export_model(resolved: Resolved[ExportSettings], services: Services, *, dry_run: bool) -> ExportResult | DryRun:
    """Export a model as the settings say, measure each precision, verify the export and push it.

    The folder is written under a temporary name and renamed at the end. Raises RunError if the export does not
    verify, unless --no-verify-strict is given.
    """
    s, console = resolved.settings, services.console
    export_dir = s.folder
    repo = Repo(services.hub, s.push_repo_id) if s.push_repo_id else None
    source = find_source(s, services, _check_can_export, dry_run=dry_run)
    layout = _choose_layout(source, s.layout)
    s = s.model_copy(update={"engine": _choose_engine(source, layout, s, console)})
    if dry_run:
        facts = {"output_dir": str(export_dir), "source": source.name, "layout": layout, "engine": s.engine}
        return DryRun(facts | {"dtypes": dict.fromkeys(s.dtype)}, resolved.provenance())
    if repo:
        repo.open(s.access, console.warn)
        repo.warn_of_foreign(r"onnx/.+", EXPORT_RECORD, console.warn)
    started = time.monotonic()
    with atomic_folder(export_dir) as staging:
        (staging / "onnx").mkdir()
        result = ExportResult(
            output_dir=str(export_dir),
            source=source.name,
            layout=layout,
            engine=s.engine,
            dtypes=_write_export(source, layout, staging, s, services),
        )
        size = sum(f.stat().st_size for f in (staging / "onnx").iterdir())
        result = replace(result, seconds=round(time.monotonic() - started, 1), bytes=size)
        _write_record(staging, source, result)
        result = replace(result, verdict=_verify_export(staging, source, list(result.dtypes), s, services))
        (staging / CARD).write_text(render_onnx_card(source, result.to_json(), s.push_repo_id))
    if repo is None:
        return result
    files = {str(f.relative_to(export_dir)): f for f in export_dir.rglob("*") if f.is_file()}

    def find_stale(snapshot: Snapshot) -> list[str]:
        # a browser could load graphs of an earlier export that this config.json does not declare, and would fail
        return [path for path in snapshot.files if path.startswith("onnx/") and path not in files]

    return replace(result, repo=repo.name, commit=repo.push(files, "ONNX export", find_stale))


def _check_can_export(config: "PretrainedConfig") -> None:
    if reason := architecture_of(config).no_export:
        raise UsageError(
            what=f"phoque does not export {config.model_type} to ONNX.",
            why=reason,
            fix="Use a model of another architecture; merge works for this one.",
        )


def _choose_engine(source: Source, layout: str, s: ExportSettings, console: Console) -> str:
    """The engine of the settings; for auto optimum, if an interpreter is given for it and it can do the export."""
    if s.engine != "auto":
        return s.engine
    if s.onnx_export_python is None:
        return "transformers"
    from phoque.onnx.optimum import find_limit

    if reason := find_limit(json.loads((source.folder / "config.json").read_text()), layout, s.dtype):
        console.warn(f"--onnx-export-python is not used: {reason}; exporting with phoque's own exporter")
        return "transformers"
    return "optimum"


def _choose_layout(source: Source, layout: str) -> str:
    config = json.loads((source.folder / "config.json").read_text())
    has_vision = ARCHITECTURES[config["model_type"]].vision is not None and "vision_config" in config
    if layout == "multimodal" and not has_vision:
        raise UsageError(
            what=f"{source.name} has no vision tower.",
            why=f"Its type is {config['model_type']}.",
            fix="Use --layout text or auto.",
        )
    if layout != "auto":
        return layout
    return "multimodal" if has_vision else "text"


def _write_export(source: Source, layout: str, folder: Path, s: ExportSettings, services: Services) -> dict[str, Any]:
    """Write the export; return for each precision its size in bytes, and KL and agreement with the checkpoint."""
    console = services.console
    reports: dict[str, dict[str, Any]] = {dtype: {} for dtype in s.dtype}
    load_tokenizer(source)  # raises an error for a model without a chat template before anything expensive runs
    calibration: accuracy.Ids = []
    held_out: accuracy.Ids = []
    if s.accuracy or set(QUANTIZED_DTYPES) & set(s.dtype):
        calibration, held_out = accuracy.load_chats(source, s.chats, s.chats_split, services.hub, config=s.chats_config)
    if s.engine == "optimum":
        from phoque.onnx.optimum import export_with_optimum

        chunks = export_with_optimum(
            source, folder, layout, dtypes=s.dtype, python=s.onnx_export_python, console=console
        )
    else:
        export = Export(Weights(CheckpointReader(source)), layout, s.dtype, folder, s.fuse)
        if "int8" in s.dtype and export.weights.fp32_bytes > MAX_WASM_BYTES:
            console.warn(
                f"int8 takes {export.weights.fp32_bytes / 1e9:.1f} GB of memory once it is loaded, and a wasm page "
                "has 4 GB: it will not load in wasm"
            )
        calibrated = _calibrate(export, calibration, s, console, reports)
        gc.collect()  # frees the calibrated model: 13 GB for 3B parameters
        chunks = _write_graphs(export, *calibrated, console)
    write_side_files(source.folder, folder, layout, chunks, s.dtype)
    if s.accuracy:
        tokens = sum(ids.shape[1] for ids in held_out)
        console.stage(f"comparing with the original model on {tokens} tokens of held-out conversations")
        expected = accuracy.compute_reference(source, held_out)
        for dtype in s.dtype:
            reports[dtype] |= accuracy.measure_accuracy(OnnxChatModel(folder, dtype).run, held_out, expected)
    for dtype in s.dtype:
        files = [f for n in SESSIONS[layout] for f in (folder / "onnx").glob(f"{n}{SUFFIXES[dtype]}.onnx*")]
        reports[dtype]["bytes"] = sum(file.stat().st_size for file in files)
    return reports


def _calibrate(
    export: Export, calibration: accuracy.Ids, s: ExportSettings, console: Console, reports: dict[str, dict[str, Any]]
) -> tuple[Weights, Quantizer | None]:
    """Return the smoothed weights for the quantized precisions, and the 4-bit quantizer if q4 or q4f16 is exported.

    Without a quantized precision the weights are returned as they are. The number of linear groups, and of those
    raised to 8 bits, is added to `reports`.
    """
    four_bit_dtypes = [dtype for dtype in ("q4", "q4f16") if dtype in export.dtypes]
    if not set(QUANTIZED_DTYPES) & set(export.dtypes):
        return export.weights, None
    console.stage("smoothing the activations")
    target_device = default_device()
    model = load_model(export.weights.source, "fp32" if target_device.type == "cpu" else "bf16", on=target_device)
    weights = smooth_activations(export.weights, model, calibration)
    if not four_bit_dtypes:
        return weights, None
    console.stage(
        f"quantizing to 4 bits with {sum(ids.shape[1] for ids in calibration)} tokens of calibration conversations"
    )
    with console.progress(model.config.num_hidden_layers) as show:
        quantizer, summary = mixed_precision.quantize_mixed_precision(
            weights, model, calibration, (s.largest_kl, s.least_agreement), show
        )
    for dtype in four_bit_dtypes:
        reports[dtype] |= summary
    return weights, quantizer


def _write_graphs(
    export: Export, smooth_weights: Weights, four_bit: Quantizer | None, console: Console
) -> dict[str, int]:
    """Write every session in every precision, one after the other; return the number of data files per .onnx file."""
    chunks: dict[str, int] = {}
    components = _list_components(export, smooth_weights, four_bit)
    with console.progress(len(components)) as show:
        for number, (dtype, name, build) in enumerate(components):
            show(number, f"{name} {dtype}: tracing")
            component = build()
            show_step = lambda text, index=number, label=f"{name} {dtype}": show(index, f"{label}: {text}")
            chunks[f"{name}{SUFFIXES[dtype]}.onnx"] = component.write(
                export.folder / "onnx", SUFFIXES[dtype], show_step
            )
        show(len(components), "all graphs written")
    return chunks


def _list_components(
    export: Export, smooth_weights: Weights, four_bit: Quantizer | None
) -> list[tuple[str, str, Callable[[], Component]]]:
    """List (dtype, session, function that builds it); `smooth_weights` are for the quantized precisions."""
    weights, text_config = export.weights, export.weights.config.get_text_config()
    eight_bit = make_8_bit_quantizer(smooth_weights.read)
    components: list[tuple[str, str, Callable[[], Component]]] = []
    providers: dict[torch.dtype, Provider] = {torch.float16: "webgpu", torch.float32: "cpu"} if export.fuse else {}
    get_traced = cache(lambda compute_dtype: trace_decoder(text_config, compute_dtype, providers.get(compute_dtype)))
    for dtype in export.dtypes:
        compute_dtype = torch.float16 if dtype in HALF_DTYPES else torch.float32
        quantizer = {
            "q8": eight_bit,
            "q4": four_bit,
            "q4f16": four_bit,
            "int8": replace(eight_bit, dequantize_on_load=True),
        }.get(dtype)
        is_multimodal = export.layout == "multimodal"
        name = "decoder_model_merged" if is_multimodal else "model"

        def build_decoder(
            compute_dtype: torch.dtype = compute_dtype,
            quantizer: Quantizer | None = quantizer,
            name: str = name,
            is_multimodal: bool = is_multimodal,
        ) -> Component:
            return decoder_component(
                get_traced(compute_dtype).copy(),
                smooth_weights if quantizer else weights,
                name,
                dtype=compute_dtype,
                quantizer=quantizer,
                takes_embeds=is_multimodal,
            )

        components.append((dtype, name, build_decoder))
        if is_multimodal:
            embedding_quantizer = eight_bit if dtype in QUANTIZED_DTYPES else None
            components.append(
                (
                    dtype,
                    "embed_tokens",
                    lambda h=compute_dtype, r=embedding_quantizer: embeddings_component(weights, h, r),
                )
            )
            components.append(
                (
                    dtype,
                    "vision_encoder",
                    lambda h=compute_dtype, d=dtype: vision_component(weights, h, d in QUANTIZED_DTYPES),
                )
            )
    return components


def _write_record(folder: Path, source: Source, result: ExportResult) -> None:
    from phoque.version import __version__

    summary = {name: getattr(result, name) for name in ("layout", "engine", "dtypes", "bytes")}
    digests = {f"onnx/{file.name}": sha256(file) for file in sorted((folder / "onnx").iterdir())}
    record = {
        "schema_version": 1,
        "phoque": __version__,
        "source_revision": source.revision,
        "system": training_system(find_run_record(source.folder)),
        **summary,
        "sha256": digests,
    }
    (folder / EXPORT_RECORD).write_text(json.dumps(record, indent=1))


def _verify_export(folder: Path, source: Source, dtypes: list[str], s: ExportSettings, services: Services) -> str:
    from phoque.onnx.verify.run import verify_folder

    verdict = verify_folder(folder, dtypes, "ort", source, services, name=s.folder.name)
    failures = verdict.failed_checks()
    for check in failures:
        services.console.warn(f"{check.level}: {check.said}")
    if failures and s.verify_strict:
        raise RunError(
            what="The export does not verify; it was deleted.",
            why=f"{failures[0].level}: {failures[0].said}",
            fix="Report it with the model's config.json, or keep the export with --no-verify-strict.",
        )
    return "FAIL" if failures else "PASS"
