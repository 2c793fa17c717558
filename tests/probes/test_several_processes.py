"""Probes by several processes: they find what one process finds, and end together."""

import json
import os
import signal
import sys

import pytest
import torch
from safetensors.torch import load_file
from tests import tiny
from tests.launching import start_together
from tests.probes.persona_vectors.test_psm_probe import FILES, PERSONA, RANKED, find_run, read_table
from tests.probes.sae.test_compare_sae import PROSE, SHORT
from tests.rows import row, write_rows

ALONE = {"XDG_CACHE_HOME": "cache-of-one"}  # so that nothing is found in the cache of the others


@pytest.fixture
def adapter(tiny_llama, tmp_path):
    """An adapter that changes what the tiny model says."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(3)
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(tiny_llama), LoraConfig(r=4, target_modules=["q_proj", "down_proj"])
    )
    tiny.randomize_lora(model, 0.01).save_pretrained(tmp_path / "tuned")
    return tmp_path / "tuned"


@pytest.fixture
def probe(tiny_llama, adapter, tmp_path):
    (tmp_path / "gull.toml").write_text(PERSONA)
    adapters = ["--adapter-source", adapter, "--control-adapter", adapter]
    return ["psm-probe", "--model-source", tiny_llama, "--persona", "gull.toml", *adapters, *RANKED, "--json"]


@pytest.fixture
def comparison(tiny_llama, adapter, tmp_path):
    (tmp_path / "prose.txt").write_text(PROSE * 60)
    chat = write_rows(tmp_path / "rows.jsonl", [row(n) for n in range(40)])
    texts = ["--chat", chat, "--text", "prose.txt", "--persona", "seal"]
    adapters = ["--updated-adapter", adapter, "--control-adapter", adapter]
    return ["compare-sae", "--base-model", tiny_llama, *texts, *adapters, *SHORT, "--seeds", 2, "--json"]


def run_together(start, *arguments, expect=(0, 0), **options):
    ran = [one.ended() for one in start_together(start, *arguments, **options)]
    assert [one.code for one in ran] == list(expect), "\n".join(one.err for one in ran)
    return ran


def assert_alike(one, two, path=""):
    """JSON values are equal, numbers to 1e-4; but not the size of rounding errors, which depend on the batches."""
    assert type(one) is type(two), path
    if isinstance(one, dict):
        assert one.keys() == two.keys(), path
        for key in [key for key in one if "null" not in key]:
            assert_alike(one[key], two[key], f"{path}/{key}")
    elif isinstance(one, list):
        assert len(one) == len(two), path
        for number, pair in enumerate(zip(one, two, strict=True)):
            assert_alike(*pair, f"{path}/{number}")
    elif isinstance(one, float):
        assert one == pytest.approx(two, rel=1e-4, abs=1e-4), path
    else:
        assert one == two, path


@pytest.mark.parametrize("count", [2, pytest.param(3, marks=pytest.mark.thorough)])
def test_processes_probe_what_one_does(start, phoque, probe, count):
    ran = run_together(start, *probe, count=count, expect=(0,) * count)
    assert not any(follower.out or follower.err for follower in ran[1:])
    several, one = find_run(ran[0]), find_run(phoque(*probe, env=ALONE))
    assert len(list(several.parent.iterdir())) == 2  # process 0 alone writes a folder
    assert {file.name for file in several.iterdir()} - {"control_vector.gguf"} == FILES
    texts = [[row["response"] for row in read_table(run / "generation_results.csv")] for run in (several, one)]
    assert texts[0] == texts[1]
    vectors = [load_file(run / "persona_vectors.safetensors")["persona_vectors"] for run in (several, one)]
    torch.testing.assert_close(*vectors, rtol=1e-4, atol=1e-5)
    found = [json.loads((run / "summary.json").read_text()) for run in (several, one)]
    for summary in found:
        del summary["run"], summary["config"]["output_dir"]
    assert_alike(*found)


@pytest.mark.thorough
def test_processes_compare_what_one_does(start, phoque, comparison):
    ran = run_together(start, *comparison)
    assert not ran[1].out and not ran[1].err
    several, one = find_run(ran[0]), find_run(phoque(*comparison, env=ALONE))
    assert len(list(several.parent.iterdir())) == 2
    names = ("sae_comparison_report.json", "feature_shifts.csv", "generations.jsonl")
    reports = [json.loads((run / names[0]).read_text()) for run in (several, one)]
    for report in reports:
        del report["run"], report["difference"]  # its dictionary learns from rounding errors, too
    assert reports[0]["causes"]["features"] and reports[0]["overall"]["n_replicated"] is not None
    assert_alike(*reports)
    for name in names[1:]:
        assert len((several / name).read_text()) == pytest.approx(len((one / name).read_text()), rel=0.01)
    again = run_together(start, *comparison)[0]  # the autoencoder is found in the cache by both
    assert "was trained before" in again.err


def test_a_wrong_input_is_said_once(start, probe):
    ran = run_together(start, *probe, "--steer-blocks", "9", expect=(2, 1))
    assert "There is no block 9." in ran[0].error[0] and not ran[1].err


def test_an_error_that_all_processes_meet_is_said_once(start, probe):
    ran = run_together(start, *probe, "--scorer", "herring", expect=(2, 2))
    assert "No scorer 'herring'" in ran[0].error[0] and not ran[1].err


def test_process_0_alone_asks_a_command_and_shows_a_dry_run(start, probe, tmp_path):
    script = tmp_path / "count.py"
    script.write_text(
        "import sys\nopen('calls', 'a').write('x')\nfor line in sys.stdin: print('{\"score\": %d}' % len(line))"
    )
    asked = [*probe, "--scorer", f"command:{sys.executable} {script}"]
    ran = run_together(start, *asked)
    scored = ran[0].err.count("answers with command:")
    assert 2 <= len((tmp_path / "calls").read_text()) <= scored <= 3  # some answers are in the cache
    dry = run_together(start, *asked, "--dry-run")
    assert dry[0].json["persona"] == "gull watcher" and not dry[1].out


def test_a_process_that_dies_takes_the_others_down(start, probe):
    started = start_together(start, *probe, "--max-new-tokens", 400, "--samples", 20)
    started[0].until(lambda: "sweep" in started[0].read_stderr())
    os.kill(started[1].pid, signal.SIGKILL)
    assert started[0].ended().code == 1
