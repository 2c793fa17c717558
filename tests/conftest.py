"""Every test runs in a home of its own: nothing of the user's caches, tokens or settings is seen or touched."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

OURS = ("PHOQUE_", "HF_", "WANDB_", "HUB_", "DATASET_", "MAX_STEPS", "BASE_MODEL", "OUTPUT_DIR", "FORCE_", "EXPORT_")


@pytest.fixture(scope="session")
def home(tmp_path_factory):
    """A home folder for the session, so that the demo's weights are dequantised once."""
    return tmp_path_factory.mktemp("home")


@pytest.fixture(autouse=True)
def isolated(home, monkeypatch, tmp_path):
    """Environment and working folder of one test."""
    for name in list(os.environ):
        if name.startswith(OURS):
            monkeypatch.delenv(name)
    places = {"HOME": home, "HF_HOME": home / "hf", "XDG_CACHE_HOME": home / "cache", "XDG_CONFIG_HOME": home / "config"}
    for name, place in (places | {"WANDB_DIR": tmp_path / "wandb"}).items():
        monkeypatch.setenv(name, str(place))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.chdir(tmp_path)


class Ran:
    """What a finished command left behind."""

    def __init__(self, done: subprocess.CompletedProcess) -> None:
        self.code, self.out, self.err = done.returncode, done.stdout, done.stderr

    @property
    def json(self):
        return json.loads(self.out)

    @property
    def error(self) -> list[str]:
        """The three lines of an error; fails if there was a traceback or none."""
        assert "Traceback" not in self.err, self.err
        lines = self.err.rstrip().splitlines()
        assert len(lines) >= 3 and lines[-3].startswith("error: "), self.err
        return lines[-3:]


def command(*arguments) -> list[str]:
    return [sys.executable, "-m", "phoque", *map(str, arguments)]


@pytest.fixture
def phoque():
    """Run phoque as a user does: a process of its own."""

    def run(*arguments, expect: int = 0, env: dict | None = None, **options) -> Ran:
        environment = os.environ | (env or {})
        ran = Ran(subprocess.run(command(*arguments), capture_output=True, text=True, env=environment, **options))
        assert ran.code == expect, f"exit {ran.code}\n{ran.out}\n{ran.err}"
        return ran

    return run


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory) -> Path:
    from tests import tiny

    return tiny.llama(tmp_path_factory.mktemp("tiny") / "llama")


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


@pytest.fixture
def rows(tmp_path) -> Path:
    """A file of forty good rows."""
    return write_rows(tmp_path / "rows.jsonl", [row(n) for n in range(40)])
