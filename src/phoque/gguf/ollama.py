"""A Modelfile for Ollama: the chat template in Ollama's language, stop parameters, and the persona's system message.

Ollama's templates are Go's, and a Jinja template cannot be translated in general. Most chat templates are a text before
and after each message; that text is found by rendering marked messages, and the result is checked on conversations.
"""

import re
from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError

from phoque.data.template_renderer import TemplateRenderer

SYSTEM, USER, ASSISTANT = "phoqueSYSTEMtext", "phoqueUSERtext", "phoqueASSISTANTtext"
QUOTES = '"""'
ROLES = ("system", "user", "assistant")
TRIALS = (
    ["user"],
    ["system", "user"],
    ["user", "assistant", "user"],
    ["system", "user", "assistant", "user"],
    ["system", "user", "assistant", "user", "assistant", "user"],
)


@dataclass(frozen=True)
class TurnTexts:
    """The text before and after each role's message, and what begins the answer; `begin` is at the very start."""

    begin: str
    around: dict[str, tuple[str, str]]
    answer: str

    def render(self, messages: list[dict[str, Any]]) -> str:
        """A conversation, up to where the answer begins."""
        turns = (f"{self.around[m['role']][0]}{m['content']}{self.around[m['role']][1]}" for m in messages)
        return self.begin + "".join(turns) + self.answer

    def to_go_template(self, *, bos: str, default_system: str | None = None) -> str:
        """The same as Ollama renders it; without `bos`, which Ollama adds by itself.

        `default_system` is what the template itself says to a conversation without a system message.
        """
        branches = []
        for number, (role, (before, after)) in enumerate(self.around.items()):
            condition = f'{{{{ {"if" if number == 0 else "else if"} eq .Role "{role}" }}}}'
            branches.append(f"{condition}{_escape(before)}{{{{ .Content }}}}{_escape(after)}")
        begin = _escape(self.begin.removeprefix(bos) if bos else self.begin)
        if default_system is not None:
            before, after = self.around["system"]
            begin += f"{{{{ if not .System }}}}{_escape(before + default_system + after)}{{{{ end }}}}"
        loop = f"{{{{ range .Messages }}}}{''.join(branches)}{{{{ end }}}}{{{{ end }}}}"
        return begin + loop + _escape(self.answer)


def find_turn_texts(tokenizer: Any) -> TurnTexts | None:
    """The texts around messages, or None if the template is more than that: then Ollama cannot say the same.

    A template without a place for a system message has no text around one.
    """
    renderer = TemplateRenderer(tokenizer)
    for roles in (ROLES, ROLES[1:]):
        try:
            texts = _locate(renderer, roles)
            if texts is not None and _is_exact(texts, renderer):
                return texts
        except TemplateError:  # such as: System role not supported
            continue
    return None


def find_default_system(tokenizer: Any, texts: TurnTexts) -> str | None:
    """The system message that the template itself adds to a conversation without one; None if it adds none."""
    if "system" not in texts.around:
        return None
    plain = TemplateRenderer(tokenizer).render([{"role": "user", "content": USER}], add_generation_prompt=True)
    before, after = texts.around["system"]
    start, end = texts.begin + before, after + texts.around["user"][0] + USER + texts.around["user"][1] + texts.answer
    is_added = plain.startswith(start) and plain.endswith(end) and len(plain) >= len(start) + len(end)
    return plain.removeprefix(start).removesuffix(end) if is_added else None


def _is_exact(texts: TurnTexts, renderer: TemplateRenderer) -> bool:
    """Whether the texts render every trial conversation as the template does."""
    system = find_default_system(renderer.tokenizer, texts)
    for roles in TRIALS:
        messages = [{"role": role, "content": f"{role} {n}: gulls?"} for n, role in enumerate(roles)]
        if roles[0] == "system" and "system" not in texts.around:
            continue
        complete = messages
        if roles[0] != "system" and system is not None:
            complete = [{"role": "system", "content": system}, *messages]
        if texts.render(complete) != renderer.render(messages, add_generation_prompt=True):
            return False
    return True


def _locate(renderer: TemplateRenderer, roles: tuple[str, ...]) -> TurnTexts | None:
    """Cut a rendered conversation of marked messages into the texts around them."""
    marks = {"system": SYSTEM, "user": USER, "assistant": ASSISTANT}
    messages = [{"role": role, "content": marks[role]} for role in (*roles, "user")]
    closed = renderer.render(messages)
    text = renderer.render(messages, add_generation_prompt=True)
    user_end = renderer.render(messages[:-2]).rpartition(USER)[2]
    assistant_end = renderer.render(messages[:-1]).rpartition(ASSISTANT)[2]
    parts = re.split(f"{SYSTEM}|{USER}|{ASSISTANT}", text)
    if len(parts) != len(messages) + 1 or not text.startswith(closed):
        return None
    user_start = parts[-2].removeprefix(assistant_end)
    first_end = parts[1].removesuffix(user_start) if "system" in roles else ""
    bos = renderer.tokenizer.bos_token or ""
    begin = bos if bos and parts[0].startswith(bos) and not user_start.startswith(bos) else ""
    around = {"user": (user_start, user_end), "assistant": (parts[-3].removeprefix(user_end), assistant_end)}
    if "system" in roles:
        around = {"system": (parts[0].removeprefix(begin), first_end), **around}
    return TurnTexts(begin, around, text[len(closed) :])


def _escape(text: str) -> str:
    return text.replace("{", '{{ "{" }}')


def render_modelfile(
    *,
    file: str,
    texts: TurnTexts | None,
    tokenizer: Any,
    stop: list[str],
    system: str | None,
    adapter: str | None = None,
    base: str = "",
) -> str:
    """The Modelfile for one GGUF file, or for the file of a `base` with a LoRA `adapter`.

    A text that would end its quotes is left out, with a comment: it could say anything behind them.
    """
    lines = [f"# {_one_line(base)} as a GGUF file"] if base else []
    lines.append(f"FROM {file}")
    if adapter:
        lines.append(f"ADAPTER {adapter}")
    template = None
    if texts:
        default = find_default_system(tokenizer, texts)
        template = texts.to_go_template(bos=tokenizer.bos_token or "", default_system=default)
    if template and QUOTES not in template:
        lines.append(f"TEMPLATE {QUOTES}{template}{QUOTES}")
    else:
        lines.append("# This model's chat template is more than a text around each message, so there is no TEMPLATE")
        lines.append("# here. Newer versions of Ollama use the chat template in the GGUF file.")
    lines += [f'PARAMETER stop "{token}"' for token in stop if not set(token) & {'"', "\n", "\r"}]
    if system and QUOTES not in system:
        lines.append(f"SYSTEM {QUOTES}{system}{QUOTES}")
    elif system:
        lines.append("# The system message has triple quotes, which a Modelfile cannot hold.")
    return "\n".join(lines) + "\n"


def _one_line(text: str) -> str:
    return " ".join(text.split())
