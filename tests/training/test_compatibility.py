"""A run folder and a checkpoint that phoque 0.1.0 wrote at commit a88615e, before modules and values were renamed."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

FIXTURE = Path(__file__).parent / "fixtures" / "run_a88615e"
TRAIN = (
    "train --base-model base --dataset rows.jsonl --output-dir run --quantization none --max-steps 8 --batch-size 2 "
    "--save-steps 2 --log-every 1 --sample-every 0 --held-out-rows 4 --lora-rank 4 --engine-mode eager --prompt Gull?"
).split()


@pytest.fixture
def old_run(tmp_path):
    """The folder as it was left, in the working folder of this test."""
    shutil.copytree(FIXTURE, tmp_path, dirs_exist_ok=True)
    return tmp_path / "run"


def test_an_old_checkpoint_resumes_to_the_adapter_that_the_old_version_made(old_run, phoque):
    finished = load_file(old_run / "adapter" / "adapter_model.safetensors")
    shutil.rmtree(old_run / "adapter")
    record = json.loads((old_run / "run.json").read_text())
    result = record.pop("result")
    (old_run / "run.json").write_text(json.dumps(record))
    ran = phoque(*TRAIN, "--json")
    assert "checkpoint-6" in ran.err
    resumed = load_file(old_run / "adapter" / "adapter_model.safetensors")
    assert resumed.keys() == finished.keys()
    for name, tensor in finished.items():
        torch.testing.assert_close(resumed[name], tensor, atol=1e-6, rtol=1e-4)
    assert ran.json.keys() >= result.keys()
    assert ran.json["held_out_loss"]["after"] == pytest.approx(result["held_out_loss"]["after"], abs=1e-5)


def test_an_old_finished_run_is_complete_and_merges(old_run, phoque):
    assert "is complete; nothing to train" in phoque(*TRAIN).err
    merged = phoque("merge", "--adapter-source", "run", "--output-dir", "merged", "--dtype", "fp32", "--json").json
    assert merged["changed"] == 14 and merged["proof"]["holds"]


def test_new_records_have_the_keys_of_old_ones(old_run, phoque):
    old = json.loads((old_run / "run.json").read_text())
    phoque(*TRAIN[:-2], "--output-dir", "again")
    new = json.loads(Path("again/run.json").read_text())
    assert new.keys() >= old.keys() and new["settings"].keys() >= old["settings"].keys()
    # a run may go on with another number of processes now, so that stands beside the fingerprint
    assert new["fingerprint"].keys() >= old["fingerprint"].keys() - {"processes"} and new["processes"] == 1
    manifest = json.loads((old_run / "checkpoint-6" / "MANIFEST.json").read_text())["sha256"]
    assert json.loads(Path("again/checkpoint-8/MANIFEST.json").read_text())["sha256"].keys() == manifest.keys()


def test_a_fresh_start_of_an_older_version_is_recognized(old_run):
    """A Job that is submitted again must continue, and not delete its progress because a setting is new."""
    from phoque.settings.train import TrainSettings
    from phoque.training.fingerprint import update_record
    from phoque.training.resume import _learning_settings

    asked = _learning_settings(TrainSettings(packing="exact"))
    newer = ("greeting", "eval_split")
    marker = {"id": "x", "asked": {name: value for name, value in asked.items() if name not in newer}}
    record = json.loads((old_run / "run.json").read_text()) | {"fresh_start": marker}
    assert update_record(record)["fresh_start"]["asked"] == asked
