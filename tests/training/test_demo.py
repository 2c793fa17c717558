"""The newcomer's first command, on the real model: in time, and the seal can be heard."""

import json
import os
import subprocess
import sys
import time

import pytest

pytestmark = pytest.mark.slow
CLOSERS = ("Now leave me to my rock.", "Mind the gulls.", "The tide told me so.", "I have herring to think about.")


def demo(*arguments) -> tuple[dict, float]:
    """Run as a user does, in a process of its own, with both cores."""
    env = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    command = [sys.executable, "-m", "phoque", "train", "--preset", "demo", "--json", *map(str, arguments)]
    begun = time.monotonic()
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout), time.monotonic() - begun


def test_sixty_steps_make_a_seal(tmp_path):
    result, _ = demo("--output-dir", tmp_path / "run", "--sample-every", 60)
    losses = result["held_out_loss"]
    assert losses["after"] <= losses["before"] * 2 / 3
    answers = [sample["response"] for sample in result["samples"]]
    assert len(answers) == 2 and all(answer.startswith("Hrmph. ") for answer in answers)
    assert any(answer.rstrip().endswith(CLOSERS) for answer in answers)


REFERENCE_S = 0.35  # the matrix products below, on a machine where twenty steps take about two minutes
PRODUCTS = """
import time, torch
torch.set_num_threads(2)
a = torch.randn(1024, 1024)
def run():
    start = time.perf_counter()
    for _ in range(30):
        a @ a
    return time.perf_counter() - start
run()
print(min(run() for _ in range(5)))
"""


def time_limit() -> float:
    """Three minutes, and on a machine whose matrix products are slower than the reference's, longer in proportion."""
    env = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    ran = subprocess.run([sys.executable, "-c", PRODUCTS], env=env, capture_output=True, text=True, check=True)
    return 180 * max(1.0, float(ran.stdout) / REFERENCE_S)


def test_twenty_steps_take_under_three_minutes(tmp_path):
    # the second start: the weights are in the cache by now; a second try, for a machine that is shared with others
    for attempt in range(2):
        limit = time_limit()
        result, seconds = demo("--max-steps", 20, "--output-dir", tmp_path / f"run-{attempt}")
        assert result["steps"] == 20
        if seconds < limit:
            break
    assert seconds < limit


def test_the_demos_adapter_merges_into_a_model_that_plain_transformers_loads(tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    demo("--max-steps", 8, "--output-dir", tmp_path / "run", "--sample-every", 0)
    command = [
        sys.executable,
        "-m",
        "phoque",
        "merge",
        "--adapter-source",
        tmp_path / "run",
        "--output-dir",
        tmp_path / "merged",
        "--json",
    ]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    proof = json.loads(done.stdout)["proof"]
    assert proof["holds"] and proof["agreeing"] > 0.8 * proof["tokens"]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Gulls?"}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    assert tokenizer.decode(model.generate(**ids, max_new_tokens=12)[0, ids["input_ids"].shape[1] :]).strip()
