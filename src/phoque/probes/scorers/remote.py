"""Scorers outside of this process: a moderation endpoint with OpenAI's API, and any command."""

import json
import shlex
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from phoque.errors import PhoqueError, RunError, UsageError, first_line
from phoque.files import sha256, split_lines
from phoque.probes.scorers import Context, ScoredAnswer, Scorer
from phoque.settings.environment import environment_without_secrets

if TYPE_CHECKING:
    from tenacity import RetryCallState

BATCH_SIZE = 32
MAX_ATTEMPTS = 4
TIMEOUT_S = 60
TRANSIENT_STATUS_CODES = (408, 429, 500, 502, 503, 504)
MAX_LABEL = "max"  # label of the largest score of all categories


def moderation(spec: str, rest: str, context: Context) -> Scorer:
    """A moderation endpoint, `URL#MODEL[#CATEGORY]`: the score of one category, or the largest of all.

    The texts leave this machine: they are posted to URL/moderations, with OPENAI_API_KEY as bearer token if it is set.
    """
    url, _, model = rest.partition("#")
    model, _, category = model.partition("#")
    if not url.startswith(("http://", "https://")) or not model:
        raise UsageError(
            what=f"{spec} names no endpoint.",
            why="The form is openai:URL#MODEL or openai:URL#MODEL#CATEGORY.",
            fix="Check --scorer.",
        )

    def score(answers: Sequence[ScoredAnswer]) -> list[dict[str, float]]:
        rows: list[dict[str, float]] = []
        for start in range(0, len(answers), BATCH_SIZE):
            texts = [answer.text for answer in answers[start : start + BATCH_SIZE]]
            response = _post(f"{url.rstrip('/')}/moderations", {"model": model, "input": texts}, context.api_key)
            results = response.get("results") or []
            if len(results) != len(texts):
                raise _scorer_error(url, f"It returned {len(results)} results for {len(texts)} texts")
            for result in results:
                scores = {name: float(value) for name, value in (result.get("category_scores") or {}).items()}
                rows.append(scores | ({MAX_LABEL: max(scores.values())} if scores else {}))
        return rows

    return Scorer(spec, category or MAX_LABEL, score, f"openai {url} {model}")


def _post(url: str, body: dict[str, Any], key: str | None) -> dict[str, Any]:
    """POST JSON and return the answer; tries again after transient failures, at most MAX_ATTEMPTS times.

    httpx drops the Authorization header where the endpoint redirects to another host.
    """
    import httpx
    from tenacity import Retrying, retry_if_exception, stop_after_attempt

    headers = {"Authorization": f"Bearer {key}"} if key else {}

    def post() -> dict[str, Any]:
        response = httpx.post(url, json=body, headers=headers, timeout=TIMEOUT_S, follow_redirects=True)
        response.raise_for_status()
        return response.json()

    def is_transient(error: BaseException) -> bool:
        if isinstance(error, httpx.HTTPStatusError):
            return error.response.status_code in TRANSIENT_STATUS_CODES
        return isinstance(error, (httpx.HTTPError, ValueError))

    def get_wait(state: "RetryCallState") -> float:
        error = state.outcome.exception() if state.outcome else None
        response = error.response if isinstance(error, httpx.HTTPStatusError) else None
        retry_after = response.headers.get("Retry-After", "") if response is not None else ""
        return float(retry_after) if retry_after.isdigit() else 2.0**state.attempt_number / 2

    retrying = Retrying(
        stop=stop_after_attempt(MAX_ATTEMPTS), wait=get_wait, retry=retry_if_exception(is_transient), reraise=True
    )
    try:
        return retrying(post)
    except httpx.HTTPStatusError as error:
        raise _scorer_error(url, f"It returned HTTP status {error.response.status_code}") from error
    except (httpx.HTTPError, ValueError) as error:
        raise _scorer_error(url, first_line(error)) from error


def command(spec: str, line: str) -> Scorer:
    """A command that reads {"prompt", "text"} as JSON lines and writes a line {label: number} for each, in order."""

    def score(answers: Sequence[ScoredAnswer]) -> list[dict[str, float]]:
        input_lines = "".join(json.dumps({"prompt": answer.prompt, "text": answer.text}) + "\n" for answer in answers)
        process = subprocess.run(
            shlex.split(line), input=input_lines, capture_output=True, text=True, env=environment_without_secrets()
        )
        if process.returncode:
            last_line = (process.stderr.strip().splitlines() or ["nothing on stderr"])[-1]
            raise _scorer_error(line, f"It exited with code {process.returncode}: {last_line[:200]}")
        try:
            records = [json.loads(record) for record in split_lines(process.stdout)]
            rows = [{str(k): float(v) for k, v in record.items()} for record in records]
        except (ValueError, AttributeError, TypeError) as error:
            raise _scorer_error(line, f"Its output is not JSON lines of numbers: {error}") from error
        if len(rows) != len(answers):
            raise _scorer_error(line, f"It wrote {len(rows)} lines for {len(answers)} texts")
        return rows

    paths = [Path(part) for part in shlex.split(line)]  # an edited script must not reuse cached scores
    return Scorer(spec, "score", score, f"command {line} {[sha256(p) for p in paths if p.is_file()]}")


def _scorer_error(scorer: str, why: str) -> PhoqueError:
    return RunError(what=f"The scorer {scorer} failed.", why=f"{why}.", fix="Fix it, or leave it out of --scorer.")
