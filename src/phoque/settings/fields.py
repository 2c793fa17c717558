"""What a setting is: a typed field with its help text, its flag and its environment variable; and the secrets."""

from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from pydantic import Field, SecretStr
from pydantic_settings import BaseSettings, SettingsConfigDict

PREFIX = "PHOQUE_"


class CommandSettings(BaseSettings):
    """The base of every command's settings: frozen, and silent about input values in its errors."""

    model_config = SettingsConfigDict(
        frozen=True,
        env_prefix=PREFIX,
        extra="ignore",
        hide_input_in_errors=True,
        populate_by_name=True,
        env_ignore_empty=True,
    )

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
