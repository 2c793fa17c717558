"""Settings from flag > environment > .env.secrets > preset > default, each value with its origin."""

import difflib
import os
import stat
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from pydantic_settings import BaseSettings, DotEnvSettingsSource, EnvSettingsSource, SettingsError

from phoque.errors import PhoqueError, UsageError
from phoque.settings.compare_sae import SaeSettings
from phoque.settings.export_onnx import ExportSettings
from phoque.settings.fields import (
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
from phoque.settings.merge import MergeSettings
from phoque.settings.psm_probe import PsmSettings
from phoque.settings.train import TrainSettings
from phoque.settings.verify_onnx import VerifySettings

ENV_FILE = ".env.secrets"
OTHER_NAMES = {"PHOQUE_DEBUG", "PHOQUE_SUBMISSION"}  # not settings of a command: see cli/main.py and environment.py
# all of them, because one environment and one secrets file serve every command
MODELS = (TrainSettings, MergeSettings, ExportSettings, VerifySettings, PsmSettings, SaeSettings)


def resolve_settings(
    model: type[S], flags: dict[str, Any], presets: dict[str, dict[str, Any]], env_file: Path | None = None
) -> tuple[Resolved[S], list[str]]:
    """The settings of one command, and warnings about the secrets file.

    Raises UsageError for a misspelt PHOQUE_* name, an unknown preset or a value of the wrong kind.
    """
    warnings: list[str] = []
    file = env_file or Path(ENV_FILE)
    if env_file and not file.is_file():
        raise UsageError(what=f"No such secrets file: {file}", why="--secrets-file names it.", fix="Check the path.")
    if file.is_file() and file.stat().st_mode & (stat.S_IRGRP | stat.S_IROTH):
        warnings.append(f"{file} can be read by others on this machine: run `chmod 600 {file}`.")
    warnings += _unknown_names(model, file)

    layers = [
        ("flag", {name: value for name, value in flags.items() if value is not None}),
        ("environment", _read(model, EnvSettingsSource(model))),
        (str(file), _read(model, DotEnvSettingsSource(model, env_file=file, env_file_encoding="utf-8"))),
    ]
    if presets:
        chosen = next((layer["preset"] for _, layer in layers if "preset" in layer), next(iter(presets)))
        if chosen not in presets:
            raise UsageError(
                what=f"No preset {chosen!r}.", why=f"phoque knows {', '.join(presets)}.", fix=_nearest(chosen, presets)
            )
        own = {name: value for name, value in presets[chosen].items() if name in model.model_fields}
        layers.append((f"preset {chosen}", own))

    values: dict[str, Any] = {}
    origins = {name: Origin("default", name) for name in model.model_fields}
    for source, layer in reversed(layers):
        values |= layer
        origins |= {name: Origin(source, _name_in(model, source, name)) for name in layer}
    try:
        settings = model(**values)
    except ValidationError as error:
        raise _settings_error(model, error, origins) from None
    secrets, secret_origins = _secrets(file)
    return Resolved(settings, secrets, origins | secret_origins), warnings


def resolved_from(settings: S) -> Resolved[S]:
    """Settings that a program made, with the secrets of its environment."""
    secrets, origins = _secrets(Path(ENV_FILE))
    fields = type(settings).model_fields
    given = {n: Origin("argument" if n in settings.model_fields_set else "default", n) for n in fields}
    return Resolved(settings, secrets, given | origins)


def _name_in(model: type[BaseSettings], source: str, name: str) -> str:
    if source == "flag":
        return flag_names(model, name)[0]
    return name if source.startswith("preset") else env_name(model, name)


def _read(model: type[BaseSettings], source: EnvSettingsSource) -> dict[str, Any]:
    """What a source holds, keyed by field name. Raises UsageError for a list that is not one."""
    try:
        return _by_field(model, source())
    except SettingsError as error:
        name = next((name for name in model.model_fields if f'"{name}"' in str(error)), "")
        raise UsageError(
            what=f"{env_name(model, name) if name else 'A setting'} cannot be read.",
            why="It takes several values, and those are read as JSON.",
            fix='Write them as ["one", "two"].',
        ) from None


def _by_field(model: type[BaseSettings], found: dict[str, Any]) -> dict[str, Any]:
    """Values keyed by field name; pydantic-settings keys them by alias where there is one."""
    by_alias = {variable: name for name in model.model_fields for variable in env_names(model, name)}
    keyed = {by_alias.get(key, key): value for key, value in found.items()}
    return {name: value for name, value in keyed.items() if name in model.model_fields}


def _secrets(file: Path) -> tuple[Secrets, dict[str, Origin]]:
    found: dict[str, Any] = {}
    origins = {name: Origin("default", env_name(Secrets, name)) for name in Secrets.model_fields}
    for source, layer in (
        (str(file), DotEnvSettingsSource(Secrets, env_file=file, env_file_encoding="utf-8")),
        ("environment", EnvSettingsSource(Secrets)),
    ):
        values = _by_field(Secrets, layer())
        found |= values
        origins |= {name: Origin(source, env_name(Secrets, name)) for name in values}
    if "hf_token" not in found:
        from huggingface_hub import get_token

        if token := get_token():
            found["hf_token"] = token
            origins["hf_token"] = Origin("hf auth login", "token file")
    return Secrets(**found), origins


def _unknown_names(model: type[CommandSettings], file: Path) -> list[str]:
    """Warnings about names in the environment that are nearly a setting's, but for those that can only be meant as one.

    Raises UsageError for these: with the prefix, or in the secrets file and nearly a setting's.
    """
    from dotenv import dotenv_values

    known = {v for m in {model, *MODELS, Secrets} for name in m.model_fields for v in env_names(m, name)} | OTHER_NAMES
    in_file = dotenv_values(file) if file.is_file() else {}
    warnings = []
    for name in {**os.environ, **in_file}.keys() - known:
        near = difflib.get_close_matches(name.upper(), known, 1, 0.85)
        if name.upper().startswith(PREFIX) or (near and name in in_file):
            raise UsageError(
                what=f"Unknown setting {name}.", why="No setting has that name.", fix=_nearest(name.upper(), known)
            )
        if near:
            warnings.append(f"{name} is set, which is no setting of phoque's; did you mean {near[0]}?")
    return sorted(warnings)


def _nearest(name: str, known: Any) -> str:
    near = difflib.get_close_matches(name, list(known), 1, 0.5)
    return f"Did you mean {near[0]}?" if near else "See .env.example for every name."


def _settings_error(model: type[BaseSettings], error: ValidationError, origins: dict[str, Origin]) -> PhoqueError:
    problem = error.errors(include_input=False, include_url=False)[0]
    said = problem["msg"].removeprefix("Value error, ")
    key = str(problem["loc"][0]) if problem["loc"] else ""
    name = next(iter(_by_field(model, {key: None})), None)
    if name is None:
        return UsageError(what="These settings do not go together.", why=said, fix="See `phoque COMMAND --help`.")
    origin = origins[name]
    return UsageError(
        what=f"{origin.name} has a value that cannot be used (from: {origin.source}).",
        why=said,
        fix=f"Set {flag_names(model, name)[0]} or {env_name(model, name)}: {model.model_fields[name].description}",
    )
