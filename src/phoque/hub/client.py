"""The Hub's client, and when to try again: what can yet succeed is made anew, as a whole, with growing waits."""

import time
from collections.abc import Callable
from typing import Any, TypeVar

from phoque.errors import IntegrityError, first_line

T = TypeVar("T")

PASSING = (408, 409, 412, 425, 429, 500, 502, 503, 504)  # answers that another try may change
PATIENCE_S = 20.0  # for what is asked before anything was spent
LONGEST_WAIT_S = 60.0
DAMAGED_TRIES = 2


class Hub:
    """huggingface_hub's API with one rule for retries.

    The client itself retries some requests and not others (a commit, a HEAD, repo_info die at the first 503), so every
    call here goes through `tried`. `patience` is how many seconds a failing request is tried for.
    """

    def __init__(self, token: str | None, say: Callable[[str], None], patience: float) -> None:
        from huggingface_hub import HfApi

        self.api: Any = HfApi(token=token)
        self._say, self._patience = say, patience

    def retry(self, what: str, action: Callable[[], T], wait: Callable[[float], None] = time.sleep) -> T:
        """What `action` returns; it is called again after passing failures, so it must make everything it sends anew.

        Raises the last error when patience is over or another try cannot help; `wait` may raise GivenUp.
        """
        begun, pause, damaged = time.monotonic(), 1.0, 0
        while True:
            try:
                return action()
            except Exception as error:
                damaged += isinstance(error, IntegrityError)
                left = self._patience - (time.monotonic() - begun)
                asked = retry_after(error)
                if not is_transient(error) or damaged >= DAMAGED_TRIES or max(asked, pause) > left:
                    raise
                self._say(f"{what}: {reason(error)}; again in {max(asked, pause):.0f} s")
                wait(max(asked, pause))
                pause = min(2 * pause, LONGEST_WAIT_S)


def is_transient(error: BaseException) -> bool:
    """Whether another try may succeed; the first cause that says something decides."""
    for cause in _causes(error):
        if (status := _status(cause)) is not None:
            return status in PASSING
        if isinstance(cause, (IntegrityError, ConnectionError, TimeoutError)) or "Consistency check failed" in str(
            cause
        ):
            return True
        if any(kind.__module__.startswith("httpx2") for kind in type(cause).__mro__):
            return True
    return False


def retry_after(error: BaseException) -> float:
    """Seconds that the server asks to wait, 0 if it does not."""
    for cause in _causes(error):
        if (response := getattr(cause, "response", None)) is not None:
            asked = response.headers.get("Retry-After", "0")
            return float(asked) if asked.isdigit() else 0.0
    return 0.0


def reason(error: BaseException) -> str:
    """An error in a few words, for the log."""
    for cause in _causes(error):
        if (status := _status(cause)) is not None:
            return f"the Hub answered {status}"
    return first_line(error)[:160]


def _status(error: BaseException) -> int | None:
    return getattr(getattr(error, "response", None), "status_code", None)


def _causes(error: BaseException | None) -> list[BaseException]:
    found: list[BaseException] = []
    while error is not None and error not in found:  # LFS errors arrive wrapped in a RuntimeError
        found.append(error)
        error = error.__cause__ or error.__context__
    return found
