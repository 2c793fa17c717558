"""phoque verify-onnx."""

import sys
from typing import Any

from phoque.cli import options
from phoque.console import console
from phoque.errors import FAILED
from phoque.settings.environment import cache_folder
from phoque.settings.fields import Resolved
from phoque.settings.verify_onnx import VerifySettings

EPILOG = (
    "Examples: `phoque verify-onnx --local-dir seal-onnx --reference seal-merged` goes as far as this machine can. "
    "`phoque verify-onnx --repo-id you/seal-onnx --level graph` looks without fetching the weights. "
    "`phoque verify-onnx --local-dir seal-onnx --serve` opens it in a chat page."
)


def command(name: str) -> Any:
    """The command for the root's table."""
    return options.command(name, run, VerifySettings, EPILOG)


def run(asked: Resolved[VerifySettings], dry_run: bool) -> None:
    """Say whether an export runs in Transformers.js: files, graphs, ONNX Runtime, Node, browser; exit 1 if not."""
    options.needs("onnx", "onnx", "onnxruntime")
    if asked.settings.serve and not dry_run:
        from phoque.onnx.verify.serve import serve_export

        serve_export(asked, cache_folder(), console)
        return
    from phoque.onnx.verify.run import verify_export

    result = verify_export(asked, cache_folder(), console, dry_run)
    if dry_run:
        console.result(result, lambda: options.plan(result), result["name"])
        return
    console.result(result, lambda: _lines(result), result["verdict"])
    if result["verdict"] != "PASS":
        sys.exit(FAILED)


def _lines(result: dict[str, Any]) -> str:
    lines = [
        f"{check['result']:8} {check['level']:8} {check['asks']}" + (f": {check['said']}" if check["said"] else "")
        for check in result["checks"]
    ]
    levels = ", ".join(f"{name} {said}" for name, said in result["levels"].items())
    return "\n".join([*lines, "", f"{result['verdict']}  {result['name']}  ({levels})"])
