"""Mistakes of new users: the seconds until phoque answers, and what it says. None needs the network.

Run: uv run python benchmarks/mistakes.py
"""

import os
import shlex
import subprocess
import sys
import tempfile
import time
from importlib.resources import files
from pathlib import Path

MISTAKES = (  # what went wrong, and the command; `rows.jsonl` and the other files are those of write_files()
    ("a misspelled command", "trian --dataset rows.jsonl"),
    ("a misspelled flag", "train --dataset rows.jsonl --learning-rte 1e-4"),
    ("a value without its flag", "train rows.jsonl"),
    ("a run without its flag", "merge runs/demo"),
    ("a question without its flag", 'chat runs/demo "What do gulls eat?"'),
    ("a flag that phoque calls otherwise", "train --dataset rows.jsonl --lr 1e-4"),
    ("several values without commas", "export-gguf --adapter-source runs/demo --dtype q8_0 q4_k_m"),
    ("a word where a number belongs", "train --dataset rows.jsonl --learning-rate fast"),
    ("a number out of range", "train --dataset rows.jsonl --max-steps -1"),
    ("a misspelled preset", "train --dataset rows.jsonl --preset minstral-3b"),
    ("a precision that does not exist", "train --dataset rows.jsonl --quantization int4"),
    ("settings that contradict each other", "train --dataset rows.jsonl --batch-size 16 --micro-batch 5"),
    ("no dataset", "train"),
    ("a misspelled dataset", "train --dataset rowz.jsonl"),
    ("an empty dataset", "train --preset demo --dataset empty.jsonl"),
    ("a dataset in a format that phoque does not read", "train --preset demo --dataset rows.xlsx"),
    ("a .json file that is cut off", "train --preset demo --dataset broken.json"),
    ("a table with other column names", "train --preset demo --dataset columns.csv"),
    ("a table with empty cells", "train --preset demo --dataset cells.csv"),
    ("a split that is not there", "train --preset demo --dataset rows.jsonl --eval-split test"),
    ("a base model that is not there", "train --dataset rows.jsonl --base-model ./mistral"),
    ("a folder without a model", "train --dataset rows.jsonl --base-model pictures"),
    ("a pickled model", "train --dataset rows.jsonl --base-model pickled"),
    ("a config file that is not there", "train --config seal.toml"),
    ("a config file with a misspelled key", "train --config typo.toml"),
    ("a secrets file that is not there", "train --dataset rows.jsonl --secrets-file .env.mine"),
    (
        "an output folder with files that training would replace",
        "train --preset demo --dataset rows.jsonl --output-dir out",
    ),
    ("an output folder that is a file", "train --preset demo --dataset rows.jsonl --output-dir rows.jsonl"),
    ("a command after the training that is misspelled", 'train --preset demo --then "export-onnx --dtype q5"'),
    ("a repository without a token", "train --preset demo --dataset rows.jsonl --hub-model-id you/seal"),
    ("a Job without a token", "train --dataset rows.jsonl --hub-model-id you/seal --on l4x1"),
    ("a merge without an adapter", "merge"),
    ("an adapter that is not there", "merge --adapter-source ./runs/seel"),
    ("a misspelled run", "merge --adapter-source runs/dem"),
    ("a merged model as the adapter", "export-gguf --adapter-source model"),
    ("a run as the merged model", "export-onnx --merged-dir runs/demo"),
    ("a run as the base model", "train --dataset rows.jsonl --base-model runs/demo"),
    ("a merge into a folder with other files", "merge --adapter-source runs/demo --output-dir pictures"),
    ("an export of nothing", "export-onnx"),
    ("an export of a model that is not there", "export-onnx --base-model ./merged"),
    ("a check of an export that is not there", "verify-onnx --local-dir ./seal-onnx"),
    ("a check of GGUF files as an ONNX export", "verify-onnx --local-dir gguf"),
    ("a check of nothing", "verify-gguf"),
    ("a persona file that is not there", "psm-probe --persona seel.toml --model-source model"),
    ("a persona file without questions", "psm-probe --persona short.toml --model-source model"),
    ("a persona file with a misspelled list", "psm-probe --persona list.toml --model-source model"),
    ("a comparison without an updated model", "compare-sae --base-model ./merged"),
    ("a probe without a persona", "psm-probe"),
    ("a prompts file that is not there", "chat runs/demo --prompts-file questions.txt"),
    ("a conversation with an empty folder", "chat empty"),
)


def write_files(folder: Path) -> None:
    """The files that the commands name."""
    row = '{"messages": [{"role": "user", "content": "Gulls?"}, {"role": "assistant", "content": "Hrmph."}]}\n'
    (folder / "rows.jsonl").write_text(row * 20)
    (folder / "empty.jsonl").write_text("")
    (folder / "columns.csv").write_text("Frage,Antwort\nGulls?,Hrmph.\n")
    (folder / "cells.csv").write_text("prompt;completion\nGulls?;\nTide?;Low.\n")
    (folder / "list.toml").write_text('name = "seal"\npersonna = ["You are a seal."]\n')
    (folder / "rows.xlsx").write_bytes(b"PK gulls")
    (folder / "broken.json").write_text('[{"messages": [')
    (folder / "typo.toml").write_text('dataset = "rows.jsonl"\nlearning_rte = 1e-4\n')
    (folder / "short.toml").write_text('name = "seal"\npersona = ["You are a seal."]\n')
    for name, file in (
        ("pictures", "gull.png"),
        ("pickled", "pytorch_model.bin"),
        ("model", "model.safetensors"),
        ("out", "metrics.jsonl"),
        ("gguf", "model-q8_0.gguf"),
        ("runs/demo/adapter", "adapter_model.safetensors"),
    ):
        (folder / name).mkdir(parents=True)
        (folder / name / file).write_bytes(b"gulls")
    (folder / "model" / "model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")  # no tensors
    (folder / "model" / "tokenizer.json").write_text("{}")
    (folder / "gguf" / "model-q8_0.gguf").write_bytes(b"GGUF gulls")
    (folder / "empty").mkdir()
    (folder / "runs/demo/run.json").write_text("{}")
    (folder / "runs/demo/adapter/adapter_config.json").write_text('{"base_model_name_or_path": "you/model"}')
    for name in ("pickled", "model"):
        (folder / name / "config.json").write_text('{"model_type": "llama", "architectures": ["LlamaForCausalLM"]}')


def run(command: str, folder: Path) -> tuple[float, int, list[str]]:
    """Seconds, exit code, and the lines of the error."""
    env = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING", "PHOQUE", "WANDB", "OPENAI"))}
    env |= {"HF_HOME": str(folder / "hf"), "XDG_CACHE_HOME": str(folder / "cache")}
    begun = time.perf_counter()
    done = subprocess.run(
        [str(Path(sys.executable).with_name("phoque")), *shlex.split(command)],
        cwd=folder,
        env=env,
        capture_output=True,
        text=True,
    )
    taken = time.perf_counter() - begun
    return taken, done.returncode, [line.strip() for line in done.stderr.strip().splitlines()[-3:]]


def main() -> None:
    """Print the table of docs/benchmarks/inputs.md."""
    print("| mistake | seconds | `error` and `do` |\n|---|---|---|")
    for mistake, command in MISTAKES:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            write_files(folder)
            seconds, code, lines = min((run(command, folder) for _ in range(2)), key=lambda found: found[0])
        text = [line.split(": ", 1)[-1].replace("|", "\\|") for line in lines]
        for place in (name, str(files("phoque").parent)):
            text = [line.replace(place, "...") for line in text]
        said = f"{text[0]} {text[-1]}" if code == 2 else f"EXIT {code}: {' '.join(text)}"
        print(f"| {mistake} | {seconds:.1f} | {said} |", flush=True)


if __name__ == "__main__":
    main()
