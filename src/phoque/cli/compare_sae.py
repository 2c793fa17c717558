"""phoque compare-sae."""

from typing import TYPE_CHECKING, Any

from phoque import api
from phoque.cli import jobs, options
from phoque.cli.processes import launch_probe
from phoque.settings.compare_sae import SaeSettings
from phoque.settings.fields import Resolved
from phoque.settings.presets import SAE_PRESETS

if TYPE_CHECKING:
    from phoque.probes.sae.run import CompareResult

EPILOG = (
    "Examples: `phoque compare-sae --preset demo --updated-adapter runs/demo` shows which features the seal's "
    "fine-tune moved. `phoque compare-sae --updated-adapter you/seal --control-adapter you/bland --on a10g-large "
    "--artifacts-repo-id you/probes` runs it as a Job."
)


def command(name: str) -> Any:
    """The command for the root's table."""
    return options.command(name, run, SaeSettings, EPILOG, SAE_PRESETS)


def run(resolved: Resolved[SaeSettings], dry_run: bool) -> None:
    """Show which sparse autoencoder features a fine-tune moved, beyond chance and a control."""
    if resolved.settings.on:
        jobs.run("compare-sae", resolved, dry_run)
        return
    if not resolved.settings.sae:
        options.require_extra("sae")
    launch = launch_probe(resolved.settings, dry_run)
    options.show_result(
        api.compare_sae(resolved, dry_run=dry_run, launch=launch), _render, lambda result: result.folder
    )


def _render(result: "CompareResult") -> str:
    overall, quality = result.overall, result.quality
    lines = [f"folder    {result.folder}", f"report    {result.report}"]
    if result.repo:
        lines.append(f"repo      {result.repo}")
    lines.append(
        f"{quality['verdict']} autoencoder at block {result.layer}: explains {quality['ev']:.0%} of the variance "
        f"in chats, {quality['l0']:.0f} active features per token, {quality['dead_fraction']:.0%} dead features"
    )
    summary = f"{overall['n_reported']} of {overall['n_tested']} features shifted ({overall['n_up']} up)"
    if "n_specific" in overall:
        runs = overall["control_runs"]
        what = "this one control run" if runs == 1 else f"{runs} control runs beyond their spread"
        summary += f", {overall['n_specific']} of them differ from {what}"
    if "n_replicated" in overall:
        summary += f", {overall['n_replicated']} again with every seed"
    lines.append(summary)
    lines += options.list_verdicts(result.verdicts, "{:.1%}".format)
    for pair, scorers in result.scores.items():
        lines += [f"{pair} {name}: {gap['diff']:+.3g} (p {gap['p']:.4f})" for name, gap in scorers.items()]
    return "\n".join(lines)
