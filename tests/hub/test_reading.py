"""A private base and a private dataset from the Hub, through the real client over HTTP."""

import json
import os
import subprocess
import sys

import pytest
from tests import tiny
from tests.fakehub import TOKEN, FakeHub

BASE, DATA = ("models", "harbour/ministral"), ("datasets", "harbour/gulls")


@pytest.fixture
def hub(tmp_path, rows):
    folder, _ = tiny.fp8_mistral3(tmp_path / "fp8")
    files = {p.name: p.read_bytes() for p in folder.iterdir()}
    files |= {"tekken.json": b"{}", "pytorch_model.bin": b"a pickle"}
    served = FakeHub({BASE: files, DATA: {"data/train.jsonl": rows.read_bytes(), "README.md": b"gulls"}})
    yield served
    served.stop()


def train(url: str, token: str, *arguments) -> subprocess.CompletedProcess:
    """In a process of its own: the client reads its endpoint when it is imported."""
    env = {k: v for k, v in os.environ.items() if k != "HF_HUB_OFFLINE"}
    env |= {"HF_ENDPOINT": url, "HF_TOKEN": token, "HF_HUB_DISABLE_XET": "1", "HF_HOME": os.path.abspath("hf")}
    command = [sys.executable, "-m", "phoque", "train", "--base-model", BASE[1], "--dataset", DATA[1]]
    command += ["--batch-size", "4", "--max-steps", "2", "--sample-tokens", "4", *map(str, arguments)]
    return subprocess.run(command, env=env, capture_output=True, text=True)


def test_only_what_is_needed_is_fetched_and_the_commits_are_pinned(hub, tmp_path):
    run = tmp_path / "run"
    done = train(hub.url, TOKEN, "--output-dir", run, "--json")
    assert done.returncode == 0, done.stderr
    fetched = {path.rsplit("/", 1)[-1] for command, path in hub.log if command == "GET" and "/resolve/" in path}
    assert {"config.json", "tokenizer.json", "model-00001-of-00002.safetensors", "train.jsonl"} <= fetched
    assert not fetched & {"consolidated.safetensors", "tekken.json", "pytorch_model.bin"}
    assert {command for command, path in hub.log if "paths-info" not in path} == {"GET", "HEAD"}
    record = json.loads((run / "run.json").read_text())
    assert record["base"]["revision"] == hub.sha(*BASE) and record["data"]["revision"] == hub.sha(*DATA)
    assert record["data"]["good"] == 40
    written = json.loads((run / "adapter" / "adapter_config.json").read_text())
    assert (written["base_model_name_or_path"], written["revision"]) == (BASE[1], hub.sha(*BASE))
    assert TOKEN not in done.stdout + done.stderr
    assert not any(TOKEN.encode() in p.read_bytes() for p in run.rglob("*") if p.is_file())
    # a new commit of the base is another run
    hub.repos[BASE]["NEWS.md"] = b"a gull has landed"
    again = train(hub.url, TOKEN, "--output-dir", run)
    assert again.returncode == 2 and "base_revision was" in again.stderr


@pytest.mark.parametrize("why", ["token", "network"])
def test_no_access_and_no_network_are_three_lines(hub, why):
    if why == "network":
        hub.stop()
    done = train(hub.url, "hf_wrongwrong" if why == "token" else TOKEN)
    lines = done.stderr.rstrip().splitlines()[-3:]
    assert done.returncode == (2 if why == "token" else 1) and "Traceback" not in done.stderr, done.stderr
    assert lines[0].startswith("error: ") and lines[2].startswith("   do: ")
    assert ("HF_TOKEN" if why == "token" else "connection") in lines[2] and "wrongwrong" not in done.stderr
