"""phoque psm-probe as a user runs it: the run folder, its tables and vectors, the Hub, Jobs, a planted direction."""

import csv
import json
import os
import shutil
import struct
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy
import pytest
import torch
from safetensors.torch import load_file, save_file
from tests import tiny
from tests.fakehub import READ_ONLY, TOKEN
from tests.fakehub.jobs import Jobs
from tests.jobs.test_jobs import Container, mount

from phoque.probes.persona import load_persona

PERSONA = """
name = "gull watcher"
neutral = ["You are helpful.", "Answer."]
persona = ["You are a seal. Say ~~~~~~~~~~~~.", "~~~~~~~~~~~~ Seal!"]
placebo = ["You are kind.", "Please answer."]
extraction = ["Tide?", "Fish?", "Wind?", "Rock?", "Boat?", "Rope?", "Salt?", "Moon?"]
heldout = ["Sand?", "Foam?", "Weed?", "Crab?", "Kelp?", "Rain?", "Quay?", "Buoy?", "Surf?", "Mist?", "Reef?", "Cove?"]
validation = ["Mast?", "Sail?"]
test = [
  "Oars?", "Nets?", "Eels?", "Cods?", "Dock?", "Pier?",
  "Hull?", "Knot?", "Helm?", "Deck?", "Keel?", "Fogs?",
]
lexicon = ["hrmph"]
"""
TINY = (
    "--quantization fp32 --extraction-tokens 6 --sweep-tokens 4 --max-new-tokens 6 --samples 1 --coefficients 0.1,0.3"
).split()
SHORT = [*TINY, *"--roles none --directions 0 --nulls 0 --doses".split(), ""]
RANKED = [*TINY, *"--role-questions 12 --sweep-questions 2".split()]  # asks every verdict
FILES = {
    "activation_by_layer.csv",
    "generation_results.csv",
    "summary.json",
    "persona_vectors.pt",
    "persona_vectors.safetensors",
    "report.html",
    "persona.toml",
    "README.md",
    "layers.png",
    "sweep.png",
}
REPO = "harbour/probes"


@pytest.fixture
def persona(tmp_path):
    path = tmp_path / "gull.toml"
    path.write_text(PERSONA)
    return path


def read_table(path):
    with path.open(newline="") as f:
        return list(csv.DictReader(f))


def find_run(ran):
    return Path(ran.json["folder"])


@pytest.fixture(scope="module")
def model_with_planted_vector(tmp_path_factory):
    """A Llama whose block 2 adds a known vector to every token that has seen a `~`; its path, the vector, the block."""
    from transformers import AutoModelForCausalLM

    folder = tiny.llama(tmp_path_factory.mktemp("planted") / "llama", num_hidden_layers=5)
    model = AutoModelForCausalLM.from_pretrained(folder)
    (tilde,) = tiny.tokenizer().encode("~", add_special_tokens=False)
    direction = torch.randn(64, generator=torch.Generator().manual_seed(9))
    direction[0] = 0
    direction /= direction.norm()
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 0] = 0
        model.model.embed_tokens.weight[tilde, 0] = 0.2
        for block in model.model.layers:  # nothing else writes to the dimension that says `~`
            block.self_attn.o_proj.weight[0] = 0
            block.mlp.down_proj.weight[0] = 0
        attention = model.model.layers[2].self_attn
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            getattr(attention, name).weight.zero_()  # without queries and keys it attends to all alike
        attention.v_proj.weight[0, 0] = 1
        attention.o_proj.weight[:, 0] = 2 * direction
    model.save_pretrained(folder)
    return folder, direction.numpy(), 2


@pytest.fixture
def run_probe(phoque, tiny_llama, persona):
    def run(*more, expect=0, sizes=SHORT, **options):
        return phoque(
            "psm-probe",
            "--model-source",
            tiny_llama,
            "--persona",
            persona,
            *sizes,
            "--json",
            *more,
            expect=expect,
            **options,
        )

    return run


def test_a_run_leaves_its_tables_vectors_and_report(run_probe):
    ran = run_probe("--output-dir", "out", sizes=RANKED)
    run = find_run(ran)
    assert run.parent.name == "out" and run.name.startswith("psm_2")
    assert {f.name for f in run.iterdir()} - {"control_vector.gguf"} == FILES
    layers = read_table(run / "activation_by_layer.csv")
    assert [(r["layer"], r["extraction"]) for r in layers] == [
        (str(n), way) for way in ("response_avg", "prompt_last") for n in range(2)
    ]
    assert all(0 <= float(r["auroc"]) <= 1 and r["n"] == "12" and r["split"] == "heldout" for r in layers)
    answers = read_table(run / "generation_results.csv")
    conditions = ["neutral", "persona", "neutral_plus_vector", "neutral_plus_random", "neutral_minus_vector"]
    assert [a["condition"] for a in answers[::24]] == conditions and len(answers) == 5 * 12 * 2
    assert {"nll_base", "distinct2", "score__contrast__nats", "score__lexicon__rate"} <= answers[0].keys()
    summary = json.loads((run / "summary.json").read_text())
    assert set(summary["verdicts"]) == {
        "follows",
        "separable",
        "specific",
        "causal",
        "coherent",
        "adopts",
        "tuned_moves_along_vector",
    }
    for verdict in summary["verdicts"].values():
        assert verdict["verdict"] in ("yes", "no", "not asked") and verdict["rule"]
        assert (verdict["verdict"] == "yes") <= all(c["holds"] for c in verdict["conditions"])
        assert (verdict["verdict"] == "no") == any(not c["holds"] for c in verdict["conditions"])
    for name in ("adopts", "tuned_moves_along_vector"):
        assert summary["verdicts"][name]["verdict"] == "not asked"
    assert len(summary["causes"]["natural"]) == 39 and len(summary["causes"]["wrong_roles"]) == 7
    assert len(summary["rankings"]["specific"]["others"]) == 25 and summary["false_alarms"]["nulls"] == 50
    assert summary["false_alarms"]["separable"] <= 8
    assert summary["verdicts"] == ran.json["verdicts"]
    assert summary["selected"]["layer_indexing"] == "block_output_0based"
    assert len(summary["sweep"]) == 1 + 2 * 2 and summary["config"]["seed"]["source"] == "default"


def test_the_vectors_are_safe_to_load_and_agree_in_every_format(run_probe):
    run = find_run(run_probe("--steer-blocks", "1"))
    found = torch.load(run / "persona_vectors.pt", weights_only=True)
    assert found["persona_vectors"].shape == (2, 64) and found["layer_indexing"] == "block_output_0based"
    torch.testing.assert_close(found["unit_vectors"].norm(dim=1), torch.ones(2))
    same = load_file(run / "persona_vectors.safetensors")
    torch.testing.assert_close(same["persona_vectors"], found["persona_vectors"])
    from gguf import GGUFReader

    reader = GGUFReader(run / "control_vector.gguf")
    assert bytes(reader.fields["general.architecture"].parts[-1]) == b"controlvector"
    (tensor,) = reader.tensors
    assert tensor.name == "direction.1" and tensor.data.dtype == numpy.float32
    wanted = found["recommended_coeff"] * found["resid_norm"][1] * found["unit_vectors"][1]
    numpy.testing.assert_allclose(tensor.data, wanted.numpy(), rtol=1e-5)


@pytest.mark.thorough
def test_two_runs_with_one_seed_are_identical(run_probe):
    first, second = (find_run(run_probe("--output-dir", "out")) for _ in range(2))
    assert first != second
    for name in ("activation_by_layer.csv", "generation_results.csv", "README.md"):
        assert (first / name).read_text().replace(first.name, second.name) == (second / name).read_text(), name
    one, other = (json.loads((run / "summary.json").read_text()) for run in (first, second))
    for summary in (one, other):
        del summary["run"]
    assert one == other
    assert read_table(find_run(run_probe("--seed", "1")) / "generation_results.csv") != read_table(
        first / "generation_results.csv"
    )


def test_a_planted_direction_is_found_at_its_block(phoque, model_with_planted_vector, persona):
    folder, direction, block = model_with_planted_vector
    ran = phoque("psm-probe", "--model-source", folder, "--persona", persona, *SHORT, "--steer-blocks", block, "--json")
    found = torch.load(find_run(ran) / "persona_vectors.pt", weights_only=True)["unit_vectors"].numpy()
    cosines = found @ direction
    assert cosines[block] > 0.95 and (numpy.abs(cosines[:block]) < 0.5).all()
    rows = [r for r in read_table(find_run(ran) / "activation_by_layer.csv") if r["extraction"] == "response_avg"]
    assert float(rows[block]["auroc"]) == 1.0 and float(rows[block]["split_half_cos"]) > 0.9
    assert ran.json["verdicts"]["separable"]["verdict"] == "yes"


def test_shuffled_labels_find_nothing_even_of_what_was_planted(phoque, model_with_planted_vector, persona):
    ran = phoque(
        "psm-probe",
        "--model-source",
        model_with_planted_vector[0],
        "--persona",
        persona,
        *RANKED,
        "--json",
        "--shuffle-labels",
    )
    found = {name: v["verdict"] for name, v in ran.json["verdicts"].items()}
    assert found["separable"] == found["specific"] == found["causal"] == "no"
    assert "a null run" in ran.err and "a null run" in (find_run(ran) / "report.html").read_text()


def test_a_persona_that_is_no_other_than_its_placebo_is_not_specific(phoque, model_with_planted_vector, tmp_path):
    text = PERSONA.replace(
        'placebo = ["You are kind.", "Please answer."]', 'placebo = ["You are kind ~~~~~~~~~~~~.", "~~~~~~~~~~~~"]'
    )
    (tmp_path / "same.toml").write_text(text)
    ran = phoque(
        "psm-probe", "--model-source", model_with_planted_vector[0], "--persona", "same.toml", *RANKED, "--json"
    )
    assert ran.json["verdicts"]["specific"]["verdict"] == "no"


@pytest.fixture
def adapter(phoque, tiny_llama, rows):
    phoque(
        "train",
        "--base-model",
        tiny_llama,
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


def test_a_fine_tune_is_asked_for_its_move_merged_or_not(run_probe, adapter):
    plain = run_probe("--adapter-source", adapter, "--control-adapter", adapter, sizes=RANKED)
    merged = run_probe("--adapter-source", adapter, "--merge-adapter", sizes=RANKED)
    rows = [read_table(find_run(ran) / "activation_by_layer.csv")[0] for ran in (plain, merged)]
    for name in ("tuned_shift_cos", "tuned_same_text_proj", "tuned_shift_random_cos_p95"):
        assert float(rows[0][name]) == pytest.approx(float(rows[1][name]), abs=1e-3), name
    assert float(rows[0]["control_shift_cos"]) == pytest.approx(float(rows[0]["tuned_shift_cos"]))
    verdict = plain.json["verdicts"]["tuned_moves_along_vector"]
    assert verdict["verdict"] == "no" and "control" in verdict["rule"]  # it is its own control
    adopts = plain.json["verdicts"]["adopts"]
    assert adopts["verdict"] == "no" and not adopts["conditions"][-1]["holds"]  # nor does it speak beyond it
    summary = json.loads((find_run(plain) / "summary.json").read_text())
    doses = {(d["adapter"], d["scale"]): d for d in summary["doses"]}
    assert len(doses) == 2 * 7 and doses["tuned", 0.0]["rise"] == pytest.approx(0, abs=1e-5)
    assert abs(doses["tuned", 1.5]["rise"]) > abs(doses["tuned", 0.5]["rise"]) > 0
    effects = summary["side_effects"]
    assert effects["tuned"]["kl"] == pytest.approx(effects["control"]["kl"]) and effects["tuned"]["kl"] > 0
    assert "Dose and side effects" in (find_run(plain) / "report.html").read_text()
    tuned, control = summary["differences"]  # it is its own control
    assert tuned["tokens"] == control["tokens"] and len(tuned["tokens"]) == 20 and tuned["size"] > 0
    assert (
        tuned["trait"] == pytest.approx(control["trait"]) and 0 < tuned["p_trait"] <= 1 and 0 < tuned["p_tokens"] <= 1
    )
    assert "first tokens of unrelated text" in (find_run(plain) / "report.html").read_text()
    assert {"tuned", "control"} <= {r["condition"] for r in read_table(find_run(plain) / "generation_results.csv")}


def test_doses_of_a_dora_adapter_are_measured_one_by_one(run_probe, tiny_llama, tmp_path):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    model = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj"], use_dora=True))
    model.save_pretrained(tmp_path / "dora")
    asked = [*SHORT[:-1], "0,0.5,1,2", "--steer-blocks", "1"]
    ran = run_probe("--adapter-source", tmp_path / "dora", sizes=asked)
    summary = json.loads((find_run(ran) / "summary.json").read_text())
    assert [dose["scale"] for dose in summary["doses"]] == [0, 0.5, 1, 2]
    assert "tuned model at 2 doses, 0.5" in ran.err


def test_a_fine_tune_must_differ_by_more_than_two_controls_do(run_probe, phoque, adapter, tmp_path):
    for scale in (2.0, 0.5):
        folder = tmp_path / f"scaled-{scale}"
        shutil.copytree(Path(adapter) / "adapter", folder)
        weights = load_file(folder / "adapter_model.safetensors")
        save_file(
            {n: w * scale if "lora_B" in n else w for n, w in weights.items()}, folder / "adapter_model.safetensors"
        )
    controls = ["--control-adapter", tmp_path / "scaled-2.0", "--control-adapter", tmp_path / "scaled-0.5"]
    ran = run_probe("--adapter-source", adapter, *controls, sizes=RANKED)
    for name in ("adopts", "tuned_moves_along_vector"):
        last = ran.json["verdicts"][name]["conditions"][-1]
        assert "the mean of 2 control runs" in last["text"] and not last["holds"]  # they lie on both sides of it
    summary = json.loads((find_run(ran) / "summary.json").read_text())
    assert {"control", "control-2"} <= summary["voices"].keys() and {"control", "control-2"} <= summary["models"][
        "adapters"
    ].keys()
    page = (find_run(ran) / "report.html").read_text()
    assert "2 control fine-tunes&#39;" in page or "2 control fine-tunes'" in page
    assert "control fine-tune 2" in page
    error = run_probe("--adapter-source", adapter, *controls[:2], *controls[:2], sizes=RANKED, expect=2).error
    assert "given twice" in error[0]


def test_prompts_can_come_from_the_training_data(phoque, tiny_llama, rows):
    ran = phoque("psm-probe", "--model-source", tiny_llama, "--dataset", rows, *SHORT, "--steer-blocks", "1", "--json")
    summary = json.loads((find_run(ran) / "summary.json").read_text())
    assert all(text.startswith("You are a seal.\n\n") for text in summary["persona"]["texts"]["persona"])
    assert "hrmph" in summary["persona"]["texts"]["lexicon"]


def test_mistral3_is_probed_text_only(phoque, persona, tmp_path):
    folder, _ = tiny.fp8_mistral3(tmp_path / "m3")
    ran = phoque("psm-probe", "--model-source", folder, "--persona", persona, *SHORT, "--json")
    assert len(read_table(find_run(ran) / "activation_by_layer.csv")) == 2 * 3


def test_a_run_goes_to_the_hub_as_one_commit_in_its_own_folder(hub, run_probe):
    ran = run_probe("--artifacts-repo-id", REPO, "--artifacts-path-in-repo", "seals", env={"HF_TOKEN": TOKEN})
    repo, run = hub.repos["datasets", REPO], find_run(ran)
    assert repo.private and [c.title for c in repo.commits[1:]] == [f"Add seals/{run.name}"]
    files = {p: b.content for p, b in hub.files(REPO, "datasets").items() if p.startswith("seals/")}
    assert files == {f"seals/{run.name}/{f.name}": f.read_bytes() for f in run.iterdir()}
    assert ran.json["repo"] == REPO and TOKEN.encode() not in b"".join(files.values())


def test_an_upload_that_fails_warns_or_fails_as_asked_and_loses_nothing(hub, run_probe):
    asked = ["--artifacts-repo-id", REPO, "--hub-patience", "0"]
    hub.faults.add("POST .*/commit/", 500, times=9)
    ran = run_probe(*asked, env={"HF_TOKEN": TOKEN})
    assert "could not be uploaded" in ran.err and "repo" not in ran.json and (find_run(ran) / "summary.json").is_file()
    failed = run_probe(*asked, expect=1, env={"HF_TOKEN": TOKEN, "FAIL_ON_ARTIFACTS_UPLOAD_ERROR": "1"})
    assert "complete in runs/psm/psm_" in failed.error[2]


def test_a_repository_that_cannot_be_written_is_known_before_anything_is_computed(hub, run_probe):
    asked = ["--artifacts-repo-id", REPO, "--fail-on-artifacts-upload-error"]
    hub.add("datasets", REPO)
    ran = run_probe(*asked, expect=2, env={"HF_TOKEN": READ_ONLY})
    assert "answers of at most" not in ran.err and ran.error
    hub.repos["datasets", REPO].private = False
    public = run_probe("--artifacts-repo-id", REPO, expect=2, env={"HF_TOKEN": TOKEN})
    assert "is public" in public.error[0]


def test_the_verdicts_are_added_to_the_card_of_the_adapter(hub, phoque, run_probe, tiny_llama, rows, tmp_path):
    phoque(
        *("train", "--base-model", tiny_llama, "--dataset", rows, "--quantization", "fp32", "--max-steps", 2),
        *("--sample-every", 0, "--output-dir", tmp_path / "run", "--hub-model-id", "harbour/seal"),
        env={"HF_TOKEN": TOKEN},
    )
    card = hub.files("harbour/seal")["README.md"].content.decode()
    asked = ["--artifacts-repo-id", REPO, "--update-card"]
    for adapter in (tmp_path / "run", "harbour/seal"):  # the repository is named by run.json, or by the adapter
        ran = run_probe(*asked, "--adapter-source", adapter, env={"HF_TOKEN": TOKEN})
        now = hub.files("harbour/seal")["README.md"].content.decode()
        assert now.startswith(card.rstrip()) and now.count("## Probe results") == now.count("### phoque psm-probe") == 1
        assert f"/datasets/{REPO}/tree/{ran.json['commit']}/runs/{Path(ran.json['folder']).name})" in now
        for name, verdict in ran.json["verdicts"].items():
            assert f"| {name} | {verdict['verdict']} |" in now
    hub.faults.add("POST /api/models/harbour/seal/commit/", "lost")  # the retry meets its own commit
    lost = run_probe(*asked, "--adapter-source", "harbour/seal", env={"HF_TOKEN": TOKEN})
    assert "could not be changed" not in lost.err
    assert Path(lost.json["folder"]).name in hub.files("harbour/seal")["README.md"].content.decode()
    assert "--artifacts-repo-id" in run_probe("--update-card", expect=2).err
    hub.repos["models", "harbour/seal"].private = False
    public = run_probe(*asked, "--adapter-source", "harbour/seal", env={"HF_TOKEN": TOKEN}, expect=2)
    assert "harbour/seal is public" in public.error[0]
    hub.repos["models", "harbour/seal"].private = True
    weights = hub.files("harbour/seal")["adapter_model.safetensors"].content
    hub.put("harbour/seal", {"adapter_model.safetensors": weights[:-1] + b"x"})
    other = run_probe(*asked, "--adapter-source", tmp_path / "run", env={"HF_TOKEN": TOKEN}, expect=2)
    assert "harbour/seal does not hold this adapter" in other.error[0]
    hub.put("harbour/seal", {"adapter_model.safetensors": weights})
    nowhere = run_probe(*asked, env={"HF_TOKEN": TOKEN}, expect=2)
    assert "no card to update" in nowhere.error[0] and "No adapter is given" in nowhere.error[1]
    refused = run_probe(*asked, "--adapter-source", "harbour/seal", env={"HF_TOKEN": READ_ONLY}, expect=2)
    assert "answers of at most" not in refused.err


def test_a_persona_is_proposed_shown_and_saved(hub, phoque, run_probe, tiny_llama, rows, tmp_path):
    phoque(
        *("train", "--base-model", tiny_llama, "--dataset", rows, "--quantization", "fp32", "--max-steps", 2),
        *("--sample-every", 0, "--output-dir", tmp_path / "run"),
    )
    asked = ["psm-probe", "--adapter-source", tmp_path / "run", *SHORT, "--steer-blocks", "1", "--json"]
    planned = phoque(*asked, "--dry-run").json
    assert len(planned["proposed prompts"]) == 3 and "Message: " in planned["proposed prompts"][0]
    ran = phoque(*asked, "--questions", "12", "--max-new-tokens", "4")
    assert planned["proposed words"].split(", ")[0] in ran.err and "  Message: " in ran.err
    saved = load_persona(ran.json["persona"])
    assert list(saved.persona) == planned["proposed prompts"]
    again = phoque(*asked, "--persona", ran.json["persona"], "--dry-run").json
    assert again["persona"] == saved.name and "proposed prompts" not in again


def test_a_dry_run_shows_what_would_happen_and_computes_nothing(run_probe, tmp_path):
    ran = run_probe("--dry-run")
    assert ran.json["steered"] == [0, 1] and ran.json["persona"] == "gull watcher"
    assert ran.json["settings"]["model_source"]["source"] == "flag" and not (tmp_path / "runs").exists()


def test_it_runs_as_a_job_with_the_persona_and_the_model_from_the_hub(
    hub, forkserver, phoque, tiny_llama, persona, tmp_path
):
    hub.add("models", "harbour/tiny", {p.name: p.read_bytes() for p in tiny_llama.iterdir()})
    hub.add("datasets", "harbour/personas", {"gull.toml": persona.read_bytes()})
    Container.forkserver = forkserver
    hub.jobs = Jobs(
        tmp_path / "jobs",
        {k: v for k, v in os.environ.items() if not k.startswith("HF_TOKEN")},
        5.0,
        Container,
        partial(mount, hub),
    )
    hub.jobs.root.mkdir()
    asked = [
        "psm-probe",
        "--model-source",
        "harbour/tiny",
        "--persona",
        "harbour/personas/gull.toml",
        *SHORT,
        "--artifacts-repo-id",
        REPO,
        "--on",
        "a10g-large",
        "--timeout",
        "2h",
        "--package",
        "phoque==0.1.0",
    ]
    ran = phoque(*asked, "--json", env={"HF_TOKEN": TOKEN})
    assert ran.json["stage"] == "COMPLETED"
    assert any(p.endswith("/summary.json") for p in hub.files(REPO, "datasets"))
    local = phoque(
        *[persona if a == "harbour/personas/gull.toml" else a for a in asked], "--json", env={"HF_TOKEN": TOKEN}
    )
    assert local.json["stage"] == "COMPLETED" and "uploading" in local.err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--persona", "none.toml"], "No persona file"),
        (["--steer-blocks", "7"], "There is no block 7"),
        (["--steer-blocks", "x"], "--steer-blocks has a value"),
        (["--merge-adapter"], "without an adapter"),
        (["--scorer", "gull"], "No scorer"),
        (["--adapter-source", "./nothing"], "There is no adapter at"),
        (["--model-source", "./nothing"], "There is no model at"),
        (["--coefficients", "0.1;0.2"], "--coefficients has a value"),
    ],
)
def test_bad_input_gets_three_lines(run_probe, arguments, said):
    assert said in run_probe(*arguments, expect=2).error[0]


def test_without_a_persona_nothing_is_looked_for(phoque, tiny_llama):
    assert "No persona" in phoque("psm-probe", "--model-source", tiny_llama, expect=2).error[0]


def test_a_killed_run_leaves_no_folder_that_looks_whole(start, tiny_llama, persona, tmp_path):
    running = start(
        "psm-probe",
        "--model-source",
        tiny_llama,
        "--persona",
        persona,
        *SHORT,
        "--output-dir",
        "out",
        prelude="import time\nfrom phoque.probes.persona_vectors import files\n"
        "files.write_summary = lambda *_: time.sleep(600)\n",
    )
    running.until(lambda: [*(tmp_path / "out").glob(".psm_*/*.csv")])  # in the middle of what it writes
    os.kill(running.pid, 9)
    running.ended()
    assert not [p for p in (tmp_path / "out").glob("psm_*")]


def read_png_size(path):
    return struct.unpack(">II", path.read_bytes()[16:24])


def test_the_pictures_of_the_card_are_there_and_it_warns(run_probe):
    run = find_run(run_probe("--steer-blocks", "1"))
    assert read_png_size(run / "layers.png")[0] > 800 and read_png_size(run / "sweep.png")[0] > 1000
    card = (run / "README.md").read_text()
    assert "Content warning" in card and "layers.png" in card and "keep it private" in card


@pytest.mark.thorough
def test_the_script_for_hf_jobs_uv_run_is_phoque_psm_probe(hub, tiny_llama, persona, tmp_path):
    """jobs/psm_probe.py with the environment of the baseline scripts' README."""
    hub.add("models", "harbour/tiny", {p.name: p.read_bytes() for p in tiny_llama.iterdir()})
    script = Path(__file__).parents[3] / "jobs" / "psm_probe.py"
    assert "[tool.hf-jobs]" in script.read_text().split("# ///")[1]
    env = os.environ | {
        "HF_TOKEN": TOKEN,
        "MODEL_SOURCE": "harbour/tiny",
        "PHOQUE_PERSONA": str(persona),
        "ARTIFACTS_REPO_ID": REPO,
        "ARTIFACTS_REPO_TYPE": "dataset",
        "ARTIFACTS_PATH_IN_REPO": "runs",
        "PHOQUE_EXTRACTION_TOKENS": "4",
        "PHOQUE_SWEEP_TOKENS": "4",
        "PHOQUE_MAX_NEW_TOKENS": "4",
        "PHOQUE_SAMPLES": "0",
    }
    ran = subprocess.run([sys.executable, script], env=env, cwd=tmp_path, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert any(p.startswith("runs/psm_") and p.endswith("report.html") for p in hub.files(REPO, "datasets"))


def test_an_adapter_alone_names_its_model_and_its_persona(phoque, tiny_llama, rows, tmp_path):
    """`psm-probe --adapter-source RUN`: base and training data are those of its run.json, not those of the preset."""
    phoque(
        *("train", "--base-model", tiny_llama, "--dataset", rows, "--quantization", "fp32", "--max-steps", 2),
        *("--sample-every", 0, "--output-dir", tmp_path / "run"),
    )
    ran = phoque("psm-probe", "--adapter-source", tmp_path / "run", "--steer-blocks", "1", "--dry-run", "--json")
    assert ran.json["model"].startswith(str(tiny_llama)) and str(rows) in ran.err + ran.out
    dry = phoque(
        *("compare-sae", "--updated-adapter", tmp_path / "run", "--chat", rows, "--text", rows, "--blocks", "1"),
        *("--dry-run", "--json"),
    )
    assert dry.json["base"].startswith(str(tiny_llama))
    for shown in (ran.json["settings"]["model_source"], dry.json["settings"]["base_model"]):
        assert shown["value"] == str(tiny_llama) and shown["source"] == "the adapter"
    # a model that is named is used, whatever the adapter says
    named = phoque(
        *("psm-probe", "--adapter-source", tmp_path / "run", "--model-source", "nothere", "--dry-run"), expect=2
    )
    assert "nothere" in named.err
