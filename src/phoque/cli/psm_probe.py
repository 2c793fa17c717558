"""phoque psm-probe."""

from typing import TYPE_CHECKING, Any

from phoque import api
from phoque.cli import jobs, options
from phoque.cli.processes import launch_probe
from phoque.settings.fields import Resolved
from phoque.settings.presets import PRESETS
from phoque.settings.psm_probe import PsmSettings

if TYPE_CHECKING:
    from phoque.probes.persona_vectors.run import ProbeRunResult

EPILOG = (
    "Examples: `phoque psm-probe --preset demo --adapter-source runs/demo` asks what the seal's fine-tune moved. "
    "`phoque psm-probe --adapter-source you/seal --persona seal.toml --on a10g-large --artifacts-repo-id you/probes` "
    "runs it as a Job."
)


def command(name: str) -> Any:
    """The command for the root's table."""
    return options.command(name, run, PsmSettings, EPILOG, PRESETS)


def run(resolved: Resolved[PsmSettings], dry_run: bool) -> None:
    """Find a persona's direction in a model, test it with controls, and measure a fine-tune along it."""
    from phoque.probes.persona_source import check_names_persona

    check_names_persona(resolved)
    if resolved.settings.on:
        jobs.run("psm-probe", resolved, dry_run)
        return
    launch = launch_probe(resolved.settings, dry_run)
    result = api.psm_probe(resolved, dry_run=dry_run, launch=launch)
    options.show_result(result, _render, lambda result: result.folder)


def _render(result: "ProbeRunResult") -> str:
    selected = result.selected
    lines = [f"folder    {result.folder}", f"report    {result.report}", f"persona   {result.persona}"]
    if result.repo:
        lines.append(f"repo      {result.repo}")
    lines.append(f"steered   block {selected['layer']} by {selected['coeff_rel_resid']:g} of the residual norm")
    lines += options.list_verdicts(result.verdicts, "{:.3g}".format)
    return "\n".join(lines)
