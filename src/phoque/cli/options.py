"""Command line options made from a settings model, so that a flag, its variable and its help are written once."""

import importlib.util
import inspect
import shlex
import textwrap
from collections.abc import Callable
from pathlib import Path
from types import NoneType
from typing import Any, Literal, Protocol, get_args

import typer
from typer.core import TyperCommand

from phoque.checks import Verdict
from phoque.cli.usage_errors import OLD, CommandLine
from phoque.console import console, silence_libraries
from phoque.errors import UsageError
from phoque.extras import install_command
from phoque.results import DryRun
from phoque.settings.fields import (
    CommandSettings,
    Resolved,
    describe_default,
    env_name,
    flag_names,
    group_of,
    is_positional,
    old_flag_name,
    value_aliases,
)
from phoque.settings.job import JOB_GROUP, JobSettings
from phoque.settings.resolve import resolve_settings

MAX_HELP_WIDTH = 140  # columns, on a terminal that is as wide
# what an extra must have brought; gguf brings Node.js, which may be there without it
EXTRA_PACKAGES = {"onnx": ("onnx", "onnxscript", "onnxruntime"), "sae": ("sae_lens",), "gguf": ()}


class HasJson(Protocol):
    """A result that --json can print."""

    def to_json(self) -> dict[str, Any]:
        """The object that --json prints."""
        ...


def command(
    name: str,
    run: Callable[..., None],
    model: type[CommandSettings],
    epilog: str,
    presets: dict[str, dict[str, Any]] | None = None,
) -> Any:
    """The Click command that calls `run(resolved settings, dry_run)`."""
    presets = presets or {}

    def callback(
        config: Path | None,
        secrets_file: Path | None,
        dry_run: bool,
        verbose: bool,
        json: bool,
        quiet: bool,
        **flags: Any,
    ) -> None:
        console.configure(json, quiet, verbose)
        resolved, warnings = resolve_settings(model, _drop_missing(flags), presets, secrets_file, config)
        console.hide(resolved.secrets.plain_values())
        for text in warnings + _list_flags_without_effect(resolved, verbose and not dry_run):
            console.warn(text)
        silence_libraries()
        run(resolved, dry_run)

    names = [name for group in model.groups.values() for name in group.split()]
    sections = {name: group_of(model, name) for name in names}
    parameters = [option for name in names for option in _options(model, name, presets)] + _common()
    callback.__signature__ = inspect.Signature(parameters)  # ty: ignore[missing-attribute]
    callback.__annotations__ = {p.name: p.annotation for p in parameters}
    app = typer.Typer(rich_markup_mode=None, pretty_exceptions_enable=False, add_completion=False)
    width = {"max_content_width": MAX_HELP_WIDTH}
    app.command(name, help=run.__doc__, epilog=epilog, cls=_GroupedCommand, context_settings=width)(callback)
    click_command: Any = typer.main.get_command(app)
    click_command.sections, click_command.model, click_command.presets = sections, model, presets
    return click_command


def resolve_words(click_command: Any, words: list[str]) -> Resolved[Any]:
    """The settings that a command line gives, `words` being what follows the command's name; nothing is run.

    Raises UsageError, or an error of Click, for what the command would refuse.
    """
    flags = click_command.make_context(f"phoque {click_command.name}", list(words)).params
    values = {key: value for key, value in _drop_missing(flags).items() if key in click_command.model.model_fields}
    model, presets = click_command.model, click_command.presets
    return resolve_settings(model, values, presets, flags["secrets_file"], flags["config"])[0]


def _list_flags_without_effect(resolved: Resolved[Any], is_verbose: bool) -> list[str]:
    """Warnings about flags that only count for a Job or for a dry run, where there is none."""
    model, warnings = type(resolved.settings), []
    if issubclass(model, JobSettings) and not resolved.settings.on:
        names = set(JOB_GROUP.split()) - {"on"} - ({"timeout"} if model.resumable else set())
        given = [name for name in model.model_fields if name in names and resolved.origins[name].source == "flag"]
        warnings = [f"{flag_names(model, name)[0]} has no effect without --on" for name in given]
    return warnings + ["--verbose has no effect without --dry-run"] * is_verbose


def _drop_missing(flags: dict[str, Any]) -> dict[str, Any]:
    """The flags that were given: Typer passes None, or an empty list or tuple where a flag can be repeated."""
    return {key.removesuffix(OLD): value for key, value in flags.items() if value not in (None, [], ())}


class _GroupedCommand(TyperCommand):
    """A command whose --help has a section for each group of its settings."""

    sections: dict[str, str]
    model: type[CommandSettings]
    presets: dict[str, dict[str, Any]]

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse the words, and say what was meant by those that are no flags or values."""
        words = CommandLine(list(args), self.params, self.model, f"phoque {self.name}")
        words.check_values()
        if words.repeats_dataset():
            console.warn(
                "--dataset is given twice, and the last one is read: several files can be read from one folder"
            )
        ctx.allow_extra_args = True  # so that they are known here, and not only named in a message
        try:
            rest = super().parse_args(ctx, args)
        except Exception as error:  # Click's errors have no public base in Typer
            if better := words.explain(error):
                raise better from error
            raise
        if ctx.args and not ctx.resilient_parsing:
            raise words.explain_extra(ctx.args)
        return rest

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write the options, section by section."""
        groups: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None:
                groups.setdefault(self.sections.get(str(parameter.name).removesuffix(OLD), "Common"), []).append(record)
        for group, records in groups.items():
            with formatter.section(group):
                formatter.write_dl(records)


def require_extra(extra: str) -> None:
    """Raise UsageError if a package of one of phoque's extras is not installed."""
    missing = [name for name in EXTRA_PACKAGES[extra] if importlib.util.find_spec(name) is None]
    if missing:
        raise UsageError(
            what=f"This command needs {', '.join(missing)}.",
            why=f"It comes with the extra `{extra}`.",
            fix=f"Install it with: {install_command(extra)}",
        )


def list_verdicts(verdicts: dict[str, dict[str, Any]], show: Callable[[float], str]) -> list[str]:
    """Each verdict with its number, and below it every condition: + if it holds, - if it does not."""
    width, lines = max(map(len, verdicts)) + 1, []
    for name, verdict in verdicts.items():
        number = "" if verdict["number"] is None else f"{show(verdict['number'])} {verdict['unit']}, n {verdict['n']}"
        lines.append(f"{name:{width}} {verdict['verdict']:16} {number or verdict['why']}")
        lines += [f"{'':{width}}   {'+' if c['holds'] else '-'} {c['text']}" for c in verdict["conditions"]]
    return lines


def render_verdict(verdict: Verdict, name: str) -> str:
    """A verification as lines: each check with its result, then the verdict with that of each level."""
    lines = [f"{c.result:8} {c.level:8} {c.asks}" + (f": {c.said}" if c.said else "") for c in verdict.checks]
    levels = ", ".join(f"{level} {verdict.level(level)}" for level in verdict.levels)
    remarks = [f"      but {remark}" for remark in verdict.remarks]
    return "\n".join([*lines, "", f"{verdict.overall_result()}  {name}  ({levels})", *remarks])


def show_result(result: DryRun | HasJson | None, render: Callable[[Any], Any], quiet: Callable[[Any], str]) -> None:
    """Print a result on stdout: as JSON, as `render(result)`, or with --quiet `quiet(result)`; a dry run as lines.

    Of several processes, those that have no result print nothing.
    """
    if result is None:
        return
    if isinstance(result, DryRun):
        target = str(result.facts.get("output_dir") or result.facts.get("name") or "")
        console.result(result.to_json(), lambda: render_plan(result), target)
    else:
        console.result(result.to_json(), lambda: render(result), quiet(result))


def next_command(*arguments: object) -> str:
    """The line at the end of a result that names the next command, with real paths."""
    return f"next: phoque {shlex.join(map(str, arguments))}"


def render_plan(plan: DryRun) -> str:
    """A dry run as lines: its facts, the settings that differ from their defaults, and warnings."""
    facts = {name.replace("_", " "): value for name, value in plan.facts.items() if value not in ({}, [], None, "")}
    lines = [f"{name}: {_to_text(value)}" for name, value in facts.items()]
    return "\n".join([*lines, *list_settings(plan.settings), *(f"note: {text}" for text in plan.warnings)])


def list_settings(settings: dict[str, dict[str, Any]]) -> list[str]:
    """The settings that differ from their defaults, a line for each source; with --verbose all, a line for each."""
    if console.verbose:
        width = max(len(row.get("flag") or row["name"]) for row in settings.values())
        return [
            f"{row.get('flag') or row['name']:{width}}  {row['value']}  (from {row['source']})  {row['meaning']}"
            for row in settings.values()
        ]
    by_source: dict[str, list[str]] = {}
    for row in settings.values():
        if row["source"] != "default" and "flag" in row and row["flag"] != "--preset":
            by_source.setdefault(row["source"], []).append(_as_flag(row["flag"], row["value"]))
    lines = [f"from {source}: {' '.join(flags)}" for source, flags in by_source.items()]
    return [*lines, "all other settings have their defaults; --verbose lists them"]


def _as_flag(flag: str, value: Any) -> str:
    if isinstance(value, bool):
        return flag if value else flag.replace("--", "--no-", 1)
    values = value if isinstance(value, list) else [value]
    return " ".join(f"{flag} {shlex.quote(str(item))}" for item in values)


def _to_text(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(name if item is None else f"{name} {item}" for name, item in value.items())
    if not isinstance(value, list):
        return str(value)
    texts = [str(item) for item in value]
    if any("\n" in text for text in texts):
        return "\n" + "\n\n".join(textwrap.indent(text, "  ") for text in texts)
    return ", ".join(texts)


def _options(model: type[CommandSettings], name: str, presets: dict[str, dict[str, Any]]) -> list[inspect.Parameter]:
    """The option of a field, and its old flag as a hidden one."""
    field = model.model_fields[name]
    names = flag_names(model, name)
    if field.annotation is bool:
        names = ["/".join([names[0], names[0].replace("--", "--no-", 1)]), *names[1:]]
    text = f"{field.description}  [env: {env_name(model, name)}]"
    if default := describe_default(model, name, presets):
        text += f" [default: {default}]"
    annotation: Any = field.annotation
    metavar = f"[{'|'.join(presets)}]" if name == "preset" else None
    if aliases := value_aliases(model, name):
        # `Literal[...]`, or `Literal[...] | None`
        choices = [
            value for part in get_args(annotation) for value in (get_args(part) or (part,)) if part is not NoneType
        ]
        metavar = f"[{'|'.join(choices)}]"
        annotation = Literal[*choices, *aliases]  # ty: ignore[invalid-type-form]
    kind = annotation if annotation is list[str] else annotation | None
    option = typer.Option(None, *names, help=text, show_default=False, metavar=metavar)
    options = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=option, annotation=kind)]
    if is_positional(model, name):
        argument = typer.Argument(None, metavar=name.upper(), show_default=False, help=f"The same as {names[0]}.")
        options.append(inspect.Parameter(name + OLD, inspect.Parameter.KEYWORD_ONLY, default=argument, annotation=kind))
    if old := old_flag_name(model, name):
        hidden = typer.Option(None, old, hidden=True)
        options.append(inspect.Parameter(name + OLD, inspect.Parameter.KEYWORD_ONLY, default=hidden, annotation=kind))
    return options


def _common() -> list[inspect.Parameter]:
    options = {
        "config": (
            Path | None,
            typer.Option(
                None,
                help="Read settings from this .toml file, a run's folder or its run.json. Flags win.",
            ),
        ),
        "secrets_file": (Path | None, typer.Option(None, help="Read secrets from this file instead of .env.secrets.")),
        "dry_run": (bool, typer.Option(False, "--dry-run", help="Show what would happen, and check all that can be.")),
        "verbose": (bool, typer.Option(False, "--verbose", help="With --dry-run, list every setting.")),
        "json": (bool, typer.Option(False, "--json", help="Print the result as one JSON object.")),
        "quiet": (bool, typer.Option(False, "--quiet", "-q", help="Print the result alone, in one line.")),
    }
    kind = inspect.Parameter.KEYWORD_ONLY
    return [inspect.Parameter(n, kind, default=option, annotation=a) for n, (a, option) in options.items()]
