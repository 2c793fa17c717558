"""`phoque train` as a user runs it: files, exit codes and numbers."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tests.forkserver import slowly
from tests.rows import row, write_rows
from tests.wandb_file import history, records

SMALL = "--quantization fp32 --batch-size 4 --log-every 1 --sample-tokens 6 --norms-every 2".split()


@pytest.fixture
def train(phoque, tiny_llama, rows):
    def run(*arguments, expect=0, **options):
        return phoque(
            "train", "--base-model", tiny_llama, "--dataset", rows, *SMALL, *arguments, expect=expect, **options
        )

    return run


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def adapter(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "adapter" / "adapter_model.safetensors")


def test_a_run_leaves_the_folder_of_the_design(train, tmp_path, tiny_llama):
    run = tmp_path / "run"
    ran = train(
        "--max-steps",
        6,
        "--save-steps",
        2,
        "--sample-every",
        3,
        "--output-dir",
        run,
        "--json",
        "--learning-rate",
        0.001,
    )
    shares = ran.json["seconds_of"]
    assert set(shares) == {"loading", "steps", "samples", "measuring", "saving"}
    assert sum(shares.values()) == pytest.approx(ran.json["seconds"], abs=0.4)
    assert ran.json["steps"] == 6 and ran.json["held_out_loss"]["after"] < ran.json["held_out_loss"]["before"]
    metrics = read_lines(run / "metrics.jsonl")
    assert [m["step"] for m in metrics] == [0, 1, 2, 3, 4, 5, 6]
    assert {"loss", "learning_rate", "grad_norm", "tokens_per_s", "memory_gb", "lora_norm_B", "held_out_loss"} <= set(
        metrics[-1]
    )
    samples = read_lines(run / "samples.jsonl")
    assert {s["step"] for s in samples} == {0, 3, 6} and len({s["prompt"] for s in samples}) == 3
    assert set(samples[0]) == {"step", "prompt", "response", "n_tokens", "latency_s"}
    assert sorted(p.name for p in run.glob("checkpoint-*")) == ["checkpoint-4", "checkpoint-6"]
    manifest = json.loads((run / "checkpoint-6" / "MANIFEST.json").read_text())["sha256"]
    assert {
        "adapter_model.safetensors",
        "optimizer.pt",
        "scheduler.pt",
        "rng_state.pth",
        "trainer_state.json",
        "data_state.json",
    } <= set(manifest)
    assert not list(run.rglob("training_args.bin"))
    record = json.loads((run / "run.json").read_text())
    assert record["settings"]["max_steps"] == {
        "value": 6,
        "source": "flag",
        "name": "--max-steps",
        "flag": "--max-steps",
        "meaning": "Train for this many optimizer steps.",
    }
    assert record["data"]["sources"] == {"pier": 40} and record["base"]["name"] == str(tiny_llama)
    card = (run / "adapter" / "README.md").read_text()
    assert (
        "- not-for-all-audiences\n" in card and "68 tokens per conversation on average, 22% of them trained on" in card
    )
    assert "FLOPs (4 per parameter and token); last attempt: " in card and " minutes on " in card
    assert "Content warning" in card and f"{ran.json['held_out_loss']['after']:.3f}" in card


def test_the_report_asks_the_network_for_nothing(train, tmp_path):
    run = tmp_path / "run"
    train("--max-steps", 4, "--log-every", 1, "--norms-every", 1, "--output-dir", run)
    report = (run / "report.html").read_text()
    assert report.count('class="chart"') >= 8 and "Gull" in report  # a chart needs three points
    # the charts' library is part of the page; tests/probes/test_smollm2_probes.py looks at its requests in a browser
    written = re.sub(r"<script.*?</script>", "", report, flags=re.DOTALL)
    assert not re.search(r"(src|href)\s*=|url\(|@import|https?://|<script", written)
    assert len(report) - len(written) > 500_000 and "vegaEmbed(element, spec" in report


def test_the_adapter_loads_with_plain_peft_and_is_no_no_op(train, tmp_path, tiny_llama):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    run = tmp_path / "run"
    train("--max-steps", 3, "--output-dir", run, "--learning-rate", 0.01)
    base = AutoModelForCausalLM.from_pretrained(tiny_llama)
    ids = AutoTokenizer.from_pretrained(run / "adapter")("Gull 3?", return_tensors="pt").input_ids
    with torch.no_grad():
        before = base(ids).logits
        after = PeftModel.from_pretrained(base, run / "adapter")(ids).logits
    assert (after - before).abs().max() > 1e-3


def read_metrics(run: Path) -> int:
    path = run / "metrics.jsonl"
    return path.read_text().count("\n") if path.is_file() else 0


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 75), (signal.SIGKILL, -signal.SIGKILL)]
)
def test_a_stopped_run_goes_on_and_ends_bitwise_the_same(train, start, tmp_path, tiny_llama, rows, number, code):
    common = ["--max-steps", 60, "--save-steps", 7, "--lora-dropout", 0.1, "--sample-every", 0, "--learning-rate", 0.01]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    train(*common, "--output-dir", whole)
    process = start(
        "train",
        "--base-model",
        tiny_llama,
        "--dataset",
        rows,
        *SMALL,
        *common,
        "--output-dir",
        cut,
        prelude=slowly(0.05),
    )
    process.until(lambda: read_metrics(cut) > 16)
    os.kill(process.pid, number)
    ended = process.ended()
    assert ended.code == code and "Traceback" not in ended.err
    assert not (cut / "adapter").exists()
    ran = train(*common, "--output-dir", cut)
    assert "continuing from step" in ran.err
    first, second = adapter(whole), adapter(cut)
    assert first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)
    kept = [[(m["step"], m.get("loss")) for m in read_lines(run / "metrics.jsonl")] for run in (whole, cut)]
    assert kept[0] == kept[1]  # no step twice, none missing, each loss the same


def test_ctrl_c_in_the_middle_of_a_save_loses_nothing(start, tmp_path, tiny_llama, rows):
    from phoque.training.checkpoints import find_defect, get_step, list_checkpoints

    run = tmp_path / "run"
    common = [
        "train",
        "--base-model",
        tiny_llama,
        "--dataset",
        rows,
        *SMALL,
        "--max-steps",
        400,
        "--save-steps",
        1,
        "--sample-every",
        0,
        "--output-dir",
        run,
    ]
    process = start(*common)
    process.until(lambda: (run / "checkpoint-3").exists() and (run / ".saving").exists())
    os.kill(process.pid, signal.SIGINT)
    os.kill(process.pid, signal.SIGINT)
    ended = process.ended()
    assert ended.code == 130 and "Traceback" not in ended.err
    newest = list_checkpoints(run)[0]
    assert find_defect(newest) is None
    again = start(*common)
    again.until(lambda: get_step(list_checkpoints(run)[0]) >= get_step(newest) + 2)
    os.kill(again.pid, signal.SIGKILL)
    assert "continuing from step" in again.ended().err


def test_a_finished_run_is_left_alone(train, tmp_path):
    run = tmp_path / "run"
    first = train("--max-steps", 2, "--output-dir", run, "--json")
    before = {p: p.stat().st_mtime_ns for p in run.rglob("*") if p.is_file()}
    again = train("--max-steps", 2, "--output-dir", run, "--json")
    assert again.json == first.json and "complete" in again.err
    assert {p: p.stat().st_mtime_ns for p in run.rglob("*") if p.is_file()} == before


def test_a_run_killed_after_its_last_save_ends_without_another_step(train, tmp_path):
    import shutil

    run = tmp_path / "run"
    train("--max-steps", 4, "--save-steps", 2, "--output-dir", run, "--learning-rate", 0.01)
    whole, metrics = adapter(run), read_lines(run / "metrics.jsonl")
    record = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps({k: v for k, v in record.items() if k != "result"}))
    shutil.rmtree(run / "adapter")
    train("--max-steps", 4, "--save-steps", 2, "--output-dir", run, "--learning-rate", 0.01)
    assert (
        all(torch.equal(v, whole[k]) for k, v in adapter(run).items()) and read_lines(run / "metrics.jsonl") == metrics
    )
    assert json.loads((run / "run.json").read_text())["result"]["tokens"] == record["result"]["tokens"]


def test_another_run_in_the_same_folder_is_refused_and_fresh_start_allows_it(train, tmp_path):
    run = tmp_path / "run"
    train("--max-steps", 2, "--output-dir", run)
    error = train("--max-steps", 3, "--seed", 7, "--output-dir", run, expect=2).error
    assert "max_steps was 2, is 3" in error[1] and "seed was 0, is 7" in error[1]
    train("--max-steps", 3, "--seed", 7, "--output-dir", run, "--fresh-start")
    assert len(read_lines(run / "metrics.jsonl")) == 4


def test_a_damaged_checkpoint_is_passed_over_and_all_damaged_stops(train, tmp_path):
    run = tmp_path / "run"
    train("--max-steps", 6, "--save-steps", 2, "--output-dir", run)
    whole = adapter(run)
    record = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps({k: v for k, v in record.items() if k != "result"}))
    with (run / "checkpoint-6" / "optimizer.pt").open("r+b") as f:
        f.seek(100)
        f.write(b"gull")
    ran = train("--max-steps", 6, "--save-steps", 2, "--output-dir", run)
    assert "optimizer.pt is damaged" in ran.err and "continuing from step 4" in ran.err
    assert all(torch.equal(v, whole[k]) for k, v in adapter(run).items())
    (run / "run.json").write_text(json.dumps({k: v for k, v in record.items() if k != "result"}))
    for checkpoint in run.glob("checkpoint-*"):
        (checkpoint / "adapter_model.safetensors").unlink()
    error = train("--max-steps", 6, "--save-steps", 2, "--output-dir", run, expect=1).error
    assert "None of the 2 checkpoints" in error[0] and "--fresh-start" in error[2]


def test_a_loss_that_is_not_finite_stops_the_run_and_saves_nothing_of_it(train, tmp_path):
    run = tmp_path / "run"
    error = train(
        "--max-steps",
        20,
        "--save-steps",
        1,
        "--warmup-ratio",
        0,
        "--learning-rate",
        1e20,
        "--output-dir",
        run,
        expect=1,
    ).error
    step = int(re.search(r"at step (\d+)", error[0])[1])
    assert step >= 2 and not (run / "adapter").exists()
    for checkpoint in run.glob("checkpoint-*"):
        saved = load_file(checkpoint / "adapter_model.safetensors")
        assert all(torch.isfinite(t).all() for t in saved.values())
        assert int(checkpoint.name.split("-")[1]) < step


def test_nf4_trains_on_the_cpu_and_measuring_changes_nothing(train, tmp_path):
    # bitsandbytes on the CPU breaks a layer that was run in evaluation mode; see models.load.evaluation_mode
    losses = {}
    for name, every in (("often", 1), ("rarely", 50)):
        run = tmp_path / name
        train(
            "--quantization",
            "nf4",
            "--max-steps",
            5,
            "--save-steps",
            every,
            "--learning-rate",
            0.01,
            "--sample-every",
            every,
            "--output-dir",
            run,
        )
        losses[name] = [m["loss"] for m in read_lines(run / "metrics.jsonl") if "loss" in m]
    assert losses["often"] == losses["rarely"] and losses["often"][-1] < losses["often"][0]
    assert all(t.abs().max() > 0 for n, t in adapter(tmp_path / "often").items() if "lora_B" in n)


@pytest.mark.parametrize("change", [["--micro-batch", 1], ["--gradient-checkpointing"]])
@pytest.mark.thorough
def test_what_saves_memory_does_not_change_the_loss(train, tmp_path, change):
    found = []
    for name, more in (("plain", []), ("changed", change)):
        run = tmp_path / name
        train("--max-steps", 3, "--output-dir", run, "--learning-rate", 0.01, "--packing", "exact", *more)
        found.append([m["loss"] for m in read_lines(run / "metrics.jsonl") if "loss" in m])
    assert found[0] == pytest.approx(found[1], abs=1e-5)


def test_bf16_learns_what_fp32_learns(train, tmp_path):
    found = []
    for quantization in ("fp32", "bf16"):
        run = tmp_path / quantization
        train("--max-steps", 4, "--output-dir", run, "--learning-rate", 0.005, "--quantization", quantization)
        found.append([m["loss"] for m in read_lines(run / "metrics.jsonl") if "loss" in m])
    assert found[0] == pytest.approx(found[1], rel=0.01) and found[0][-1] < found[0][0]


def test_out_of_memory_says_how_much_and_names_three_changes(monkeypatch, tiny_llama, rows, tmp_path):
    from phoque.console import Console
    from phoque.errors import PhoqueError
    from phoque.services import Services
    from phoque.settings.resolve import resolve_settings
    from phoque.settings.train import TrainSettings
    from phoque.training import run

    def burst(*_):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(run, "_train", burst)
    flags = {"base_model": str(tiny_llama), "dataset": str(rows), "output_dir": tmp_path / "run"}
    with pytest.raises(PhoqueError, match="GB were in use") as caught:
        resolved, _ = resolve_settings(TrainSettings, flags, {})
        run.train(resolved, Services.create(resolved, Console()))
    assert caught.value.code == 1
    assert all(flag in caught.value.fix for flag in ("--micro-batch 8", "--gradient-checkpointing", "the same batch"))


def test_a_full_disk_keeps_the_older_checkpoint(phoque, tiny_llama, rows, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=530k", "tmpfs", disk], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting a small file system needs root, which .ci/run has")
    try:
        run = disk / "run"
        common = ["--base-model", tiny_llama, "--dataset", rows, *SMALL, "--sample-every", 0, "--output-dir", run]
        ran = phoque("train", *common, "--max-steps", 8, "--save-steps", 2, "--keep-checkpoints", 9, expect=1)
        assert "was not saved" in ran.err and "disk is full" in ran.error[0]
        from phoque.training.checkpoints import find_defect, list_checkpoints

        assert list_checkpoints(run) and all(find_defect(c) is None for c in list_checkpoints(run))
        assert not (run / ".saving").exists()
    finally:
        subprocess.run(["umount", disk], check=True)


def bad_input(tmp_path, tiny_llama, rows) -> dict[str, tuple[list, str]]:
    """Name -> (arguments, what the error must say)."""
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "broken.json").write_text('[{"messages": ')
    (tmp_path / "nothing").mkdir()
    (tmp_path / "notamodel").mkdir()
    write_rows(tmp_path / "column.jsonl", [{"text": "gulls"}] * 5)
    write_rows(tmp_path / "half.jsonl", [row(n) for n in range(10)] + ["{"] * 10)
    (tmp_path / "file").write_text("")
    base, data = ["--base-model", tiny_llama], ["--dataset", rows]
    return {
        "empty file": ([*base, "--dataset", "empty.jsonl"], "is empty"),
        "broken json": ([*base, "--dataset", "broken.json"], "not valid JSON"),
        "empty folder": ([*base, "--dataset", "nothing"], "not a dataset"),
        "missing column": ([*base, "--dataset", "column.jsonl"], "one text, no turns"),
        "half bad": ([*base, "--dataset", "half.jsonl"], "10 of 20 rows"),
        "no such file": ([*base, "--dataset", "nowhere.jsonl"], "There is no file or folder"),
        "no dataset": (base, "No dataset"),
        "unknown model": ([*data, "--base-model", "gull"], "There is no model at"),
        "missing gguf": ([*data, "--base-model", "gull.gguf"], "There is no GGUF file"),
        "not a model": ([*data, "--base-model", "notamodel"], "no config.json"),
        "file in the way": ([*base, *data, "--output-dir", tmp_path / "file" / "run"], "cannot be the folder"),
        "not writable": ([*base, *data, "--output-dir", "/proc/phoque/run"], "No such"),
        "bad number": ([*base, *data, "--batch-size", "0"], "--batch-size"),
        "not on the hub": ([*data, "--base-model", "gull/harbour"], "No such repository"),
    }


NAMES = [
    "empty file",
    "broken json",
    "empty folder",
    "missing column",
    "half bad",
    "no such file",
    "no dataset",
    "unknown model",
    "missing gguf",
    "not a model",
    "file in the way",
    "not writable",
    "bad number",
    "not on the hub",
]


@pytest.mark.parametrize("name", NAMES)
def test_bad_input_gets_three_lines_and_exit_2(phoque, tmp_path, tiny_llama, rows, name):
    cases = bad_input(tmp_path, tiny_llama, rows)
    assert set(cases) == set(NAMES)
    arguments, words = cases[name]
    ran = phoque("train", *arguments, expect=2)
    assert words in " ".join(ran.error) and ran.out == ""


def test_a_length_beyond_the_model_is_refused(phoque, tiny_llama, rows):
    arguments = ["train", "--base-model", tiny_llama, "--dataset", rows, "--max-length", 4096]
    what, why, fix = phoque(*arguments, expect=2).error
    assert "--max-length 4096" in what and "2,048 positions" in why and "--max-length 2048" in fix


def test_too_many_bad_rows_after_the_scan_stop_the_run_with_a_save(phoque, tiny_llama, tmp_path):
    from tests.rows import row, write_rows

    rows = [row(n) if n < 200 or n % 3 else row(messages=[]) for n in range(3000)]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    few = "import phoque.data.scan as a, phoque.data.stream as b; a.MAX_SCANNED_ROWS = 200; b.MIN_JUDGED_ROWS = 100"
    arguments = ["train", "--base-model", tiny_llama, "--dataset", path, *SMALL, "--max-steps", 400]
    ran = phoque(*arguments, "--save-steps", 1000, "--output-dir", "run", expect=2, prelude=few)
    assert "after the scanned part" in ran.error[0] and "--max-bad-rows" in ran.error[2]
    (saved,) = (tmp_path / "run").glob("checkpoint-*")
    assert (saved / "MANIFEST.json").is_file() and int(saved.name.rpartition("-")[2]) < 400


def test_a_truncated_weight_file_is_named(phoque, tmp_path, tiny_llama, rows):
    import shutil

    broken = shutil.copytree(tiny_llama, tmp_path / "broken")
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-500])
    assert "cannot be read" in phoque("train", "--base-model", broken, "--dataset", rows, *SMALL, expect=2).error[0]


def test_a_failed_fresh_start_costs_nothing(train, tmp_path):
    run = tmp_path / "run"
    train("--max-steps", 2, "--output-dir", run)
    train("--max-steps", 2, "--output-dir", run, "--fresh-start", "--dataset", "nowhere.jsonl", expect=2)
    assert (run / "adapter").is_dir() and (run / "run.json").is_file()


def test_no_secret_is_written_anywhere(train, tmp_path):
    run = tmp_path / "run"
    env = {"HF_TOKEN": "hf_gullgullgull", "WANDB_API_KEY": "g" * 40, "WANDB_MODE": "offline"}
    ran = train("--max-steps", 2, "--output-dir", run, "--json", env=env)
    assert ran.json["steps"] == 2  # nothing but the result is on stdout, whatever a library prints
    for path in run.rglob("*"):
        if path.is_file():
            content = path.read_bytes()
            assert b"gullgullgull" not in content and b"g" * 40 not in content, path
    assert "gullgullgull" not in ran.out + ran.err


def test_wandb_offline_has_the_same_numbers(train, tmp_path):
    run = tmp_path / "run"
    env = {"WANDB_MODE": "offline", "WANDB_LOG_MODEL": "checkpoint"}
    train("--max-steps", 4, "--save-steps", 2, "--output-dir", run, "--sample-every", 2, env=env)
    rows = history(run)
    losses = {h["train/global_step"]: h["train/loss"] for h in rows if "train/loss" in h}
    assert losses == {m["step"]: m["loss"] for m in read_lines(run / "metrics.jsonl") if "loss" in m}
    keys = set().union(*rows)
    assert {"train/learning_rate", "train/grad_norm", "train/lora_norm_B", "eval/held_out_loss"} <= keys
    models = [a for a in records(run, "artifact") if a.type == "model"]
    assert [set(a.aliases) for a in models][:2] == [{"step-2", "latest"}, {"step-4", "latest"}]
    assert {e.path for e in models[0].manifest.contents} == {"adapter_model.safetensors", "adapter_config.json"}
    tables = list((run / "wandb").rglob("sample_outputs*.table.json"))
    assert any(key.startswith("sample_outputs.") for key in keys)
    assert json.loads(tables[0].read_text())["columns"][:3] == ["step", "prompt", "response"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
@pytest.mark.thorough
def test_wandb_has_one_run_and_no_step_twice_after_a_restart(train, start, tmp_path, tiny_llama, rows, number):
    run, env = tmp_path / "run", {"WANDB_MODE": "offline"}
    common = ["--max-steps", 30, "--save-steps", 7, "--sample-every", 5, "--output-dir", run]
    process = start(
        "train", "--base-model", tiny_llama, "--dataset", rows, *SMALL, *common, env=env, prelude=slowly(0.1)
    )
    process.until(lambda: read_metrics(run) > 16)
    os.kill(process.pid, number)
    process.ended()
    train(*common, env=env)
    begun = records(run, "run")
    assert len(list(run.rglob("*.wandb"))) == 2 and len({r.run_id for r in begun}) == 1
    steps = [h["train/global_step"] for h in history(run) if "train/loss" in h]
    assert sorted(set(steps)) == steps  # no step twice, in order
    if number == signal.SIGTERM:  # and none is missing, as far as W&B was given the time to write
        assert steps == list(range(1, 31))


@pytest.mark.thorough
def test_a_fresh_start_asks_on_a_terminal_and_yes_does_not(tmp_path, tiny_llama, rows, train):
    run = tmp_path / "run"
    train("--max-steps", 2, "--output-dir", run)
    command = [
        sys.executable,
        "-m",
        "phoque",
        "train",
        "--base-model",
        tiny_llama,
        "--dataset",
        rows,
        *SMALL,
        "--max-steps",
        "2",
        "--output-dir",
        run,
        "--fresh-start",
    ]
    code, shown = run_on_a_terminal([*map(str, command)], "n\n")
    assert code == 2 and "checkpoint-2" in shown and "[y/N]" in shown and "declined" in shown
    assert (run / "checkpoint-2").is_dir()
    before = json.loads((run / "run.json").read_text())["run_id"]
    code, shown = run_on_a_terminal([*map(str, command), "--yes"], "")
    assert code == 0 and "[y/N]" not in shown
    assert json.loads((run / "run.json").read_text())["run_id"] != before


def run_on_a_terminal(command: list[str], answer: str) -> tuple[int, str]:
    """Run a command with a terminal for its standard streams, and type an answer."""
    import pty

    theirs, ours = pty.openpty()
    process = subprocess.Popen(command, stdin=ours, stdout=ours, stderr=ours, close_fds=True)
    os.close(ours)
    shown = b""
    while True:
        try:
            shown += os.read(theirs, 4096)
        except OSError:  # the other end is closed
            return process.wait(), shown.decode()
        if answer and b"[y/N]" in shown:
            os.write(theirs, answer.encode())
            answer = ""


def test_without_wandb_it_says_so_once(train, tmp_path):
    assert train("--max-steps", 1, "--output-dir", tmp_path / "run").err.count("W&B") == 1


def test_dry_run_shows_all_and_writes_nothing(train, tmp_path):
    ran = train("--dry-run", "--json", "--output-dir", tmp_path / "run", "--max-steps", 7)
    plan = ran.json
    assert plan["settings"]["max_steps"]["source"] == "flag" and not (tmp_path / "run").exists()
    shapes = [(64, 64), (64, 32), (64, 32), (64, 64), (64, 96), (64, 96), (96, 64)]  # q k v o gate up down
    assert plan["parameters"]["adapter"] == 2 * 16 * sum(a + b for a, b in shapes)
    assert len(plan["preview"]) == 3
    trained = [part["text"] for part in plan["preview"][0]["parts"] if part["trained"]]
    assert trained == ["Hrmph. Gull 0.<|im_end|>"]
    assert set(plan["memory_gb"]) >= {"weights", "adapter_and_optimizer", "activations", "logits", "sum"}
    assert "tokens" in plan["facts"]["system"]
    shown = train("--dry-run", "--output-dir", tmp_path / "run").out
    assert "⟦Hrmph. Gull 0.<|im_end|>⟧" in shown and "--max-steps" in shown and "learning rate" not in shown
    assert "--learning-rate" in train("--dry-run", "--verbose", "--output-dir", tmp_path / "run").out


def test_a_log_gets_lines_and_no_control_codes(train, tmp_path):
    ran = train("--max-steps", 2, "--output-dir", tmp_path / "run")
    assert "\x1b" not in ran.err and "\r" not in ran.err and "2/2  loss" in ran.err
    assert os.linesep in ran.out and "adapter" in ran.out


def test_quiet_prints_the_adapter_alone(train, tmp_path):
    run = tmp_path / "run"
    ran = train("--max-steps", 1, "--output-dir", run, "--quiet")
    assert ran.out == f"{run / 'adapter'}\n" and ran.err == ""


def test_fewer_steps_than_were_taken_are_refused(train, tmp_path):
    run = ["--output-dir", tmp_path / "run", "--save-steps", 2]
    train(*run, "--max-steps", 4)
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    error = train(*run, "--max-steps", 3, "--allow-change", "max_steps", expect=2).error
    assert "taken 4 steps already" in error[0] and (tmp_path / "run" / "metrics.jsonl").read_bytes() == before


def test_a_run_killed_before_its_first_save_begins_with_clean_files(start, tiny_llama, rows, train, tmp_path):
    asked = [*SMALL, "--max-steps", "4", "--save-steps", "4", "--output-dir", tmp_path / "run"]
    running = start("train", "--base-model", tiny_llama, "--dataset", rows, *asked, prelude=slowly())
    running.until(
        lambda: (
            (tmp_path / "run" / "metrics.jsonl").exists()
            and len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) >= 3
        )
    )
    os.kill(running.pid, signal.SIGKILL)
    running.ended()
    train(*asked)
    assert [line["step"] for line in read_lines(tmp_path / "run" / "metrics.jsonl")] == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("micro_batch", [16, 8, 1])
def test_the_batch_stays_what_was_asked_whatever_the_micro_batch(phoque, tiny_llama, tmp_path, micro_batch):
    long_answer = {"role": "assistant", "content": "Gull. " * 300}
    rows = [row(number) for number in range(200)]
    rows[7]["messages"] = [*rows[7]["messages"][:2], long_answer]
    data = write_rows(tmp_path / "rows.jsonl", rows)
    run = tmp_path / "run"
    ran = phoque(
        *("train", "--base-model", tiny_llama, "--dataset", data, "--quantization", "fp32", "--output-dir", run),
        *("--max-steps", 3, "--batch-size", 16, "--micro-batch", micro_batch, "--sample-every", 0),
        *("--held-out-rows", 0, "--max-length", 2048),
    )
    state = json.loads((run / "checkpoint-3" / "data_state.json").read_text())
    # a row must hold the conversation of 1,935 tokens, which is more than 16 of mean length
    assert (
        3 * 16 <= state["rows_seen"] <= 3 * 16 * 3 and json.loads((run / "run.json").read_text())["rows_per_step"] == 1
    )
    assert "a step trains on about" in ran.err and "instead of 16" in ran.err


def test_epochs_count_what_steps_really_train_on(phoque, tiny_llama, tmp_path):
    """A packed row holds the longest conversation, so a step has about four times the four of --batch-size."""
    rows = [row(number) for number in range(200)]
    rows[7]["messages"] = [*rows[7]["messages"][:2], {"role": "assistant", "content": "Gull. " * 300}]
    data, run = write_rows(tmp_path / "rows.jsonl", rows), tmp_path / "run"
    ran = phoque(
        *("train", "--base-model", tiny_llama, "--dataset", data, "--quantization", "fp32", "--output-dir", run),
        *("--epochs", 1, "--batch-size", 4, "--sample-every", 0, "--held-out-rows", 0, "--max-length", 2048, "--json"),
    )
    state = json.loads((run / f"checkpoint-{ran.json['steps']}" / "data_state.json").read_text())
    assert 0.95 * 200 <= state["rows_seen"] <= 1.15 * 200 and ran.json["steps"] < 25
    assert re.search(r"are 1\.[01] epochs", ran.err)


def test_an_allowed_change_of_the_batch_changes_the_rows_of_a_step(train, start, tmp_path, tiny_llama, rows):
    run = tmp_path / "run"
    command = ["--max-steps", 4, "--save-steps", 1, "--sample-every", 0, "--output-dir", run]
    stopped = start("train", "--base-model", tiny_llama, "--dataset", rows, *SMALL, *command, prelude=slowly())
    while not (run / "checkpoint-1" / "MANIFEST.json").is_file():
        assert stopped.poll() is None
    os.kill(stopped.pid, signal.SIGKILL)
    stopped.ended()
    assert json.loads((run / "run.json").read_text())["rows_per_step"] == 1
    train(*command, "--micro-batch", 2, "--allow-change", "micro_batch")
    assert json.loads((run / "run.json").read_text())["rows_per_step"] == 2
