"""Write docs/reference/cli.md and environment.md from the settings models; `--check` fails if they are stale.

uv run python docs/generate.py [--check]
"""

import argparse
import sys
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from phoque.cli.main import COMMANDS
from phoque.settings.chat import ChatSettings
from phoque.settings.compare_sae import SaeSettings
from phoque.settings.export_gguf import GgufSettings
from phoque.settings.export_onnx import ExportSettings
from phoque.settings.fields import (
    CommandSettings,
    Secrets,
    describe_default,
    env_name,
    env_names,
    flag_names,
    old_flag_name,
)
from phoque.settings.job import HubSettings, JobSettings
from phoque.settings.jobs import JobsSettings
from phoque.settings.merge import MergeSettings
from phoque.settings.presets import PRESETS, SAE_PRESETS
from phoque.settings.psm_probe import PsmSettings
from phoque.settings.train import TrainSettings
from phoque.settings.verify_gguf import VerifyGgufSettings
from phoque.settings.verify_onnx import VerifySettings

REFERENCE = Path(__file__).parent / "reference"
MODELS: dict[str, type[CommandSettings]] = {
    "train": TrainSettings,
    "chat": ChatSettings,
    "merge": MergeSettings,
    "jobs": JobsSettings,
    "export-onnx": ExportSettings,
    "verify-onnx": VerifySettings,
    "export-gguf": GgufSettings,
    "verify-gguf": VerifyGgufSettings,
    "compare-sae": SaeSettings,
    "psm-probe": PsmSettings,
}
COMMON = """Every command also takes `--dry-run` (show what would happen, and check what can be checked), `--json`
(print the result as one JSON object), `--quiet` (print one line), `--config FILE` (read settings from this .toml file,
or repeat those of a run.json; see [Settings](../guides/training.md#settings)), and `--secrets-file FILE` (read secrets
from this file instead of `.env.secrets`).
"""


def describe_values(annotation: Any) -> str:
    """The values that an option takes, in words."""
    options = [a for a in get_args(annotation) if a is not type(None)]
    if get_origin(annotation) is Literal:
        return " \\| ".join(map(str, options))
    if annotation in (str, int, float, bool):
        return {str: "text", int: "integer", float: "number", bool: "on or off"}[annotation]
    if annotation is list[str]:
        return "text, repeatable"
    return describe_values(options[0]) if options else annotation.__name__.lower()


def render_options(model: type[CommandSettings], names: list[str]) -> list[str]:
    """The table of a command's options."""
    lines = ["| option | value | default | meaning |", "|---|---|---|---|"]
    for name in names:
        field = model.model_fields[name]
        flags = ", ".join(f"`{flag}`" for flag in flag_names(model, name))
        default = describe_default(model, name, SAE_PRESETS if model is SaeSettings else PRESETS)
        lines.append(f"| {flags} | {describe_values(field.annotation)} | {default or 'none'} | {field.description} |")
    return lines


def render_cli() -> str:
    """docs/reference/cli.md."""
    lines = ["# Commands and options", "", "<!-- written by docs/generate.py; do not edit -->", "", COMMON]
    for command, model in MODELS.items():
        lines += [f"## phoque {command}", "", COMMANDS[command], ""]
        for group, fields in model.groups.items():
            shared = JobSettings if issubclass(model, JobSettings) else HubSettings
            if names := [name for name in fields.split() if name not in shared.model_fields]:
                lines += [f"### {group}", "", *render_options(model, names), ""]
    names = [name for name in JobSettings.model_fields]
    lines += ["## Options of every command that can run as a Job", "", *render_options(JobSettings, names), ""]
    lines += ["## Old names", "", "These flags still work.", "", "| old | now | command |", "|---|---|---|"]
    seen = set()
    for command, model in MODELS.items():
        for name in model.model_fields:
            if old := old_flag_name(model, name):
                where = "all" if name in JobSettings.model_fields else command
                if (old, where) not in seen and not (command == "verify-onnx" and where == command):
                    lines.append(f"| `{old}` | `{flag_names(model, name)[0]}` | {where} |")
                seen.add((old, where))
    return "\n".join(lines) + "\n"


def render_environment() -> str:
    """docs/reference/environment.md."""
    variables: dict[str, dict[str, str]] = {}
    for command, model in MODELS.items():
        for name, field in model.model_fields.items():
            for variable in env_names(model, name):
                variables.setdefault(variable, {})[command] = str(field.description)
    lines = [
        "# Environment variables",
        "",
        "<!-- written by docs/generate.py; do not edit -->",
        "",
        "A flag beats a variable, a variable beats `.env.secrets`, that beats a `--config` file, "
        "a file beats a preset, and a preset beats a default. "
        'A list is written as JSON: `["one", "two"]`.',
        "",
        "## Secrets",
        "",
        "| variable | meaning |",
        "|---|---|",
        *(f"| `{env_name(Secrets, name)}` | {field.description} |" for name, field in Secrets.model_fields.items()),
        "",
        "## Settings",
        "",
        "| variable | commands | meaning |",
        "|---|---|---|",
    ]
    for variable, meanings in sorted(variables.items()):
        for meaning in dict.fromkeys(meanings.values()):
            commands = ", ".join(command for command, text in meanings.items() if text == meaning)
            lines.append(f"| `{variable}` | {commands} | {meaning} |")
    lines += [
        "",
        "## For debugging",
        "",
        "| variable | meaning |",
        "|---|---|",
        "| `PHOQUE_DEBUG` | With 1, an error shows its traceback. |",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Write or check the two pages."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="fail if a page is stale, and write nothing")
    check = parser.parse_args().check
    stale = []
    for name, text in (("cli.md", render_cli()), ("environment.md", render_environment())):
        path = REFERENCE / name
        if not path.is_file() or path.read_text() != text:
            stale.append(name)
            if not check:
                path.write_text(text)
    if check and stale:
        sys.exit(f"stale: {', '.join(stale)}; run `uv run python docs/generate.py`")


main()
