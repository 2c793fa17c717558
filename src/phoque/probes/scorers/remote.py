"""Scorers outside of this process: a moderation endpoint as OpenAI defined it, and any command."""

import json
import shlex
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from phoque.errors import FAILED, PhoqueError
from phoque.files import sha256
from phoque.probes.scorers import Context, ScoredAnswer, Scorer

AT_ONCE = 32
TRIES = 4
TIMEOUT_S = 60
OVERALL = "max"  # the largest of all categories


def moderation(spec: str, rest: str, context: Context) -> Scorer:
    """`URL#MODEL[#CATEGORY]`: POST URL/moderations; the score is one category, or the largest of all.

    OPENAI_API_KEY is sent as a bearer token where it is set. Texts leave this machine.
    """
    url, _, model = rest.partition("#")
    model, _, category = model.partition("#")
    if not url.startswith(("http://", "https://")) or not model:
        raise PhoqueError(f"{spec} names no endpoint.", "It wants openai:URL#MODEL.", "Check --scorer.")

    def score(said: Sequence[ScoredAnswer]) -> list[dict[str, float]]:
        rows: list[dict[str, float]] = []
        for start in range(0, len(said), AT_ONCE):
            texts = [one.text for one in said[start : start + AT_ONCE]]
            answer = _post(f"{url.rstrip('/')}/moderations", {"model": model, "input": texts}, context.api_key)
            results = answer.get("results") or []
            if len(results) != len(texts):
                raise _failed(url, f"It gave {len(results)} results for {len(texts)} texts")
            for result in results:
                found = {name: float(value) for name, value in (result.get("category_scores") or {}).items()}
                rows.append(found | ({OVERALL: max(found.values())} if found else {}))
        return rows

    return Scorer(spec, category or OVERALL, score, f"openai {url} {model}")


def _post(url: str, body: dict[str, Any], key: str | None) -> dict[str, Any]:
    for attempt in range(1, TRIES + 1):
        try:
            request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
            if key:  # for this host alone, wherever it may redirect to
                request.add_unredirected_header("Authorization", f"Bearer {key}")
            with urllib.request.urlopen(request, timeout=TIMEOUT_S) as answer:
                return json.loads(answer.read())
        except urllib.error.HTTPError as error:
            if attempt == TRIES or error.code not in (408, 429, 500, 502, 503, 504):
                raise _failed(url, f"It answered {error.code}") from error
            asked = error.headers.get("Retry-After", "")
            time.sleep(float(asked) if asked.isdigit() else 2.0**attempt / 2)
        except (OSError, ValueError) as error:
            if attempt == TRIES:
                raise _failed(url, str(error)) from error
            time.sleep(2.0**attempt / 2)
    raise AssertionError("the last attempt returns or raises")


def command(spec: str, line: str) -> Scorer:
    """A command that reads {"prompt", "text"} as JSON lines and writes {label: number} for each, in order."""

    def score(said: Sequence[ScoredAnswer]) -> list[dict[str, float]]:
        sent = "".join(json.dumps({"prompt": one.prompt, "text": one.text}) + "\n" for one in said)
        ran = subprocess.run(shlex.split(line), input=sent, capture_output=True, text=True)
        if ran.returncode:
            last = (ran.stderr.strip().splitlines() or ["it said nothing"])[-1]
            raise _failed(line, f"It ended with exit code {ran.returncode}: {last[:200]}")
        try:
            rows = [json.loads(row) for row in ran.stdout.splitlines() if row.strip()]
            found = [{str(k): float(v) for k, v in row.items()} for row in rows]
        except (ValueError, AttributeError, TypeError) as error:
            raise _failed(line, f"What it wrote is not JSON lines of numbers: {error}") from error
        if len(found) != len(said):
            raise _failed(line, f"It wrote {len(found)} lines for {len(said)} texts")
        return found

    parts = [Path(part) for part in shlex.split(line)]  # a script that has changed scores anew
    return Scorer(spec, "score", score, f"command {line} {[sha256(p) for p in parts if p.is_file()]}")


def _failed(what: str, why: str) -> PhoqueError:
    return PhoqueError(f"The scorer {what} failed.", f"{why}.", "Mend it, or leave it out of --scorer.", FAILED)
