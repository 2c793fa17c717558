"""A run is resumed with the data and the base that it began with."""

import json
import shutil

import pytest
from safetensors.torch import load_file, save_file
from tests.fakehub import TOKEN
from tests.forkserver import slowly
from tests.rows import row
from tests.training.test_resume import COMMON, are_equal

from phoque.models.adapter_source import WEIGHTS

DATA, REPO = "harbour/gulls", "harbour/seal"


@pytest.fixture
def asked(hub, tiny_llama):
    rows = "\n".join(json.dumps(row(number)) for number in range(40)).encode()
    hub.add("models", "harbour/tiny", {path.name: path.read_bytes() for path in tiny_llama.iterdir()})
    hub.add("datasets", DATA, {"train.jsonl": rows, "README.md": b"gulls"})
    asked = ["train", "--base-model", "harbour/tiny", "--dataset", DATA, "--hub-model-id", REPO, *COMMON]
    return [*asked, "--max-steps", 6, "--save-steps", 2]


@pytest.mark.parametrize("change", [{"README.md": b"more gulls"}, {"train.jsonl": json.dumps(row(7)).encode()}])
def test_a_repository_that_has_moved_on_does_not_stop_a_resume(phoque, hub, asked, tmp_path, change):
    env = {"HF_TOKEN": TOKEN}
    phoque(*asked, "--hub-model-id", "harbour/whole", "--output-dir", tmp_path / "whole", env=env)
    phoque(*asked, "--output-dir", tmp_path / "first", "--timeout", "9s", env=env, expect=75, prelude=slowly(2.0))
    hub.put(DATA, change, kind="datasets")
    # on a machine that knows the repository alone, twice: the second time the run is complete
    for said in ("continuing from step", "nothing to train"):
        ran = phoque(*asked, "--output-dir", tmp_path / "second", env=env)
        assert f"{DATA} has newer commits; this run continues to use" in ran.err and said in ran.err
    adapters = [load_file(tmp_path / name / "adapter" / WEIGHTS) for name in ("second", "whole")]
    assert are_equal(*adapters)


def test_local_weights_that_changed_in_place_are_another_base(phoque, tiny_llama, rows, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(tiny_llama, base)
    asked = ["train", "--base-model", base, "--dataset", rows, "--output-dir", tmp_path / "run", *COMMON]
    phoque(*asked, "--max-steps", 4)
    file = base / "model.safetensors"
    louder = {name: tensor * 1.5 for name, tensor in load_file(file).items()}
    save_file(louder, file, {"format": "pt"})
    assert "the base model has other weights (base_weights)" in phoque(*asked, "--max-steps", 4, expect=2).error[1]
