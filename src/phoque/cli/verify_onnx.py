"""phoque verify-onnx."""

import sys
from typing import TYPE_CHECKING, Any

from phoque import api
from phoque.cli import options
from phoque.console import console
from phoque.errors import FAILED
from phoque.results import DryRun
from phoque.services import Services
from phoque.settings.fields import Resolved
from phoque.settings.verify_onnx import VerifySettings

if TYPE_CHECKING:
    from phoque.onnx.verify.run import VerifyResult

EPILOG = (
    "Examples: `phoque verify-onnx --local-dir seal-onnx --reference seal-merged` goes as far as this machine can. "
    "`phoque verify-onnx --repo-id you/seal-onnx --level graph` looks without fetching the weights. "
    "`phoque verify-onnx --local-dir seal-onnx --serve` opens it in a chat page."
)


def command(name: str) -> Any:
    """The command for the root's table."""
    return options.command(name, run, VerifySettings, EPILOG)


def run(resolved: Resolved[VerifySettings], dry_run: bool) -> None:
    """Check whether an export runs in Transformers.js: files, graphs, ONNX Runtime, Node, browser; exit 1 if not."""
    options.require_extra("onnx", "onnx", "onnxruntime")
    if resolved.settings.serve and not dry_run:
        from phoque.onnx.verify.serve import serve_export

        serve_export(resolved.settings, Services.create(resolved, console))
        return
    result = api.verify_onnx(resolved, dry_run=dry_run)
    options.show_result(result, _render, lambda result: result.verdict.overall_result())
    if not isinstance(result, DryRun) and result.verdict.overall_result() != "PASS":
        sys.exit(FAILED)


def _render(result: "VerifyResult") -> str:
    verdict = result.verdict.as_dict()
    lines = [
        f"{check['result']:8} {check['level']:8} {check['asks']}" + (f": {check['said']}" if check["said"] else "")
        for check in verdict["checks"]
    ]
    levels = ", ".join(f"{name} {outcome}" for name, outcome in verdict["levels"].items())
    lines += ["", f"{verdict['verdict']}  {result.name}  ({levels})"]
    if verdict["verdict"] == "PASS" and result.folder:
        lines.append(options.next_command("verify-onnx", "--local-dir", result.folder, "--serve"))
    return "\n".join(lines)
