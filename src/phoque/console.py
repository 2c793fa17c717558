"""The one place that prints: the result on stdout (human, --json or --quiet), all else on stderr."""

import json
import logging
import os
import sys
import time
import warnings
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any

from phoque.errors import PhoqueError

LOG_EVERY_S = 5.0  # without a terminal, long work prints a line this often


class Console:
    """One output sink; a service gets it to say what it does, and never learns how that is shown."""

    def __init__(self) -> None:
        self.json = self.quiet = False
        self._out: Any = sys.stdout
        self._live: Any = None

    def use(self, json: bool = False, quiet: bool = False) -> None:
        """Choose how results are shown, once, at the start of a command, and keep stdout for them alone."""
        self.json, self.quiet = json, quiet
        self._out, sys.stdout = sys.stdout, sys.stderr  # a library that prints does so beside the result, not in it

    def say(self, text: str) -> None:
        """A line of news, on stderr."""
        if not self.quiet:
            self._err(printable(text))

    def warn(self, text: str) -> None:
        """A line that a user should not miss, on stderr."""
        self._err(f"warning: {printable(text)}", style="yellow")

    def error(self, error: PhoqueError) -> None:
        """What happened, why, and what to do: three lines on stderr."""
        for label, text in (("error", error.what), ("  why", error.why), ("   do", error.fix)):
            self._err(f"{label}: {printable(text).strip()}", style="bold red" if label == "error" else None)

    def result(self, data: dict[str, Any], human: Callable[[], Any], quiet: str) -> None:
        """The command's answer, on stdout: `data` with --json, `quiet` with --quiet, else what `human()` renders."""
        if self.json:
            print(json.dumps(data, ensure_ascii=False, default=str), file=self._out)
        elif self.quiet:
            print(quiet, file=self._out)
        elif isinstance(shown := human(), str):  # not rich's to wrap, nor to read for its markup
            print(printable(shown), file=self._out)
        else:
            from rich.console import Console as Rich

            Rich(file=self._out, highlight=False).print(shown)
        self._out.flush()

    def can_ask(self) -> bool:
        """Whether a person is there to answer."""
        return sys.stdin.isatty() and sys.stderr.isatty() and not self.quiet

    def confirmed(self, question: str) -> bool:
        """A yes or no from the terminal; no is the default."""
        print(f"{question} [y/N] ", end="", file=sys.stderr, flush=True)
        return sys.stdin.readline().strip().lower() in ("y", "yes")

    @contextmanager
    def progress(self, total: int, done: int = 0) -> Generator[Callable[[int, str], None]]:
        """Yield `update(done, text)`: a bar with time left on a terminal, a line every few seconds in a log."""
        if self.quiet:
            yield lambda done, text: None
        elif sys.stderr.isatty():
            with self._bar(total, done) as update:
                yield update
        else:
            yield _line_updates(self._err, total)

    @contextmanager
    def _bar(self, total: int, done: int) -> Generator[Callable[[int, str], None]]:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"), TimeRemainingColumn())
        with Progress(*columns, console=self._rich()) as bar:
            task = bar.add_task("", total=total, completed=done)
            self._live = bar.console
            try:
                yield lambda done, text: bar.update(task, completed=done, description=text)
            finally:
                self._live = None

    def _rich(self) -> Any:
        from rich.console import Console as Rich

        return self._live or Rich(stderr=True, highlight=False, soft_wrap=True)

    def _err(self, text: str, style: str | None = None) -> None:
        if self._live or sys.stderr.isatty():
            self._rich().print(text, style=style, markup=False)
        else:
            print(text, file=sys.stderr, flush=True)


def printable(text: str) -> str:
    """`text` without control characters: names and samples come from repositories and models, not from us."""
    return "".join(c if c in "\n\t" or c.isprintable() else f"\\x{ord(c):02x}" for c in text)


def _line_updates(write: Callable[[str], None], total: int) -> Callable[[int, str], None]:
    first: tuple[float, int] | None = None
    last = 0.0

    def update(done: int, text: str) -> None:
        nonlocal first, last
        now = time.monotonic()
        first = first or (now, done)
        if now - last < LOG_EVERY_S and done < total:
            return
        last = now
        begun, at = first
        left = f"  {clock((now - begun) / (done - at) * (total - done))} left" if done > at else ""
        write(f"{done}/{total}  {text}{left}")

    return update


def clock(seconds: float) -> str:
    """Seconds as 1:05 or 2:10:05."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def in_parts(seconds: dict[str, float]) -> str:
    """Seconds by what they went to, without what took none: `60 s steps, 6 s samples`."""
    return ", ".join(f"{spent:.0f} s {name}" for name, spent in seconds.items() if spent >= 0.5)


def silence_libraries() -> None:
    """Keep the libraries' own bars, banners and notes off the terminal; call it before they are imported."""
    os.environ.update(
        {
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "TQDM_DISABLE": "1",
            "HF_HUB_VERBOSITY": "error",
        }
    )
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=UserWarning)
    for name in ("bitsandbytes", "datasets", "trl", "accelerate", "huggingface_hub", "torch", "wandb"):
        logging.getLogger(name).setLevel(logging.ERROR)


console = Console()
