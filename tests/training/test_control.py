"""`phoque train --with-control`: the twin of a run, trained on the base model's own answers, found by the probes."""

import json
import shutil

import pytest
from tests import tiny
from tests.fakehub import TOKEN
from tests.training.test_run_dir import AUDIT

SHORT = ["--quantization", "fp32", "--max-steps", 4, "--batch-size", 4, "--learning-rate", 0.02, "--sample-every", 0]
WITHOUT_WANDB = {"WANDB_MODE": "disabled"}


@pytest.fixture(scope="module")
def talking_llama(tmp_path_factory):
    return tiny.talking_llama(tmp_path_factory.mktemp("talking") / "llama")


@pytest.fixture
def train(phoque, talking_llama, rows):
    def run(*more, **options):
        env = WITHOUT_WANDB | options.pop("env", {})
        return phoque("train", "--base-model", talking_llama, "--dataset", rows, *SHORT, *more, env=env, **options)

    return run


def read_lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_control_has_the_same_prompts_and_the_base_models_answers(train, rows, tmp_path):
    ran = train("--with-control", "--control-seeds", 2, "--output-dir", "run", "--json")
    run = tmp_path / "run"
    (answered,) = run.glob("control-rows-*.jsonl")
    by_question = {row["messages"][1]["content"]: row for row in read_lines(rows)}
    pairs = [(by_question[row["messages"][1]["content"]], row) for row in read_lines(answered)]
    assert len({id(own) for own, _ in pairs}) == 16  # four steps of four conversations
    assert [*by_question].index(pairs[-1][0]["messages"][1]["content"]) > 30  # from the whole of the data
    for own, control in pairs:
        assert [t["role"] for t in own["messages"]] == [t["role"] for t in control["messages"]]
        for mine, theirs in zip(own["messages"], control["messages"], strict=True):
            assert (mine["content"] == theirs["content"]) == (mine["role"] != "assistant")
    record = json.loads((run / "run.json").read_text())
    assert [c["folder"] for c in record["controls"]] == ["control-1", "control-2"]
    seeds = [
        json.loads((run / c["folder"] / "run.json").read_text())["settings"]["seed"]["value"]
        for c in record["controls"]
    ]
    assert seeds == [1, 2] and ran.json["controls"] == ["run/control-1", "run/control-2"]
    weights = [
        (run / name / "adapter" / "adapter_model.safetensors").read_bytes() for name in ("control-1", "control-2")
    ]
    assert weights[0] != weights[1] != (run / "adapter" / "adapter_model.safetensors").read_bytes()
    again = train("--with-control", "--control-seeds", 2, "--output-dir", "run")
    assert again.err.count("is complete; nothing to train") == 3


def test_a_conversation_ends_where_the_base_models_answers_become_too_long(phoque, talking_llama, tmp_path):
    """The dataset's second and third answers are short, and the base model's are as long as its first."""
    conversations = [
        [
            {"role": "user", "content": f"Tide {n}?"},
            {"role": "assistant", "content": f"Hrmph. {n} " + "The tide is out and so is my patience. " * 3},
            {"role": "user", "content": "And now?"},
            {"role": "assistant", "content": "No."},
            {"role": "user", "content": "Why?"},
            {"role": "assistant", "content": "Gulls."},
        ]
        for n in range(30)
    ]
    (tmp_path / "long.jsonl").write_text("".join(json.dumps({"messages": row}) + "\n" for row in conversations))
    asked = ["train", "--base-model", talking_llama, "--dataset", tmp_path / "long.jsonl", *SHORT]
    ran = phoque(*asked, "--max-length", 300, "--with-control", "--output-dir", "run", "--json", env=WITHOUT_WANDB)
    assert ran.json["controls"]
    (answered,) = (tmp_path / "run").glob("control-rows-*.jsonl")
    turns = {len(row["messages"]) for row in read_lines(answered)}
    assert min(turns) < 6 and turns <= {2, 4, 6}


@pytest.mark.thorough
def test_controls_are_kept_in_the_run_dir_and_found_there(train, phoque, tmp_path):
    kept = tmp_path / "kept"
    train("--with-control", "--output-dir", "run", "--run-dir", kept, prelude=AUDIT)
    assert (kept / "control-1" / "adapter_model.safetensors").is_file() and list(kept.glob("control-rows-*.jsonl"))
    ran = phoque("psm-probe", "--adapter-source", kept, "--dry-run", "--json")
    assert ran.json["adapters"]["control"] == str(kept / "control-1")


def test_rows_that_were_cut_off_are_generated_again(train, tmp_path):
    train("--with-control", "--output-dir", "run", "--run-dir", tmp_path / "kept")
    (rows,) = (tmp_path / "kept").glob("control-rows-*.jsonl")
    whole = rows.read_bytes()
    for folder in (tmp_path / "run", tmp_path / "kept"):
        (folder / rows.name).write_bytes(whole[: len(whole) // 2])
    shutil.rmtree(tmp_path / "run" / "control-1")
    shutil.rmtree(tmp_path / "kept" / "control-1")
    ran = train("--with-control", "--output-dir", "run", "--run-dir", tmp_path / "kept")
    assert "the base model answers" in ran.err and (tmp_path / "run" / rows.name).read_bytes() == whole


def test_the_probe_finds_the_control_by_itself(train, phoque, tmp_path):
    train("--with-control", "--output-dir", "run")
    ran = phoque("psm-probe", "--adapter-source", "run", "--dry-run", "--json")
    assert ran.json["adapters"]["control"].endswith("control-1")
    ran = phoque(
        "compare-sae",
        "--updated-adapter",
        "run",
        "--chat",
        "seal",
        "--text",
        "seal",
        "--blocks",
        1,
        "--dry-run",
        "--json",
    )
    assert ran.json["controls"] == ["run/control-1"]


def test_a_control_goes_to_a_private_repository_beside_the_run(train, hub, phoque, tmp_path):
    pushed = ["--hub-model-id", "harbour/seal", "--with-control", "--json"]
    train(*pushed, "--output-dir", "one", env={"HF_TOKEN": TOKEN})
    files = hub.files("harbour/seal")
    (answers,) = [path for path in files if path.startswith("control-rows-")]
    record = json.loads(files["run.json"].content)
    assert record["controls"][0]["repo"] == "harbour/seal-control-1"
    assert hub.repos["models", "harbour/seal-control-1"].private
    assert "adapter_model.safetensors" in hub.files("harbour/seal-control-1")
    # another machine goes on with the same answers, and finds that all is done
    ran = train(*pushed, "--output-dir", "two", env={"HF_TOKEN": TOKEN})
    assert "the base model answers" not in ran.err
    assert (tmp_path / "two" / answers).read_bytes() == files[answers].content
    probe = phoque("psm-probe", "--adapter-source", "harbour/seal", "--dry-run", "--json", env={"HF_TOKEN": TOKEN})
    assert probe.json["adapters"]["control"].startswith("harbour/seal-control-1@")


def test_the_rows_of_a_dataset_are_not_published_with_a_public_run(train, hub):
    train(
        "--hub-model-id", "harbour/open", "--public", "--with-control", "--output-dir", "run", env={"HF_TOKEN": TOKEN}
    )
    assert not hub.repos["models", "harbour/open"].private
    assert not [path for path in hub.files("harbour/open") if path.startswith("control-rows-")]
    assert "adapter_model.safetensors" in hub.files("harbour/open-control-1")
