"""Command line options made from a settings model, so that a flag, its variable and its help are written once."""

import importlib.util
import inspect
import re
import shlex
import textwrap
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from types import NoneType
from typing import Any, Literal, Protocol, get_args

import typer
from typer.core import TyperCommand

from phoque.checks import Verdict
from phoque.console import console, silence_libraries
from phoque.errors import UsageError
from phoque.files import local_path
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
    takes_commas,
    value_aliases,
)
from phoque.settings.resolve import resolve_settings

COMMON_FLAGS = {"--config", "--secrets-file", "--dry-run", "--verbose", "--json", "--quiet"}
MAX_HELP_WIDTH = 140  # columns, on a terminal that is as wide
EXTRA_PACKAGES = {"onnx": ("onnx", "onnxscript", "onnxruntime"), "sae": ("sae_lens",), "gguf": ()}
PEER_FLAGS = {  # what transformers, TRL, Unsloth and llama.cpp call a setting, and phoque's flags for it
    "--lr": ("--learning-rate",),
    "--model": ("--base-model", "--model-source", "--reference"),
    "--model-name": ("--base-model",),
    "--model-name-or-path": ("--base-model",),
    "--data": ("--dataset",),
    "--dataset-name": ("--dataset",),
    "--output": ("--output-dir",),
    "--out": ("--output-dir",),
    "--outfile": ("--output-dir",),
    "--adapter": ("--adapter-source", "--updated-adapter"),
    "--adapter-source": ("--updated-adapter",),
    "--lora": ("--adapter-source",),
    "--lora-r": ("--lora-rank",),
    "--rank": ("--lora-rank",),
    "--num-train-epochs": ("--epochs",),
    "--num-epochs": ("--epochs",),
    "--steps": ("--max-steps",),
    "--per-device-train-batch-size": ("--batch-size",),
    "--max-seq-length": ("--max-length",),
    "--eval-strategy": ("--eval-steps",),
    "--logging-steps": ("--log-every",),
    "--push-to-hub": ("--hub-model-id",),
    "--hub-repo": ("--hub-model-id",),
    "--repo": ("--repo-id",),
    "--outtype": ("--dtype",),
    "--quant": ("--dtype",),
    "--load-in-4bit": ("--quantization",),
    "--system-prompt": ("--system", "--default-system"),
}
TOKEN_FIX = "Set HF_TOKEN, or run `hf auth login`."
OLD = "__old"  # ends the parameter name of a hidden flag


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
        for text in warnings:
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


def _drop_missing(flags: dict[str, Any]) -> dict[str, Any]:
    """The flags that were given: Typer passes None, or an empty list or tuple where a flag can be repeated."""
    return {key.removesuffix(OLD): value for key, value in flags.items() if value not in (None, [], ())}


class _GroupedCommand(TyperCommand):
    """A command whose --help has a section for each group of its settings."""

    sections: dict[str, str]
    model: type[CommandSettings]
    presets: dict[str, dict[str, Any]]

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse the words, and say which flag was meant where a word has none or a flag has a peer's name."""
        given = list(args)
        self._check_values(given)
        try:
            return super().parse_args(ctx, args)
        except Exception as error:  # Click's errors have no public base in Typer
            if better := self._explain(error, given):
                raise better from error
            raise

    def _explain(self, error: Exception, args: list[str]) -> UsageError | None:
        """A clearer message for a word without a flag, and for a flag that is called so elsewhere."""
        text = getattr(error, "message", "")
        known = {flag for parameter in self.params for flag in parameter.opts}
        if found := re.search(r"unexpected extra argument\(s\) \((.*)\)", text):
            return self._explain_extra(found[1], args)
        name = str(getattr(error, "option_name", ""))
        flag = next((flag for flag in PEER_FLAGS.get(name.replace("_", "-"), ()) if flag in known), None)
        if flag:
            return UsageError(
                what=f"There is no flag {name}.",
                why="phoque calls it by another name.",
                fix=f"Use {flag}. See `phoque {self.name} --help`.",
            )
        if name in ("--hf-token", "--hub-token", "--api-key"):
            return UsageError(
                what=f"There is no flag {name}.", why="The command line would be in the shell's history.", fix=TOKEN_FIX
            )
        if describe := getattr(error, "format_message", None):
            fix = f"See `phoque {self.name} --help`."
            if name and "--then" in args:
                fix = f"Put quotes around a command of --then and its options: --then 'merge {name} ...'"
            what = describe().replace("Value error, ", "").removesuffix(".")
            return UsageError(what=f"{what}.", why="The command line is not valid.", fix=fix)
        return None

    def _check_values(self, args: list[str]) -> None:
        """Raise UsageError for a flag whose value is missing, so that the flag after it would be taken for it."""
        flags = {flag: p for p in self.params for flag in (*p.opts, *p.secondary_opts) if flag.startswith("-")}
        datasets = flag_names(self.model, "dataset") if "dataset" in self.model.model_fields else []
        if sum(word.split("=")[0] in datasets for word in args) > 1:  # the last one would win without a word
            raise UsageError(
                what=f"{datasets[0]} is given twice.",
                why="The command reads one dataset.",
                fix="Put several files into one folder, and name the folder.",
            )
        for flag, value in pairwise(args):
            if flag == "--":
                return
            parameter = flags.get(flag)
            if parameter is not None and not getattr(parameter, "is_flag", False) and value in flags:
                raise UsageError(
                    what=f"{flag} has no value.",
                    why=f"{value}, which follows it, is a flag itself.",
                    fix=f"Give it a value, or write {flag}={value} if that is meant.",
                )

    def _explain_extra(self, words: str, args: list[str]) -> UsageError:
        """What was probably meant by words that follow no flag."""
        if words.startswith("hf_"):
            return UsageError(
                what="A token is given on the command line.",
                why="The command line would be in the shell's history.",
                fix=TOKEN_FIX,
            )
        setting, fix = self.model.main_input, f"See `phoque {self.name} --help`."
        word = words if setting == "prompts" or local_path(words) else words.split()[0]
        flag = flag_names(self.model, setting)[0] if setting else ""
        place = args.index(word) if word in args else 0
        value, its_flag = (args[place - n] if place >= n else "" for n in (1, 2))
        lists = {
            f
            for name in self.model.model_fields
            if takes_commas(self.model, name)
            for f in flag_names(self.model, name)
        }
        if flag and flag not in args and (setting == "prompts" or "/" in word or Path(word).suffix or local_path(word)):
            fix = f"Put its flag before it: {flag} {shlex.quote(word)}"
        elif its_flag in lists:
            fix = f"Separate several values with commas: {its_flag} {value},{word}"
        elif value.startswith("--") and any(value in p.opts for p in self.params if getattr(p, "is_flag", False)):
            fix = f"{value} takes no value: write {value}, or {value.replace('--', '--no-', 1)}"
        elif value and not value.startswith("-"):
            fix = f"If it belongs to {value!r}, put quotes around both: {shlex.quote(f'{value} {word}')}"
        return UsageError(
            what=f"{word!r} is given without a flag.", why="Every value of this command follows its flag.", fix=fix
        )

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
            fix=f"Install it with: pip install 'phoque[{extra}]'",
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
    lines = [f"{name}: {to_text(value)}" for name, value in plan.facts.items() if value not in ({}, [], None, "")]
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


def to_text(value: Any) -> str:
    """A value of a dry run as text: a list or an object in one line, unless its texts have several lines."""
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
