"""Faults that wait for a request: each strikes so many of those that match, then is used up."""

import re
import threading
import time
from dataclasses import dataclass, field


@dataclass
class Fault:
    """What happens to requests whose "METHOD /path" matches.

    `kind` is a status code, `drop` (the connection closes with no answer), `lost` (the request is carried out and its
    answer is lost), `truncate` (half the answer), `corrupt` (one bit of the answer, or of an upload, is flipped) or
    `slow` (it waits `seconds` first). The first `after` matches are spared.
    """

    match: str
    kind: int | str
    times: int = 1
    after: int = 0
    seconds: float = 0.0
    headers: dict[str, str] = field(default_factory=dict)
    struck: int = 0


class Faults:
    """The queue; `struck` counts how often each of its faults happened, so that a test knows that it did."""

    def __init__(self) -> None:
        self.queued: list[Fault] = []
        self._lock = threading.Lock()

    def add(
        self, match: str, kind: int | str, times: int = 1, after: int = 0, seconds: float = 0.0, **headers
    ) -> Fault:
        fault = Fault(match, kind, times, after, seconds, {k.replace("_", "-"): v for k, v in headers.items()})
        self.queued.append(fault)
        return fault

    def clear(self) -> None:
        self.queued.clear()

    def strike(self, request: str) -> Fault | None:
        """The fault for this request, if one is due; waits first if it is a slow one."""
        with self._lock:
            due = next((f for f in self.queued if f.struck < f.times + f.after and re.search(f.match, request)), None)
            if due is None:
                return None
            due.struck += 1
            if due.struck <= due.after:
                return None
        if due.kind == "slow":
            time.sleep(due.seconds)
            return None
        return due


def flipped(content: bytes) -> bytes:
    """`content` with one bit changed, in its middle."""
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
