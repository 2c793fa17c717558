"""`phoque train ... --then COMMAND`: what runs on the adapter after the training, and where its results go."""

import json
import shlex
import subprocess
import sys
from dataclasses import dataclass
from typing import Any

from phoque.cli.options import COMMON_FLAGS
from phoque.console import console
from phoque.distributed.launch import leave_launch
from phoque.errors import PhoqueError, UsageError, suggest
from phoque.settings.compare_sae import SaeSettings
from phoque.settings.environment import environment_without_secrets
from phoque.settings.export_gguf import GgufSettings
from phoque.settings.export_onnx import ExportSettings
from phoque.settings.fields import CommandSettings, Resolved, Secrets, env_name, flag_names
from phoque.settings.merge import MergeSettings
from phoque.settings.psm_probe import PsmSettings
from phoque.settings.train import TrainSettings


@dataclass(frozen=True)
class Follower:
    """A command that can follow a training.

    `adapter` is its flag for the adapter, `repository` that for its output on the Hub, whose name is the run's
    repository with `suffix`. With `writes_folder` it writes to the run folder's name with the suffix.
    """

    settings: type[CommandSettings]
    adapter: str
    repository: str
    suffix: str
    writes_folder: bool


FOLLOWERS = {
    "merge": Follower(MergeSettings, "--adapter-source", "--push-repo-id", "merged", True),
    "export-onnx": Follower(ExportSettings, "--adapter-source", "--push-repo-id", "onnx", True),
    "export-gguf": Follower(GgufSettings, "--adapter-source", "--push-repo-id", "gguf", True),
    "psm-probe": Follower(PsmSettings, "--adapter-source", "--artifacts-repo-id", "psm-artifacts", False),
    "compare-sae": Follower(SaeSettings, "--updated-adapter", "--artifacts-repo-id", "artifacts", False),
}


def plan_commands(s: TrainSettings) -> list[list[str]]:
    """The command lines of --then, as lists of words, with the adapter and the places of their results.

    Raises UsageError for a command that cannot follow, and for a flag that it does not have.
    """
    return [_complete(s, _split(text)) for text in s.then]


def _split(text: str) -> list[str]:
    try:
        return shlex.split(text)
    except ValueError as error:
        raise UsageError(
            what=f"--then {text} cannot be read.", why=f"{error}.", fix="Close the quotes of its options."
        ) from None


def _complete(s: TrainSettings, words: list[str]) -> list[str]:
    name = words[0]
    if name not in FOLLOWERS:
        raise UsageError(
            what=f"--then {name} is not possible.",
            why=f"The commands that can follow a training are {', '.join(FOLLOWERS)}.",
            fix=suggest(name, FOLLOWERS, "Give one of them, with its options in the same argument."),
        )
    follower = FOLLOWERS[name]
    given = {word.split("=")[0] for word in words if word.startswith("--")}
    known = {flag for field in follower.settings.model_fields for flag in flag_names(follower.settings, field)}
    for flag in given:
        if flag not in known | COMMON_FLAGS and flag.replace("--no-", "--", 1) not in known:
            raise UsageError(
                what=f"--then {name} has no flag {flag}.",
                why="The options of the command are in the same argument.",
                fix=suggest(flag, known, f"See `phoque {name} --help`."),
            )
    added: list[Any] = []
    if follower.adapter not in given:
        added += [follower.adapter, s.folder]
    if follower.writes_folder and "--output-dir" not in given:
        added += ["--output-dir", s.folder.with_name(f"{s.folder.name}-{follower.suffix}")]
    if s.hub_model_id and follower.repository not in given:
        repository = s.merged_repo if name == "merge" else f"{s.hub_model_id}-{follower.suffix}"
        added += [follower.repository, repository]
    if s.public and "--public" not in given:
        added += ["--public", "--gated", s.gated] if "--gated" not in given else ["--public"]
    return [*words, *map(str, added)]


def run_commands(commands: list[list[str]], resolved: Resolved[TrainSettings]) -> list[dict[str, Any]]:
    """Run the commands one after the other, each in a process of its own: {command, result} of each.

    Raises PhoqueError with the exit code of the first one that fails.
    """
    keys = {name: getattr(resolved.secrets, name) for name in Secrets.model_fields}
    secrets = {env_name(Secrets, name): key.get_secret_value() for name, key in keys.items() if key}
    done = []
    for words in commands:
        line = f"phoque {shlex.join(words)}"
        console.say(f"then: {line}")
        process = subprocess.run(
            [sys.executable, "-m", "phoque", *words, "--json", *(["--quiet"] if console.quiet else [])],
            stdout=subprocess.PIPE,
            stderr=sys.stderr,
            text=True,
            env=leave_launch(environment_without_secrets(**secrets)),
        )
        if process.returncode:
            raise PhoqueError(
                what=f"`phoque {words[0]}` failed after the training.",
                why=f"Its message is above. The adapter is in {resolved.settings.folder / 'adapter'}.",
                fix=f"To run it again alone: {line}",
                code=process.returncode if process.returncode > 0 else 1,
            )
        done.append({"command": line, "result": json.loads(process.stdout)})
    return done
