"""`phoque train ... --then COMMAND`: what runs on the adapter after the training, and where its results go."""

import importlib
import json
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from phoque.cli.options import require_extra, resolve_words
from phoque.console import console
from phoque.distributed.launch import leave_launch
from phoque.errors import USAGE, PhoqueError, UsageError, suggest, to_phoque_error
from phoque.inputs import check_inputs
from phoque.settings.environment import environment_without_secrets
from phoque.settings.fields import Resolved, Secrets, env_name
from phoque.settings.train import THEN_EXTRAS, TrainSettings


@dataclass(frozen=True)
class Follower:
    """A command that can follow a training.

    `adapter` is its flag for the adapter, `repository` that for its output on the Hub, whose name is the run's
    repository with `suffix`. With `writes_folder` it writes to the run folder's name with the suffix.
    """

    adapter: str
    repository: str
    suffix: str
    writes_folder: bool


FOLLOWERS = {
    "merge": Follower("--adapter-source", "--push-repo-id", "merged", True),
    "export-onnx": Follower("--adapter-source", "--push-repo-id", "onnx", True),
    "export-gguf": Follower("--adapter-source", "--push-repo-id", "gguf", True),
    "psm-probe": Follower("--adapter-source", "--artifacts-repo-id", "psm-artifacts", False),
    "compare-sae": Follower("--updated-adapter", "--artifacts-repo-id", "artifacts", False),
}


def plan_commands(s: TrainSettings) -> list[list[str]]:
    """The command lines of --then, as lists of words, with the adapter and the places of their results.

    Raises UsageError for a command that cannot follow, and for what the command would refuse: a flag or a value, a
    file that does not exist, an extra that is not installed. Of a Job's commands, only flags and values are checked.
    """
    commands = [_complete(s, _split(text)) for text in s.then]
    made = [s.folder]  # by the training, and then by each command
    for words in commands:
        try:
            _check(words, made, on_this_machine=not s.on)
        except Exception as error:  # also what Click raises
            found = to_phoque_error(error)
            if found.code != USAGE:
                raise
            raise UsageError(what=f"--then {words[0]}: {found.what}", why=found.why, fix=found.fix) from error
    return commands


def _split(text: str) -> list[str]:
    try:
        return shlex.split(text)
    except ValueError as error:
        raise UsageError(
            what=f"--then {text} cannot be read.", why=f"{error}.", fix="Close the quotes of its options."
        ) from None


def _complete(s: TrainSettings, words: list[str]) -> list[str]:
    words = words[1:] if words[0] == "phoque" and len(words) > 1 else words
    name = words[0]
    if name not in FOLLOWERS:
        raise UsageError(
            what=f"--then {name} is not possible.",
            why=f"The commands that can follow a training are {', '.join(FOLLOWERS)}.",
            fix=suggest(name, FOLLOWERS, "Give one of them, with its options in the same argument."),
        )
    follower = FOLLOWERS[name]
    given = {word.split("=")[0] for word in words if word.startswith("-")}
    if given & {"--help", "-h"}:
        raise UsageError(
            what=f"--then {name} asks for help.",
            why="It would run after the training.",
            fix=f"Run phoque {name} --help",
        )
    added: list[Any] = []
    if not given & {follower.adapter, "--merged-dir", "--updated-model"}:  # another source is the user's choice
        added += [follower.adapter, s.folder]
    if follower.writes_folder and "--output-dir" not in given:
        added += ["--output-dir", s.folder.with_name(f"{s.folder.name}-{follower.suffix}")]
    if s.hub_model_id and follower.repository not in given:
        repository = s.merged_repo if name == "merge" else f"{s.hub_model_id}-{follower.suffix}"
        added += [follower.repository, repository]
    if s.public and "--public" not in given:
        added += ["--public", "--gated", s.gated] if "--gated" not in given else ["--public"]
    return [*words, *map(str, added)]


def _check(words: list[str], made: list[Path], *, on_this_machine: bool) -> None:
    """Raise what the command would raise for its flags and values, and on this machine for its inputs and extra.

    What is in the folders that are `made` before it need not be there yet; its own output folder is added to them.
    """
    name, *options = words
    module = importlib.import_module(f"phoque.cli.{name.replace('-', '_')}")
    settings = resolve_words(module.command(name), options).settings
    if on_this_machine:
        check_inputs(settings, made)
        if FOLLOWERS[name].writes_folder:
            made.append(settings.folder)
        if merged := getattr(settings, "merged_out_dir", None):
            made.append(merged)
        if name in THEN_EXTRAS and not getattr(settings, "sae", ""):  # a dictionary that is given is not trained
            require_extra(THEN_EXTRAS[name])


def run_commands(commands: list[list[str]], resolved: Resolved[TrainSettings]) -> list[dict[str, Any]]:
    """Run the commands one after the other, each in a process of its own: {command, result} of each.

    A result is an object with --json, and otherwise the text that the command prints.

    Raises PhoqueError with the exit code of the first one that fails.
    """
    keys = {name: getattr(resolved.secrets, name) for name in Secrets.model_fields}
    secrets = {env_name(Secrets, name): key.get_secret_value() for name, key in keys.items() if key}
    done = []
    for words in commands:
        line = f"phoque {shlex.join(words)}"
        console.say(f"then: {line}")
        process = subprocess.run(
            [sys.executable, "-m", "phoque", *words, *(["--json"] if console.json else [])],
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
        result = json.loads(process.stdout) if console.json else process.stdout.strip()
        done.append({"command": line, "result": result})
    return done
