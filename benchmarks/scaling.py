"""One run on several GPUs: tokens per second for 1, 2, ... GPUs at the same number of tokens per GPU.

    uv run python benchmarks/scaling.py --out scaling --gpus 1 2

Trains the 3B shape (random weights) with the command line, as a user does: `phoque train --gpus N`. Each GPU gets one
row of about 2,100 or 8,192 tokens per step. At the end one GPU trains on the rows of two, and the losses of both runs
are compared. `--trl` runs TRL under `accelerate launch` beside it, without and with gradient checkpointing, on
conversations of equal length, because it pads them. What is in the folder already is not run again.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from itertools import product
from pathlib import Path
from random import Random
from typing import Any

sys.path.append(str(Path(__file__).parent))
SHAPES = {
    "3B": {"hidden_size": 3072, "intermediate_size": 9216, "num_hidden_layers": 26},
    "8B": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 34},
}
SENTENCE = "The tide comes in and the tide goes out, and a seal on the rock has all the time in the world for both. "
SPREAD = 100  # tokens
STEPS = 25


def write_rows(path: Path, spread: int = 0) -> None:
    """Conversations of 220 tokens of the tiny byte tokenizer, or of up to `spread` tokens more or less."""
    text, random = SENTENCE * 3, Random(0)
    rows = [
        [
            {"role": "user", "content": f"What do you think of tide number {number:05}?"},
            {"role": "assistant", "content": text[number % 40 :][: 150 + random.randint(-spread, spread)]},
        ]
        for number in range(20_000)
    ]
    path.write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))


def train(out: Path, model: Path, quantization: str, tokens: int, gpus: int, rows: int, mean: float) -> dict[str, Any]:
    """Run the command; return its tokens per second, losses, peak GB per GPU, and the share of time without data."""
    micro_batch = round(tokens / mean)
    folder = out / f"{model.name}-{quantization}-{tokens}-{gpus}x{rows}"
    command = [sys.executable, "-m", "phoque", "train", "--base-model", model, "--dataset", out / "rows.jsonl"]
    command += ["--quantization", quantization, "--batch-size", rows * micro_batch, "--micro-batch", micro_batch]
    command += ["--max-steps", STEPS, "--log-every", 5, "--held-out-rows", 0, "--sample-every", 0, "--save-steps", 1000]
    command += ["--engine-mode", "graph", "--norms-every", 1000, "--output-dir", folder, "--fresh-start", "--yes"]
    command += ["--gpus", gpus]
    return run_training(command, folder)


def run_training(command: list[Any], folder: Path) -> dict[str, Any]:
    """Run the command; return its speed, losses, peak GB per GPU, engine and sharded GB, or its error.

    The first logged line is left out of the speed.
    """
    begun = time.monotonic()
    done = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, env=os.environ | {"WANDB_MODE": "disabled"}
    )
    if done.returncode:
        return {"error": done.stderr[-6000:]}
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "loss" in line]
    record = json.loads((folder / "run.json").read_text())
    return {
        "tokens_per_s": statistics.median(line["tokens_per_s"] for line in steps[1:]),
        "losses": [line["loss"] for line in steps],
        "held_out": [line["held_out_loss"] for line in lines if "held_out_loss" in line],
        "waiting_for_data": max(line["waiting_for_data"] for line in steps[1:]),
        "gpu_memory_gb": steps[-1].get("gpu_memory_gb"),
        "seconds": round(time.monotonic() - begun, 1),
        "engine": record["engine"]["mode"],
        "sharded": record.get("fsdp"),
    }


def train_trl(out: Path, model: Path, tokens: int, gpus: int, mean: float, *, checkpointing: bool) -> dict[str, Any]:
    """Run TRL under `accelerate launch`; return its tokens per second and peak GB per GPU, or its error."""
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", gpus, "--num_machines", 1]
    launch += ["--mixed_precision", "no", "--dynamo_backend", "no", *(["--multi_gpu"] if gpus > 1 else [])]
    command = [*launch, Path(__file__).with_name("trl_scaling.py"), "--model", model, "--rows", out / "equal.jsonl"]
    command += ["--batch", round(tokens / mean), *(["--checkpointing"] if checkpointing else [])]
    # beside a second GPU, one process would use DataParallel, which refuses models in 4 bits
    visible = os.environ | {"CUDA_VISIBLE_DEVICES": ",".join(map(str, range(gpus)))}
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=visible)
    lines = [line for line in done.stdout.splitlines() if line.startswith('{"tokens_per_s')]
    return json.loads(lines[-1]) if lines else {"error": done.stderr[-3000:]}


def main(out: Path, gpus: list[int], shapes: list[str], tokens: list[int], *, trl: bool, same_rows: bool) -> None:
    from family_speed import SHAPES as FAMILIES
    from family_speed import write_checkpoint

    out.mkdir(parents=True, exist_ok=True)
    path = out / "scaling.json"
    found: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    write_rows(out / "rows.jsonl", SPREAD)
    write_rows(out / "equal.jsonl")
    for shape in shapes:
        model = out / shape
        if not model.is_dir():
            write_checkpoint(model, FAMILIES["Ministral 3 8B"] | SHAPES[shape])
        asked = [(q, t, n, n) for t in tokens for q in ("nf4", "fp8") for n in gpus]
        if same_rows:
            asked.append(("nf4", tokens[-1], 1, max(gpus)))  # one GPU on the rows of several
        for quantization, length, count, rows in asked:
            key = f"{shape} {quantization} {length} {count} GPU {rows} rows"
            if "tokens_per_s" not in found.get(key, {}):
                found[key] = train(out, model, quantization, length, count, rows, mean=220.0)
                path.write_text(json.dumps(found, indent=1))
                print(key, found[key], flush=True)
        for length, count, checkpointing in product(tokens, gpus, (False, True)) if trl else ():
            key = f"{shape} TRL{'-checkpointing' if checkpointing else ''} {length} {count} GPU {count} rows"
            if "tokens_per_s" not in found.get(key, {}):
                found[key] = train_trl(out, model, length, count, 220.0, checkpointing=checkpointing)
                path.write_text(json.dumps(found, indent=1))
                print(key, found[key], flush=True)
    print_table(found, gpus)


def print_table(found: dict[str, Any], gpus: list[int]) -> None:
    """Speed and efficiency by shape, precision and tokens per GPU; and how far the losses of one and several differ."""
    print("\n| shape, precision, tokens per GPU | " + " | ".join(f"{n} GPU" for n in gpus) + " | speed-up |")
    print("|---|" + "---|" * (len(gpus) + 1))
    for key in found:
        shape, quantization, length, count, _, rows, _ = key.split()
        if (count, rows) != (str(gpus[0]), str(gpus[0])):
            continue
        speeds = [found.get(f"{shape} {quantization} {length} {n} GPU {n} rows", {}).get("tokens_per_s") for n in gpus]
        if all(speeds):
            shown = " | ".join(f"{speed:,.0f}" for speed in speeds)
            print(f"| {shape}, {quantization}, {length} | {shown} | {speeds[-1] / speeds[0]:.2f} x |")
    for key, alone in found.items():
        shape, quantization, length, count, _, rows, _ = key.split()
        several = found.get(f"{shape} {quantization} {length} {rows} GPU {rows} rows", {})
        if count == "1" and rows != "1" and "losses" in alone and "losses" in several:
            pairs = zip(alone["losses"], several["losses"], strict=True)
            worst = max(abs(a - b) for a, b in pairs)
            print(f"\nlosses of 1 and {rows} GPUs on the same rows differ by at most {worst:.4f} nats per token")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("scaling"))
    parser.add_argument("--gpus", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--shapes", nargs="+", default=["3B"])
    parser.add_argument("--tokens", type=int, nargs="+", default=[8192, 2100])
    parser.add_argument("--trl", action="store_true", help="run TRL beside phoque")
    parser.add_argument("--no-same-rows", action="store_true", help="leave out one GPU on the rows of several")
    asked = parser.parse_args()
    main(asked.out, asked.gpus, asked.shapes, asked.tokens, trl=asked.trl, same_rows=not asked.no_same_rows)
