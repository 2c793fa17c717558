"""What surrounds a command: pipes that close, terminals without columns or UTF-8, homes that cannot be written."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from tests.fakehub import TOKEN
from tests.rows import row, write_rows
from tests.training.test_resume import COMMON


def run_process(command, **options):
    return subprocess.run(command, capture_output=True, text=True, timeout=120, **options)


@pytest.fixture
def dry_run(tiny_llama, rows):
    return [sys.executable, "-m", "phoque", "train", "--base-model", tiny_llama, "--dataset", rows, "--dry-run"]


def test_a_dry_run_on_a_terminal_of_zero_columns_or_of_ascii_shows_everything(dry_run, rows):
    write_rows(rows, [row(n) | {"source": "häfen"} for n in range(20)])
    env = os.environ | {"COLUMNS": "0", "PYTHONIOENCODING": "ascii"}
    ran = run_process(dry_run, env=env)
    assert ran.returncode == 0 and "loss mask of the first rows" in ran.stdout and ran.stdout.isascii(), ran.stderr
    ran = run_process([*dry_run, "--json"], env=env)
    assert ran.stdout.isascii() and "h\\u00e4fen" in ran.stdout and json.loads(ran.stdout)["settings"]


def test_a_closed_pipe_is_no_error(dry_run):
    for pipes in ("| true", "2>&1 | true", "2>&1 | head -1 > /dev/null"):
        command = "set -o pipefail; " + " ".join(map(str, dry_run)) + f" {pipes}"
        ran = run_process(["bash", "-c", command])
        said = [line.strip() for line in ran.stderr.splitlines()]
        assert ran.returncode == 0 and all(line.startswith("importing torch") for line in said), (pipes, said)


def test_a_run_goes_on_when_nobody_reads_its_log(tmp_path, tiny_llama, rows):
    run = tmp_path / "run"
    command = [sys.executable, "-m", "phoque", "train", "--base-model", tiny_llama, "--dataset", rows, *COMMON]
    command += ["--max-steps", 4, "--output-dir", run]
    ran = run_process(["bash", "-c", " ".join(map(str, command)) + " 2>&1 | head -1; exit ${PIPESTATUS[0]}"])
    assert ran.returncode == 0 and (run / "adapter" / "adapter_model.safetensors").is_file()


def test_a_home_that_cannot_be_written_is_named(phoque):
    env = {"HOME": "/dev/null/home", "XDG_CACHE_HOME": "/dev/null/home/.cache", "HF_HOME": "/dev/null/home/hf"}
    error = phoque("train", "--preset", "demo", "--max-steps", "2", env=env, expect=2).error
    assert "XDG_CACHE_HOME" in error[2]


@pytest.mark.parametrize("folder", [".", "..", "/"])
def test_the_current_folder_is_not_replaced(phoque, tmp_path, tiny_llama, folder):
    from tests.merging.test_adapter_options import make_adapter

    make_adapter(tiny_llama, tmp_path / "adapter", target_modules=["q_proj"])
    asked = ["--base-model", tiny_llama, "--output-dir", folder]
    error = phoque("merge", "--adapter-source", tmp_path / "adapter", *asked, expect=2).error
    assert "current folder" in error[0] and (tmp_path / "adapter").is_dir()
    export = ["export-onnx", "--merged-dir", tiny_llama, "--output-dir", folder]
    assert "current folder" in phoque(*export, expect=2).error[0]


def test_a_repository_that_is_missing_is_named(phoque, hub):
    error = phoque("train", "--dataset", "harbour/typo", "--base-model", "harbour/nothing", expect=2).error
    assert "harbour/typo" in error[1] or "harbour/nothing" in error[1]


def test_a_hub_that_drops_connections_at_the_start_ends_in_75_and_a_short_fault_is_survived(phoque, hub, tiny_llama):
    files = {path.name: path.read_bytes() for path in tiny_llama.iterdir()}
    hub.add("models", "harbour/tiny", files)
    hub.add("datasets", "harbour/gulls", {"train.jsonl": "\n".join(json.dumps(row(n)) for n in range(20)).encode()})
    asked = ["train", "--base-model", "harbour/tiny", "--dataset", "harbour/gulls", "--dry-run"]
    for kind in (503, "drop"):
        hub.faults.add("GET .*", kind, times=2)
        phoque(*asked, env={"HF_TOKEN": TOKEN})
        fault = hub.faults.add("GET .*", kind, times=1000)
        error = phoque(*asked, "--retry-timeout", "2", env={"JOB_ID": "a" * 24, "HF_TOKEN": TOKEN}, expect=75).error
        assert {503: "refused a request", "drop": "did not answer"}[kind] in error[0] and "harbour/" in error[0]
        fault.times = 0


def test_a_closed_terminal_stops_the_run_after_a_save(tmp_path, tiny_llama, rows):
    run = tmp_path / "run"
    command = [sys.executable, "-m", "phoque", "train", "--base-model", tiny_llama, "--dataset", rows, *COMMON]
    command += ["--max-steps", 40_000, "--output-dir", run]
    master, slave = os.openpty()
    # under nohup, which the tests may run under, SIGHUP is ignored
    command = ["env", "--default-signal=HUP", *map(str, command)]
    process = subprocess.Popen(command, stdin=slave, stdout=slave, stderr=slave, start_new_session=True)
    os.close(slave)
    drain = threading.Thread(target=read_to_the_end, args=(master,), daemon=True)
    drain.start()
    end = time.monotonic() + 90
    while not (run / "metrics.jsonl").is_file() or (run / "metrics.jsonl").read_text().count("\n") < 3:
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.05)
    os.close(master)  # the terminal is gone: writing to it fails
    process.send_signal(signal.SIGHUP)
    assert process.wait(60) == 75 and list(run.glob("checkpoint-*"))


def read_to_the_end(descriptor: int) -> None:
    with contextlib.suppress(OSError):
        while os.read(descriptor, 4096):
            pass


@pytest.mark.parametrize(
    "edit",
    [
        lambda entry: entry | {"data_offsets": [-64, 0]},
        lambda entry: entry | {"data_offsets": [64, 0]},
        lambda entry: entry | {"data_offsets": "0:64"},
        lambda entry: entry | {"shape": [3, 3]},
        lambda entry: entry | {"shape": None},
        lambda entry: [],
        lambda entry: entry | {"dtype": 7},
    ],
)
def test_a_damaged_header_is_named(phoque, tmp_path, tiny_llama, edit):
    import shutil

    base = tmp_path / "base"
    shutil.copytree(tiny_llama, base)
    file = base / "model.safetensors"
    raw = file.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    header["model.norm.weight"] = edit(header["model.norm.weight"])
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + length :])
    error = phoque("export-onnx", "--merged-dir", base, "--output-dir", tmp_path / "out", expect=2).error
    assert "cannot be read" in error[0] and "model.norm.weight" in error[1]


def test_old_and_loose_values_of_wandb_are_read(monkeypatch):
    from phoque.settings.presets import PRESETS
    from phoque.settings.resolve import resolve_settings
    from phoque.settings.train import TrainSettings

    for value, meaning in {"dryrun": "offline", "run": "online"}.items():
        monkeypatch.setenv("WANDB_MODE", value)
        assert resolve_settings(TrainSettings, {}, PRESETS)[0].settings.wandb_mode == meaning
    monkeypatch.setenv("WANDB_LOG_MODEL", "true")
    assert resolve_settings(TrainSettings, {}, PRESETS)[0].settings.wandb_log_model == "end"


@pytest.mark.parametrize(
    ("name", "right"),
    [("PHOQUE_MAX_STEPS", "MAX_STEPS"), ("PHOQUE_BASE_MODEL", "BASE_MODEL"), ("PHOQUE_DATASET", "DATASET_REPO")],
)
def test_a_setting_with_a_prefix_too_much_is_recognised(phoque, name, right):
    assert phoque("train", "--dry-run", env={name: "1"}, expect=2).error[2].endswith(f"Did you mean {right}?")


def test_a_job_gets_only_the_secrets_that_its_command_uses():
    from phoque.settings.compare_sae import SaeSettings
    from phoque.settings.psm_probe import PsmSettings
    from phoque.settings.train import TrainSettings

    assert TrainSettings().used_secrets == ("hf_token", "wandb_api_key")
    assert TrainSettings(wandb_mode="disabled").used_secrets == ("hf_token",)
    assert SaeSettings(updated_model="x").used_secrets == PsmSettings().used_secrets == ("hf_token",)
    assert "openai_api_key" in PsmSettings(scorer=["openai:http://x#y"]).used_secrets


def test_job_scripts_install_this_release():
    from phoque.version import __version__

    for script in Path(__file__).parent.parent.glob("jobs/*.py"):
        assert f"=={__version__}" in script.read_text(), script
