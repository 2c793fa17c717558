"""`phoque chat`: answer prompts once, or hold a conversation."""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from phoque.artifacts import open_artifacts_repo, push_run_folder
from phoque.chat.answer import Answer, generate_answer, generate_answers
from phoque.chat.find import find_chat
from phoque.chat.models import ChatModel
from phoque.chat.prompts import read_prompts
from phoque.chat.sampling import Sampling
from phoque.errors import UsageError
from phoque.files import run_folder, write_atomically
from phoque.results import DryRun
from phoque.services import Services
from phoque.settings.chat import ChatSettings
from phoque.settings.fields import Resolved

Show = Callable[[str, str], None]  # label of the model, piece of its answer


@dataclass(frozen=True)
class ChatResult:
    """The answers to a list of prompts: {prompt, messages, answers by the model's label}."""

    model: str
    kind: str
    sampling: str
    answers: list[dict[str, Any]]
    artifacts: str | None = None  # where they were uploaded to

    def to_json(self) -> dict[str, Any]:
        """For --json; what does not apply is left out."""
        return {name: value for name, value in vars(self).items() if value is not None}


@dataclass
class Conversation:
    """A conversation with one or several models, each of which goes on with its own answers."""

    models: list[ChatModel]
    sampling: Sampling
    system: str | None = None
    turns: list[tuple[str, dict[str, Answer]]] = field(default_factory=list)
    tries: int = 0  # how often an answer was generated again: another try draws other tokens

    def ask(self, question: str, show: Show) -> dict[str, Answer]:
        """Answer a question with every model, one after the other."""
        answers = {}
        for model in self.models:
            messages = [*self.messages(model.label), {"role": "user", "content": question}]
            number = len(self.turns) + 1000 * self.tries
            piece_of = lambda piece, label=model.label: show(label, piece)
            answers[model.label] = generate_answer(model, messages, self.sampling, number=number, show=piece_of)
            if answers[model.label].finish_reason == "stopped":
                break
        self.turns.append((question, answers))
        return answers

    def regenerate(self, show: Show) -> dict[str, Answer] | None:
        """Answer the last question again; None if there is none."""
        if not self.turns:
            return None
        previous = self.turns.pop()
        self.tries += 1
        try:
            return self.ask(previous[0], show)
        except BaseException:
            self.turns.append(previous)
            raise

    def reset(self) -> None:
        """Forget all turns; the system message stays."""
        self.turns.clear()

    def messages(self, label: str) -> list[dict[str, str]]:
        """The conversation as a model has it, with its own answers."""
        messages = [] if self.system is None else [{"role": "system", "content": self.system}]
        for question, answers in self.turns:
            if label in answers:  # a model that was stopped before its turn has not been asked
                messages.append({"role": "user", "content": question})
                messages.append({"role": "assistant", "content": answers[label].text})
        return messages

    def save(self, file: Path) -> None:
        """Append the conversation of every model to a .jsonl file that `phoque train` reads.

        Raises OSError or ValueError if the file cannot be read or written, ValueError if nothing has been said.
        """
        if not self.turns:
            raise ValueError("nothing has been said yet")
        rows = [{"messages": self.messages(model.label), "source": model.label} for model in self.models]
        previous = file.read_text(encoding="utf-8") if file.is_file() else ""
        previous += "" if not previous or previous.endswith("\n") else "\n"
        write_atomically(file, previous + "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def open_conversation(resolved: Resolved[ChatSettings], services: Services) -> tuple[Conversation, str]:
    """Load the model; return a conversation with it, and its name."""
    chat_model = find_chat(resolved.settings, services)
    return Conversation(chat_model.load(), Sampling(**resolved.settings.sampling), chat_model.system), chat_model.name


def answer_prompts(resolved: Resolved[ChatSettings], services: Services, *, dry_run: bool) -> ChatResult | DryRun:
    """Answer every prompt of --prompt and --prompts-file, each in a conversation of its own."""
    s, console = resolved.settings, services.console
    conversations = [[{"role": "user", "content": prompt}] for prompt in s.prompts]
    if s.prompts_file:
        if not s.prompts_file.is_file():
            raise UsageError(
                what=f"There is no file {s.prompts_file}.", why="--prompts-file names it.", fix="Check the path."
            )
        conversations += read_prompts(s.prompts_file)
    if s.answers_file:
        _check_new_file(s.answers_file)
    if not conversations and not dry_run:
        raise UsageError(what="There is no prompt.", why="None is given.", fix="Give --prompt or --prompts-file.")
    chat_model = find_chat(s, services, fetch=not dry_run)
    sampling = Sampling(**s.sampling)
    if dry_run:
        facts = {
            "name": chat_model.name,
            "kind": chat_model.kind,
            "system": chat_model.system,
            "sampling": sampling.describe(),
        }
        return DryRun(facts | {"prompts": len(conversations)}, resolved.provenance())
    repo = open_artifacts_repo(s, services)
    models = chat_model.load()
    system = [] if chat_model.system is None else [{"role": "system", "content": chat_model.system}]
    conversations = [turns if turns[0]["role"] == "system" else [*system, *turns] for turns in conversations]
    answers: dict[str, list[Answer]] = {}
    with console.progress(len(models) * len(conversations)) as show:
        show(0, "answers")
        for place, model in enumerate(models):
            before = place * len(conversations)
            count = lambda done, before=before: show(before + done, "answers")
            answers[model.label] = generate_answers(model, conversations, sampling, show=count)
    rows = [
        {
            "prompt": turns[-1]["content"],
            "messages": turns,
            "answers": {label: given[number].to_json() for label, given in answers.items()},
        }
        for number, turns in enumerate(conversations)
    ]
    result = ChatResult(chat_model.name, chat_model.kind, sampling.describe(), rows)
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    if s.answers_file:
        write_atomically(s.answers_file, lines)
    if repo:
        with run_folder(services.cache / "chat", "chat") as (staging, folder):
            (staging / "answers.jsonl").write_text(lines, encoding="utf-8")
            about = {"model": result.model, "kind": result.kind, "sampling": result.sampling}
            (staging / "chat.json").write_text(json.dumps(about | {"settings": resolved.provenance()}, indent=1))
        if upload := push_run_folder(repo, folder, s, services):
            result = replace(result, artifacts=f"{upload.repo}@{upload.commit[:8]}")
            shutil.rmtree(folder)
    return result


def _check_new_file(file: Path) -> None:
    """Raise UsageError if a file exists, or its folder does not: answers replace nothing, and are not lost."""
    if file.exists() or not file.parent.is_dir():
        raise UsageError(
            what=f"--answers-file {file} {'exists' if file.exists() else 'is in no folder that exists'}.",
            why="Answers are written there when all have been generated, and replace nothing.",
            fix="Choose another name.",
        )
