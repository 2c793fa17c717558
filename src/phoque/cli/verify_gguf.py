"""phoque verify-gguf."""

import sys
from typing import TYPE_CHECKING, Any

from phoque import api
from phoque.cli import options
from phoque.console import console
from phoque.errors import FAILED
from phoque.inputs import check_inputs
from phoque.results import DryRun
from phoque.services import Services
from phoque.settings.fields import Resolved
from phoque.settings.verify_gguf import VerifyGgufSettings

if TYPE_CHECKING:
    from phoque.checks import VerifyResult

EPILOG = (
    "Examples: `phoque verify-gguf --local-dir seal-gguf --reference seal-merged` goes as far as this machine can. "
    "`phoque verify-gguf --local-dir model-Q4_K_M.gguf --level graph` checks one file without running it."
)


def command(name: str) -> Any:
    """The command for the root's table."""
    return options.command(name, run, VerifyGgufSettings, EPILOG)


def run(resolved: Resolved[VerifyGgufSettings], dry_run: bool) -> None:
    """Check whether GGUF files run: files, tensors, llama.cpp, Node, browser; exit 1 if not."""
    if resolved.settings.serve and not dry_run:
        from phoque.gguf.verify.serve import serve_files

        check_inputs(resolved.settings)
        serve_files(resolved.settings, Services.create(resolved, console))
        return
    result = api.verify_gguf(resolved, dry_run=dry_run)
    options.show_result(result, _render, lambda result: result.verdict.overall_result())
    if not isinstance(result, DryRun) and result.verdict.overall_result() != "PASS":
        sys.exit(FAILED)


def _render(result: "VerifyResult") -> str:
    return options.render_verdict(result.verdict, result.name)
