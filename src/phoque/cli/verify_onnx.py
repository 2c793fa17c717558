"""phoque verify-onnx."""

import sys
from typing import TYPE_CHECKING, Any

from phoque import api
from phoque.cli import jobs, options
from phoque.console import console
from phoque.errors import FAILED
from phoque.inputs import check_inputs
from phoque.results import DryRun
from phoque.services import Services
from phoque.settings.fields import Resolved
from phoque.settings.verify_onnx import VerifySettings

if TYPE_CHECKING:
    from phoque.checks import VerifyResult

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
    if resolved.settings.on:
        jobs.run("verify-onnx", resolved, dry_run)
        return
    options.require_extra("onnx")
    if resolved.settings.serve and not dry_run:
        from phoque.onnx.verify.serve import serve_export

        check_inputs(resolved.settings)
        serve_export(resolved.settings, Services.create(resolved, console))
        return
    result = api.verify_onnx(resolved, dry_run=dry_run)
    options.show_result(result, _render, lambda result: result.verdict.overall_result())
    if not isinstance(result, DryRun) and result.verdict.overall_result() != "PASS":
        sys.exit(FAILED)


def _render(result: "VerifyResult") -> str:
    text = options.render_verdict(result.verdict, result.name)
    if result.verdict.overall_result() == "PASS" and result.folder:
        text += "\n" + options.next_command("verify-onnx", "--local-dir", result.folder, "--serve")
    return text
