"""Command line options made from a settings model, so that a flag, its variable and its help are written once."""

import importlib.util
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import typer

from phoque.console import console, silence_libraries
from phoque.errors import PhoqueError
from phoque.settings.fields import CommandSettings, env_name, flag_names
from phoque.settings.job import JobSettings
from phoque.settings.resolve import resolve_settings


def command(
    name: str,
    run: Callable[..., None],
    model: type[CommandSettings],
    epilog: str,
    presets: dict[str, dict[str, Any]] | None = None,
) -> Any:
    """The Click command that calls `run(resolved settings, dry_run)`."""

    def called(secrets_file: Path | None, dry_run: bool, json: bool, quiet: bool, **flags: Any) -> None:
        console.configure(json, quiet)
        # None, and an empty list for a repeatable flag, is how Typer says that it was not given
        given = {key: value for key, value in flags.items() if value not in (None, [])}
        asked, warnings = resolve_settings(model, given, presets or {}, secrets_file)
        for text in warnings:
            console.warn(text)
        silence_libraries()
        run(asked, dry_run)

    # its own before those that it shares
    names = sorted(model.model_fields, key=lambda name: name in JobSettings.model_fields)
    parameters = [_option(model, name) for name in names] + _common()
    called.__signature__ = inspect.Signature(parameters)  # ty: ignore[missing-attribute]
    called.__annotations__ = {p.name: p.annotation for p in parameters}
    app = typer.Typer(rich_markup_mode=None, pretty_exceptions_enable=False, add_completion=False)
    app.command(name, help=run.__doc__, epilog=epilog)(called)
    return typer.main.get_command(app)


def needs(extra: str, *packages: str) -> None:
    """Raise PhoqueError (2) if a package of one of phoque's extras is not installed."""
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise PhoqueError(
            f"This command needs {', '.join(missing)}.",
            f"It comes with the extra `{extra}`.",
            f"Install it with: pip install 'phoque[{extra}]'",
        )


def plan(shown: dict[str, Any]) -> str:
    """A dry run as lines: what was found, every setting with where it came from, and notes."""
    lines = [f"{name}: {_in_words(value)}" for name, value in shown.items() if name not in ("settings", "warnings")]
    lines += [f"{name} = {row['value']}  ({row['source']})" for name, row in shown["settings"].items()]
    return "\n".join([*lines, *(f"note: {text}" for text in shown.get("warnings", ()))])


def _in_words(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(name if held is None else f"{name} {held}" for name, held in value.items())
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _option(model: type[CommandSettings], name: str) -> inspect.Parameter:
    field = model.model_fields[name]
    names = flag_names(model, name)
    if field.annotation is bool:
        names = ["/".join([names[0], names[0].replace("--", "--no-", 1)]), *names[1:]]
    text = f"{field.description}  [env: {env_name(model, name)}]"
    option = typer.Option(None, *names, help=text, show_default=False)
    kind = field.annotation if field.annotation is list[str] else field.annotation | None  # ty: ignore[unsupported-operator]
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=option, annotation=kind)


def _common() -> list[inspect.Parameter]:
    options = {
        "secrets_file": (Path | None, typer.Option(None, help="Read secrets from this file instead of .env.secrets.")),
        "dry_run": (bool, typer.Option(False, "--dry-run", help="Show what would happen, and check all that can be.")),
        "json": (bool, typer.Option(False, "--json", help="Print the result as one JSON object.")),
        "quiet": (bool, typer.Option(False, "--quiet", "-q", help="Print the result alone, in one line.")),
    }
    kind = inspect.Parameter.KEYWORD_ONLY
    return [inspect.Parameter(n, kind, default=option, annotation=a) for n, (a, option) in options.items()]
