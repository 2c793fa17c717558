"""The GPU memory that `phoque train --dry-run` estimates, beside what the same training takes.

Every cell is a run of its own on random weights: the estimate comes from `--dry-run --json`, the memory from the peak
that torch allocated in four steps, and from nvidia-smi while the process runs, of the whole card, less what it held
before the first run. The seconds are those from Enter to the first optimizer step.

Run on a GPU machine: python benchmarks/memory.py [--shapes 3b,8b] [--folder FOLDER] [--cap GB] [--cells NAME]
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from itertools import product
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
STEPS = 4
CAPPED = Path(__file__).parent / "capped.py"
SHAPES = {
    "3b": {},
    "8b": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 34},
}
BATCHES = {"3b": (16, 62), "8b": (16,)}  # conversations per step; their mean length is about 130 tokens
QUANTIZATIONS = {"3b": ("nf4", "fp8", "bf16"), "8b": ("nf4",)}


def train(
    model: Path, rows: Path, quantization: str, batch: int, recompute: bool, output: Path, cap: float
) -> dict[str, Any]:
    """Ask for the estimate, then train; returns GB and seconds. With `cap`, torch may allocate so many GB."""
    start = [str(CAPPED), str(cap)] if cap else ["-m", "phoque"]
    command = [sys.executable, *start, "train", "--base-model", str(model), "--dataset", str(rows)]
    command += ["--quantization", quantization, "--batch-size", str(batch), "--max-steps", str(STEPS), "--json"]
    command += ["--output-dir", str(output), "--log-every", "1", "--sample-every", "0", "--held-out-rows", "0"]
    command += ["--gradient-checkpointing"] if recompute else []
    planned = subprocess.run([*command, "--dry-run"], capture_output=True, text=True)
    if planned.returncode:
        raise SystemExit(planned.stderr)
    estimate = json.loads(planned.stdout)["memory_gb"]
    begun, smi, first, lines = time.monotonic(), 0, None, []
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    os.set_blocking(process.stderr.fileno(), False)
    while process.poll() is None:
        if first is None and (output / "metrics.jsonl").is_file() and (output / "metrics.jsonl").stat().st_size:
            first = time.monotonic() - begun
        if line := process.stderr.readline():
            lines.append(f"{time.monotonic() - begun:6.2f} {line.strip()}")
            continue
        smi = max(smi, read_smi())
    assert process.stdout is not None
    process.stdout.close()
    if process.returncode:
        raise SystemExit("\n".join(lines))
    print("\n".join(lines), file=sys.stderr, flush=True)
    found = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    engine = json.loads((output / "run.json").read_text()).get("engine", {})
    return {
        "estimate": estimate,
        "torch": max(row.get("gpu_memory_gb", 0) for row in found),
        "smi": smi / 1e3,
        "first_step": first,
        "tokens": max(row.get("tokens", 0) for row in found) / STEPS,
        "engine": engine,
    }


def read_smi() -> int:
    """MB in use on the first GPU, of all processes; 0 without a GPU."""
    if shutil.which("nvidia-smi") is None:
        return 0
    query = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits", "--id=0"]
    return round(int(subprocess.run(query, capture_output=True, text=True).stdout) * 1.048576)


def describe_recomputed(engine: dict[str, Any], asked: bool) -> str:
    """How many layers the run recomputed, from what run.json says of its engine."""
    count, layers = engine.get("recomputed_layers", 0), engine.get("layers", 0)
    if asked or (count and count == layers):
        return "all"
    return f"{count} of {layers}" if count else "none"


def main() -> None:
    """Measure every cell and print the table of docs/benchmarks/training.md."""
    import ministral
    import train_speed

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", default="3b,8b")
    parser.add_argument("--folder", type=Path, default=None)
    parser.add_argument("--cap", type=float, default=0.0, help="the GB that torch may allocate")
    parser.add_argument("--cells", default="", help="only cells whose name contains this, such as 3b-nf4-16-all")
    parser.add_argument("--tiny", action="store_true", help="a small model, to try the script itself")
    asked = parser.parse_args()
    folder = asked.folder or Path(tempfile.mkdtemp())
    idle = read_smi()
    print(
        "| shape | weights | tokens per step | recomputed layers | estimate, GB | torch, GB | nvidia-smi, GB "
        "| first step, s |"
    )
    print("|---|---|---|---|---|---|---|---|", flush=True)
    for shape in asked.shapes.split(","):
        ministral.SHAPE |= SHAPES[shape]
        home = folder / shape
        home.mkdir(parents=True, exist_ok=True)
        if not (home / "fp8").is_dir():
            ministral.make(home, asked.tiny, ("fp8",))
            train_speed.write_rows(home)
        for quantization, batch, recompute in product(QUANTIZATIONS[shape], BATCHES[shape], (False, True)):
            name = f"{shape}-{quantization}-{batch}-{'all' if recompute else 'chosen'}"
            if asked.cells not in name:
                continue
            output = home / (f"{name}-{asked.cap:g}" if asked.cap else name)
            found = train(home / "fp8", home / "rows.jsonl", quantization, batch, recompute, output, asked.cap)
            capped = f", torch capped at {asked.cap:g} GB" if asked.cap else ""
            print(
                f"| {shape.upper()}{capped} | {quantization.upper()} | "
                f"{found['tokens']:,.0f} | {describe_recomputed(found['engine'], recompute)} | "
                f"{found['estimate']['sum']:.1f} | {found['torch']:.1f} | {found['smi'] - idle / 1e3:.1f} | "
                f"{found['first_step'] or 0:.1f} |",
                flush=True,
            )
            print(json.dumps({**found, "cell": [shape, quantization, batch, recompute]}), file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
