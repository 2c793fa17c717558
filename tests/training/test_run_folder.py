"""A run folder: foreign files are refused, one process uses it at a time, pruning leaves what phoque did not make."""

import json
import os
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from tests.forkserver import slowly

from phoque.training import checkpoints


@pytest.fixture
def arguments(tiny_llama, rows):
    return ["train", "--base-model", tiny_llama, "--dataset", rows, "--quantization", "fp32", "--sample-every", 0]


@pytest.mark.parametrize(
    "name", ["adapter/notes.txt", "merged/precious.bin", "report.html", "metrics.jsonl", "run.json"]
)
@pytest.mark.parametrize("fresh", [[], ["--fresh-start", "--yes"]])
def test_a_folder_with_files_that_training_would_replace_is_refused_and_kept(phoque, arguments, tmp_path, name, fresh):
    file = tmp_path / "out" / name
    file.parent.mkdir(parents=True)
    file.write_text('{"mine": 1}')
    error = phoque(*arguments, "--max-steps", 2, "--output-dir", tmp_path / "out", *fresh, expect=2).error
    assert "not the folder of a run" in error[0] and name.split("/")[0] in error[1]
    assert file.read_text() == '{"mine": 1}' and [p.name for p in (tmp_path / "out").iterdir()] == [name.split("/")[0]]


def test_a_second_process_in_the_same_folder_is_refused_and_the_first_goes_on(phoque, start, arguments, tmp_path):
    run = tmp_path / "run"
    command = [*arguments, "--max-steps", 6, "--save-steps", 1, "--output-dir", run]
    first = start(*command, prelude=slowly(0.5))
    while not (run / "checkpoint-1" / checkpoints.MANIFEST).is_file():
        assert first.poll() is None
        time.sleep(0.05)
    error = phoque(*command, expect=2).error
    assert "Another process is training" in error[0] and str(run) in error[0]
    os.kill(first.pid, signal.SIGKILL)  # the lock ends with the process that held it
    first.poll(wait=True)
    assert phoque(*command, "--json").json["steps"] == 6


def test_pruning_leaves_checkpoints_that_phoque_did_not_write(tmp_path):
    for step in (1, 2, 3, 4):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        if step != 1:
            (folder / checkpoints.MANIFEST).write_text("{}")
    checkpoints.prune(tmp_path, 3, 1, set())  # 4 is damaged, and the run goes on from an earlier one
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint-1", "checkpoint-3", "checkpoint-4"]
    checkpoints.prune(tmp_path, 4, 1, set())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint-1", "checkpoint-4"]


class Payload:
    """What a pickle of it would do if it were loaded."""

    def __reduce__(self):
        return os.system, (f"touch {PWNED}",)


PWNED = "a-pickle-ran"  # in the test's current folder


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_a_checkpoint_that_holds_a_program_is_not_run(phoque, arguments, tmp_path, monkeypatch, name):
    """Whoever can write the repository of a run can write its manifest too, so the hashes fit."""
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "run"
    phoque(*arguments, "--output-dir", run, "--max-steps", 2, "--save-steps", 1)
    shutil.rmtree(run / "adapter")
    record = json.loads((run / "run.json").read_text())
    record.pop("result")
    (run / "run.json").write_text(json.dumps(record))
    for checkpoint in run.glob("checkpoint-*"):
        torch.save(Payload(), checkpoint / name)
        checkpoints.write_manifest(checkpoint)
    error = phoque(*arguments, "--output-dir", run, "--max-steps", 4, "--allow-change", "max_steps", expect=2).error
    assert "checkpoint-2 holds a pickled object that is no tensor" in error[0] and "weights_only" not in " ".join(error)
    assert not Path(PWNED).exists()
