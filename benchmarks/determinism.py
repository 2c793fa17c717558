"""Is training deterministic on this GPU, and what does it cost? Equal runs, a killed and resumed run, and the speed.

A model of random weights at --shape is trained on the bundled seal by `phoque train` in processes of its own: twice as
it is, once stopped by SIGTERM half-way and resumed, and once with --no-deterministic twice. The adapters are compared
byte for byte. The speed is the median of the steps after the first ten, in tokens per second, per setting.

Run on a GPU machine: python benchmarks/determinism.py [--shape small|3b] [--modes eager,graph] [--batch-sizes 3,11]
"""

import argparse
import hashlib
import itertools
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[1] / "src")]
SHAPES = {
    "small": {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 8, "num_attention_heads": 16},
    "3b": {"hidden_size": 3072, "intermediate_size": 9216, "num_hidden_layers": 26, "num_attention_heads": 32},
}


def write_base(folder: Path, shape: str) -> Path:
    """A Llama of random weights in bf16, with the tests' tokenizer."""
    from tests import tiny
    from transformers import LlamaConfig, LlamaForCausalLM

    tiny.llama(folder)
    config = LlamaConfig.from_pretrained(folder)
    config.update(SHAPES[shape] | {"num_key_value_heads": 8, "head_dim": 128 if shape == "3b" else 64})
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.cpu().save_pretrained(folder)
    return folder


def train(base: Path, run: Path, *options: str, stop_at: int | None = None) -> str:
    """Train in a process of its own; stop it after step `stop_at`. Returns the adapter's SHA-256."""
    command = [sys.executable, "-m", "phoque", "train", "--base-model", base, "--dataset", "seal", "--output-dir", run]
    command += ["--log-every", "1", "--sample-every", "0", "--save-steps", "1000", *options]
    env = os.environ | {"WANDB_MODE": "disabled"}
    for attempt in range(2 if stop_at else 1):
        process = subprocess.Popen(
            [*map(str, command)], env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )
        if stop_at and attempt == 0:
            metrics = run / "metrics.jsonl"
            while not metrics.is_file() or metrics.read_text().count('"loss"') < stop_at:
                assert process.poll() is None, process.communicate()[1][-800:]
                time.sleep(0.005)
            process.send_signal(signal.SIGTERM)
        error = process.communicate()[1]
        assert process.returncode == (75 if stop_at and attempt == 0 else 0), error[-1500:]
    return hashlib.sha256((run / "adapter" / "adapter_model.safetensors").read_bytes()).hexdigest()[:16]


def read_speed(run: Path) -> float:
    """Median tokens per second of the steps after the first ten."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    speeds = [row["tokens_per_s"] for row in rows if row.get("step", 0) > 10 and "tokens_per_s" in row]
    return statistics.median(speeds) if speeds else float("nan")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=[*SHAPES], default="small")
    parser.add_argument("--modes", default="eager,graph")
    parser.add_argument("--quantizations", default="nf4")
    parser.add_argument("--batch-sizes", default="3,11", help="conversations of about 700 tokens per step")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--speed-alone", action="store_true", help="one run with and one without, nothing compared")
    asked = parser.parse_args()
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    print(f"{device}, torch {torch.__version__}, shape {asked.shape}, {asked.steps} steps")
    names = "quantization, mode, tokens per step, equal runs, resumed, without: equal runs, tokens per s, without, cost"
    print("| " + names.replace(", ", " | ") + " |")
    print("|---|---|---|---|---|---|---|---|---|", flush=True)
    lists = (asked.quantizations.split(","), asked.modes.split(","), asked.batch_sizes.split(","))
    with tempfile.TemporaryDirectory() as scratch:
        base = write_base(Path(scratch) / "base", asked.shape)
        for quantization, mode, batch in itertools.product(*lists):
            root = Path(scratch) / f"{quantization}-{mode}-{batch}"
            options = ("--quantization", quantization, "--engine-mode", mode, "--batch-size", batch)
            options += ("--max-steps", str(asked.steps))
            free = ("--no-deterministic",)
            hashes = {"1": train(base, root / "1", *options), "free": train(base, root / "free", *options, *free)}
            verdicts = ["", "", ""]
            if not asked.speed_alone:
                resumed = train(base, root / "resumed", *options, stop_at=asked.steps // 2)
                again, free_again = (train(base, root / n, *options, *more) for n, more in (("2", ()), ("free2", free)))
                verdicts = [again == hashes["1"], resumed == hashes["1"], free_again == hashes["free"]]
            speeds = [read_speed(root / name) for name in hashes]
            record = json.loads((root / "1" / "run.json").read_text())
            tokens = record["packing"]["row_tokens"] * record["rows_per_step"]
            cells = [
                quantization,
                record["engine"]["mode"],
                f"{tokens:,}",
                *verdicts,
                *(f"{speed:,.0f}" for speed in speeds),
            ]
            print("| " + " | ".join(map(str, [*cells, f"{1 - speeds[0] / speeds[1]:.1%}"])) + " |", flush=True)


if __name__ == "__main__":
    main()
