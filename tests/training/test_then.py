"""What follows a training: the commands of --then, where their results go, and what is refused before it."""

import json
from pathlib import Path

import pytest
from tests.fakehub import TOKEN

QUIET = {"WANDB_MODE": "disabled"}


@pytest.fixture
def asked(tiny_llama, rows):
    words = ["train", "--base-model", tiny_llama, "--dataset", rows, "--quantization", "fp32", "--output-dir", "run"]
    return [*words, "--max-steps", 2, "--sample-every", 0, "--save-steps", 2]


@pytest.mark.thorough
def test_commands_follow_a_training_in_their_order(phoque, asked, hub):
    more = ["--then", "merge --dtype fp32", "--then", "merge --dtype bf16 --output-dir other"]
    env = QUIET | {"HF_TOKEN": TOKEN}
    ran = phoque(*asked, *more, "--hub-model-id", "harbour/seal", "--json", env=env)
    first, second = ran.json["then"]
    assert first["command"].startswith("phoque merge --dtype fp32 --adapter-source run --output-dir run-merged")
    assert first["result"]["proof"]["holds"] and Path("run-merged/model.safetensors").is_file()
    assert second["result"]["proof"]["holds"] and Path("other/model.safetensors").is_file()
    merged = hub.repos["models", "harbour/seal-merged"]
    assert "model.safetensors" in merged.commits[-1].files and merged.private
    assert ran.err.index("run-merged") < ran.err.index("--output-dir other")
    text = phoque(*asked, *more, "--hub-model-id", "harbour/seal", env=env)
    assert "nothing to train" in text.err and text.out.count("done     phoque merge") == 2


@pytest.mark.thorough
def test_a_command_that_fails_ends_the_chain_with_its_exit_code(phoque, asked):
    more = ["--then", "merge --output-dir run", "--then", "merge"]
    ran = phoque(*asked, *more, env=QUIET, expect=2)
    assert "failed after the training" in ran.error[0] and "phoque merge --output-dir run" in ran.error[2]
    assert Path("run/adapter").is_dir() and not Path("run-merged").exists()


@pytest.mark.parametrize(
    ("then", "words"),
    [
        ("mrege", ["mrege", "merge"]),
        ("chat", ["chat is not possible", "export-onnx"]),
        ("merge --dtpe fp32", ["--then merge", "--dtpe", "--dtype"]),
        ("export-onnx --dtype q5", ["--then export-onnx", "no precision 'q5'", "q4"]),
        ("merge --dtype fp17", ["--then merge", "fp17", "fp32"]),
        ("psm-probe --persona nowhere.toml", ["--then psm-probe", "nowhere.toml"]),
        ("merge demo", ["--then merge", "demo"]),
        ("merge --help", ["asks for help", "phoque merge --help"]),
        ("merge --adapter-source nowhere", ["--then merge", "nowhere"]),
        ("export-gguf --merged-dir run-merged --adapter-source run", ["Two sources"]),
        ("merge 'fp32", ["cannot be read", "quotation"]),
        ("", ["empty"]),
    ],
)
def test_what_cannot_follow_is_refused_before_the_training(phoque, asked, then, words):
    error = " ".join(phoque(*asked, "--then", then, env=QUIET, expect=2).error)
    assert all(word in error for word in words) and not Path("run").exists()


def test_a_dry_run_shows_the_whole_command_lines(phoque, asked):
    shown = phoque(*asked, "--then", "export-gguf --dtype q4_k_m", "--dry-run", "--json", env=QUIET).json["facts"]
    assert shown["then"] == ["phoque export-gguf --dtype q4_k_m --adapter-source run --output-dir run-gguf"]


def test_commands_may_read_what_is_made_before_them(phoque, asked):
    more = ["--then", "merge --output-dir merged", "--then", "export-gguf --merged-dir merged --output-dir gguf"]
    more += ["--then", "psm-probe --model-source merged --control-adapter run/control-1 --persona seal"]
    shown = phoque(*asked, *more, "--dry-run", "--json", env=QUIET).json["facts"]["then"]
    assert shown[1] == "phoque export-gguf --merged-dir merged --output-dir gguf" and len(shown) == 3


def test_a_job_installs_what_the_commands_need():
    from phoque.settings.train import TrainSettings

    then = ["export-onnx --dtype q4", "psm-probe", "compare-sae"]
    assert TrainSettings(then=then, report_to=["trackio"]).needed_extra == "onnx,sae,trackio"
    assert json.dumps(TrainSettings().then) == "[]"
