"""--run-dir: the run is kept in a folder on another disk, which may be a mounted bucket."""

import json
import shutil

import pytest
from safetensors.torch import load_file
from tests.training.test_resume import COMMON, are_equal

# what an object store that is mounted as a folder cannot do: rename, append, change a part, lock
AUDIT = """
import sys
def forbid(event, arguments):
    names = [str(item) for item in arguments if isinstance(item, (str, bytes)) or hasattr(item, "__fspath__")]
    if not any("/kept/" in name or name.endswith("/kept") for name in names):
        return
    if event in ("os.rename", "os.link", "os.symlink", "os.truncate"):
        raise AssertionError(f"{event} {names}")
    if event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("a+"):
        raise AssertionError(f"open {arguments}")
sys.addaudithook(forbid)
"""


@pytest.fixture
def asked(tiny_llama, rows, tmp_path):
    return ["train", "--base-model", tiny_llama, "--dataset", rows, *COMMON, "--run-dir", tmp_path / "kept"]


def test_a_run_goes_on_from_the_folder_on_another_machine(phoque, asked, tmp_path):
    more = ["--save-steps", 3, "--sample-every", 0]
    phoque(*asked, *more, "--max-steps", 6, "--run-dir", tmp_path / "whole", "--output-dir", tmp_path / "a")
    ran = phoque(*asked, *more, "--max-steps", 3, "--output-dir", tmp_path / "b", prelude=AUDIT)
    assert f"checkpoint 3 is in {tmp_path / 'kept'}" in ran.err
    shutil.rmtree(tmp_path / "b")
    more += ["--max-steps", 6, "--allow-change", "max_steps", "--output-dir", tmp_path / "c"]
    ran = phoque(*asked, *more, prelude=AUDIT)
    assert "continuing from step 3" in ran.err
    whole = load_file(tmp_path / "a" / "adapter" / "adapter_model.safetensors")
    kept = load_file(tmp_path / "kept" / "adapter_model.safetensors")
    assert kept.keys() == whole.keys()
    result = json.loads((tmp_path / "kept" / "run.json").read_text())["result"]
    assert result["steps"] == 6 and "repo" not in result and result["adapter_sha256"]
    assert {file.name for file in (tmp_path / "kept").iterdir()} >= {"README.md", "report.html", "metrics.jsonl"}
    assert not list((tmp_path / "kept").glob("*.partial")) and not list((tmp_path / "kept").rglob(".lock"))
    # a finished run is not trained again anywhere, and other commands read the folder as an adapter
    more[-1] = tmp_path / "d"
    assert "is complete" in phoque(*asked, *more).err
    assert are_equal(load_file(tmp_path / "d" / "adapter" / "adapter_model.safetensors"), kept)
    merged = tmp_path / "merged"
    phoque("merge", "--adapter-source", tmp_path / "kept", "--output-dir", merged, "--dtype", "fp32")
    assert (merged / "model.safetensors").is_file()


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--hub-model-id", "harbour/seal"], ["exclude each other"]),
        (["--run-dir", "hf://buckets/harbour/runs/seal"], ["is a bucket", "--on"]),
        (["--run-dir", "same", "--output-dir", "same"], ["both same"]),
        (["--run-dir", "notes"], ["not the folder of a run", "notes.txt"]),
        (["--no-token"], ["--on and --run-dir"]),
        (["--squash-history"], ["keeps no history"]),
    ],
)
def test_what_cannot_keep_a_run_is_refused(phoque, asked, tmp_path, monkeypatch, more, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "notes.txt").write_text("mine")
    ran = phoque(*asked, *more, expect=2)
    assert all(word in " ".join(ran.error) for word in words)
    assert (tmp_path / "notes" / "notes.txt").read_text() == "mine"


def test_a_folder_that_keeps_another_run_is_refused_though_that_is_behind(phoque, asked, tmp_path):
    phoque(*asked, "--max-steps", 3, "--save-steps", 3, "--output-dir", tmp_path / "b")
    for path in [path for path in (tmp_path / "kept").iterdir() if path.name not in ("checkpoint-3", "phoque-run.txt")]:
        path.unlink()
    mine = [word for word in asked if word not in ("--run-dir", tmp_path / "kept")]
    phoque(*mine, "--max-steps", 6, "--save-steps", 6, "--learning-rate", 0.02, "--output-dir", tmp_path / "a")
    more = ["--max-steps", 9, "--learning-rate", 0.02, "--allow-change", "max_steps", "--keep-checkpoints", 1]
    error = phoque(*asked, *more, "--output-dir", tmp_path / "a", expect=2).error
    assert "hold two different runs" in error[0] and (tmp_path / "kept" / "checkpoint-3" / "MANIFEST.json").is_file()


def test_a_checkpoint_that_was_cut_off_is_written_again_and_one_of_another_program_stays(phoque, asked, tmp_path):
    kept = tmp_path / "kept"
    phoque(*asked, "--max-steps", 3, "--save-steps", 3, "--output-dir", tmp_path / "a")
    (kept / "checkpoint-3" / ".unfinished").write_text("")
    foreign = kept / "checkpoint-2"
    foreign.mkdir()
    (foreign / "notes.txt").write_text("mine")
    phoque(*asked, "--max-steps", 4, "--save-steps", 4, "--allow-change", "max_steps", "--output-dir", tmp_path / "a")
    for name in ("checkpoint-3", "checkpoint-4"):
        assert (kept / name / "MANIFEST.json").is_file() and not (kept / name / ".unfinished").exists()
    assert (foreign / "notes.txt").read_text() == "mine"


def test_a_record_without_the_adapters_hash_is_accepted(phoque, asked, tmp_path):
    phoque(*asked, "--max-steps", 3, "--output-dir", tmp_path / "a")
    record = json.loads((tmp_path / "kept" / "run.json").read_text())
    del record["result"]["adapter_sha256"]
    (tmp_path / "kept" / "run.json").write_text(json.dumps(record))
    assert "is complete" in phoque(*asked, "--max-steps", 3, "--output-dir", tmp_path / "b").err


def test_a_dry_run_names_the_folder_and_makes_nothing(phoque, asked, tmp_path):
    facts = phoque(*asked, "--dry-run", "--json").json["facts"]
    assert facts["kept in"] == f"{tmp_path / 'kept'}, with no checkpoint"
    assert not (tmp_path / "kept").exists()
