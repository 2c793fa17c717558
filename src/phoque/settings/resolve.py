"""Settings from flag > environment > .env.secrets > --config > preset > default, each value with its origin."""

import difflib
import io
import logging
import os
import re
import stat
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from pydantic_settings import BaseSettings, DotEnvSettingsSource, EnvSettingsSource, SettingsError

from phoque.errors import PhoqueError, UsageError, suggest
from phoque.settings.chat import ChatSettings
from phoque.settings.compare_sae import WHOLE, SaeSettings
from phoque.settings.config_file import drop_other_revisions, read_config
from phoque.settings.export_gguf import GgufSettings
from phoque.settings.export_onnx import ExportSettings
from phoque.settings.fields import (
    CONFLICT,
    COUNT,
    PREFIX,
    CommandSettings,
    Origin,
    Resolved,
    S,
    Secrets,
    env_name,
    env_names,
    flag_names,
)
from phoque.settings.job import DURATION, LABEL, REPO
from phoque.settings.jobs import JobsSettings
from phoque.settings.merge import MergeSettings
from phoque.settings.psm_probe import NUMBERS, PsmSettings
from phoque.settings.train import TrainSettings
from phoque.settings.verify_gguf import VerifyGgufSettings
from phoque.settings.verify_onnx import VerifySettings

ENV_FILE = ".env.secrets"
PROBLEMS = {  # pydantic's kinds of errors, with the names of their details
    "greater_than_equal": "It must be at least {ge:g}.",
    "greater_than": "It must be more than {gt:g}.",
    "less_than_equal": "It must be at most {le:g}.",
    "less_than": "It must be less than {lt:g}.",
    "int_parsing": "It must be a whole number.",
    "int_type": "It must be a whole number.",
    "int_from_float": "It must be a whole number.",
    "float_parsing": "It must be a number.",
    "float_type": "It must be a number.",
    "bool_parsing": "It must be true or false.",
    "bool_type": "It must be true or false.",
    "literal_error": "It must be {expected}.",
}
PATTERNS = {  # what a pattern of a setting means
    REPO: "It is not of the form owner/name.",
    rf"^$|{REPO}": "It is not of the form owner/name.",
    DURATION: "It is not a duration such as 4h, 90m or 14400 (seconds).",
    NUMBERS: "It is not a list of numbers with commas between them, such as 0.5,1.",
    f"^$|{NUMBERS}": "It is not a list of numbers with commas between them, such as 0.5,1.",
    WHOLE: "It is not a list of whole numbers with commas between them, such as 9,14.",
    COUNT: "It is neither all nor a whole number from 1.",
    LABEL: "It may have letters, digits, - and _.",
}
ALL_NAMES = "`phoque COMMAND --help` lists the settings of a command."
OTHER_NAMES = {"PHOQUE_DEBUG", "PHOQUE_SUBMISSION"}  # not settings of a command: see cli/main.py and environment.py
# all of them, because one environment and one secrets file serve every command
MODELS = (
    TrainSettings,
    MergeSettings,
    ExportSettings,
    VerifySettings,
    GgufSettings,
    VerifyGgufSettings,
    ChatSettings,
    JobsSettings,
    PsmSettings,
    SaeSettings,
)


def resolve_settings(
    model: type[S],
    flags: dict[str, Any],
    presets: dict[str, dict[str, Any]],
    env_file: Path | None = None,
    config: Path | None = None,
) -> tuple[Resolved[S], list[str]]:
    """The settings of one command, and warnings about the secrets file.

    `config` is a .toml file or the run.json of a run, whose settings are below the secrets file's and above the
    preset's. Raises UsageError for a misspelled PHOQUE_* name, an unknown preset or a value of the wrong kind.
    """
    warnings: list[str] = []
    file = env_file or Path(ENV_FILE)
    if env_file and not file.is_file():
        why = "It is a folder." if file.is_dir() else "--secrets-file names it."
        raise UsageError(what=f"No such secrets file: {file}", why=why, fix="Check the path.")
    warnings += _check_lines(file)
    if file.is_file() and file.stat().st_mode & (stat.S_IRGRP | stat.S_IROTH):
        warnings.append(f"{file} can be read by others on this machine: run `chmod 600 {file}`.")
    warnings += _check_names(model, file)

    layers = [
        ("flag", {name: value for name, value in flags.items() if value is not None}),
        ("environment", _read(model, EnvSettingsSource(model))),
        (str(file), _read(model, DotEnvSettingsSource(model, env_file=file, env_file_encoding="utf-8"))),
    ]
    if config:
        above = {name: value for _, layer in reversed(layers) for name, value in layer.items()}
        layers.append((str(config), drop_other_revisions(read_config(model, config), above)))
    if presets:
        default = model.model_fields["preset"].default
        chosen = next((layer["preset"] for _, layer in layers if "preset" in layer), default)
        if chosen:
            values_of = _find_preset(chosen, presets)
            preset = {name: value for name, value in values_of.items() if name in model.model_fields}
            layers.append((f"preset {chosen}", preset))

    values: dict[str, Any] = {}
    origins = {name: Origin("default", name) for name in model.model_fields}
    for source, layer in reversed(layers):
        values |= layer
        is_variable = source in ("environment", str(file))
        origins |= {name: Origin(source, _name_at(source, is_variable, model, name)) for name in layer}
    try:
        settings = model(**values)
    except ValidationError as error:
        raise _settings_error(model, error, origins) from None
    secrets, secret_origins = _read_secrets(file)
    return Resolved(settings, secrets, origins | secret_origins), warnings


def resolved_from(settings: S, presets: dict[str, dict[str, Any]]) -> Resolved[S]:
    """Settings that a program made, with those of the preset that it names, and the secrets of its environment.

    Raises UsageError for an unknown preset.
    """
    _check_lines(Path(ENV_FILE))
    secrets, secret_origins = _read_secrets(Path(ENV_FILE))
    model, given = type(settings), settings.model_fields_set
    origins = {name: Origin("argument" if name in given else "default", name) for name in model.model_fields}
    if "preset" in given and (chosen := getattr(settings, "preset", "")):
        preset = {name: value for name, value in _find_preset(chosen, presets).items() if name not in given}
        values = {name: value for name, value in preset.items() if name in model.model_fields}
        origins |= {name: Origin(f"preset {chosen}", name) for name in values}
        try:
            settings = model(**{name: getattr(settings, name) for name in given} | values)
        except ValidationError as error:
            raise _settings_error(model, error, origins) from None
    return Resolved(settings, secrets, origins | secret_origins)


def _find_preset(chosen: Any, presets: dict[str, dict[str, Any]]) -> dict[str, Any]:
    if not isinstance(chosen, str) or chosen not in presets:
        raise UsageError(
            what=f"No preset {chosen!r}.",
            why=f"phoque knows {', '.join(presets)}.",
            fix=suggest(str(chosen), presets, "Use one of them."),
        )
    return presets[chosen]


def _name_at(source: str, is_variable: bool, model: type[BaseSettings], name: str) -> str:
    """What a setting is called in a source: its flag, its environment variable, or its own name."""
    if source == "flag":
        return flag_names(model, name)[0]
    return env_name(model, name) if is_variable else name


def _read(model: type[BaseSettings], source: EnvSettingsSource) -> dict[str, Any]:
    """The values of a source by field name. Raises UsageError for a list setting that is not a JSON list."""
    try:
        return _by_field(model, source())
    except SettingsError as error:
        name = next((name for name in model.model_fields if f'"{name}"' in str(error)), "")
        raise UsageError(
            what=f"{env_name(model, name) if name else 'A setting'} cannot be read.",
            why="It takes several values, which are read as a JSON list.",
            fix='Write them as ["one", "two"].',
        ) from None


def _by_field(model: type[BaseSettings], values: dict[str, Any]) -> dict[str, Any]:
    """Values by field name; pydantic-settings has them by environment variable where a field names one."""
    by_alias = {variable: name for name in model.model_fields for variable in env_names(model, name)}
    renamed = {by_alias.get(key, key): value for key, value in values.items()}
    return {name: value for name, value in renamed.items() if name in model.model_fields}


def _read_secrets(file: Path) -> tuple[Secrets, dict[str, Origin]]:
    """The secrets of a file, overridden by the environment; the Hub token also from `hf auth login`."""
    secrets: dict[str, Any] = {}
    origins = {name: Origin("default", env_name(Secrets, name)) for name in Secrets.model_fields}
    for source, layer in (
        (str(file), DotEnvSettingsSource(Secrets, env_file=file, env_file_encoding="utf-8")),
        ("environment", EnvSettingsSource(Secrets)),
    ):
        values = _by_field(Secrets, layer())
        secrets |= values
        origins |= {name: Origin(source, env_name(Secrets, name)) for name in values}
    if "hf_token" not in secrets:
        from huggingface_hub import get_token

        if token := get_token():
            secrets["hf_token"] = token
            origins["hf_token"] = Origin("hf auth login", "token file")
    try:
        return Secrets(**secrets), origins
    except ValidationError as error:
        problem = error.errors(include_input=False, include_url=False)[0]  # the value itself is in neither
        name = next(iter(_by_field(Secrets, {str(problem["loc"][0]): None})))
        raise UsageError(
            what=f"{env_name(Secrets, name)} has a value that cannot be used (from: {origins[name].source}).",
            why=problem["msg"].removeprefix("Value error, "),
            fix="Copy it again, without quotes or spaces.",
        ) from None


def _check_lines(file: Path) -> list[str]:
    """Warnings about lines of a secrets file that are neither NAME=value nor a comment; they are not shown.

    Raises UsageError if such a line begins with the name of a secret, or if the file is not UTF-8.
    """
    from dotenv.parser import parse_stream

    if not file.is_file():
        return []
    logging.getLogger("dotenv.main").setLevel(logging.ERROR)  # it warns of the same lines, each time they are read
    try:
        bindings = list(parse_stream(io.StringIO(file.read_text(encoding="utf-8"))))
    except UnicodeDecodeError as error:
        raise UsageError(
            what=f"{file} cannot be read.", why="It is not UTF-8 text.", fix="Save it as UTF-8."
        ) from error
    names, warnings = {name for field in Secrets.model_fields for name in env_names(Secrets, field)}, []
    for text, line in ((b.original.string, b.original.line) for b in bindings if b.error):
        number = line + len(text[: len(text) - len(text.lstrip())].splitlines())
        words = re.split(r"[\s:=]", text.strip(), maxsplit=1)
        if words[0] in names and words[1:]:
            raise UsageError(
                what=f"Line {number} of {file} cannot be read.",
                why=f"It begins with {words[0]}, and is not of the form NAME=value.",
                fix=f"Write {words[0]}=VALUE, with nothing behind the value.",
            )
        warnings.append(f"line {number} of {file} is not of the form NAME=value, and is not read")
    return warnings


def _check_names(model: type[CommandSettings], file: Path) -> list[str]:
    """Warnings about environment variables whose names resemble a setting's.

    Raises UsageError for a name that can only be a misspelled setting: it has the prefix PHOQUE_, or it stands in the
    secrets file and resembles a setting's.
    """
    from dotenv import dotenv_values

    known = {v for m in {model, *MODELS, Secrets} for name in m.model_fields for v in env_names(m, name)} | OTHER_NAMES
    in_file = dotenv_values(file) if file.is_file() else {}
    warnings = []
    by_field = {name.upper(): env_name(m, name) for m in {model, *MODELS} for name in m.model_fields}
    names = {name for name in {**os.environ, **in_file} if name.upper() not in known}  # pydantic reads either case
    for name in names:
        near = difflib.get_close_matches(name.upper(), known, 1, 0.85)
        is_field = name in in_file and name.upper() in by_field
        if name.upper().startswith(PREFIX) or is_field or (near and name in in_file):
            bare = name.upper().removeprefix(PREFIX)  # the name without the prefix, or a setting of that name
            plain = difflib.get_close_matches(bare, [k for k in known if not k.startswith(PREFIX)], 1, 0.85)
            exact = bare if bare in known else by_field.get(bare) or next(iter(plain), None)
            raise UsageError(
                what=f"Unknown setting {name}.",
                why="No setting has that name.",
                fix=f"Did you mean {exact}?" if exact else suggest(name.upper(), known, ALL_NAMES),
            )
        # of one word, it may well be for another program
        if name.upper() in by_field and "_" in name:
            warnings.append(f"{name} is set, but phoque reads {by_field[name.upper()]}")
        elif near:
            warnings.append(f"{name} is set, but it is not a setting of phoque; did you mean {near[0]}?")
    return sorted(warnings)


def _settings_error(model: type[BaseSettings], error: ValidationError, origins: dict[str, Origin]) -> PhoqueError:
    problem = error.errors(include_input=False, include_url=False)[0]
    details = problem.get("ctx", {})
    if problem["type"] == CONFLICT:
        return UsageError(what=details["what"], why=details["why"], fix=details["fix"])
    why = explain_problem(problem["type"], details, problem["msg"])
    key = str(problem["loc"][0]) if problem["loc"] else ""
    name = next(iter(_by_field(model, {key: None})))
    origin = origins[name]
    description = model.model_fields[name].description
    is_flag_or_variable = origin.source in ("flag", "environment")
    place = f"{flag_names(model, name)[0]} or {env_name(model, name)}" if is_flag_or_variable else "it there"
    return UsageError(
        what=f"{origin.name} has a value that cannot be used (from: {origin.source}).",
        why=why,
        fix=f"Change {place}. Its help: {description}",
    )


def explain_problem(kind: str, details: dict[str, Any], otherwise: str) -> str:
    """What is wrong with a value, by pydantic's kind of error and its details; `otherwise` is pydantic's own text."""
    if kind == "string_pattern_mismatch":
        return PATTERNS[details["pattern"]]
    if kind in PROBLEMS:
        return PROBLEMS[kind].format(**details)
    return otherwise.removeprefix("Value error, ")
