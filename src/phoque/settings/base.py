"""Settings from flag > environment > .env.secrets > preset > default, each value with where it came from."""

import difflib
import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from pydantic import Field, SecretStr, ValidationError
from pydantic_settings import (
    BaseSettings,
    DotEnvSettingsSource,
    EnvSettingsSource,
    SettingsConfigDict,
    SettingsError,
)

from phoque.errors import PhoqueError

PREFIX = "PHOQUE_"
ENV_FILE = ".env.secrets"
OTHER_NAMES = {"PHOQUE_DEBUG", "PHOQUE_SUBMISSION"}  # no settings of a command: see cli.py and `submission`


class CommandSettings(BaseSettings):
    """The base of every command's settings: frozen, and silent about input values in its errors."""

    model_config = SettingsConfigDict(
        frozen=True, env_prefix=PREFIX, extra="ignore", hide_input_in_errors=True, populate_by_name=True,
        env_ignore_empty=True,
    )  # fmt: skip

    @classmethod
    def settings_customise_sources(cls, settings_cls: Any, init_settings: Any, *_: Any, **__: Any) -> tuple[Any, ...]:
        # `resolved` reads each source by itself, to know where a value came from.
        return (init_settings,)


class Secrets(CommandSettings):
    """What must never leave memory: these have no flag and are in no log, file or upload."""

    hf_token: SecretStr | None = Field(
        None, validation_alias="HF_TOKEN", description="Hub token; also read from `hf auth login`"
    )
    wandb_api_key: SecretStr | None = Field(
        None, validation_alias="WANDB_API_KEY", description="W&B key; without it a run is not tracked there"
    )
    openai_api_key: SecretStr | None = Field(
        None, validation_alias="OPENAI_API_KEY", description="key that an openai: scorer sends to its endpoint"
    )

    @property
    def hub(self) -> str | None:
        """The Hub token itself, for a client's memory alone."""
        return self.hf_token.get_secret_value() if self.hf_token else None


@dataclass(frozen=True)
class Origin:
    """Where a value came from: `source` (flag, environment, .env.secrets, preset, default) and its name there."""

    source: str
    name: str


S = TypeVar("S", bound=CommandSettings)


@dataclass(frozen=True)
class Resolved(Generic[S]):
    """Settings, secrets and the origin of every value."""

    settings: S
    secrets: Secrets
    origins: dict[str, Origin]

    def provenance(self) -> dict[str, dict[str, Any]]:
        """Every setting as {value, source, name, meaning}, fit for JSON and free of secrets."""
        fields = type(self.settings).model_fields
        values = self.settings.model_dump(mode="json")
        rows = {
            name: {"value": values[name], **vars(self.origins[name]), "meaning": field.description}
            for name, field in fields.items()
        }
        for name, field in Secrets.model_fields.items():
            shown = "set" if getattr(self.secrets, name) else "not set"
            rows[name] = {"value": shown, **vars(self.origins[name]), "meaning": field.description}
        return rows


def setting(default: Any, meaning: str, env: str | None = None, flag: str | None = None, **limits: Any) -> Any:
    """A field with its meaning; `env` is its name in the spec where that is not PHOQUE_<FIELD>, `flag` its own flag."""
    extra: Any = {"flag": flag} if flag else None
    return Field(default, description=meaning, validation_alias=env, json_schema_extra=extra, **limits)


def env_name(model: type[BaseSettings], name: str) -> str:
    """The environment variable that sets a field."""
    alias = model.model_fields[name].validation_alias
    return alias if isinstance(alias, str) else PREFIX + name.upper()


def flag_names(model: type[BaseSettings], name: str) -> list[str]:
    """A field's flags: its own name, and the spec's name in kebab case where that differs."""
    extra = model.model_fields[name].json_schema_extra
    own = extra["flag"] if isinstance(extra, dict) else name.replace("_", "-")
    spec = env_name(model, name).removeprefix(PREFIX).lower().replace("_", "-")
    return [f"--{flag}" for flag in dict.fromkeys([own, spec])]


def resolved(
    model: type[S], flags: dict[str, Any], presets: dict[str, dict[str, Any]], env_file: Path | None = None
) -> tuple[Resolved[S], list[str]]:
    """The settings of one command, and warnings about the secrets file.

    Raises PhoqueError (2) for a misspelt PHOQUE_* name, an unknown preset or a value of the wrong kind.
    """
    warnings: list[str] = []
    file = env_file or Path(ENV_FILE)
    if env_file and not file.is_file():
        raise PhoqueError(f"No such secrets file: {file}", "--secrets-file names it.", "Check the path.")
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
            raise PhoqueError(
                f"No preset {chosen!r}.", f"phoque knows {', '.join(presets)}.", _nearest(chosen, presets)
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


def _name_in(model: type[BaseSettings], source: str, name: str) -> str:
    if source == "flag":
        return flag_names(model, name)[0]
    return name if source.startswith("preset") else env_name(model, name)


def _read(model: type[BaseSettings], source: EnvSettingsSource) -> dict[str, Any]:
    """What a source holds, keyed by field name. Raises PhoqueError (2) for a list that is not one."""
    try:
        return _by_field(model, source())
    except SettingsError as error:
        name = next((name for name in model.model_fields if f'"{name}"' in str(error)), "")
        raise PhoqueError(
            f"{env_name(model, name) if name else 'A setting'} cannot be read.",
            "It takes several values, and those are read as JSON.",
            'Write them as ["one", "two"].',
        ) from None


def _by_field(model: type[BaseSettings], found: dict[str, Any]) -> dict[str, Any]:
    """Values keyed by field name; pydantic-settings keys them by alias where there is one."""
    by_alias = {env_name(model, name): name for name in model.model_fields}
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

    Raises PhoqueError (2) for these: with the prefix, or in the secrets file and nearly a setting's.
    """
    from dotenv import dotenv_values

    from phoque.settings.merge import MergeSettings
    from phoque.settings.onnx import ExportSettings, VerifySettings
    from phoque.settings.psm import PsmSettings
    from phoque.settings.sae import SaeSettings
    from phoque.settings.train import TrainSettings

    # one environment and one file serve every command
    models = {model, TrainSettings, MergeSettings, ExportSettings, VerifySettings, PsmSettings, SaeSettings, Secrets}
    known = {env_name(m, name) for m in models for name in m.model_fields} | OTHER_NAMES
    in_file = dotenv_values(file) if file.is_file() else {}
    warnings = []
    for name in {**os.environ, **in_file}.keys() - known:
        near = difflib.get_close_matches(name.upper(), known, 1, 0.85)
        if name.upper().startswith(PREFIX) or (near and name in in_file):
            raise PhoqueError(f"Unknown setting {name}.", "No setting has that name.", _nearest(name.upper(), known))
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
        return PhoqueError("These settings do not go together.", said, "See `phoque COMMAND --help`.")
    origin = origins[name]
    return PhoqueError(
        f"{origin.name} has a value that cannot be used (from: {origin.source}).",
        said,
        f"Set {flag_names(model, name)[0]} or {env_name(model, name)}: {model.model_fields[name].description}.",
    )


def in_job() -> bool:
    """Whether this process runs in the container of an HF Job."""
    return "JOB_ID" in os.environ


def submission() -> str:
    """What all attempts of one Job, or of one `--attempts`, have in common; empty outside of Jobs."""
    return os.environ.get("PHOQUE_SUBMISSION") or os.environ.get("JOB_ID", "")


def deadline(seconds: float | None) -> float | None:
    """The time.time() at which this process is killed, if it is given so many seconds.

    In a Job they count from when its container began, which is when its first process did; else from our own start.
    """
    import psutil

    if seconds is None:
        return None
    own = psutil.Process().create_time()
    if not in_job():
        return own + seconds
    first = psutil.Process(1).create_time()
    # a first process that is older than all the time there is belongs to the machine, not to the container
    return (first if own - first < seconds else own) + seconds


def cache_folder() -> Path:
    """phoque's own cache: $XDG_CACHE_HOME/phoque, or ~/.cache/phoque."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "phoque"
