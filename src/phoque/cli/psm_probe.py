"""phoque psm-probe."""

from typing import Any

from phoque.cli import jobs, options
from phoque.console import console
from phoque.settings.environment import cache_folder
from phoque.settings.fields import Resolved
from phoque.settings.presets import PRESETS
from phoque.settings.psm_probe import PsmSettings

EPILOG = (
    "Examples: `phoque psm-probe --preset demo --adapter-source runs/demo` asks what the seal's fine-tune moved. "
    "`phoque psm-probe --adapter-source you/seal --persona seal.toml --on a10g-large --artifacts-repo-id you/probes` "
    "runs it as a Job."
)


def command(name: str) -> Any:
    """The command for the root's table."""
    return options.command(name, run, PsmSettings, EPILOG, PRESETS)


def run(asked: Resolved[PsmSettings], dry_run: bool) -> None:
    """Find a persona's direction in a model, test it against controls, ask if a fine-tune moved along it."""
    if asked.settings.on:
        jobs.run("psm-probe", asked, dry_run)
        return
    from phoque.probes.persona_vectors.run import probe

    result = probe(asked, cache_folder(), console, dry_run)
    console.result(result, lambda: options.plan(result) if dry_run else _lines(result), str(result.get("folder", "")))


def _lines(result: dict[str, Any]) -> str:
    chosen = result["selected"]
    lines = [f"{name:9} {result[name]}" for name in ("folder", "report", "repo") if name in result]
    lines.append(f"steered   block {chosen['layer']} by {chosen['coeff_rel_resid']:g} of the residual norm")
    for name, verdict in result["verdicts"].items():
        number = "" if verdict["number"] is None else f"{verdict['number']:.3g}"
        lines.append(f"{name:25} {verdict['verdict']:16} {number:>7}  {verdict['rule']}")
    return "\n".join(lines)
