"""All terminal output: the result on stdout (as text, --json or --quiet), everything else on stderr."""

import errno
import io
import json
import logging
import os
import re
import sys
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from typing import Any

from phoque.errors import PhoqueError
from phoque.heartbeat import Heartbeat

HUB_TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{20,}")
MIN_SECRET = 6  # characters; a shorter text would be replaced inside words
MAX_LISTED = 6  # names or counts that are listed; of the others, only the number
NAME_CHARACTERS = 40  # of a name from outside, in a list
SPEED_PERIOD_S = 1800.0  # steps may take a minute; rich forgets the speed after 30 seconds
LOG_EVERY_S = 5.0  # seconds between progress lines when stderr is not a terminal


class Console:
    """The output of a command. Services report to it and do not depend on how their messages are displayed."""

    def __init__(self) -> None:
        self.json = self.quiet = self.verbose = self._is_muted = False
        self._out: Any = sys.stdout
        self._live: Any = None
        self._heartbeat: Heartbeat | None = None
        self._lock = threading.RLock()  # a signal handler may print while its thread holds it
        self._secrets: list[str] = []

    def configure(self, json: bool = False, quiet: bool = False, verbose: bool = False) -> None:
        """Choose the output format, once, at the start of a command, and reserve stdout for the result."""
        self.json, self.quiet, self.verbose = json, quiet, verbose
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="replace")  # a terminal may know ASCII only
        self._out, sys.stdout = sys.stdout, sys.stderr  # what libraries print goes to stderr

    def mute(self) -> None:
        """Print nothing but errors from now on: another process of the same run speaks."""
        self.quiet = self._is_muted = True

    def hide(self, secrets: Sequence[str]) -> None:
        """Replace these texts by *** in everything that is printed, whatever printed them."""
        self._secrets = [secret for secret in secrets if len(secret) >= MIN_SECRET]

    def _hide_secrets(self, text: str) -> str:
        for secret in self._secrets:
            text = text.replace(secret, "***")
        return HUB_TOKEN.sub("hf_***", text)  # also one that was given where none belongs

    def _clean(self, text: str) -> str:
        return escape_control_characters(self._hide_secrets(text))

    def say(self, text: str) -> None:
        """Print a status line to stderr, unless --quiet is set."""
        if not self.quiet:
            self._print_stderr(self._clean(text))

    def stage(self, text: str) -> None:
        """Print a status line about work that begins, and show that it goes on until anything else is printed."""
        self.say(text)
        if not self.quiet and not self._live:
            self._beat(text)

    def end_stage(self) -> None:
        """Show no longer that the last stage goes on."""
        with self._lock:
            heartbeat, self._heartbeat = self._heartbeat, None
        if heartbeat:
            heartbeat.stop()

    def _beat(self, text: str) -> None:
        cleaned = self._clean(text)
        with self._lock:  # the thread that pushes checkpoints reports too
            if self._heartbeat:
                self._heartbeat.restart(cleaned)
            else:
                self._heartbeat = Heartbeat(cleaned, sys.stderr)

    def warn(self, text: str) -> None:
        """Print a warning to stderr, even with --quiet."""
        if self._is_muted:
            return
        self._print_stderr(f"warning: {self._clean(text)}", style="yellow")

    def error(self, error: PhoqueError) -> None:
        """Print an error to stderr in three lines: what happened, why, and what to do."""
        for label, text in (("error", error.what), ("  why", error.why), ("   do", error.fix)):
            self._print_stderr(f"{label}: {self._clean(text).strip()}", style="bold red" if label == "error" else None)

    def result(self, data: dict[str, Any], human: Callable[[], Any], quiet: str) -> None:
        """Print a command's result to stdout: `data` with --json, `quiet` with --quiet, else what `human()` returns."""
        self.end_stage()
        if self._is_muted:
            return
        if self.json:
            is_utf8 = "utf" in (self._out.encoding or "").lower()
            text = self._hide_secrets(json.dumps(data, ensure_ascii=not is_utf8, default=str))
        elif self.quiet:
            text = self._hide_secrets(quiet)
        elif isinstance(shown := human(), str):  # plain text: rich must not wrap it or interpret markup in it
            text = self._clean(shown)
        else:
            rich = _make_rich(file=self._out, soft_wrap=not self._out.isatty())  # a file is not 80 columns wide
            with rich.capture() as captured:
                rich.print(shown)
            text = self._hide_secrets(captured.get()).removesuffix("\n")
        with _without_reader(self._out):
            print(text, file=self._out, flush=True)

    def write(self, text: str) -> None:
        """Write a piece of a result to stdout as it is made, without a line end."""
        self.end_stage()
        with _without_reader(self._out):
            print(self._clean(text), end="", file=self._out, flush=True)

    def ask(self, prompt: str) -> str | None:
        """Read a line that the user types, with editing keys on a terminal; None at the end of the input."""
        self.end_stage()
        if not sys.stdin.isatty():
            line = sys.stdin.readline()
            return line.rstrip("\n") if line else None
        import readline  # noqa: F401 - importing it gives input() its editing keys

        redirected, sys.stdout = sys.stdout, self._out  # input() has its editing keys on the real terminal only
        try:
            return input(prompt)
        except EOFError:
            return None
        finally:
            sys.stdout = redirected

    def is_on_terminal(self) -> bool:
        """Whether results are shown on a terminal."""
        return self._out.isatty()

    def can_ask(self) -> bool:
        """Whether stdin and stderr are terminals, so that a question can be answered."""
        return sys.stdin.isatty() and sys.stderr.isatty() and not self.quiet

    def confirm(self, question: str) -> bool:
        """Ask a yes/no question on the terminal and return the answer; the default is no."""
        self.end_stage()
        print(f"{self._clean(question)} [y/N] ", end="", file=sys.stderr, flush=True)
        return sys.stdin.readline().strip().lower() in ("y", "yes")

    @contextmanager
    def progress(self, total: int, done: int = 0) -> Generator[Callable[[int, str], None]]:
        """Yield `update(done, text)`, which shows a bar on a terminal, else a line every LOG_EVERY_S seconds."""
        self.end_stage()
        if self.quiet:
            yield lambda done, text: None
        elif sys.stderr.isatty():
            with self._progress_bar(total, done) as update:
                yield update
        else:
            lines = _ProgressLines(lambda text: self._print_stderr(self._clean(text)), self._beat, total)
            try:
                yield lines.update
            finally:
                lines.flush()
                self.end_stage()

    @contextmanager
    def _progress_bar(self, total: int, done: int) -> Generator[Callable[[int, str], None]]:
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            SpinnerColumn,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )

        columns = (
            SpinnerColumn(),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.description}"),
            TimeRemainingColumn(),
        )
        bar = Progress(*columns, console=self._rich_console(), speed_estimate_period=SPEED_PERIOD_S)
        task = bar.add_task("", total=total, completed=done)

        def update(done: int, text: str) -> None:
            with _without_reader(sys.stderr):
                bar.update(task, completed=done, description=self._clean(text))

        with _without_reader(sys.stderr):  # around the output alone: an error of the work must not be taken for its own
            bar.start()
        self._live = bar.console
        try:
            yield update
        finally:
            self._live = None
            with _without_reader(sys.stderr):
                bar.stop()

    def _rich_console(self) -> Any:
        return self._live or _make_rich(stderr=True, soft_wrap=True)

    def _print_stderr(self, text: str, style: str | None = None) -> None:
        self.end_stage()
        with _without_reader(sys.stderr):
            if self._live or sys.stderr.isatty():
                self._rich_console().print(text, style=style, markup=False)
            else:
                print(text, file=sys.stderr, flush=True)


def _make_rich(**options: Any) -> Any:
    """A rich console; of 80 columns where the environment says 0."""
    from rich.console import Console as Rich

    rich = Rich(highlight=False, **options)
    if rich.width < 1:
        rich.width = 80
    return rich


@contextmanager
def _without_reader(stream: Any) -> Generator[None]:
    """Go on when the reader of a stream has left, as in `phoque ... | head -1`, or its terminal is closed.

    All further output of the stream then goes nowhere, so that neither a print nor the exit of Python fails.
    """
    try:
        yield
    except OSError as error:
        if not isinstance(error, BrokenPipeError) and error.errno != errno.EIO:
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def describe_counts(counts: Counter[str]) -> str:
    """The largest few counts and how many others there are, with long names cut."""
    largest = [f"{shorten(name)} {count}" for name, count in counts.most_common(MAX_LISTED)]
    others = len(counts) - len(largest)
    return ", ".join(largest) + (f" and {others} others" if others > 0 else "")


def shorten_list(names: Sequence[str]) -> str:
    """The first few names and how many others there are, with long names cut."""
    others = len(names) - MAX_LISTED
    return ", ".join(map(shorten, names[:MAX_LISTED])) + (f" and {others} others" if others > 0 else "")


def shorten(name: str) -> str:
    """A name from the data, cut after NAME_CHARACTERS characters."""
    return name if len(name) <= NAME_CHARACTERS else f"{name[: NAME_CHARACTERS - 1]}…"


def escape_control_characters(text: str) -> str:
    """Return `text` with control characters escaped; names and samples come from untrusted repositories and models."""
    return "".join(c if c in "\n\t" or c.isprintable() else f"\\x{ord(c):02x}" for c in text)


class _ProgressLines:
    """Progress as lines: one every LOG_EVERY_S seconds, and the last one at the end.

    `beat` is told what is going on, which may take longer than the next update.
    """

    def __init__(self, write: Callable[[str], None], beat: Callable[[str], None], total: int) -> None:
        self._write, self._beat, self._total = write, beat, total
        self._first: tuple[float, int] | None = None
        self._last_write, self._pending = 0.0, ""

    def update(self, done: int, text: str) -> None:
        """Note progress; write it if the last line is old enough."""
        now = time.monotonic()
        start, start_done = self._first = self._first or (now, done)
        self._pending = f"{done}/{self._total}  {text}"
        if done > start_done:
            self._pending += f"  {format_duration((now - start) / (done - start_done) * (self._total - done))} left"
        if now - self._last_write >= LOG_EVERY_S:
            self._last_write = now
            self.flush()
        self._beat(f"{done}/{self._total}  {text}")

    def flush(self) -> None:
        """Write the last update, if it has not been."""
        if self._pending:
            self._write(self._pending)
            self._pending = ""


def format_duration(seconds: float) -> str:
    """Format seconds as m:ss or h:mm:ss, such as 1:05 or 2:10:05."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def format_breakdown(seconds: dict[str, float]) -> str:
    """Format seconds per activity, such as `60 s steps, 6 s samples`; activities under 0.5 s are left out."""
    return ", ".join(f"{spent:.0f} s {name}" for name, spent in seconds.items() if spent >= 0.5)


def silence_libraries() -> None:
    """Turn off the progress bars, banners and notes of libraries. Call it before they are imported.

    It also ignores all FutureWarning and UserWarning in the whole process.
    """
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
