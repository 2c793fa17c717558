"""phoque train."""

import gc
import importlib
import os
import shlex
import sys
from collections.abc import Generator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from phoque import api
from phoque.cli import jobs, options
from phoque.cli.processes import check_inputs_once
from phoque.cli.then import plan_commands, run_commands
from phoque.console import console, escape_control_characters, format_breakdown
from phoque.distributed.launch import check_sharded, enter_launch, run_on_gpus
from phoque.inputs import check_run
from phoque.results import DryRun
from phoque.settings.fields import Resolved
from phoque.settings.presets import PRESETS
from phoque.settings.train import TrainSettings

if TYPE_CHECKING:
    from rich.console import Group
    from rich.text import Text

    from phoque.training.dry_run import TrainPlan
    from phoque.training.finish import TrainResult

EPILOG = (
    "Examples: `phoque train --preset demo --max-steps 20` trains the bundled seal on this machine. "
    "`phoque train --dataset rows.jsonl --dry-run` checks and shows everything first."
)

SHOWN_CHARACTERS = 240  # of a part of a row in the dry run


def command(name: str) -> Any:
    """The command for the root's table."""
    return options.command(name, run, TrainSettings, EPILOG, PRESETS)


def run(resolved: Resolved[TrainSettings], dry_run: bool) -> None:
    """Fine-tune a chat model into a persona, from a dataset of conversations."""
    commands = plan_commands(resolved.settings)
    if resolved.settings.on:
        jobs.run("train", resolved, dry_run)
        return
    launched = enter_launch(console)  # before torch is imported, and with it CUDA's list of devices
    if not dry_run:
        check_inputs_once(resolved.settings, launched)
        check_run(resolved)
        run_on_gpus(resolved.settings.gpus)
        check_sharded(resolved.settings.fsdp, launched.size if launched else 1)
        _import_trainer()
    result = api.train(resolved, dry_run=dry_run)
    if result is None:  # process 0 shows it
        return
    if isinstance(result, DryRun):
        plan: Any = result
        if commands:
            plan.facts["then"] = [f"phoque {shlex.join(words)}" for words in commands]
        console.result(plan.to_json(), lambda: _render_plan(plan), str(resolved.settings.folder))
        return
    values = result.to_json()
    if commands:
        values["then"] = run_commands(commands, resolved)
    console.result(values, lambda: _render_result(result, values.get("then", [])), result.adapter)


def _import_trainer() -> None:
    """Import what training needs, and let the garbage collector leave it alone.

    accelerate collects garbage before and after training, which takes half a second each time where all imported
    modules are walked.
    """
    console.stage("importing torch and transformers")
    with _without_compiler():
        importlib.import_module("bitsandbytes")
    importlib.import_module("phoque.training.run")
    with _postponed("datasets"):  # which Trainer imports, and with it pandas, for a method that phoque never calls
        importlib.import_module("phoque.training.trainer")
    gc.freeze()


@contextmanager
def _postponed(name: str) -> Generator[None]:
    """Give what is imported meanwhile a stand-in for a module, which imports it when an attribute is needed."""
    if name in sys.modules:
        yield
        return
    stand_in: Any = ModuleType(name)

    def find_attribute(attribute: str) -> Any:
        if attribute.startswith("__"):  # by which inspect and importlib look into modules
            raise AttributeError(attribute)
        if sys.modules.get(name) is stand_in:
            del sys.modules[name]
        return getattr(importlib.import_module(name), attribute)

    stand_in.__getattr__, stand_in.__spec__ = find_attribute, find_spec(name)
    sys.modules[name] = stand_in
    try:
        yield
    finally:
        if sys.modules.get(name) is stand_in:
            del sys.modules[name]


@contextmanager
def _without_compiler() -> Generator[None]:
    """Let torch.compile return functions as they are.

    bitsandbytes compiles functions for devices without kernels of their own, which imports inductor: a fifth of the
    time for all imports. phoque compiles only in runs that are long enough.
    """
    before = os.environ.get("TORCHDYNAMO_DISABLE")
    os.environ["TORCHDYNAMO_DISABLE"] = "1"
    try:
        yield
    finally:
        del os.environ["TORCHDYNAMO_DISABLE"]
        if before is not None:
            os.environ["TORCHDYNAMO_DISABLE"] = before


def _render_result(result: "TrainResult", then: list[dict[str, Any]]) -> str:
    values = {
        "adapter": result.adapter,
        "report": result.report,
        "hub": result.repo,
        "merged": result.merged,
        "": result.merged_repo,
        "steps": f"{result.steps} in {result.seconds:.0f} s, {result.tokens:,} tokens ({result.padding:.1%} padding)",
    }
    lines = [f"{name:8} {value}" for name, value in values.items() if value is not None]
    if result.seconds_of:
        lines.append(f"time     {format_breakdown(result.seconds_of)}")
    if losses := result.held_out_loss:
        lines += _describe_held_out_loss(losses, result.adapter_step or result.steps)
    folder = str(Path(result.adapter).parent)
    for done in then:
        lines += ["", f"done     {done['command']}", done["result"]]
    if then:
        return "\n".join(lines)
    lines.append(options.next_command("merge", "--adapter-source", folder))
    lines.append(f"try it: phoque chat {shlex.quote(folder)}")
    return "\n".join(lines)


def _describe_held_out_loss(losses: dict[str, Any], step: int) -> list[str]:
    """How the held-out loss changed, and whether another step had a lower one."""
    from phoque.training.best import OVERFITTING  # imports torch

    before, after = losses["before"], losses["after"]
    change = abs(after / before - 1)
    direction = "lower" if after < before else "higher"
    first = losses.get("before_step", 0)
    start = f"{before:.3f} at step {first}" if first else f"{before:.3f}"
    lines = [f"held-out loss {start} -> {after:.3f} at step {step} ({change:.0%} {direction})"]
    lowest, lowest_step = losses.get("lowest", after), losses.get("lowest_step")
    if lowest_step == 0:
        lines.append("         it was never lower than before training: check the data, or lower --learning-rate")
    elif after > lowest * (1 + OVERFITTING):
        lines.append(
            f"         it was lowest at step {lowest_step} ({lowest:.3f}): --keep-best keeps the adapter of that step, "
            "--early-stop ends the run"
        )
    return lines


def _render_plan(plan: "TrainPlan") -> "Group":
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    values = [*plan.facts.items(), ("note", plan.notes), ("warning", plan.warnings)]
    lines = [
        (name, Text(escape_control_characters(str(part)), "yellow" if name == "warning" else ""))
        for name, value in values
        for part in (value if isinstance(value, list) else [value])
    ]
    if console.is_on_terminal():
        facts = Table.grid(padding=(0, 2))
        for line in lines:
            facts.add_row(*line)
    else:  # a table would fill the lines with spaces
        width = max(len(name) for name, _ in lines) + 2
        facts = Text("\n").join(Text(f"{name:{width}}").append(text) for name, text in lines)
    rows = [_render_masked_row(row) for row in plan.preview]
    legend = (
        Text("loss mask of the first rows: ") + Text("⟦tokens with loss⟧", "bold green") + Text(", without loss", "dim")
    )
    settings = Text(escape_control_characters("\n".join(options.list_settings(plan.settings))))
    return Group(facts, "", settings, "", legend, "", *rows)


def _render_masked_row(row: dict[str, Any]) -> "Text":
    """One row with its loss mask: in color on a terminal, and between brackets anywhere. Long parts are cut."""
    from rich.text import Text

    text = Text()
    for part in row["parts"]:
        shown = escape_control_characters(part["text"])
        if len(shown) > SHOWN_CHARACTERS and not console.verbose:
            half = SHOWN_CHARACTERS // 2
            shown = f"{shown[:half]} … {shown[-half:]}"
        shown = f"⟦{shown}⟧" if part["trained"] else shown
        text.append(shown, "bold green" if part["trained"] else "dim")
    where = f"{row['source']}, " if row["source"] != "unknown" else ""
    shown = escape_control_characters(f"\n[{where}{row['tokens']} tokens, {row['trained']} trained]\n")
    return text.append(shown, "italic")
