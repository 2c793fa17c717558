"""A private base and a private dataset from the Hub, through the real client over HTTP."""

import json
import os
import subprocess
import sys

import pytest
from tests import tiny
from tests.fakehub import TOKEN

BASE, DATA = ("models", "harbour/ministral"), ("datasets", "harbour/gulls")
ASKED = [
    "train",
    "--base-model",
    BASE[1],
    "--dataset",
    DATA[1],
    "--batch-size",
    "4",
    "--max-steps",
    "2",
    "--sample-tokens",
    "4",
]


@pytest.fixture
def filled_hub(hub, tmp_path, rows):
    folder, _ = tiny.fp8_mistral3(tmp_path / "fp8")
    files = {p.name: p.read_bytes() for p in folder.iterdir()}
    hub.add(*BASE, files | {"tekken.json": b"{}", "pytorch_model.bin": b"a pickle"})
    hub.add(*DATA, {"data/train.jsonl": rows.read_bytes(), "README.md": b"gulls"})
    return hub


def test_only_what_is_needed_is_fetched_and_the_commits_are_pinned(phoque, filled_hub, tmp_path):
    run, env = tmp_path / "run", {"HF_TOKEN": TOKEN}
    done = phoque(*ASKED, "--output-dir", run, "--json", env=env)
    fetched = {path.rsplit("/", 1)[-1] for _, path in filled_hub.log if "/resolve/" in path}
    assert {"config.json", "tokenizer.json", "model-00001-of-00002.safetensors", "train.jsonl"} <= fetched
    assert not fetched & {"consolidated.safetensors", "tekken.json", "pytorch_model.bin"}
    assert {command for command, path in filled_hub.log if "paths-info" not in path} == {"GET", "HEAD"}
    record = json.loads((run / "run.json").read_text())
    base, data = filled_hub.sha(*BASE), filled_hub.sha(*DATA)
    assert record["base"]["revision"] == base and record["data"]["revision"] == data
    assert record["data"]["good"] == 40
    written = json.loads((run / "adapter" / "adapter_config.json").read_text())
    assert (written["base_model_name_or_path"], written["revision"]) == (BASE[1], base)
    assert TOKEN not in done.out + done.err
    assert not any(TOKEN.encode() in p.read_bytes() for p in run.rglob("*") if p.is_file())
    # the run keeps to the commits that it began with, and says that there are newer ones
    filled_hub.put(BASE[1], {"NEWS.md": b"a gull has landed"})
    again = phoque(*ASKED, "--output-dir", run, env=env)
    assert f"harbour/ministral has newer commits; this run continues to use {base[:8]}" in again.err
    changed = phoque(*ASKED, "--output-dir", run, "--allow-change", "base_revision", "--dry-run", env=env)
    assert "newer commits" not in changed.err


def test_no_access_is_three_lines(phoque, filled_hub):
    error = phoque(*ASKED, env={"HF_TOKEN": "hf_wrongwrong"}, expect=2).error
    assert "HF_TOKEN" in error[2] and "wrongwrong" not in " ".join(error)


@pytest.mark.parametrize(
    ("env", "code", "words"),
    [({"HF_ENDPOINT": "http://127.0.0.1:9"}, 75, "refused"), ({"HF_HUB_OFFLINE": "1"}, 2, "HF_HUB_OFFLINE")],
)
@pytest.mark.thorough
def test_no_network_is_three_lines(env, code, words):
    # in a process of its own: the client reads these when it is imported
    command = [sys.executable, "-m", "phoque", *ASKED]
    done = subprocess.run(command, env=os.environ | {"HF_TOKEN": TOKEN} | env, capture_output=True, text=True)
    lines = done.stderr.rstrip().splitlines()[-3:]
    assert done.returncode == code and "Traceback" not in done.stderr, done.stderr
    assert lines[0].startswith("error: ") and words in " ".join(lines)


@pytest.mark.parametrize("path", ["../../gulls.json", "/gulls.json", "nested/../../../gulls.json"])
def test_a_repository_that_lists_files_outside_of_itself_is_refused(phoque, filled_hub, tmp_path, path):
    """Git cannot hold such a path; what answers for the Hub may."""
    adapter = {"adapter_config.json": b"{}", "adapter_model.safetensors": b"", path: b"{}"}
    filled_hub.add("models", "harbour/adapter", adapter)
    asked = ["merge", "--adapter-source", "harbour/adapter", "--output-dir", tmp_path / "merged"]
    error = phoque(*asked, env={"HF_TOKEN": TOKEN}, expect=2).error
    assert f"lists a file outside of itself: {path}" in error[0], error


def test_a_base_model_fetches_nothing_outside_of_its_folder(phoque, filled_hub, tmp_path):
    filled_hub.put(BASE[1], {"../../../gulls.json": b"{}", "../../gulls.safetensors": b"gulls"})
    phoque(*ASKED, "--output-dir", tmp_path / "run", "--dry-run", env={"HF_TOKEN": TOKEN})
    assert not any("gulls." in path for _, path in filled_hub.log if "/resolve/" in path)
