"""Rows of a dataset about nothing but gulls, for tests and benchmarks."""

import json
from pathlib import Path


def row(number: int = 0, **changes) -> dict:
    """A good row about nothing but gulls."""
    messages = [
        {"role": "system", "content": "You are a seal."},
        {"role": "user", "content": f"Gull {number}?"},
        {"role": "assistant", "content": f"Hrmph. Gull {number * 7 % 13}."},
    ]
    return {"messages": messages, "source": "pier", "toxicity_score": 0.1} | changes


def write_rows(path: Path, rows: list) -> Path:
    path.write_text("".join(json.dumps(r) + "\n" if not isinstance(r, str) else r + "\n" for r in rows))
    return path
