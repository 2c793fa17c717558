"""phoque train."""

from typing import Any

from phoque.cli import jobs, options
from phoque.console import console, format_breakdown
from phoque.settings.environment import cache_folder, deadline, submission
from phoque.settings.fields import Resolved
from phoque.settings.presets import PRESETS
from phoque.settings.train import TrainSettings

KEPT = {"hub": "repo", "merged": "merged", "": "merged_repo"}
EPILOG = (
    "Examples: `phoque train --preset demo --max-steps 20` trains the bundled seal on this machine. "
    "`phoque train --dataset rows.jsonl --dry-run` checks and shows everything first."
)


def command(name: str) -> Any:
    """The command for the root's table."""
    return options.command(name, run, TrainSettings, EPILOG, PRESETS)


def run(asked: Resolved[TrainSettings], dry_run: bool) -> None:
    """Fine-tune a chat model into a persona, from a dataset of conversations."""
    if asked.settings.on:
        jobs.run("train", asked, dry_run)
    elif dry_run:
        from phoque.training.dry_run import plan_run

        shown = plan_run(asked, cache_folder(), console)
        console.result(shown, lambda: _plan(shown, asked), str(asked.settings.folder))
    else:
        from phoque.training.run import train

        result = train(asked, cache_folder(), console, deadline(asked.settings.seconds), submission())
        console.result(result, lambda: _result(result), result["adapter"])


def _result(result: dict[str, Any]) -> str:
    losses = result["held_out_loss"]
    lines = [
        f"adapter  {result['adapter']}",
        f"report   {result['report']}",
        *(f"{name:8} {result[key]}" for name, key in KEPT.items() if key in result),
        f"steps    {result['steps']} in {result['seconds']:.0f} s, {result['tokens']:,} tokens "
        f"({result.get('padding', 0):.1%} padding)",
    ]
    if shares := result.get("seconds_of"):
        lines.append(f"time     {format_breakdown(shares)}")
    if losses:
        fallen = 1 - losses["after"] / losses["before"]
        lines.append(f"held-out loss {losses['before']:.3f} -> {losses['after']:.3f} ({fallen:.0%} lower)")
    return "\n".join(lines)


def _plan(shown: dict[str, Any], asked: Resolved[TrainSettings]) -> Any:
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    settings = Table("setting", "value", "from", "meaning", box=None, header_style="bold")
    for name, row in shown["settings"].items():
        own = row["source"].startswith(("default", "preset"))  # their names are the setting's own
        source = row["source"] if own else f"{row['source']} ({row['name']})"
        settings.add_row(name, Text(str(row["value"])), source, Text(row["meaning"]))
    facts = Text("\n".join(f"{name}: {value}" for name, value in shown["facts"].items()))
    rows = [_masked(row) for row in shown["preview"]]
    legend = Text("the loss mask of three rows; ") + Text("trained on", "bold green") + Text(", read only", "dim")
    return Group(settings, "", facts, "", legend, "", *rows)


def _masked(row: dict[str, Any]) -> Any:
    """One row with its loss mask: in colour on a terminal, and between marks anywhere."""
    from rich.text import Text

    text = Text()
    for part in row["parts"]:
        shown = f"⟦{part['text']}⟧" if part["trained"] else part["text"]
        text.append(shown, "bold green" if part["trained"] else "dim")
    return text.append(f"\n[{row['source']}, {row['tokens']} tokens, {row['trained']} trained]\n", "italic")
