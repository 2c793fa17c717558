"""The same through xet, which is how production uploads: hf_xet's own local store behind the Hub of the tests."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file
from tests.fakehub import TOKEN, FakeHub
from tests.training.test_resume import COMMON, REPO, are_equal, checkpoints, commit_titles

pytestmark = pytest.mark.slow


def test_a_run_is_pushed_and_restored_through_xet(tmp_path, tiny_llama, rows):
    store = tmp_path / "xet"
    store.mkdir()
    hub = FakeHub(xet=store)
    env = {k: v for k, v in os.environ.items() if k != "HF_HUB_DISABLE_XET"}
    env |= {"HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN, "WANDB_MODE": "disabled", "HF_HOME": str(tmp_path / "hf")}

    def train(folder: Path) -> subprocess.CompletedProcess:
        command = [
            sys.executable,
            "-m",
            "phoque",
            "train",
            "--base-model",
            tiny_llama,
            "--dataset",
            rows,
            *COMMON,
            "--max-steps",
            "6",
            "--save-steps",
            "3",
            "--hub-model-id",
            REPO,
            "--output-dir",
            folder,
        ]
        ran = subprocess.run([*map(str, command)], env=env, capture_output=True, text=True)
        assert ran.returncode == 0, ran.stderr
        return ran

    try:
        train(tmp_path / "one")
        assert checkpoints(hub) == {"checkpoint-3", "checkpoint-6"} and commit_titles(hub)[-1] == "Adapter"
        weights = [b for p, b in hub.files(REPO).items() if p.endswith(".safetensors")]
        assert len(weights) == 3 and all(blob.content is None for blob in weights)  # they lie in the xet store alone
        hub.put(REPO, {p: None for p in hub.files(REPO) if "/" not in p and p != ".gitattributes"})
        assert "continuing from step 6" in train(tmp_path / "two").stderr
        made = [load_file(tmp_path / name / "adapter" / "adapter_model.safetensors") for name in ("one", "two")]
        assert are_equal(*made)
    finally:
        hub.stop()
