"""The Hub client and its retry rule: an action that fails transiently runs again from its start, after a wait."""

import time
from collections.abc import Callable
from typing import Any, TypeVar

from phoque.errors import IntegrityError, first_line

T = TypeVar("T")

TRANSIENT_STATUS_CODES = (408, 409, 412, 425, 429, 500, 502, 503, 504)  # HTTP status codes that are retried
LOOKUP_PATIENCE_S = 20.0  # retry time for lookups before a run has done any work
MAX_WAIT_S = 60.0
MAX_INTEGRITY_FAILURES = 2


class Hub:
    """huggingface_hub's API with one rule for retries.

    The client itself retries only some requests (a commit, a HEAD request and repo_info fail at the first 503), so all
    calls go through `retry`. `patience` is the number of seconds for which a failing request is retried.
    """

    def __init__(self, token: str | None, say: Callable[[str], None], patience: float) -> None:
        from huggingface_hub import HfApi

        self.api: Any = HfApi(token=token)
        self._say, self._patience = say, patience

    def retry(self, what: str, action: Callable[[], T], wait: Callable[[float], None] = time.sleep) -> T:
        """Call `action`, again after transient failures, and return its result; it must rebuild all that it sends.

        Raises the last error when the patience has run out or the error is permanent; `wait` may raise Superseded.
        """
        start_time, pause, integrity_failures = time.monotonic(), 1.0, 0
        while True:
            try:
                return action()
            except Exception as error:
                integrity_failures += isinstance(error, IntegrityError)
                remaining = self._patience - (time.monotonic() - start_time)
                server_wait = retry_after(error)
                if (
                    not is_transient(error)
                    or integrity_failures >= MAX_INTEGRITY_FAILURES
                    or max(server_wait, pause) > remaining
                ):
                    raise
                self._say(f"{what}: {describe_error(error)}; retrying in {max(server_wait, pause):.0f} s")
                wait(max(server_wait, pause))
                pause = min(2 * pause, MAX_WAIT_S)


def is_transient(error: BaseException) -> bool:
    """Whether a retry may succeed; the first cause in the chain that is known decides."""
    for cause in _cause_chain(error):
        if (status := _status_code(cause)) is not None:
            return status in TRANSIENT_STATUS_CODES
        if isinstance(cause, (IntegrityError, ConnectionError, TimeoutError)) or "Consistency check failed" in str(
            cause
        ):
            return True
        if any(kind.__module__.startswith("httpx2") for kind in type(cause).__mro__):
            return True
    return False


def retry_after(error: BaseException) -> float:
    """Return the seconds of the server's Retry-After header, or 0."""
    for cause in _cause_chain(error):
        if (response := getattr(cause, "response", None)) is not None:
            header = response.headers.get("Retry-After", "0")
            return float(header) if header.isdigit() else 0.0
    return 0.0


def describe_error(error: BaseException) -> str:
    """Describe an error in at most 160 characters, for the log."""
    for cause in _cause_chain(error):
        if (status := _status_code(cause)) is not None:
            return f"the Hub answered {status}"
    return first_line(error)[:160]


def _status_code(error: BaseException) -> int | None:
    return getattr(getattr(error, "response", None), "status_code", None)


def _cause_chain(error: BaseException | None) -> list[BaseException]:
    chain: list[BaseException] = []
    while error is not None and error not in chain:  # LFS errors come wrapped in a RuntimeError
        chain.append(error)
        error = error.__cause__ or error.__context__
    return chain
