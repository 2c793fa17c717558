"""A base model that is sharded over GPUs (`--fsdp`), beside the same training on one GPU, with a cap on each card.

    uv run python benchmarks/sharding.py --out sharding --cap 24

Trains the 24B shape of Mistral Small (random weights) with the command line under torchrun, with all layers
recomputed. Each GPU gets one row of about 2,100 tokens per step; one GPU alone takes the rows of all. torch may
allocate --cap GB on each card. What is in the folder already is not run again.
"""

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch

sys.path.append(str(Path(__file__).parent))
SHAPES = {
    "24B": {"hidden_size": 5120, "intermediate_size": 32768, "num_hidden_layers": 40, "head_dim": 128},
    "3B": {"hidden_size": 3072, "intermediate_size": 9216, "num_hidden_layers": 26},
    "tiny": {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 1024},
}
STEPS, TOKENS, MEAN = 6, 2100, 220.0
CAPPED = Path(__file__).parent / "capped.py"


def train(
    out: Path, model: Path, quantization: str, gpus: int, rows: int, cap: float, *, shard: bool
) -> dict[str, Any]:
    """Run the command; return its tokens per second, losses, and peak GB per GPU, or its error."""
    from scaling import run_training

    micro_batch = round(TOKENS / MEAN)
    folder = out / f"{model.name}-{quantization}-{gpus}{'-fsdp' if shard else ''}-{cap:g}"
    start = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", gpus] if gpus > 1 else [sys.executable]
    command = [*start, CAPPED, cap, "train", "--base-model", model, "--dataset", out / "rows.jsonl"]
    command += ["--fresh-start", "--yes"]
    command += ["--quantization", quantization, "--batch-size", rows * micro_batch, "--micro-batch", micro_batch]
    command += ["--max-steps", STEPS, "--log-every", 1, "--held-out-rows", 8, "--sample-every", 0, "--save-steps", 1000]
    command += ["--engine-mode", "eager", "--gradient-checkpointing", "--norms-every", 1000, "--output-dir", folder]
    command += ["--fsdp"] if shard else []
    return run_training(command, folder)


def main(out: Path, shape: str, gpus: int, cap: float) -> None:
    """Measure what is missing in the folder, and print the table."""
    from family_speed import SHAPES as FAMILIES
    from family_speed import write_checkpoint
    from scaling import write_rows

    out.mkdir(parents=True, exist_ok=True)
    path = out / "sharding.json"
    found: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    write_rows(out / "rows.jsonl")
    torch.manual_seed(0)
    model = out / shape
    if not model.is_dir():
        begun = time.monotonic()
        count = write_checkpoint(model, FAMILIES["Ministral 3 8B"] | SHAPES[shape])
        print(f"{count / 1e9:.1f} B parameters, written in {time.monotonic() - begun:.0f} s", flush=True)
    cells = [("nf4", gpus, True, cap), ("nf4", 1, False, cap), ("bf16", gpus, True, 0.0), ("bf16", 1, False, cap)]
    for quantization, count, shard, limit in cells:
        how = ", --fsdp" if shard else ""
        key = f"{shape} {quantization}, {count} GPU{how}, {f'{limit:g} GB' if limit else 'no cap'}"
        if "tokens_per_s" not in found.get(key, {}):
            found[key] = train(out, model, quantization, count, gpus, limit, shard=shard)
            path.write_text(json.dumps(found, indent=1))
            print(key, found[key], flush=True)
    print("\n| | weights per GPU, GB | memory per GPU, GB | tokens/s | loss of the first and last step |")
    print("|---|---|---|---|---|")
    for key, row in found.items():
        if "error" in row:
            print(f"| {key} | | does not fit | | |")
            continue
        here = f"{row['sharded']['gb_per_process']:.1f} of {row['sharded']['gb']:.1f}" if row["sharded"] else "all"
        memory = f"{row['gpu_memory_gb']:.1f}" if row["gpu_memory_gb"] else ""
        losses = f"{row['losses'][0]:.4f}, {row['losses'][-1]:.4f}"
        print(f"| {key} | {here} | {memory} | {row['tokens_per_s']:,.0f} | {losses} |")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("sharding"))
    parser.add_argument("--shape", default="24B", choices=SHAPES)
    parser.add_argument("--gpus", type=int, default=2)
    parser.add_argument("--cap", type=float, default=24.0, help="the GB that torch may allocate on each card")
    asked = parser.parse_args()
    main(asked.out, asked.shape, asked.gpus, asked.cap)
