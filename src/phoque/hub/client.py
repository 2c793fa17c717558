"""The Hub client and its retry rule: an action that fails transiently runs again from its start, after a wait."""

import re
import time
from collections.abc import Callable
from typing import Any, TypeVar

from phoque.errors import IntegrityError, PhoqueError, Resumable, first_line
from phoque.settings.environment import in_job

T = TypeVar("T")

TRANSIENT_STATUS_CODES = (408, 409, 412, 425, 429, 500, 502, 503, 504)  # HTTP status codes that are retried
LOOKUP_PATIENCE_S = 20.0  # retry time for lookups before a run has done any work
MAX_WAIT_S = 60.0
MAX_INTEGRITY_FAILURES = 2


class Hub:
    """huggingface_hub's API with one rule for retries.

    The client itself retries only some requests (a commit, a HEAD request and repo_info fail at the first 503), so all
    calls go through `retry`. `patience` is the number of seconds for which a failing request is retried; for a Hub that
    has not answered yet it is at most LOOKUP_PATIENCE_S, outside of a Job.
    """

    def __init__(
        self, token: str | None, say: Callable[[str], None], patience: float, *, has_answered: bool = False
    ) -> None:
        from huggingface_hub import HfApi

        self.api: Any = HfApi(token=token)
        self.token = token
        self._say, self._patience = say, patience
        self._has_answered = has_answered

    def retry(self, what: str, action: Callable[[], T], wait: Callable[[float], None] = time.sleep) -> T:
        """Call `action`, again after transient failures, and return its result; it must rebuild all that it sends.

        Raises the last error if it is permanent, Resumable (75) when the patience has run out; `wait` may raise
        Superseded. Outside of a Job a Hub that cannot be reached at all is retried for LOOKUP_PATIENCE_S at most.
        """
        start_time, pause, integrity_failures = time.monotonic(), 1.0, 0
        while True:
            try:
                result = action()
                self._has_answered = True
                return result
            except PhoqueError:  # a signal, or an inner request whose patience has run out
                raise
            except Exception as error:
                integrity_failures += isinstance(error, IntegrityError)
                if not is_transient(error) or integrity_failures >= MAX_INTEGRITY_FAILURES:
                    raise
                patience = self._patience
                if not (self._has_answered or in_job()) and _find_status(error) is None:
                    patience = min(patience, LOOKUP_PATIENCE_S)
                server_wait = retry_after(error)
                if max(server_wait, pause) > patience - (time.monotonic() - start_time):
                    raise _out_of_patience(what, error, time.monotonic() - start_time) from error
                self._say(f"{what}: {describe_error(error)}; retrying in {max(server_wait, pause):.0f} s")
                wait(max(server_wait, pause))
                pause = min(2 * pause, MAX_WAIT_S)


def _out_of_patience(what: str, error: Exception, seconds: float) -> Resumable:
    wait, has_answered = retry_after(error), _find_status(error) is not None
    return Resumable(
        what=f"The Hub {'refused a request' if has_answered else 'did not answer'} for {seconds:.0f} s ({what}).",
        why=f"{describe_error(error)}{f', and asks to wait {wait:.0f} s' if wait else ''}.",
        fix="Run the same command again later. --retry-timeout sets for how many seconds a request is retried."
        if has_answered
        else "Check the network, then run the same command again; or name files and models of this machine.",
    )


def is_transient(error: BaseException) -> bool:
    """Whether a retry may succeed; the first cause in the chain that is known decides."""
    for cause in _cause_chain(error):
        if (status := _status_code(cause)) is not None:
            return status in TRANSIENT_STATUS_CODES
        if type(cause).__name__ == "OfflineModeIsEnabled":  # a ConnectionError that lasts
            return False
        if isinstance(cause, (IntegrityError, ConnectionError, TimeoutError)) or "Consistency check failed" in str(
            cause
        ):
            return True
        if any(kind.__module__.startswith("httpx2") for kind in type(cause).__mro__):
            return True
    return False


def retry_after(error: BaseException) -> float:
    """Return the seconds that the server asks to wait, in Retry-After or for a spent quota in RateLimit, or 0."""
    for cause in _cause_chain(error):
        if (response := getattr(cause, "response", None)) is not None:
            header = response.headers.get("Retry-After", "")
            # the Hub's RateLimit header, such as `"api";r=0;t=55`: t is the seconds until the quota is renewed
            limit = re.search(r"\bt=(\d+)", response.headers.get("RateLimit", ""))
            if header.isdigit():
                return float(header)
            return float(limit[1]) if limit and response.status_code == 429 else 0.0
    return 0.0


def describe_error(error: BaseException) -> str:
    """Describe an error in one line, for the log."""
    if (status := _find_status(error)) is not None:
        return f"the Hub answered {status}"
    if isinstance(error, PhoqueError):
        return f"{error.what.rstrip('.')} ({error.why.rstrip('.')})"
    return first_line(error)[:160]


def _find_status(error: BaseException) -> int | None:
    """The status of the Hub's answer in the chain of causes; None if the Hub could not be reached."""
    codes = map(_status_code, _cause_chain(error))
    return next((code for code in codes if code is not None), None)


def _status_code(error: BaseException) -> int | None:
    return getattr(getattr(error, "response", None), "status_code", None)


def _cause_chain(error: BaseException | None) -> list[BaseException]:
    chain: list[BaseException] = []
    while error is not None and error not in chain:  # LFS errors come wrapped in a RuntimeError
        chain.append(error)
        error = error.__cause__ or error.__context__
    return chain
