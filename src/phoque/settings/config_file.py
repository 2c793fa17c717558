"""Settings from a file: TOML, or the run.json of a run that is to be repeated."""

import json
import re
import tomllib
from pathlib import Path
from typing import Any

from phoque.errors import UsageError, first_line, suggest
from phoque.files import expand_user
from phoque.settings.fields import CommandSettings, Secrets, env_names, flag_names, old_flag_name
from phoque.settings.peer_flags import find_flag

# settings of a run.json that say where a run goes and how it was started: a run that repeats it has its own
NOT_REPEATED = {
    "output_dir",
    "hub_model_id",
    "merged_hub_model_id",
    "public",
    "gated",
    "fresh_start",
    "yes",
    "allow_change",
    "squash_history",
    "on",
    "timeout",
    "attempts",
    "package",
}
COMMIT = r"[0-9a-f]{40}"
# setting that names a repository -> setting of its revision, and the key of the revision in a run's fingerprint
REVISIONS = {
    "base_model": ("revision", "base_revision"),
    "dataset": ("dataset_revision", "dataset_revision"),
}


def read_config(model: type[CommandSettings], file: Path) -> dict[str, Any]:
    """The settings in a file by field name.

    TOML has a setting per line, under its name or its flag's. Raises UsageError for a file that cannot be read, a key
    that is no setting, and a secret.
    """
    record = expand_user(file) / "run.json"  # of a run's folder
    file = record if record.is_file() else file
    values = _read_values(file)
    if file.suffix == ".json" and "settings" in values:
        return _settings_of_run(model, values, file)
    known = {alias: name for name in model.model_fields for alias in _names_of(model, name)}
    settings = {}
    for key, value in values.items():
        plain = key.lower().replace("-", "_")
        if plain in Secrets.model_fields:
            raise UsageError(
                what=f"{file} has {key}.",
                why="Secrets are kept out of settings files, which are shared.",
                fix=f"Move it to .env.secrets as {env_names(Secrets, plain)[0]}; replace it if others saw the file.",
            )
        if plain not in known and isinstance(value, dict):
            raise UsageError(
                what=f"{file} has the section [{key}].",
                why="Settings stand at the top level of the file.",
                fix="Leave out the line of the section.",
            )
        if plain not in known:
            by_flag = {f"--{alias.replace('_', '-')}": name for alias, name in known.items()}
            meant = by_flag.get(find_flag(f"--{plain}", by_flag) or "")
            raise UsageError(
                what=f"{file} has {key!r}.",
                why="phoque calls it by another name." if meant else "No setting of this command has that name.",
                fix=f"Use {meant}." if meant else suggest(plain, known, "`--help` lists every flag."),
            )
        name = known[plain]
        if name in settings:
            raise UsageError(
                what=f"{file} has {key!r} and another name of the same setting.",
                why="Only one of the two can be meant.",
                fix="Delete one.",
            )
        is_list = model.model_fields[name].annotation == list[str]
        settings[name] = [value] if is_list and isinstance(value, str) else value
    return settings


def drop_other_revisions(config: dict[str, Any], overriding: dict[str, Any]) -> dict[str, Any]:
    """The settings of a file without the revisions of repositories that something else replaces."""
    replaced = [
        setting
        for name, (setting, _) in REVISIONS.items()
        if name in overriding and overriding[name] != config.get(name)
    ]
    return {name: value for name, value in config.items() if name not in replaced}


def _read_values(file: Path) -> dict[str, Any]:
    try:
        text = expand_user(file).read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise UsageError(what=f"There is no file {file}.", why="--config names it.", fix="Check the path.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(
            what=f"{file} cannot be read.", why=first_line(error), fix="Give a .toml file or a run.json."
        ) from error
    try:
        values = json.loads(text) if file.suffix == ".json" else tomllib.loads(text)
    except (json.JSONDecodeError, tomllib.TOMLDecodeError) as error:
        kind = "JSON" if file.suffix == ".json" else "TOML"
        raise UsageError(
            what=f"{file} cannot be read.",
            why=f"It is not {kind}: {error}.",
            fix="Write TOML, such as max_steps = 20, or give the run.json of a run.",
        ) from None
    if not isinstance(values, dict):
        raise UsageError(what=f"{file} has no settings.", why="It is not an object.", fix="Give a .toml file.")
    return values


def _settings_of_run(model: type[CommandSettings], record: dict[str, Any], file: Path) -> dict[str, Any]:
    """What was given to a run, or came from its preset, by field name; and the revisions that it had of the Hub's."""
    if "fingerprint" in record and "max_steps" not in model.model_fields:
        raise UsageError(
            what=f"{file} is the record of a training run.",
            why="This command has other settings.",
            fix="Give a .toml file, or the JSON report of this command.",
        )
    settings, fingerprint = record["settings"], record.get("fingerprint") or {}
    if not isinstance(settings, dict) or not all(isinstance(row, dict) for row in settings.values()):
        raise UsageError(
            what=f"{file} cannot be read.",
            why="Its settings are not those of a record: each has a value and a source.",
            fix="Give a .toml file or a run.json.",
        )
    repeated = {
        name: row["value"]
        for name, row in settings.items()
        if name in model.model_fields
        and name not in NOT_REPEATED
        and row.get("value") is not None
        and row.get("source") not in ("default", "--epochs")
    }
    for name, (setting, key) in REVISIONS.items():
        revision = str(fingerprint.get(key) or "")
        if name in repeated and re.fullmatch(COMMIT, revision):  # files on this machine have hashes of another length
            repeated[setting] = revision
    return repeated


def _names_of(model: type[CommandSettings], name: str) -> set[str]:
    """A setting's name, its flags without dashes, and its variables, in the form that keys are compared in."""
    flags = {
        flag.removeprefix("--").replace("-", "_")
        for flag in [*flag_names(model, name), old_flag_name(model, name)]
        if flag
    }
    return {name, *flags, *(variable.lower() for variable in env_names(model, name))}
