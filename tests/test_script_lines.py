"""Every command line of the scripts that phoque replaces, as docs/from-the-scripts.md lists them, run as it stands."""

import json
import os
import re
import shlex
from itertools import pairwise
from pathlib import Path

import pytest

from tests import tiny
from tests.fakehub import TOKEN
from tests.rows import row

GUIDE = Path(__file__).parent.parent / "docs" / "from-the-scripts.md"
USER, BASE = "harbour", "mistralai/Ministral-3-3B-Instruct-2512"
COMMANDS = {
    "train": "train",
    "export_onnx": "export-onnx",
    "verify_transformersjs_onnx": "verify-onnx",
    "compare_sae": "compare-sae",
    "prove_psm": "psm-probe",
}
# Sizes for a tiny model on a CPU, as environment variables; the command lines stay as they are.
SMALL = {
    "PHOQUE_QUANTIZATION": "fp32",
    "PHOQUE_BATCH_SIZE": "4",
    "PHOQUE_SAMPLE_TOKENS": "4",
    "PHOQUE_MAX_NEW_TOKENS": "6",
    "PHOQUE_EXTRACTION_TOKENS": "6",
    "PHOQUE_SWEEP_TOKENS": "4",
    "PHOQUE_COEFFICIENTS": "0.1,0.3",
    "PHOQUE_SAMPLES": "1",
    "PHOQUE_QUESTIONS": "12",
    "PHOQUE_ROLE_QUESTIONS": "2",
    "PHOQUE_SWEEP_QUESTIONS": "1",
    "PHOQUE_DIRECTIONS": "0",
    "PHOQUE_DOSES": "0,1",
    "PHOQUE_MATCHED_FEATURES": "4",
    "PHOQUE_TOKENS": "4000",
    "PHOQUE_OWN_ANSWERS": "6",
    "PHOQUE_K": "8",
    "PHOQUE_SAE_BATCH": "64",
    "PHOQUE_CARDS": "2",
    "PHOQUE_CAUSAL_PROMPTS": "4",
    "WANDB_MODE": "offline",
}


def script_lines() -> list[str]:
    """The command lines in the guide's blocks of the kind `sh`, without their line breaks."""
    blocks = re.findall(r"^```sh\n(.*?)^```", GUIDE.read_text(), re.MULTILINE | re.DOTALL)
    return [line for block in blocks for line in block.replace("\\\n", " ").splitlines() if line.strip()]


def read_line(line: str) -> tuple[list[str], dict[str, str]]:
    """The arguments of phoque and the environment that a command line of the scripts stands for."""
    words = shlex.split(line.replace("{username}", USER))
    script = next(n for n, word in enumerate(words) if word.startswith("train/"))
    env = {"JOB_ID": "a" * 24} if words[0] == "hf" else {}
    for flag, value in pairwise(words[:script]):
        if flag == "--env":
            name, _, text = value.partition("=")
            env[name] = text
    return [COMMANDS[Path(words[script]).stem], *words[script + 1 :]], env


@pytest.fixture
def published(hub, tmp_path):
    """The base model and the dataset of the scripts, on the test Hub."""
    base, _ = tiny.fp8_mistral3(tmp_path / "base")
    (base / "processor_config.json").write_text("{}")
    (base / "preprocessor_config.json").write_text("{}")
    hub.add("models", BASE, {path.name: path.read_bytes() for path in base.iterdir()})
    lines = "\n".join(json.dumps(row(number)) for number in range(60))
    hub.add("datasets", f"{USER}/what-the-phoque-dataset", {"train.jsonl": lines.encode()})
    hub.add("datasets", "HuggingFaceH4/ultrachat_200k", {"data/train_sft-00000-of-00001.jsonl": lines.encode()})
    prose = "\n".join(
        json.dumps({"text": f"The tide came in at {n}, and the gulls took the herring. " * 9}) for n in range(80)
    )
    hub.add("datasets", "HuggingFaceFW/fineweb-edu", {"sample/10BT/000_00000.jsonl": prose.encode()})
    return hub


@pytest.mark.thorough
def test_every_line_runs_as_it_stands(phoque, published, tmp_path):
    """In the guide's order, because a line uses what earlier lines made."""
    lines = [line for line in script_lines() if " train/" in line]
    assert len(lines) >= 14 and {read_line(line)[0][0] for line in lines} == set(COMMANDS.values())
    paths = {"/tmp/checkpoints/checkpoint-100": None, "/tmp/checkpoint-100-merged": None}
    for line in lines:
        arguments, env = read_line(line)
        if "checkpoint-" in line:  # the folders that a run on this machine would have left
            local = tmp_path / "runs" / "checkpoints"
            if not local.exists():
                phoque(
                    "train",
                    env=small(
                        env | {"MAX_STEPS": "4", "DATASET_REPO": f"{USER}/what-the-phoque-dataset"},
                        OUTPUT_DIR=str(local),
                        PHOQUE_SAVE_STEPS="2",
                    ),
                )
                phoque(
                    "merge",
                    "--adapter-source",
                    local / "checkpoint-2",
                    "--output-dir",
                    tmp_path / "merged",
                    env=small({}),
                )
            paths = {
                "/tmp/checkpoints/checkpoint-100": local / "checkpoint-2",
                "/tmp/checkpoint-100-merged": tmp_path / "merged",
            }
        arguments = [str(paths.get(argument) or argument) for argument in arguments]
        if "--onnx-export-python" in arguments:
            arguments[arguments.index("--onnx-export-python") + 1] = os.sys.executable
        if "train" in arguments and "MAX_STEPS" not in env:
            env |= {"MAX_STEPS": "20"}
        ran = phoque(*arguments, "--json", env=small(env))
        assert ran.json, line


def small(env: dict[str, str], **more: str) -> dict[str, str]:
    return SMALL | {"HF_TOKEN": TOKEN, "WANDB_API_KEY": "g" * 40} | env | more
