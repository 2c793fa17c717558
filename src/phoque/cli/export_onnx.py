"""phoque export-onnx."""

from typing import Any

from phoque.cli import jobs, options
from phoque.console import console
from phoque.settings.environment import cache_folder
from phoque.settings.export_onnx import ExportSettings
from phoque.settings.fields import Resolved
from phoque.settings.presets import PRESETS

EPILOG = (
    "Examples: `phoque export-onnx --preset demo --adapter-source runs/demo --output-dir seal-onnx` makes q4 and q8. "
    "`phoque export-onnx --merged-dir you/seal-merged --dtype q4f16 --push-repo-id you/seal-onnx` goes from the Hub to "
    "the Hub."
)


def command(name: str) -> Any:
    """The command for the root's table."""
    return options.command(name, run, ExportSettings, EPILOG, PRESETS)


def run(asked: Resolved[ExportSettings], dry_run: bool) -> None:
    """Export a model for Transformers.js: graphs, weights in each precision, configs; measured and verified."""
    if asked.settings.on:
        jobs.run("export-onnx", asked, dry_run)
        return
    options.needs("onnx", "onnx", "onnxscript", "onnxruntime")
    from phoque.onnx.export import export_model

    result = export_model(asked, cache_folder(), console, dry_run)
    console.result(result, lambda: options.plan(result) if dry_run else _lines(result), str(result["output_dir"]))


def _lines(result: dict[str, Any]) -> str:
    shown = ("output_dir", "source", "layout", "engine", "seconds", "repo", "verdict")
    lines = [f"{name:10} {result[name]}" for name in shown if name in result]
    for dtype, found in result["dtypes"].items():
        if not found:
            continue
        text = f"{dtype:10} {found['bytes'] / 1e6:,.0f} MB"
        if "kl" in found:
            text += f", KL {found['kl']:.2g} nats a token, {found['agreement']:.1%} of next tokens agree"
        if found.get("raised"):
            text += f"; {found['raised']} of {found['groups']} products in 8 bits"
        lines.append(text)
    return "\n".join(lines)
