"""Epochs, schedules, target modules, rsLoRA, the best adapter and early stops, as a user asks for them."""

import json
import math
import os
import shutil
import signal
import sqlite3
from pathlib import Path

import pytest
from safetensors.torch import load_file
from tests.fakehub import TOKEN
from tests.forkserver import slowly
from tests.rows import row, write_rows

from phoque.training.best import has_stalled

QUIET = {"WANDB_MODE": "disabled"}


@pytest.fixture
def asked(tiny_llama, rows):
    """A run on forty rows, four of which are held out."""
    words = ["train", "--base-model", tiny_llama, "--dataset", rows, "--quantization", "fp32", "--output-dir", "run"]
    return [*words, "--sample-every", 0, "--batch-size", 4, "--save-steps", 100, "--log-every", 1]


def saying(text, numbers):
    return [row(n, messages=[*row(n)["messages"][:2], {"role": "assistant", "content": text}]) for n in numbers]


@pytest.fixture
def overfit(tiny_llama, tmp_path):
    """A run whose held-out loss falls and then rises: it learns one letter, ever more surely."""
    (tmp_path / "data").mkdir()
    write_rows(tmp_path / "data" / "train.jsonl", saying("g g g g g g " * 6, range(40)))
    other = "a tide, a crab, two dull limpets and wind"
    write_rows(tmp_path / "data" / "test.jsonl", saying(other, range(100, 106)))
    words = ["train", "--base-model", tiny_llama, "--dataset", "data", "--eval-split", "test", "--quantization", "fp32"]
    words += ["--output-dir", "run", "--sample-every", 0, "--batch-size", 4, "--log-every", 1, "--save-steps", 100]
    return [
        *words,
        "--max-steps",
        24,
        "--learning-rate",
        0.02,
        "--lr-scheduler",
        "constant",
        "--warmup-ratio",
        0,
        "--eval-steps",
        2,
    ]


def metrics(folder="run"):
    return [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]


def measured(folder="run"):
    return {m["step"]: m["held_out_loss"] for m in metrics(folder) if m.get("held_out_loss") is not None}


def weights(folder):
    return load_file(Path(folder) / "adapter_model.safetensors")


def equal(first, second):
    return all((first[name] == second[name]).all() for name in first | second)


@pytest.mark.parametrize(
    ("more", "steps"),
    [
        (["--epochs", 1], 9),  # 36 rows of 4
        (["--epochs", 0.5], 5),
        (["--epochs", 3, "--max-steps", 10], 10),
        (["--epochs", 1, "--max-steps", 100], 9),
    ],
)
def test_epochs_become_steps_and_max_steps_is_their_limit(phoque, asked, more, steps):
    ran = phoque(*asked, *more, "--dry-run", "--json", env=QUIET)
    assert ran.json["facts"]["length"].startswith(f"{steps} steps, ")


def test_a_run_of_epochs_is_resumed_and_complete(phoque, start, asked):
    asked = [*asked, "--epochs", 1, "--save-steps", 3]
    running = start(*asked, env=QUIET, prelude=slowly())
    running.until(lambda: Path("run/checkpoint-3").exists())
    os.kill(running.pid, signal.SIGTERM)
    assert running.ended().code == 75
    ran = phoque(*asked, "--json", env=QUIET)
    assert ran.json["steps"] == 9 and "continuing from step" in ran.err
    assert "nothing to train" in phoque(*asked, env=QUIET).err
    settings = json.loads(Path("run/run.json").read_text())["settings"]
    assert settings["max_steps"]["value"] == 9 and settings["max_steps"]["source"] == "--epochs"


@pytest.mark.parametrize("kind", ["cosine", "linear", "constant"])
def test_the_learning_rate_follows_its_schedule(phoque, asked, kind):
    phoque(*asked, "--max-steps", 10, "--warmup-ratio", 0.2, "--lr-scheduler", kind, "--learning-rate", 0.01, env=QUIET)
    rates = [m["learning_rate"] for m in metrics() if "learning_rate" in m]
    assert rates[:3] == pytest.approx([0, 0.005, 0.01])  # the warm-up
    shape = {"cosine": lambda x: (1 + math.cos(math.pi * x)) / 2, "linear": lambda x: 1 - x, "constant": lambda x: 1}
    assert rates[2:] == pytest.approx([0.01 * shape[kind](step / 8) for step in range(8)])


@pytest.mark.parametrize(
    ("wanted", "modules"),
    [
        ("attention", {"q_proj", "k_proj", "v_proj", "o_proj"}),
        ("mlp", {"gate_proj", "up_proj", "down_proj"}),
        ("q_proj, v_proj,", {"q_proj", "v_proj"}),
        ("mlp,o_proj", {"gate_proj", "up_proj", "down_proj", "o_proj"}),
        (r".*\.self_attn\.[qo]_proj", {"q_proj", "o_proj"}),
    ],
)
def test_the_adapter_has_the_modules_that_were_asked_for(phoque, asked, tiny_llama, wanted, modules):
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    phoque(*asked, "--max-steps", 3, "--target-modules", wanted, env=QUIET)
    names = {name.split(".lora_")[0].rpartition(".")[2] for name in weights("run/adapter")}
    assert names == modules
    base = AutoModelForCausalLM.from_pretrained(tiny_llama)
    ids = torch.arange(5, 40)[None]
    before = base(ids).logits
    tuned = PeftModel.from_pretrained(base, "run/adapter")
    loaded = {name for name, module in tuned.named_modules() if hasattr(module, "lora_A")}
    assert {name.rpartition(".")[2] for name in loaded} == modules
    assert (tuned(ids).logits - before).abs().max() > 0
    merged = phoque("merge", "--adapter-source", "run", "--output-dir", "merged", "--dtype", "fp32", "--json").json
    assert merged["proof"]["holds"]


def test_a_regular_expression_may_choose_layers(phoque, asked, tiny_llama):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    ran = phoque(*asked, "--max-steps", 3, "--target-modules", r"model\.layers\.1\.mlp\..*", env=QUIET)
    assert {name.split("layers.")[1][0] for name in weights("run/adapter")} == {"1"}
    tuned = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_llama), "run/adapter")
    loaded = [name for name, module in tuned.named_modules() if hasattr(module, "lora_A")]
    assert len(loaded) == 3 and all("layers.1.mlp" in name for name in loaded)
    assert "engine eager: plain layers: --target-modules adapts other modules" in ran.err


@pytest.mark.parametrize(
    ("wanted", "words"),
    [
        ("q_prj", "matches no linear layer"),
        (",", "matches no linear layer"),
        ("(", "no regular expression"),
        (".*", "model.embed_tokens"),
        ("lm_head", "lm_head"),
    ],
)
def test_target_modules_that_cannot_be_adapted_are_refused(phoque, asked, wanted, words):
    what, why, fix = phoque(*asked, "--target-modules", wanted, env=QUIET, expect=2).error
    assert words in what + why and "down_proj" in fix + why


def test_rslora_scales_by_the_root_of_the_rank(phoque, asked):
    phoque(*asked, "--max-steps", 2, "--rslora", "--lora-rank", 4, "--lora-alpha", 8, env=QUIET)
    config = json.loads(Path("run/adapter/adapter_config.json").read_text())
    assert config["use_rslora"] and config["r"] == 4 and config["lora_alpha"] == 8
    ran = phoque("merge", "--adapter-source", "run", "--output-dir", "merged", "--dtype", "fp32", "--json")
    assert ran.json["proof"]["holds"]
    error = phoque(*asked, "--max-steps", 2, "--lora-rank", 4, "--lora-alpha", 8, env=QUIET, expect=2).error
    assert "rslora was True, is False" in error[1]


def test_the_best_adapter_is_kept_and_the_last_one_stays_beside_it(phoque, overfit):
    ran = phoque(*overfit, "--keep-best", "--json", env=QUIET)
    losses = measured()
    best = min((loss, step) for step, loss in losses.items() if step > 0)[1]
    assert 0 < best < 24 and losses[24] > losses[best]  # otherwise this test shows nothing
    assert ran.json["adapter_step"] == best and ran.json["steps"] == 24
    assert ran.json["held_out_loss"]["after"] == losses[best] == ran.json["held_out_loss"]["lowest"]
    assert not equal(weights("run/adapter"), weights("run/checkpoint-24"))
    # the adapter is that of a run which ended there
    short = [word if word != "run" else "short" for word in overfit]
    phoque(*short, "--max-steps", best, env=QUIET)
    assert equal(weights("run/adapter"), weights("short/adapter"))
    card = Path("run/adapter/README.md").read_text()
    assert f"step {best}" in card and f"{losses[best]:.3f}" in card
    assert f"The adapter is that of step {best}" in Path("run/report.html").read_text()


def test_without_it_the_result_names_the_better_step(phoque, overfit):
    ran = phoque(*overfit, env=QUIET)
    losses = measured()
    best = min(losses, key=losses.__getitem__)
    assert f"it was lowest at step {best} ({losses[best]:.3f})" in ran.out and "--keep-best" in ran.out


def test_a_run_that_never_got_better_says_so(phoque, asked):
    ran = phoque(*asked, "--max-steps", 2, "--learning-rate", 1, env=QUIET)
    assert "higher)" in ran.out and "never lower than before training" in ran.out


def test_an_early_stop_ends_the_run_whole(phoque, overfit):
    ran = phoque(*overfit, "--early-stop", 3, "--sample-every", 100, "--prompt", "Gull 1?", "--json", env=QUIET)
    losses = measured()
    last, best = max(losses), min(losses, key=losses.__getitem__)
    assert ran.json["steps"] == last == best + 6 < 24  # three measurements without a lower loss
    assert ran.json["adapter_step"] == last and Path(f"run/checkpoint-{last}").is_dir()
    assert f"the run ends at step {last}" in ran.err and [s["step"] for s in ran.json["samples"]] == [last]
    assert "lora_norm_B" in metrics()[-1]
    assert "nothing to train" in phoque(*overfit, "--early-stop", 3, "--sample-every", 100, env=QUIET).err
    # with another setting it is another run, which can go on
    error = phoque(*overfit, env=QUIET, expect=2).error
    assert "early_stop was 3, is None" in error[1]
    more = phoque(*overfit, "--allow-change", "early_stop", "--json", env=QUIET)
    assert more.json["steps"] == 24 and f"continuing from step {last}" in more.err


@pytest.mark.thorough
def test_the_last_step_of_an_early_stop_is_merged_once(phoque, overfit, hub):
    env = QUIET | {"HF_TOKEN": TOKEN, "EXPORT_MERGED_MODEL": "1", "EXPORT_INFERENCE_ON_SAVE": "1"}
    ran = phoque(*overfit, "--early-stop", 3, "--hub-model-id", "harbour/seal", "--json", env=env)
    titles = [commit.title for commit in hub.repos["models", "harbour/seal-merged"].commits][1:]
    assert titles[-1] == "Merged model" and f"Merged model of step {ran.json['steps']}" not in titles


def test_a_run_killed_after_its_early_stop_ends_as_one_that_was_not(phoque, overfit, tmp_path):
    asked = [*overfit, "--early-stop", 3, "--keep-best"]
    phoque(*asked, env=QUIET)
    last, best = max(measured()), json.loads(Path("run/best/best.json").read_text())["step"]
    adapter = weights("run/adapter")
    shutil.rmtree("run/adapter")
    record = json.loads(Path("run/run.json").read_text())
    record.pop("result")
    Path("run/run.json").write_text(json.dumps(record))
    shutil.rmtree("run/best")  # the checkpoint has it too
    ran = phoque(*asked, "--json", env=QUIET)
    assert ran.json["steps"] == last and ran.json["adapter_step"] == best
    assert equal(adapter, weights("run/adapter"))


def test_the_best_adapter_survives_a_move_to_another_machine(phoque, start, overfit, hub, tmp_path):
    env = QUIET | {"HF_TOKEN": TOKEN}
    asked = [*overfit, "--keep-best", "--hub-model-id", "harbour/seal"]
    running = start(*asked, env=env, prelude=slowly())
    running.until(lambda: Path("run/metrics.jsonl").exists() and max(measured(), default=0) >= 14)
    os.kill(running.pid, signal.SIGTERM)
    assert running.ended().code == 75
    assert any(
        name.endswith("/best/adapter_model.safetensors")
        for name in hub.repos["models", "harbour/seal"].commits[-1].files
    )
    shutil.rmtree("run")
    ran = phoque(*asked, "--json", env=env)
    assert ran.json["adapter_step"] == min((loss, step) for step, loss in measured().items() if step)[1] < 24
    whole = [word if word != "run" else "whole" for word in overfit]
    phoque(*whole, "--keep-best", env=QUIET)
    assert equal(weights("run/adapter"), weights("whole/adapter"))
    assert hub.repos["models", "harbour/seal"].commits[-1].files["adapter_model.safetensors"].content == (
        Path("run/adapter/adapter_model.safetensors").read_bytes()
    )


def test_a_loss_that_is_not_measured_cannot_choose(phoque, asked, tmp_path, tiny_llama):
    error = phoque(*asked, "--keep-best", "--held-out-rows", 0, env=QUIET, expect=2).error
    assert "--keep-best has no held-out loss to compare" in error[0]
    few = write_rows(tmp_path / "few.jsonl", [row(n) for n in range(5)])
    words = ["train", "--base-model", tiny_llama, "--dataset", few, "--quantization", "fp32", "--early-stop", 1]
    assert "no held-out loss" in phoque(*words, env=QUIET, expect=2).error[0]


def test_patience_counts_measurements_since_the_lowest():
    losses = [(0, 3.0), (2, 2.0), (4, 2.5), (6, 2.2)]
    assert has_stalled(losses, 2) and not has_stalled(losses, 3) and not has_stalled(losses[:3], 2)
    assert not has_stalled(losses, None) and not has_stalled([], 1)
    assert has_stalled([(0, 1.0), (2, 1.0)], 1)  # an equal loss is not lower


def test_a_run_repeats_another_by_its_record(phoque, asked, hub):
    lines = "\n".join(json.dumps(row(n)) for n in range(40))
    hub.add("datasets", "harbour/gulls", {"train.jsonl": lines.encode()})
    asked[asked.index("--dataset") + 1] = "harbour/gulls"
    env = QUIET | {"HF_TOKEN": TOKEN}
    phoque(*asked, "--epochs", 0.5, "--lora-rank", 4, "--seed", 3, env=env)
    hub.put("harbour/gulls", {"train.jsonl": lines.replace("Hrmph", "Grumble").encode()}, kind="datasets")
    phoque("train", "--config", "run/run.json", "--output-dir", "again", env=env)
    assert equal(weights("run/adapter"), weights("again/adapter"))  # on the commit that the first run had
    phoque("train", "--config", "run/run.json", "--output-dir", "other", "--seed", 4, env=env)
    assert not equal(weights("run/adapter"), weights("other/adapter"))


@pytest.fixture
def database(monkeypatch, tmp_path):
    """Trackio's folder, as the next command has it."""
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    return tmp_path / "trackio" / "seals.db"


def trackio_runs(database):
    with sqlite3.connect(database) as db:
        db.row_factory = sqlite3.Row
        rows = [dict(r) for r in db.execute("select run_name, step, metrics from metrics order by step")]
    found = {}
    for r in rows:
        found.setdefault(r["run_name"], []).append((r["step"], json.loads(r["metrics"])))
    return found


def test_trackio_has_each_step_once_also_of_a_resumed_run(phoque, start, asked, database):
    asked = [*asked, "--report-to", "trackio", "--wandb-project", "seals", "--max-steps", 8, "--save-steps", 3]
    running = start(*asked, prelude=slowly())
    running.until(lambda: Path("run/checkpoint-3").exists())
    os.kill(running.pid, signal.SIGTERM)
    assert running.ended().code == 75
    ran = phoque(*asked, "--sample-every", 8, "--sample-tokens", 4, "--json")
    assert "Trackio: `trackio show --project seals`" in ran.err and "W&B" not in ran.err
    ((name, lines),) = trackio_runs(database).items()
    assert name.startswith("run-")
    steps = [step for step, metrics in lines if "train/loss" in metrics]
    assert steps == list(range(1, 9)) and any("eval/held_out_loss" in metrics for _, metrics in lines)
    assert any("sample_outputs" in metrics for _, metrics in lines)


@pytest.mark.parametrize(("value", "words"), [("wandbb", "not one of wandb, trackio"), ("none,wandb", "excludes")])
def test_a_service_that_is_unknown_is_refused(phoque, asked, value, words):
    assert words in phoque(*asked, "--report-to", value, expect=2).error[1]


@pytest.mark.parametrize("broken", ["trackio.init", "trackio.run.Run.log"])
def test_a_broken_trackio_stops_nothing(phoque, asked, database, broken):
    breaks = f"import trackio\ndef fail(*a, **k): raise ConnectionError('the tide took it')\n{broken} = fail"
    ran = phoque(*asked, "--report-to", "trackio", "--max-steps", 2, prelude=breaks)
    assert "Trackio: the tide took it; the run continues without it" in ran.err and Path("run/adapter").is_dir()


def test_new_rows_are_no_other_command_though_epochs_take_more_steps(phoque, start, asked, rows):
    asked = [*asked, "--epochs", 40, "--save-steps", 3, "--fresh-start"]
    running = start(*asked, env=QUIET, prelude=slowly(0.05))
    running.until(lambda: Path("run/checkpoint-3").exists())
    os.kill(running.pid, signal.SIGTERM)
    assert running.ended().code == 75
    kept = sorted(path.name for path in Path("run").glob("checkpoint-*"))
    with rows.open("a") as f:
        f.writelines(json.dumps(row(n)) + "\n" for n in range(200, 240))
    error = phoque(*asked, env=QUIET, expect=2).error
    assert "a different run" in error[0] and sorted(path.name for path in Path("run").glob("checkpoint-*")) == kept


def test_a_run_that_is_repeated_keeps_the_limit_of_its_steps(phoque, asked):
    phoque(*asked, "--max-steps", 4, "--epochs", 9, env=QUIET)
    plan = phoque("train", "--config", "run/run.json", "--output-dir", "again", "--dry-run", "--json", env=QUIET).json
    assert plan["facts"]["length"].startswith("4 steps") and plan["settings"]["max_steps"]["value"] == 4


def test_a_stop_at_a_measurement_does_not_lose_it(phoque, start, overfit):
    asked = [*overfit, "--keep-best", "--early-stop", 3]
    running = start(*asked, env=QUIET, prelude=slowly(0.15))
    running.until(lambda: Path("run/metrics.jsonl").exists() and max((m["step"] for m in metrics()), default=0) >= 7)
    os.kill(running.pid, signal.SIGTERM)  # it stops after step 8, which is measured
    assert running.ended().code == 75
    ran = phoque(*asked, "--json", env=QUIET)
    after = measured()
    whole = [word if word != "run" else "whole" for word in asked]
    alone = phoque(*whole, "--json", env=QUIET)
    assert after == pytest.approx(measured("whole"))
    assert ran.json["adapter_step"] == alone.json["adapter_step"] and ran.json["steps"] == alone.json["steps"]
    assert equal(weights("run/adapter"), weights("whole/adapter"))


def test_losses_on_other_held_out_rows_are_not_compared(phoque, overfit):
    phoque(*overfit, "--keep-best", "--max-steps", 8, env=QUIET)
    lines = Path("data/test.jsonl").read_text().replace("a tide", "g g g g")
    Path("data/test.jsonl").write_text(lines)
    error = phoque(*overfit, "--keep-best", "--max-steps", 8, env=QUIET, expect=2).error
    assert "the held-out rows of --eval-split differ (eval_digest)" in error[1]
    allowed = "max_steps,eval_digest"
    ran = phoque(*overfit, "--keep-best", "--max-steps", 16, "--allow-change", allowed, "--json", env=QUIET)
    assert ran.json["adapter_step"] > 8 and ran.json["held_out_loss"]["lowest_step"] > 8
    later = [line["held_out_loss"] for line in metrics() if "held_out_loss" in line and line["step"] > 8]
    assert ran.json["held_out_loss"]["before"] == pytest.approx(later[0])


def test_a_card_bounds_the_energy_of_the_gpus():
    from phoque.model_cards import render_adapter_card

    record = json.loads((Path(__file__).parent / "fixtures" / "run_a88615e" / "run" / "run.json").read_text())
    record |= {"device": "NVIDIA H100 80GB HBM3", "processes": 2, "parameters": {"all": 3e9}}
    card = render_adapter_card(record, record["result"] | {"tokens": 1e6, "seconds": 1800})
    assert "1.2e+16 FLOPs (4 per parameter and token)" in card
    assert "last attempt: 30.0 minutes on 2 x NVIDIA H100 80GB HBM3, at most 0.7 kWh at 700 W per card" in card
    record["device"] = "NVIDIA A10G"
    assert "at most 0.3 kWh at 300 W" in render_adapter_card(
        record, record["result"] | {"tokens": 1e6, "seconds": 1800}
    )
    record["engine"] = {"mode": "compiled", "recomputed_layers": 13, "layers": 26}  # half of them run forward twice
    assert "1.5e+16 FLOPs (5 per parameter and token)" in render_adapter_card(
        record, record["result"] | {"tokens": 1e6, "seconds": 1800}
    )


def test_a_card_names_the_ten_largest_sources():
    from phoque.model_cards import render_adapter_card

    record = json.loads((Path(__file__).parent / "fixtures" / "run_a88615e" / "run" / "run.json").read_text())
    record["data"]["sources"] = {f"harbour-{n}": n for n in range(1, 14)}
    card = render_adapter_card(record, record["result"])
    assert "rows by source: harbour-13 13, " in card and "harbour-4 4 and 3 others" in card and "harbour-3 " not in card
