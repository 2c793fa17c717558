"""phoque merge."""

from typing import Any

from phoque.cli import jobs, options
from phoque.console import console
from phoque.settings.environment import cache_folder
from phoque.settings.fields import Resolved
from phoque.settings.merge import MergeSettings

EPILOG = (
    "Examples: `phoque merge --adapter-source runs/demo --output-dir demo-merged` merges on this machine. "
    "`phoque merge --adapter-source you/seal --push-repo-id you/seal-merged` merges from the Hub to the Hub."
)


def command(name: str) -> Any:
    """The command for the root's table."""
    return options.command(name, run, MergeSettings, EPILOG)


def run(asked: Resolved[MergeSettings], dry_run: bool) -> None:
    """Merge an adapter into its base: a standalone model, written tensor by tensor and proven equal."""
    if asked.settings.on:
        jobs.run("merge", asked, dry_run)
        return
    from phoque.merging.run import merged

    result = merged(asked, cache_folder(), console, dry_run)
    console.result(result, lambda: options.plan(result) if dry_run else _lines(result), str(result["output_dir"]))


def _lines(result: dict[str, Any]) -> str:
    lines = [f"{name:9} {result[name]}" for name in ("output_dir", "base", "adapter", "repo") if name in result]
    lines.append(
        f"written   {result['bytes'] / 1e9:.2f} GB in {result['shards']} shards, {result['changed']} of "
        f"{result['tensors']} tensors changed"
    )
    if proof := result.get("proof"):
        lines.append(
            f"proof     logits differ by {proof['mean_difference']:.2g} on average, {proof['max_difference']:.2g} "
            f"at most; the adapter moves them by {proof['adapter_effect']:.2g}\n"
            f"          {proof['agreeing']} of {proof['tokens']} greedy tokens are the same ({proof['precision']})"
        )
    return "\n".join(lines)
