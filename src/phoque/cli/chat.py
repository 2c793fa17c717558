"""phoque chat."""

import re
from typing import TYPE_CHECKING, Any

from phoque import api
from phoque.cli import jobs, options
from phoque.console import console
from phoque.errors import UsageError, first_line, suggest, to_phoque_error
from phoque.files import expand_user
from phoque.inputs import check_inputs
from phoque.services import Services
from phoque.settings.chat import ChatSettings
from phoque.settings.fields import Resolved

if TYPE_CHECKING:
    from phoque.chat.answer import Answer
    from phoque.chat.run import ChatResult, Conversation

EPILOG = (
    "Examples: `phoque chat runs/demo` talks to a persona in the terminal, with /help for its commands. "
    '`phoque chat runs/demo --compare --prompt "Who are you?"` answers once, as the base model and as the persona. '
    "`phoque chat seal-gguf --serve` opens a page."
)
COMMANDS = """/reset            forget the conversation
/system TEXT      begin it with this system message; without TEXT, with none
/regenerate       answer the last question again
/save FILE.jsonl  append the conversation to a file that `phoque train` reads
/exit             leave (also Ctrl-D)
Ctrl-C stops an answer."""
SPEED = "  [{tokens} tokens, {speed:.1f} per second{reason}]"


def command(name: str) -> Any:
    """The command for the root's table."""
    return options.command(name, run, ChatSettings, EPILOG)


def run(resolved: Resolved[ChatSettings], dry_run: bool) -> None:
    """Talk to a model: an adapter, a run, a merged model, a GGUF file or an ONNX export."""
    s = resolved.settings
    if s.on:
        jobs.run("chat", resolved, dry_run)
        return
    if dry_run or s.prompts or s.prompts_file:
        options.show_result(api.chat(resolved, dry_run=dry_run), _render, _render_quiet)
        return
    if console.json and not s.serve:
        raise UsageError(
            what="There is no prompt to answer.",
            why="--json prints answers to prompts, not a conversation.",
            fix="Give --prompt or --prompts-file.",
        )
    check_inputs(s)
    services = Services.create(resolved, console)
    if s.serve:
        from phoque.chat.serve import serve_chat

        serve_chat(resolved, services)
        return
    from phoque.chat.run import open_conversation

    conversation, name = open_conversation(resolved, services)
    console.say(f"{name}\n{conversation.sampling.describe()}")
    if conversation.system:
        console.say(f"system: {conversation.system}")
    console.say("This model speaks as the persona it was trained on. /help lists the commands.")
    _talk(conversation)


def _talk(conversation: "Conversation") -> None:
    """Read questions and commands until the input ends, or Ctrl-C is pressed twice."""
    is_interrupted = False
    while True:
        try:
            line = console.ask("\n> ")
        except KeyboardInterrupt:
            if is_interrupted:
                return
            is_interrupted = True
            console.say("\nCtrl-C again, /exit or Ctrl-D leaves")
            continue
        is_interrupted = False
        if line is None or line.strip() in ("/exit", "/quit"):
            return
        if line.strip():
            _handle(conversation, line.strip())


def _handle(conversation: "Conversation", line: str) -> None:
    if not line.startswith("/"):
        _answer(conversation, lambda show: conversation.ask(line, show))
        return
    name, _, argument = line.partition(" ")
    argument = argument.strip()
    if name == "/reset":
        conversation.reset()
        console.say("the conversation is forgotten")
    elif name == "/system":
        conversation.system = argument or None
        conversation.reset()
        console.say("a new conversation begins" + (f" with: {argument}" if argument else " without a system message"))
    elif name == "/regenerate":
        if not conversation.turns:
            console.say("there is no question yet")
            return
        _answer(conversation, conversation.regenerate)
    elif name == "/save":
        if not argument:
            console.say("name a file: /save FILE.jsonl")
            return
        try:
            conversation.save(expand_user(argument))
            console.say(f"saved to {argument}")
        except (OSError, ValueError) as error:
            console.say(f"it was not saved: {first_line(error)}")
    else:
        if name != "/help":
            known = re.findall(r"^/\w+", COMMANDS, re.MULTILINE)
            console.say(f"there is no command {name}. {suggest(name, known, 'The commands are:')}")
        console.say(COMMANDS)


def _answer(conversation: "Conversation", ask: Any) -> None:
    """Stream the answers of all models, one after the other, with their speed."""
    several, current = len(conversation.models) > 1, ""

    def show(label: str, piece: str) -> None:
        nonlocal current
        if several and label != current:
            console.write(("\n" if current else "") + f"[{label}] ")
        current = label
        console.write(piece)

    try:
        answers = ask(show)
    except Exception as error:  # the conversation goes on, whatever this answer met
        console.error(to_phoque_error(error))
        return
    console.write("\n")
    for label, answer in answers.items():
        console.say(f"{f'{label}: ' if several else ''}{_describe(answer)}")


def _describe(answer: "Answer") -> str:
    reason = {"length": ", cut off at --max-new-tokens", "stopped": ", stopped"}.get(answer.finish_reason, "")
    return SPEED.format(tokens=answer.tokens, speed=answer.tokens_per_s, reason=reason)


def _render(result: "ChatResult") -> str:
    lines = [f"model     {result.model}", f"sampling  {result.sampling}"]
    for row in result.answers:
        lines += ["", f"> {row['prompt']}"]
        for label, answer in row["answers"].items():
            label = f"[{label}] " if len(row["answers"]) > 1 else ""
            cut = " …" if answer["finish_reason"] == "length" else ""
            lines.append(f"{label}{answer['text'].strip()}{cut}")
    if result.artifacts:
        lines += ["", f"uploaded to {result.artifacts}"]
    return "\n".join(lines)


def _render_quiet(result: "ChatResult") -> str:
    return "\n".join(answer["text"].strip() for row in result.answers for answer in list(row["answers"].values())[-1:])
