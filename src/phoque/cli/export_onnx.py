"""phoque export-onnx."""

from typing import TYPE_CHECKING, Any

from phoque import api
from phoque.cli import jobs, options
from phoque.settings.export_onnx import ExportSettings
from phoque.settings.fields import Resolved
from phoque.settings.presets import PRESETS

if TYPE_CHECKING:
    from phoque.onnx.export import ExportResult

EPILOG = (
    "Examples: `phoque export-onnx --adapter-source runs/demo --output-dir seal-onnx` makes q4 and q8. "
    "`phoque export-onnx --merged-dir you/seal-merged --dtype q4f16 --push-repo-id you/seal-onnx` goes from the Hub to "
    "the Hub."
)


def command(name: str) -> Any:
    """The command for the root's table."""
    return options.command(name, run, ExportSettings, EPILOG, PRESETS)


def run(resolved: Resolved[ExportSettings], dry_run: bool) -> None:
    """Export a model for Transformers.js in several precisions, measure each, and verify the export."""
    if resolved.settings.on:
        jobs.run("export-onnx", resolved, dry_run)
        return
    options.require_extra("onnx")
    options.show_result(api.export_onnx(resolved, dry_run=dry_run), _render, lambda result: result.output_dir)


def _render(result: "ExportResult") -> str:
    values = {
        "folder": result.output_dir,
        "source": result.source,
        "layout": result.layout,
        "engine": result.engine,
        "seconds": result.seconds,
        "repo": result.repo,
        "verdict": result.verdict,
    }
    lines = [f"{name:10} {value}" for name, value in values.items() if value is not None]
    for dtype, report in result.dtypes.items():
        text = f"{dtype:10} {report['bytes'] / 1e6:,.0f} MB"
        if "kl" in report:
            text += f", KL {report['kl']:.2g} nats per token, {report['agreement']:.1%} of next tokens agree"
        if report.get("raised"):
            text += f"; {report['raised']} of {report['groups']} linear groups in 8 bits"
        lines.append(text)
    lines.append(options.next_command("verify-onnx", "--local-dir", result.output_dir, "--serve"))
    return "\n".join(lines)
