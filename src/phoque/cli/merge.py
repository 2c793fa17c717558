"""phoque merge."""

from typing import TYPE_CHECKING, Any

from phoque import api
from phoque.cli import jobs, options
from phoque.settings.fields import Resolved
from phoque.settings.merge import MergeSettings
from phoque.settings.presets import PRESETS

if TYPE_CHECKING:
    from phoque.merging.run import MergeResult

EPILOG = (
    "Examples: `phoque merge --adapter-source runs/demo --output-dir demo-merged` merges on this machine. "
    "`phoque merge --adapter-source you/seal --push-repo-id you/seal-merged` merges from the Hub to the Hub."
)


def command(name: str) -> Any:
    """The command for the root's table."""
    return options.command(name, run, MergeSettings, EPILOG, PRESETS)


def run(resolved: Resolved[MergeSettings], dry_run: bool) -> None:
    """Merge an adapter into its base model, and check that the merged model computes the same."""
    if resolved.settings.on:
        jobs.run("merge", resolved, dry_run)
        return
    options.show_result(api.merge(resolved, dry_run=dry_run), _render, lambda result: result.output_dir)


def _render(result: "MergeResult") -> str:
    values = {
        "folder": result.output_dir,
        "base": result.base,
        "adapter": result.adapter,
        "repo": result.repo,
        "written": f"{result.bytes / 1e9:.2f} GB in {result.shards} shard{'s' if result.shards > 1 else ''}, "
        f"{result.changed} of {result.tensors} tensors changed",
    }
    lines = [f"{name:10} {value}" for name, value in values.items() if value is not None]
    if proof := result.proof:
        verdict = "the same model as base + adapter" if proof["holds"] else "NOT the same as base + adapter"
        if proof["holds"] and not proof.get("measurable", True):
            verdict = "not proven, because the adapter hardly changes the base"
        lines.append(
            f"verdict    {verdict}: logits differ by {proof['mean_difference']:.2g} on average; "
            f"the adapter changes them by {proof['adapter_effect']:.2g}\n"
            f"           (compared in {proof['precision']}; {proof['agreeing']} of {proof['tokens']} most likely "
            "tokens agree; rounding alone changes some)"
        )
    lines.append(options.next_command("export-onnx", "--merged-dir", result.output_dir))
    return "\n".join(lines)
