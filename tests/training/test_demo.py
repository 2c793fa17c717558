"""The newcomer's first command, on the real model: in time, and the seal can be heard."""

import json
import os
import subprocess
import sys

import pytest
from tests.conftest import run_as_user

pytestmark = pytest.mark.slow
CLOSERS = ("Now leave me to my rock.", "Mind the gulls.", "The tide told me so.", "I have herring to think about.")


def test_sixty_steps_make_a_seal(seal):
    losses = seal["held_out_loss"]
    assert losses["after"] <= 0.7 * losses["before"]  # no held-out row is nearly repeated in training
    answers = [sample["response"] for sample in seal["samples"]]
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


@pytest.mark.alone
def test_twenty_steps_take_under_three_minutes(tmp_path):
    env = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"} | {"WANDB_MODE": "disabled"}
    command = "train --preset demo --max-steps 20 --json --output-dir".split()
    for attempt in range(2):  # a second one, for a machine that is shared with others
        argv = [sys.executable, "-m", "phoque", *command, tmp_path / f"run-{attempt}"]
        ran = subprocess.run(argv, env=env, capture_output=True, text=True, check=True)
        if json.loads(ran.stdout)["seconds"] < time_limit():
            return
    pytest.fail(f"{json.loads(ran.stdout)['seconds']} s, where the limit is {time_limit():.0f} s")


def test_the_demos_adapter_merges_into_a_model_that_plain_transformers_loads(seal, shared, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    command = ["merge", "--adapter-source", shared / "seal", "--output-dir", tmp_path / "merged"]
    proof = run_as_user(*command)["proof"]
    assert proof["holds"] and proof["agreeing"] > 0.8 * proof["tokens"]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Gulls?"}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    assert tokenizer.decode(model.generate(**ids, max_new_tokens=12)[0, ids["input_ids"].shape[1] :]).strip()
