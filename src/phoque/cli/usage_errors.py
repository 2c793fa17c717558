"""Turns mistakes on the command line into errors with a suggestion."""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from phoque.errors import LOG_IN, UsageError
from phoque.files import local_path
from phoque.settings.fields import CommandSettings, flag_names, takes_commas, value_aliases
from phoque.settings.peer_flags import find_flag

OLD = "__old"  # ends the parameter name of a hidden flag
NO_NUMBER = {  # the beginnings of pydantic's messages
    "Input should be a valid number": "It must be a number.",
    "Input should be a valid integer": "It must be a whole number.",
}


@dataclass(frozen=True)
class CommandLine:
    """The words after a command, with the parameters and the settings that the command has, and its name."""

    words: list[str]
    parameters: Sequence[Any]
    model: type[CommandSettings]
    command: str

    def explain(self, error: Exception) -> UsageError | None:
        """A clearer message for an error of Click, such as for a flag that is called so elsewhere."""
        known = {flag for parameter in self.parameters for flag in parameter.opts}
        name = str(getattr(error, "option_name", ""))
        flag = find_flag(name, known)
        if flag:
            return UsageError(
                what=f"There is no flag {name}.",
                why="phoque calls it by another name.",
                fix=f"Use {flag}. See `{self.command} --help`.",
            )
        if name in ("--hf-token", "--hub-token", "--api-key"):
            return UsageError(
                what=f"There is no flag {name}.", why="The command line would be in the shell's history.", fix=LOG_IN
            )
        resumes = name.replace("_", "-") in ("--resume", "--resume-from-checkpoint")
        if resumes and self.command == "phoque train":
            return UsageError(
                what=f"There is no flag {name}.",
                why="A run continues from its newest checkpoint on its own.",
                fix="Run the same command again, with the same --output-dir.",
            )
        parameter = getattr(error, "param", None)
        if parameter is not None and type(error).__name__ == "BadParameter":
            setting = str(parameter.name).removesuffix(OLD)
            value, why = self._explain_value(str(getattr(error, "message", "")), setting, parameter.opts)
            is_flag = setting in self.model.model_fields and parameter.param_type_name == "option"
            flag = flag_names(self.model, setting)[0] if is_flag else parameter.opts[0].removesuffix(OLD)
            return UsageError(what=f"{flag} cannot be {value}.", why=why, fix=f"See `{self.command} --help`.")
        if describe := getattr(error, "format_message", None):
            fix = f"See `{self.command} --help`."
            if name and "--then" in self.words:
                fix = f"Put quotes around a command of --then and its options: --then 'merge {name} ...'"
            what = describe().replace("Value error, ", "").removesuffix(".")
            return UsageError(what=f"{what}.", why="The command line is not valid.", fix=fix)
        return None

    def _explain_value(self, message: str, setting: str, flags: Sequence[str]) -> tuple[str, str]:
        """The value that was refused, and why; values that are accepted, but not shown, are not named."""
        message = message.removeprefix("Value error, ")
        value, choice, choices = message.partition(" is not one of ")
        if choice:
            for alias in value_aliases(self.model, setting):
                choices = choices.replace(f", {alias!r}", "")
            shown = choices.replace("'", "").removesuffix(".")
            return value, f"It can be {shown}."
        words = [part for word in self.words for part in word.split("=", 1)]
        value = [word for flag, word in pairwise(words) if flag in flags][-1]
        reasons = [reason for begin, reason in NO_NUMBER.items() if message.startswith(begin)]
        return repr(value), (*reasons, f"{message.removesuffix('.')}.")[0]

    def check_values(self) -> None:
        """Raise UsageError for a flag whose value is missing, so that the flag after it would be taken for it."""
        flags = {flag: p for p in self.parameters for flag in (*p.opts, *p.secondary_opts) if flag.startswith("-")}
        for flag, value in pairwise(self.words):
            if flag == "--":
                return
            parameter = flags.get(flag)
            if parameter is not None and not getattr(parameter, "is_flag", False) and value in flags:
                raise UsageError(
                    what=f"{flag} has no value.",
                    why=f"{value}, which follows it, is a flag itself.",
                    fix=f"Give it a value, or write {flag}={value} if that is meant.",
                )

    def repeats_dataset(self) -> bool:
        """Whether several datasets are named, of which the command would read the last."""
        flags = flag_names(self.model, "dataset") if "dataset" in self.model.model_fields else []
        return sum(word.split("=")[0] in flags for word in self.words) > 1

    def explain_extra(self, extra: list[str]) -> UsageError:
        """The error for words that follow no flag, and what was probably meant by them."""
        word = extra[0]
        if word.startswith("hf_"):
            return UsageError(
                what="A token is given on the command line.",
                why="The command line would be in the shell's history.",
                fix=LOG_IN,
            )
        setting, fix = self.model.main_input, f"See `{self.command} --help`."
        flag = flag_names(self.model, setting)[0] if setting else ""
        place = self.words.index(word) if word in self.words else 0
        value, its_flag = (self.words[place - n] if place >= n else "" for n in (1, 2))
        fields = [name for name in self.model.model_fields if takes_commas(self.model, name)]
        list_flags = {list_flag for name in fields for list_flag in flag_names(self.model, name)}
        is_input = setting == "prompts" or "/" in word or Path(word).suffix or local_path(word)
        if flag and flag not in self.words and is_input:
            fix = f"Put its flag before it: {flag} {shlex.quote(word)}"
        elif its_flag in list_flags:
            fix = f"Separate several values with commas: {its_flag} {value},{word}"
        elif value.startswith("--") and any(value in p.opts for p in self.parameters if getattr(p, "is_flag", False)):
            fix = f"{value} takes no value: write {value}, or {value.replace('--', '--no-', 1)}"
        elif value and not value.startswith("-"):
            fix = f"If it belongs to {value!r}, put quotes around both: {shlex.quote(f'{value} {word}')}"
        return UsageError(
            what=f"{word!r} is given without a flag.", why="Every value of this command follows its flag.", fix=fix
        )
