"""What a setting is: a typed field with its help text, its flag and its environment variable; and the secrets."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

from pydantic import AliasChoices, Field, SecretStr, field_validator, model_validator
from pydantic_core import PydanticCustomError
from pydantic_settings import BaseSettings, SettingsConfigDict

from phoque.errors import LOG_IN, UsageError
from phoque.files import expand_user, local_path

PREFIX = "PHOQUE_"
CONFLICT = "conflict"  # pydantic's kind of an error that `conflict` makes
COUNT = r"^(all|[1-9]\d*)$"  # the pattern of a number of GPUs


class CommandSettings(BaseSettings):
    """The base of every command's settings: frozen, and silent about input values in its errors.

    - `groups`: the fields of each section of --help, separated by spaces.
    - `required`: the inputs that the command cannot do without.
    - `main_input`: the input that a word without a flag is meant for.
    - `output_record`: the file by which a folder is known as the command's own output, and what such a folder holds.
    """

    groups: ClassVar[dict[str, str]] = {}
    required: ClassVar[tuple[str, ...]] = ()
    main_input: ClassVar[str] = ""
    output_record: ClassVar[tuple[str, str] | None] = None

    model_config = SettingsConfigDict(
        frozen=True,
        env_prefix=PREFIX,
        extra="forbid",
        hide_input_in_errors=True,
        populate_by_name=True,
        env_ignore_empty=True,
    )

    @classmethod
    def settings_customise_sources(cls, settings_cls: Any, init_settings: Any, *_: Any, **__: Any) -> tuple[Any, ...]:
        # resolve.py reads each source separately, to know where each value came from
        return (init_settings,)

    @model_validator(mode="before")
    @classmethod
    def _replace_value_aliases(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        return {
            name: cls._replace_value(name, value) if name in cls.model_fields else value
            for name, value in values.items()
        }

    @classmethod
    def _replace_value(cls, name: str, value: Any) -> Any:
        if cls.model_fields[name].annotation in (Path, Path | None) and isinstance(value, str | Path):
            return expand_user(value)  # a shell expands `~` in flags only
        if isinstance(value, str):
            return value_aliases(cls, name).get(value, value)
        if isinstance(value, list) and takes_commas(cls, name):  # --dtype q8,q4 is --dtype q8 --dtype q4
            return [part.strip() for item in value for part in str(item).split(",") if part.strip()]
        return value


class Secrets(CommandSettings):
    """Values that must never leave memory: they have no flag, and are in no log, file or upload."""

    hf_token: SecretStr | None = Field(
        None,
        validation_alias="HF_TOKEN",
        description="The token for the Hugging Face Hub. Without it, the one of `hf auth login`.",
    )
    wandb_api_key: SecretStr | None = Field(
        None,
        validation_alias="WANDB_API_KEY",
        description="The key for Weights & Biases. Without it, a run is not tracked there.",
    )
    openai_api_key: SecretStr | None = Field(
        None, validation_alias="OPENAI_API_KEY", description="The key that an openai: scorer sends to its endpoint."
    )

    @field_validator("*", mode="before")
    @classmethod
    def _strip(cls, value: Any) -> Any:
        """Without the space and line ends that copying adds; refuse what no header can carry. It is never shown."""
        if not isinstance(value, str):
            return value
        stripped = value.strip()
        if not all(" " <= character <= "~" for character in stripped):  # local servers take keys such as "not needed"
            raise ValueError("It has a character that no key has: a control character, or one that is not ASCII.")
        return stripped or None

    def plain_values(self) -> list[str]:
        """Every secret that is set, in plain text, so that output can be cleared of it."""
        values = (getattr(self, name) for name in type(self).model_fields)
        return [value.get_secret_value() for value in values if value is not None]

    @property
    def hub(self) -> str | None:
        """The Hub token in plain text, for the Hub client."""
        return self.hf_token.get_secret_value() if self.hf_token else None

    def require_hub(self, repository: str) -> None:
        """Raise UsageError if there is no Hub token, which writing to a repository needs."""
        if self.hf_token is None:
            raise UsageError(
                what="There is no Hub token.",
                why=f"{repository} cannot be written without one.",
                fix=LOG_IN,
            )


@dataclass(frozen=True)
class Origin:
    """Where a value came from, and its name there.

    `source` is flag, environment, a file (.env.secrets, that of --config), preset, default, or --epochs.
    """

    source: str
    name: str

    @property
    def is_given(self) -> bool:
        """Whether the value was given, and is not that of a preset or a default."""
        return self.source != "default" and not self.source.startswith("preset ")


S = TypeVar("S", bound=CommandSettings)


@dataclass(frozen=True)
class Resolved(Generic[S]):
    """Settings, secrets and the origin of every value."""

    settings: S
    secrets: Secrets
    origins: dict[str, Origin]

    def provenance(self) -> dict[str, dict[str, Any]]:
        """Every setting as {value, source, name, flag, meaning}, for JSON; of secrets only whether they are set."""
        fields = type(self.settings).model_fields
        values = self.settings.model_dump(mode="json")
        rows = {
            name: {
                "value": values[name],
                **vars(self.origins[name]),
                "flag": flag_names(type(self.settings), name)[0],
                "meaning": field.description,
            }
            for name, field in fields.items()
        }
        for name, field in Secrets.model_fields.items():
            shown = "set" if getattr(self.secrets, name) else "not set"
            rows[name] = {"value": shown, **vars(self.origins[name]), "meaning": field.description}
        return rows


def conflict(what: str, why: str, fix: str) -> PydanticCustomError:
    """An error to raise for settings that contradict each other, or of which one is missing, in a command's words."""
    return PydanticCustomError(CONFLICT, "{what} {why} {fix}", {"what": what, "why": why, "fix": fix})


def setting(
    default: Any,
    meaning: str,
    *,
    env: str | None = None,
    flag: str | None = None,
    old_flag: str | None = None,
    value_aliases: dict[str, str] | None = None,
    commas: bool = False,
    positional: bool = False,
    **limits: Any,
) -> Any:
    """A field with its help text.

    `env` is its environment variable where that is not PHOQUE_<FIELD>, `flag` its flag where that is not its name.
    `old_flag` and the variable of that name, and the values in `value_aliases`, are still accepted, and are hidden.
    With `commas`, an item of a list that has commas in it is several items. A `positional` setting is also the
    command's first argument.
    """
    extra: Any = {"flag": flag, "old_flag": old_flag, "value_aliases": value_aliases, "commas": commas}
    extra["positional"] = positional
    variable: Any = env
    if flag and old_flag and env is None:
        variable = AliasChoices(*(PREFIX + name.upper().replace("-", "_") for name in (flag, old_flag)))
    return Field(default, description=meaning, validation_alias=variable, json_schema_extra=extra, **limits)


def name_after(source: str) -> str:
    """The name for what is made from a folder, a file or a repository; of a run's folder `adapter` that of the run."""
    if not source:
        return "model"
    path = local_path(source)  # of `.`, the folder's own name
    parts = path.resolve().parts if path else tuple(source.rstrip("/").split("/"))
    name = parts[-2] if parts[-1] == "adapter" and len(parts) > 2 else parts[-1]
    return name.strip("/").removesuffix(".gguf") or "model"


def env_names(model: type[BaseSettings], name: str) -> list[str]:
    """The environment variables that set a field, the one to document first."""
    alias = model.model_fields[name].validation_alias
    if isinstance(alias, AliasChoices):
        return [str(choice) for choice in alias.choices]
    return [alias] if isinstance(alias, str) else [PREFIX + name.upper()]


def env_name(model: type[BaseSettings], name: str) -> str:
    """The environment variable that sets a field."""
    return env_names(model, name)[0]


def flag_names(model: type[BaseSettings], name: str) -> list[str]:
    """A field's flags: its own, and its environment variable in kebab case where that differs."""
    variable = env_name(model, name).removeprefix(PREFIX).lower().replace("_", "-")
    flags = dict.fromkeys([_extra(model, name, "flag") or name.replace("_", "-"), variable])
    return [f"--{flag}" for flag in flags if flag != _extra(model, name, "old_flag")]


def old_flag_name(model: type[BaseSettings], name: str) -> str | None:
    """The flag that a field had before; it works and is not shown."""
    flag = _extra(model, name, "old_flag")
    return f"--{flag}" if flag else None


def value_aliases(model: type[BaseSettings], name: str) -> dict[str, str]:
    """Values that are accepted for others, such as `none` for `fp32`."""
    return _extra(model, name, "value_aliases") or {}


def takes_commas(model: type[BaseSettings], name: str) -> bool:
    """Whether several values of a list may be given as one, with commas between them."""
    return bool(_extra(model, name, "commas"))


def is_positional(model: type[BaseSettings], name: str) -> bool:
    """Whether a setting is also the command's first argument."""
    return bool(_extra(model, name, "positional"))


def group_of(model: type[CommandSettings], name: str) -> str:
    """The section of --help that a field is in."""
    return next((group for group, names in model.groups.items() if name in names.split()), "Other")


def describe_default(model: type[CommandSettings], name: str, presets: dict[str, dict[str, Any]]) -> str:
    """The default of a field and the presets that have another, for --help and the reference; "" if there is none."""
    default = model.model_fields[name].get_default(call_default_factory=True)
    values = {"": default} | {
        preset: others[name] for preset, others in presets.items() if others.get(name, default) != default
    }
    shown = [f"{preset}: {text}" if preset else text for preset, value in values.items() if (text := show_value(value))]
    return "; ".join(shown)


def show_value(value: Any) -> str:
    """A value as text: on or off, the items of a list, "" for what is not set."""
    if value is None or value == "" or value == []:
        return ""
    if isinstance(value, bool):
        return "on" if value else "off"
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _extra(model: type[BaseSettings], name: str, key: str) -> Any:
    extra = model.model_fields[name].json_schema_extra
    return extra.get(key) if isinstance(extra, dict) else None
