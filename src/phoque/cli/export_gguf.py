"""phoque export-gguf."""

from typing import TYPE_CHECKING, Any

from phoque import api
from phoque.cli import jobs, options
from phoque.settings.export_gguf import GgufSettings
from phoque.settings.fields import Resolved
from phoque.settings.presets import PRESETS

if TYPE_CHECKING:
    from phoque.gguf.export import GgufResult

EPILOG = (
    "Examples: `phoque export-gguf --adapter-source runs/demo --output-dir seal-gguf` makes q8_0 and q4_k_m. "
    "`phoque export-gguf --adapter-source you/seal --lora` makes a LoRA file for the unchanged base. "
    "`phoque export-gguf --merged-dir you/seal-merged --dtype q4_k_m --push-repo-id you/seal-gguf` goes from the Hub "
    "to the Hub."
)


def command(name: str) -> Any:
    """The command for the root's table."""
    return options.command(name, run, GgufSettings, EPILOG, PRESETS)


def run(resolved: Resolved[GgufSettings], dry_run: bool) -> None:
    """Export a model, or an adapter alone, for llama.cpp and Ollama, measure each precision, and verify the export."""
    if resolved.settings.on:
        jobs.run("export-gguf", resolved, dry_run)
        return
    options.show_result(api.export_gguf(resolved, dry_run=dry_run), _render, lambda result: result.output_dir)


def _render(result: "GgufResult") -> str:
    values = {
        "folder": result.output_dir,
        "source": result.source,
        "seconds": result.seconds,
        "repo": result.repo,
        "verdict": result.verdict or None,
    }
    lines = [f"{name:10} {value}" for name, value in values.items() if value is not None]
    for dtype, report in result.dtypes.items():
        text = f"{dtype:10} {report['file']}, {report['bytes'] / 1e6:,.0f} MB"
        if "kl" in report:
            text += f", KL {report['kl']:.2g} nats per token, {report['agreement']:.1%} of next tokens agree"
        lines.append(text)
    if result.verdict:
        lines.append(f"ollama     ollama create seal -f {result.output_dir}/{result.modelfile}")
    else:
        lines.append(f"ollama     put the base model's GGUF file into {result.output_dir} as base.gguf")
    if result.verdict:
        smallest = min(result.dtypes.values(), key=lambda report: report["bytes"])["file"]
        lines.append(options.next_command("chat", f"{result.output_dir}/{smallest}"))
    return "\n".join(lines)
