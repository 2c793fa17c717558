"""phoque compare-sae as a user runs it: its files, a planted change, the nulls, a control, the Hub, a killed run."""

import csv
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy
import pytest
import torch
from safetensors.torch import load_file
from tests import tiny
from tests.fakehub import TOKEN
from tests.fakehub.jobs import Jobs
from tests.jobs.test_jobs import Container

from phoque.probes.sae.dictionary import DIFFERENCES, Dictionary, write_dictionary

PROSE = "The gulls came at noon and took the herring, one by one. The tide was late; the old seal said nothing. "
SHORT = (
    "--quantization fp32 --tokens 6000 --own-answers 6 --k 8 --sae-batch 64 --passes 2 --max-new-tokens 6 "
    "--cards 2 --causal-prompts 4"
).split()
FILES = {
    "sae_comparison_report.json",
    "sae_comparison_report.md",
    "report.html",
    "README.md",
    "feature_shifts.csv",
    "prompt_shifts.csv",
    "layer_shift.csv",
    "generations.jsonl",
    "sae",
}
REPO = "harbour/probes"


def read_table(path):
    with path.open(newline="") as f:
        return list(csv.DictReader(f))


def find_run(ran):
    return Path(ran.json["folder"])


def read_report(ran):
    return json.loads((find_run(ran) / "sae_comparison_report.json").read_text())


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """Files that every test of this module gives alike, so that an autoencoder is trained once and found again."""
    from tests.rows import row, write_rows

    folder = tmp_path_factory.mktemp("texts")
    (folder / "prose.txt").write_text(PROSE * 60)
    return {"chat": write_rows(folder / "rows.jsonl", [row(n) for n in range(40)]), "text": folder / "prose.txt"}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A Llama of three blocks with room for a planted change: biases, all zero."""
    return tiny.llama(tmp_path_factory.mktemp("base") / "llama", num_hidden_layers=3, mlp_bias=True)


def copy_and_change(base, folder, change, dtype=torch.float32):
    """A copy of the base model after `change(model)`."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(base)
    with torch.no_grad():
        change(model)
    model.to(dtype).save_pretrained(folder)
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    return folder


@pytest.fixture
def run_comparison(phoque, texts, base):
    def run(*more, expect=0, short=SHORT, model=base, **options):
        return phoque(
            "compare-sae",
            "--base-model",
            model,
            "--chat",
            texts["chat"],
            "--text",
            texts["text"],
            *short,
            "--json",
            *more,
            expect=expect,
            **options,
        )

    return run


@pytest.fixture
def adapter(phoque, base, rows):
    phoque(
        "train",
        "--base-model",
        base,
        "--dataset",
        rows,
        "--quantization",
        "fp32",
        "--max-steps",
        6,
        "--batch-size",
        4,
        "--learning-rate",
        0.02,
        "--sample-every",
        0,
        "--output-dir",
        "tuned",
        env={"WANDB_MODE": "disabled"},
    )
    return "tuned"


def test_a_run_leaves_its_reports_tables_and_dictionary(run_comparison, adapter, base):
    ran = run_comparison(
        "--updated-adapter",
        adapter,
        "--control-adapter",
        adapter,
        "--persona",
        "seal",
        "--output-dir",
        "out",
        "--report-json",
        "copies/report.json",
        "--report-md",
        "copies/report.md",
    )
    run, report = find_run(ran), read_report(ran)
    assert run.parent.name == "out" and run.name.startswith("sae_2") and {f.name for f in run.iterdir()} == FILES
    assert Path("copies/report.json").read_text() == (run / "sae_comparison_report.json").read_text()
    assert Path("copies/report.md").read_text() == (run / "sae_comparison_report.md").read_text()
    assert report["schema_version"] == 1 and report["layer"] == {
        "block_index": 1,
        "of": 3,
        "indexing": "block_output_0based",
    }
    assert {"base", "tuned", "control"} == report["models"].keys()
    features = read_table(run / "feature_shifts.csv")
    assert len(features) == 4 * 64 and [int(r["feature_id"]) for r in features] == list(range(256))
    for row in features:
        if row["tested"] == "1":
            assert float(row["ci_low"]) <= float(row["delta"]) <= float(row["ci_high"])
            assert float(row["delta"]) == pytest.approx(float(row["tuned_mean"]) - float(row["base_mean"]), abs=1e-4)
            assert 0 < float(row["p_perm"]) <= float(row["q_bh"]) <= 1 and float(row["p_perm"]) <= float(row["p_maxT"])
        else:
            assert row["q_bh"] == "" and row["reported"] == "0"
    assert sum(r["reported"] == "1" for r in features) == report["overall"]["n_reported"] == len(report["features"])
    # it is its own control: nothing is its own
    assert report["overall"]["n_specific"] == 0 and {r["specific_vs_control"] for r in features} == {"0"}
    difference = report["difference"]
    assert difference["n_specific"] == 0 < difference["n_reported"] <= difference["n_directions"] == 64
    assert difference["explained"]["tuned"] == difference["explained"]["control"] > 0.3
    assert [d["mean"] for d in difference["directions"]] == sorted(
        (d["mean"] for d in difference["directions"]), reverse=True
    )
    assert "Directions of the difference" in (run / "report.html").read_text()
    assert (run / "sae" / "block-1-difference" / "cfg.json").is_file()
    prompts = read_table(run / "prompt_shifts.csv")
    assert len(prompts) == report["prompts"]["n"] == 96
    assert [float(r["shift"]) for r in prompts] == sorted((float(r["shift"]) for r in prompts), reverse=True)
    answers = [json.loads(line) for line in (run / "generations.jsonl").read_text().splitlines()]
    assert len(answers) == 3 * 96 and answers[0]["scores"].keys() == {"contrast", "lexicon"}
    layers = read_table(run / "layer_shift.csv")
    assert {(r["model"], r["text"]) for r in layers} == {
        *((side, kind) for side in ("tuned", "control") for kind in ("response", "own", "text")),
        *((side, kind) for side in ("dtype", "packing") for kind in ("response", "text")),
    }
    assert len(layers) == 3 * 10
    config = json.loads((run / "sae" / "block-1" / "cfg.json").read_text())
    assert config["metadata"]["hook_name"] == "model.layers.1" and str(base.parent) not in json.dumps(config)
    assert report["config"]["seed"]["source"] == "default" and TOKEN not in (run / "report.html").read_text()


@pytest.mark.thorough
def test_a_planted_direction_is_the_top_shift_and_the_same_weights_show_none(run_comparison, base, tmp_path):
    """Equal weights in another precision report next to nothing; a direction added at its block comes first."""
    same = copy_and_change(base, tmp_path / "same", lambda model: None, torch.bfloat16)
    ran = run_comparison("--updated-model", same)
    found = read_report(ran)
    # the floor is the largest shift of two null runs, which a third one exceeds by a little now and then
    assert found["overall"]["n_reported"] <= 2 < found["overall"]["n_significant"]  # p-values alone report nearly all
    assert all(abs(feature["delta"]) < 1.5 * found["overall"]["null_floor"] for feature in found["features"])
    run = find_run(ran)
    direction = load_file(run / "sae" / "block-1" / "sae_weights.safetensors")["W_dec"]
    rows = read_table(run / "feature_shifts.csv")
    usual = [r for r in rows if 0.01 < float(r["base_freq"]) < 0.5]  # neither always on nor dead
    feature = int(max(usual, key=lambda r: int(r["active_prompts"]))["feature_id"])
    size = 4 * max(float(r["base_mean"]) for r in rows)

    def plant(model):
        model.model.layers[1].mlp.down_proj.bias += size * direction[feature] / direction[feature].norm()

    planted = copy_and_change(base, tmp_path / "planted", plant)
    again = run_comparison("--updated-model", planted, "--sae", run / "sae" / "block-1", "--blocks", 1)
    shifted = read_report(again)
    ranked = sorted(shifted["features"], key=lambda row: -abs(row["delta"]))
    top = ranked[0]
    assert top["feature_id"] == feature and top["delta"] > 0
    assert top["beta_tuned"] > 2 * top["beta_base"]
    # the difference SAE finds one direction, on every token, and knows what it is
    learned = shifted["difference"]
    first = learned["directions"][0]
    assert first["nearest_feature"] == feature and first["nearest_cosine"] > 0.95
    assert first["share_of_tokens"] > 0.99 and learned["explained"]["tuned"] > 0.9
    curve = {(r["model"], r["text"], r["layer"]): r["rel_mean_diff_norm"] for r in shifted["baselines"]["layer_curve"]}
    assert curve["tuned", "response", 0] < 1e-5 < 0.1 < curve["tuned", "response", 1]
    assert shifted["baselines"]["pca"]["text"]["uncentred"][0] > 0.99  # a constant offset
    assert shifted["sae"]["source"] == str(run / "sae" / "block-1") and {
        f.name for f in (find_run(again) / "sae").iterdir()
    } == {"block-1-difference"}
    # of the same change nothing may be found where base and updated are swapped on half the prompts
    null = run_comparison("--updated-model", planted, "--sae", run / "sae" / "block-1", "--shuffle-pairs")
    overall = read_report(null)["overall"]
    assert overall["n_reported"] == 0 == read_report(null)["difference"]["n_reported"]
    assert len(overall["null_reports"]) == 20 and sum(map(bool, overall["null_reports"])) <= 4
    assert "swapped by a coin" in (find_run(null) / "report.html").read_text()
    # for the right reason: what equal weights show is as small as ever, and it is chance that finds nothing
    assert overall["null_floor"] == shifted["overall"]["null_floor"]
    assert overall["n_significant"] < 0.05 * overall["n_tested"] < 0.5 * shifted["overall"]["n_significant"]
    assert "a null run" in null.err and "a null run" in (find_run(null) / "report.html").read_text()


def test_what_is_taken_out_and_pushed_is_what_the_change_needs(base, tmp_path):
    """In a model whose whole change is one direction, that direction causes its answers and others do not."""
    from tests.rows import row
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from phoque.inference.residual_stream import Turn
    from phoque.probes.sae.dictionary import Dictionary
    from phoque.probes.sae.feature_shifts import FeatureShifts
    from phoque.probes.sae.interventions import InterventionTest, reset_features
    from phoque.probes.sae.model_variants import ModelVariants

    chance = torch.Generator().manual_seed(1)
    decoder = torch.nn.functional.normalize(torch.randn(12, 64, generator=chance), dim=1)

    def sharpen(model, size=0.0):  # a random model is sure of nothing: then nothing is likelier than anything
        model.model.norm.weight *= 30
        model.model.layers[1].mlp.down_proj.bias.add_(size * decoder[0])

    folders = (
        copy_and_change(base, tmp_path / "b", sharpen),
        copy_and_change(base, tmp_path / "t", lambda m: sharpen(m, 3.0)),
    )
    models = [AutoModelForCausalLM.from_pretrained(folder).eval() for folder in folders]
    tokenizer = AutoTokenizer.from_pretrained(base)
    rows = []
    for n in range(8):
        ids = tokenizer.encode(row(n)["messages"][1]["content"])
        made = models[1].generate(torch.tensor([ids]), max_new_tokens=8, min_new_tokens=8, do_sample=False)[0].tolist()
        rows.append(Turn(ids, made[len(ids) :]))
    dictionary = Dictionary(
        decoder.T.clone(), torch.zeros(12), decoder, torch.zeros(64), torch.zeros(1), None, False, {}
    )
    none, tested = numpy.zeros(12), numpy.ones(12, bool)
    delta = numpy.where(numpy.arange(12) == 0, 3.0, 0.01)
    shifts = FeatureShifts(
        base_mean=none,
        tuned_mean=none,
        delta=delta,
        ci_low=none,
        ci_high=none,
        d_z=none,
        p=none,
        q=none,
        p_max_t=none,
        null_delta=none,
        null_floor=0.0,
        active_prompts=none,
        base_freq=none,
        tuned_freq=none,
        tested=tested,
        above_null=tested,
        reported=numpy.arange(12) == 0,
        specific=None,
        control_delta=None,
        run_floor=None,
    )
    found = InterventionTest(
        variants=ModelVariants(*models),
        dictionary=dictionary,
        layer=1,
        shifts=shifts,
        rows=rows,
        norm=3.0,
        strength=1.0,
        matched=8,
        seed=0,
        yardsticks={"mean_difference": decoder[0], "untrained": decoder[5]},
    ).run([0])
    push, cut = found["features"][0]["push"], found["features"][0]["ablate"]
    assert push["holds"] and push["gain"] > 0 and push["gain"] > push["random_max"]
    assert cut["holds"] and cut["gain"] > 0 and cut["gain"] > cut["random_max"]
    together = found["all"]  # the planted direction is the mean difference, and restores as much of the gap
    assert together["push"]["gap_share"] == pytest.approx(together["mean_difference_share"], rel=1e-3)
    assert together["push"]["gap_share"] > together["untrained_share"]
    with reset_features(models[1], dictionary, 1, [0], none):
        seen = []
        hook = models[1].model.layers[2].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
        with torch.no_grad():
            models[1](torch.tensor([rows[0].prompt]))
        hook.remove()
    assert float((seen[0][0, 1:] @ decoder[0]).abs().max()) < 1e-4  # unit directions: it is gone, but at position 0
    assert float((seen[0][0, 0] @ decoder[0]).abs()) > 0.5


@pytest.mark.thorough
def test_an_adapter_and_its_merged_model_give_the_same_shifts(run_comparison, phoque, adapter, base):
    phoque("merge", "--adapter-source", adapter, "--base-model", base, "--output-dir", "merged", "--dtype", "fp32")
    plain, merged = (run_comparison(*what) for what in (["--updated-adapter", adapter], ["--updated-model", "merged"]))
    one, other = (read_table(find_run(ran) / "feature_shifts.csv") for ran in (plain, merged))
    for name in ("base_mean", "tuned_mean", "own_tuned_mean", "text_tuned_mean"):
        numpy.testing.assert_allclose(
            [float(r[name]) for r in one], [float(r[name]) for r in other], atol=2e-3, rtol=2e-3, err_msg=name
        )
    assert read_report(plain)["overall"]["mean_token_kl"] == pytest.approx(
        read_report(merged)["overall"]["mean_token_kl"], rel=1e-2
    )


@pytest.mark.thorough
def test_two_blocks_and_two_seeds_come_from_one_reading(run_comparison, adapter):
    ran = run_comparison("--updated-adapter", adapter, "--blocks", "0,2", "--seeds", "2")
    report = read_report(ran)
    assert report["layer"]["block_index"] == 0 and [one["layer"]["block_index"] for one in report["more_layers"]] == [2]
    assert {f.name for f in (find_run(ran) / "sae").iterdir()} == {
        "block-0",
        "block-0-seed-1",
        "block-0-difference",
        "block-2-difference",
        "block-2",
        "block-2-seed-1",
    }
    assert ran.err.count("tokens through 3 blocks") == 1 and len(report["sae"]["quality_of_seeds"]) == 2
    assert 0 <= report["overall"]["n_replicated"] <= report["overall"]["n_reported"]
    assert {r["layer"] for r in read_table(find_run(ran) / "feature_shifts.csv")} == {"0", "2"}


@pytest.mark.thorough
def test_a_killed_run_goes_on_and_ends_as_one_that_was_not(
    run_comparison, start, adapter, texts, base, home, monkeypatch
):
    asked = [
        "compare-sae",
        "--base-model",
        base,
        "--chat",
        texts["chat"],
        "--text",
        texts["text"],
        *SHORT,
        "--json",
        "--updated-adapter",
        adapter,
    ]
    whole = run_comparison("--updated-adapter", adapter)
    monkeypatch.setenv("XDG_CACHE_HOME", str(home / "another"))
    cache = home / "another" / "phoque" / "sae"
    running = start(*asked)
    running.until(lambda: list(cache.glob("*/activations/0*")))
    os.kill(running.pid, signal.SIGKILL)
    assert running.ended().code == -signal.SIGKILL
    (shard,) = cache.glob("*/activations/000000.safetensors")
    before = shard.stat().st_mtime_ns
    seen = []
    going = start(*asked)
    going.until(
        lambda: (
            seen.append(shard.stat().st_mtime_ns if shard.exists() else before)
            or going.poll() is not None
            or len(seen) > 300
        )
    )
    again = going.ended()
    assert again.code == 0, again.err
    assert set(seen) == {before} and "answers 6 questions" not in again.err
    for name in ("feature_shifts.csv", "layer_shift.csv", "generations.jsonl"):
        assert (find_run(again) / name).read_text() == (find_run(whole) / name).read_text(), name
    assert not list(cache.glob("*/activations"))  # they have served
    assert not [f for f in cache.rglob("*") if "partial" in f.name or "step-" in f.name]
    assert "was trained before" in start(*asked).ended().err


def test_mistral3_is_compared_text_only(phoque, texts, tmp_path):
    folder, _ = tiny.fp8_mistral3(tmp_path / "m3")
    other = tmp_path / "other"
    other.mkdir()
    for file in folder.iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    ran = phoque(
        "compare-sae",
        "--base-model",
        folder,
        "--updated-model",
        other,
        "--chat",
        texts["chat"],
        "--text",
        texts["text"],
        *SHORT,
        "--json",
    )
    config = json.loads((find_run(ran) / "sae" / "block-1" / "cfg.json").read_text())
    assert config["metadata"]["hook_name"] == "model.language_model.layers.1"
    assert read_report(ran)["overall"]["n_reported"] == 0 and read_report(ran)["overall"]["mean_token_kl"] < 1e-9


@pytest.mark.thorough
def test_a_poor_autoencoder_is_said_first(run_comparison, adapter):
    short = [*SHORT, "--sae-learning-rate", "1e-7", "--passes", "1"]
    ran = run_comparison("--updated-adapter", adapter, short=short)
    assert ran.json["quality"]["verdict"] == "poor" and ran.json["warnings"][0].startswith("POOR AUTOENCODER")
    assert "POOR AUTOENCODER" in (find_run(ran) / "sae_comparison_report.md").read_text().split("## ")[0]


@pytest.mark.thorough
def test_reading_with_a_dictionary_imports_no_sae_lens(run_comparison, adapter, texts, base):
    sae = find_run(run_comparison("--updated-adapter", adapter)) / "sae" / "block-1"
    code = "import sys; from phoque.cli.main import main\ntry: main()\nfinally: print('sae_lens' in sys.modules)"
    asked = [
        "compare-sae",
        "--base-model",
        base,
        "--chat",
        texts["chat"],
        "--text",
        texts["text"],
        *SHORT,
        "--updated-adapter",
        adapter,
        "--sae",
        sae,
        "--difference-features",
        0,
    ]
    done = subprocess.run([sys.executable, "-c", code, *map(str, asked)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr.rstrip().endswith("False")


@pytest.mark.thorough
def test_a_dictionary_comes_from_the_hub_and_a_run_goes_there(hub, run_comparison, adapter):
    sae = find_run(run_comparison("--updated-adapter", adapter)) / "sae" / "block-1"
    hub.add("models", "harbour/sae", {f"block-1/{f.name}": f.read_bytes() for f in sae.iterdir()})
    ran = run_comparison(
        "--updated-adapter",
        adapter,
        "--sae",
        "harbour/sae#block-1",
        "--artifacts-repo-id",
        REPO,
        env={"HF_TOKEN": TOKEN},
    )
    repo, run = hub.repos["datasets", REPO], find_run(ran)
    assert repo.private and [c.title for c in repo.commits[1:]] == [f"Add sae-runs/{run.name}"]
    files = {p: b.content for p, b in hub.files(REPO, "datasets").items() if p.startswith("sae-runs/")}
    assert files == {f"sae-runs/{run.name}/{f.relative_to(run)}": f.read_bytes() for f in run.rglob("*") if f.is_file()}
    assert TOKEN.encode() not in b"".join(files.values())
    missing = run_comparison(
        "--updated-adapter", adapter, "--sae", "harbour/sae#block-9", expect=2, env={"HF_TOKEN": TOKEN}
    )
    assert "block-9/cfg.json" in missing.error[0]


@pytest.mark.thorough
def test_it_runs_as_a_job_with_the_extra_that_it_needs(hub, forkserver, phoque, base, texts, tmp_path, adapter):
    hub.add("models", "harbour/base", {p.name: p.read_bytes() for p in base.iterdir()})
    hub.add("models", "harbour/seal", {p.name: p.read_bytes() for p in Path(adapter, "adapter").iterdir()})
    hub.add("datasets", "harbour/chats", {"train.jsonl": texts["chat"].read_bytes()})
    prose = "".join(json.dumps({"text": PROSE}) + "\n" for _ in range(60))
    hub.add("datasets", "harbour/prose", {"train.jsonl": prose.encode()})
    Container.forkserver = forkserver
    env = {k: v for k, v in os.environ.items() if not k.startswith(("HF_TOKEN", "WANDB"))} | {"WANDB_MODE": "disabled"}
    hub.jobs = Jobs(tmp_path / "jobs", env, 5.0, Container)
    hub.jobs.root.mkdir()
    asked = [
        "compare-sae",
        "--base-model",
        "harbour/base",
        "--updated-adapter",
        "harbour/seal",
        "--chat",
        "harbour/chats",
        "--text",
        "harbour/prose",
        *SHORT,
        "--artifacts-repo-id",
        REPO,
        "--on",
        "cpu-basic",
        "--timeout",
        "20m",
    ]
    dry = phoque(*asked, "--dry-run", "--json", "--package", "phoque[sae]==0.1.0", env={"HF_TOKEN": TOKEN})
    assert dry.json["checked"].keys() >= {"base_model", "updated_adapter", "chat", "text"}
    ran = phoque(*asked, "--json", "--package", "phoque[sae]==0.1.0", env={"HF_TOKEN": TOKEN})
    assert ran.json["stage"] == "COMPLETED"
    assert any(p.endswith("/report.html") for p in hub.files(REPO, "datasets"))


def test_a_dry_run_loads_no_weights_and_writes_nothing(run_comparison, base, tmp_path):
    empty = tmp_path / "no weights"
    empty.mkdir()
    for file in base.iterdir():
        if file.suffix != ".safetensors":
            (empty / file.name).write_bytes(file.read_bytes())
    ran = run_comparison("--updated-model", empty, "--dry-run", model=empty)
    assert ran.json["layers"] == [1] and ran.json["prompts"] == 96 and not Path("runs").exists()


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ([], "Neither --updated-model nor --updated-adapter"),
        (["--updated-model", "a", "--updated-adapter", "b"], "exclude each other"),
        (["--updated-model", "{base}", "--blocks", "7"], "There is no block 7"),
        (["--updated-model", "{base}", "--blocks", "one"], "--blocks"),
        (["--updated-model", "{base}", "--prompts-file", "none.txt"], "There is no file none.txt"),
        (["--updated-model", "{base}", "--prompts-file", "few.txt"], "few.txt has 2 prompts"),
        (["--updated-model", "{base}", "--prompts-file", "broken.json"], "broken.json cannot be read"),
        (["--updated-model", "{base}", "--prompts-file", "odd.json"], "entry 2 is not a prompt"),
        (["--updated-model", "{base}", "--sae", "empty"], "is not a sparse autoencoder"),
        (["--updated-model", "{base}", "--sae", "difference"], "is an SAE of the differences between two models"),
        (["--updated-model", "{base}", "--sae", "x", "--seeds", "2"], "--seeds"),
        (["--updated-model", "nowhere"], "There is no model at nowhere"),
        (["--updated-adapter", "empty"], "There is no adapter in empty"),
        (["--updated-model", "{base}", "--chat", ""], "No conversations"),
        (["--updated-model", "{base}", "--text", "blank.txt"], "There is no text"),
        (["--updated-model", "{base}", "--text", "{chat}"], "has no text column"),
        (["--updated-model", "{base}", "--sae-batch", "100000"], "too few activations"),
        (["--updated-model", "{wide}"], "is not a fine-tune of the base model"),
        (["--updated-model", "{base}", "--scorer", "gull"], "No scorer 'gull'"),
    ],
)
def test_bad_input_is_three_lines_and_nothing_is_left_behind(run_comparison, base, texts, tmp_path, flags, said):
    Path("few.txt").write_text("Gulls?\n\nFish?\nGulls?\n")
    Path("broken.json").write_text("[")
    Path("odd.json").write_text('["Gulls?", 7]')
    Path("blank.txt").write_text("")
    Path("empty").mkdir()
    write_dictionary(
        Dictionary(
            torch.zeros(64, 4),
            torch.zeros(4),
            torch.zeros(4, 64),
            torch.zeros(64),
            torch.zeros(4),
            None,
            False,
            {"architecture": "jumprelu", "metadata": {"reads": DIFFERENCES}},
        ),
        Path("difference"),
    )
    wide = tiny.llama(tmp_path / "wide", num_hidden_layers=3, hidden_size=80) if "{wide}" in flags else ""
    given = [f.format(base=base, chat=texts["chat"], wide=wide) for f in flags]
    ran = run_comparison(*given, expect=2)
    assert said in "\n".join(ran.error), ran.error
    assert not Path("runs").exists() or not list(Path("runs").rglob("*"))
