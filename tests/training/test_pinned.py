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


ON_ANOTHER_DAY = """
from datetime import datetime
import phoque.training.prepare, transformers.utils.chat_template_utils
class Later(datetime):
    @classmethod
    def now(cls, tz=None):
        return datetime(2031, 5, 6, tzinfo=tz)
for module in (phoque.training.prepare, transformers.utils.chat_template_utils):
    module.datetime = Later
"""


def test_a_run_that_is_resumed_on_another_day_goes_on_with_its_date(phoque, tiny_llama, rows, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(tiny_llama, base)
    template = base / "chat_template.jinja"
    template.write_text("{{ strftime_now('%d %b %Y') }}" + template.read_text())
    asked = ["train", "--base-model", base, "--dataset", rows, "--max-steps", 6, "--save-steps", 2, *COMMON]
    phoque(*asked, "--output-dir", tmp_path / "whole")
    run = tmp_path / "run"
    phoque(*asked, "--output-dir", run, "--timeout", "9s", expect=75, prelude=slowly(2.0))
    phoque(*asked, "--output-dir", run, prelude=ON_ANOTHER_DAY)
    assert are_equal(*(load_file(folder / "adapter" / WEIGHTS) for folder in (run, tmp_path / "whole")))
    phoque(*asked, "--output-dir", tmp_path / "later", prelude=ON_ANOTHER_DAY)
    assert json.loads((tmp_path / "later" / "run.json").read_text())["template_date"] == "2031-05-06"
    assert not are_equal(*(load_file(folder / "adapter" / WEIGHTS) for folder in (run, tmp_path / "later")))


def test_local_weights_that_changed_in_place_are_another_base(phoque, tiny_llama, rows, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(tiny_llama, base)
    asked = ["train", "--base-model", base, "--dataset", rows, "--output-dir", tmp_path / "run", *COMMON]
    phoque(*asked, "--max-steps", 4)
    file = base / "model.safetensors"
    louder = {name: tensor * 1.5 for name, tensor in load_file(file).items()}
    save_file(louder, file, {"format": "pt"})
    assert "the base model has other weights (base_weights)" in phoque(*asked, "--max-steps", 4, expect=2).error[1]
