"""phoque compare-sae."""

from typing import Any

from phoque.cli import jobs, options
from phoque.console import console
from phoque.settings.compare_sae import SaeSettings
from phoque.settings.environment import cache_folder
from phoque.settings.fields import Resolved
from phoque.settings.presets import PRESETS

EPILOG = (
    "Examples: `phoque compare-sae --preset demo --updated-adapter runs/demo` shows which features the seal's "
    "fine-tune moved. `phoque compare-sae --updated-adapter you/seal --control-adapter you/bland --on a10g-large "
    "--artifacts-repo-id you/probes` runs it as a Job."
)


def command(name: str) -> Any:
    """The command for the root's table."""
    return options.command(name, run, SaeSettings, EPILOG, PRESETS)


def run(asked: Resolved[SaeSettings], dry_run: bool) -> None:
    """Show which features of a sparse autoencoder a fine-tune moved, beyond what chance and a control would."""
    if asked.settings.on:
        jobs.run("compare-sae", asked, dry_run)
        return
    if not asked.settings.sae:
        options.needs("sae", "sae_lens")
    from phoque.probes.sae.run import compare

    result = compare(asked, cache_folder(), console, dry_run)
    console.result(result, lambda: options.plan(result) if dry_run else _lines(result), str(result.get("folder", "")))


def _lines(result: dict[str, Any]) -> str:
    overall, quality = result["overall"], result["quality"]
    lines = [f"{name:9} {result[name]}" for name in ("folder", "report", "repo") if name in result]
    lines.append(
        f"{quality['verdict']} autoencoder at block {result['layer']}: explains {quality['ev']:.0%} of chats, "
        f"{quality['l0']:.0f} features a token, {quality['dead_fraction']:.0%} dead"
    )
    found = f"{overall['n_reported']} of {overall['n_tested']} features shifted ({overall['n_up']} up)"
    if "n_specific" in overall:
        found += f", {overall['n_specific']} of them beyond the control"
    if "n_replicated" in overall:
        found += f", {overall['n_replicated']} again with every seed"
    lines.append(found)
    for pair, scorers in result["scores"].items():
        lines += [f"{pair} {name}: {gap['diff']:+.3g} (p {gap['p']:.4f})" for name, gap in scorers.items()]
    return "\n".join(lines)
