"""Shows that a command still works: a spinner with the seconds on a terminal, else a line now and then."""

import shutil
import threading
import time
from typing import TextIO

FRAMES = "⠋⠙⠹⠸⠼⠴⠦⠧⠇⠏"
ASCII_FRAMES = "|/-\\"
SPINNER_AFTER_S, FRAME_S = 1.0, 0.1
FIRST_LINE_S, MOST_S = 5.0, 60.0  # seconds of silence before a line; each further line waits twice as long
POLL_S = 0.5


class Heartbeat:
    """Runs from its creation to `stop`, in a thread of its own.

    On a terminal a spinner shows `text` below the last line. Elsewhere a line with the seconds is written.
    """

    def __init__(self, text: str, stream: TextIO) -> None:
        self._text, self._stream = text, stream
        self._start, self._wait, self._ended = time.monotonic(), FIRST_LINE_S, threading.Event()
        run = self._spin if stream.isatty() else self._write_lines
        self._thread = threading.Thread(target=run, daemon=True, name="heartbeat")
        self._thread.start()

    def restart(self, text: str) -> None:
        """Show another text, with its seconds counted from now."""
        self._text, self._start, self._wait = text, time.monotonic(), FIRST_LINE_S

    def stop(self) -> None:
        """End, and clear the spinner; nothing is shown after this."""
        self._ended.set()
        if self._thread is not threading.current_thread():
            self._thread.join(timeout=FRAME_S * 5)  # a stream that blocks must not hold the command up

    def _spin(self) -> None:
        frames = FRAMES if "utf" in (self._stream.encoding or "").lower() else ASCII_FRAMES
        number, shown = 0, False
        wait = SPINNER_AFTER_S
        while not self._ended.wait(wait):
            wait, number, shown = FRAME_S, number + 1, True
            seconds = f"  {time.monotonic() - self._start:.0f} s"
            width = max(0, shutil.get_terminal_size().columns - len(seconds) - 3)
            self._put(f"\r{frames[number % len(frames)]} {self._text[:width]}{seconds}\x1b[K")
        if shown:
            self._put("\r\x1b[K")

    def _write_lines(self) -> None:
        while not self._ended.wait(POLL_S):
            start, wait = self._start, self._wait
            seconds = time.monotonic() - start
            if seconds >= wait:
                self._put(f"  {self._text} ({seconds:.0f} s)\n")
                if self._start == start:  # restart may have been called meanwhile
                    self._wait = seconds + min(MOST_S, seconds)

    def _put(self, text: str) -> None:
        try:
            self._stream.write(text)
            self._stream.flush()
        except (OSError, ValueError):  # nobody reads it any more
            self._ended.set()
