"""Rendering of a chat template, which is untrusted code: in transformers' sandbox, and within a time limit."""

import ctypes
import json
import re
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from functools import lru_cache
from typing import Any

from jinja2 import TemplateError

from phoque.errors import PhoqueError, UsageError, first_line

TIME_LIMIT_S = 10.0  # for one conversation; a template takes some 50 microseconds
_DATE_CALL = re.compile(r"strftime_now\(\s*(?P<quote>['\"])(?P<format>[^'\"\\]*)(?P=quote)\s*\)")
_GENERATION_MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")

Messages = Sequence[dict[str, Any]]
Marks = list[tuple[int, int]]


class TemplateTimeout(BaseException):
    """Raised inside a template that renders for longer than TIME_LIMIT_S; no `except Exception` catches it."""


class _Watchdog:
    """Interrupts the thread that renders, if it does so for too long. One thread renders at a time."""

    def __init__(self) -> None:
        self._lock = threading.Lock()  # transformers shares one compiled template, and the spans it marks
        self._changing_job = threading.Lock()
        self._job: tuple[int, float] | None = None
        self._thread: threading.Thread | None = None

    def __enter__(self) -> None:
        self._lock.acquire()
        self._job = threading.get_ident(), time.monotonic() + TIME_LIMIT_S
        if self._thread is None or not self._thread.is_alive():  # a forked process has no watchdog yet
            self._thread = threading.Thread(target=self._watch, name="template time limit", daemon=True)
            self._thread.start()

    def __exit__(self, *_: object) -> None:
        with self._changing_job:  # the watchdog does not interrupt what has just ended
            self._job = None
        self._lock.release()

    def _watch(self) -> None:
        while True:
            time.sleep(min(1.0, TIME_LIMIT_S / 4))
            with self._changing_job:
                job = self._job
                if job and time.monotonic() > job[1]:
                    thread = ctypes.c_ulong(job[0])
                    ctypes.pythonapi.PyThreadState_SetAsyncExc(thread, ctypes.py_object(TemplateTimeout))
                    self._job = None


_watchdog = _Watchdog()


@lru_cache
def _write_date(source: str, today: date | None) -> str:
    """The template with the texts of a date in place of calls that format the present one.

    transformers gives a template no functions but its own, so the calls cannot be answered otherwise. A call whose
    format is no literal stays.
    """
    if today is None:
        return source
    return _DATE_CALL.sub(lambda call: json.dumps(today.strftime(call["format"])), source)


@lru_cache
def _has_marks(source: str) -> bool:
    return bool(_GENERATION_MARK.search(source))


@dataclass(frozen=True)
class TemplateOnly:
    """What a renderer needs of a tokenizer, where there is none: a chat template and the texts of special tokens."""

    chat_template: str
    special_tokens_map: dict[str, str]

    def get_chat_template(self, template: str | None, tools: Any) -> str:
        """The one template."""
        return self.chat_template


class TemplateRenderer:
    """Renders conversations with the chat template of a tokenizer.

    A template that writes the date writes `today`, or the present date if that is None.
    """

    def __init__(self, tokenizer: Any, today: date | None = None) -> None:
        if not tokenizer.chat_template:
            raise UsageError(
                what="This model has no chat template.",
                why="Its tokenizer does not say how a conversation is written, as is usual for a base model.",
                fix="Use the instruct variant of the model, or put a chat_template.jinja beside its tokenizer.",
            )
        self.tokenizer = tokenizer
        self._special_tokens, self._today = dict(tokenizer.special_tokens_map), today

    def source(self, tools: Any = None) -> str:
        """The text of the template, or of the named one that is meant for conversations with tools."""
        try:
            return self.tokenizer.get_chat_template(None, tools)
        except ValueError as error:
            names = ", ".join(sorted(self.tokenizer.chat_template))
            raise UsageError(
                what="This model has several chat templates, and none of them is the default.",
                why=f"Their names are {names}.",
                fix="Name one of them `default` in the tokenizer's configuration.",
            ) from error

    def render(self, messages: Messages, *, tools: Any = None, add_generation_prompt: bool = False) -> str:
        """The text of a conversation. Raises TemplateError, with the template's reason, if the template refuses it."""
        text, _ = self._render(messages, tools, add_generation_prompt=add_generation_prompt)
        return text

    def render_with_marks(self, messages: Messages, tools: Any = None) -> tuple[str, Marks | None]:
        """The text, and the character ranges that the template marks as generated; None if it has no such marks."""
        if not _has_marks(self.source(tools)):
            return self.render(messages, tools=tools), None
        return self._render(messages, tools, return_assistant_tokens_mask=True)

    def _render(self, messages: Messages, tools: Any, **options: Any) -> tuple[str, Marks]:
        from transformers.utils.chat_template_utils import render_jinja_template

        try:
            with _watchdog:
                rendered: Any = render_jinja_template(
                    conversations=[list(messages)],
                    tools=tools,
                    chat_template=_write_date(self.source(tools), self._today),
                    **options,
                    **self._special_tokens,
                )
        except TemplateTimeout:
            raise UsageError(
                what="The model's chat template does not end.",
                why=f"It was stopped after {TIME_LIMIT_S:.0f} seconds.",
                fix="Do not trust this repository; use another copy of the model.",
            ) from None
        except (TemplateError, PhoqueError):
            raise
        except Exception as error:  # whatever the template's own code raises
            raise TemplateError(first_line(error)) from error
        texts, marks = rendered
        return texts[0], [(start, end) for start, end in marks[0]] if marks else []
