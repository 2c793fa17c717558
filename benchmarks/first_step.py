"""How soon the first optimizer step of the preset ministral-3b ends on a GPU: seconds from Enter to each line.

    python benchmarks/train_speed.py --part make --folder models   # random weights at the 3B shape, and rows
    python benchmarks/first_step.py --folder models

Each row is one start with its own run folder. The first start also hashes the weights and measures the rows, and is
shown apart. `import` is the start of TRL's SFT script up to its imports, which has loaded nothing by then.
"""

import argparse
import shutil
import subprocess
import sys
import time
from pathlib import Path

LINES = {"reading ": "imports", "loading ": "data", "trying ": "loading", "engine ": "trial", "1/": "first step"}
TRL = "from trl import SFTConfig, SFTTrainer; from peft import LoraConfig; from transformers import BitsAndBytesConfig"


def measure(folder: Path, mode: str, quantization: str) -> dict[str, float]:
    """Run three steps; return the seconds from the start to the end of each part."""
    run = folder / "first-step"
    shutil.rmtree(run, ignore_errors=True)
    command = [sys.executable, "-u", "-m", "phoque", "train", "--preset", "ministral-3b", "--yes"]
    command += ["--base-model", str(folder / "fp8"), "--dataset", str(folder / "rows.jsonl"), "--output-dir", str(run)]
    command += ["--engine-mode", mode, "--quantization", quantization, "--batch-size", "16", "--max-steps", "3"]
    command += ["--log-every", "1", "--sample-every", "0", "--held-out-rows", "0"]
    begun, found = time.perf_counter(), {}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert process.stdout
    lines = []
    for line in process.stdout:
        lines.append(line)
        for beginning, part in LINES.items():
            if line.strip().startswith(beginning) and part not in found:
                found[part] = time.perf_counter() - begun
    if process.wait() or "first step" not in found:
        raise SystemExit("".join(lines[-20:]))
    return found


def show(what: str, found: dict[str, float]) -> None:
    """Print a row: the seconds that each part took, and all of them."""
    ends = [found.get(part, 0.0) for part in LINES.values()]
    seconds = [end - max([0.0, *ends[:number]]) for number, end in enumerate(ends)]
    print(f"| {what} | " + " | ".join(f"{s:.1f}" for s in (*seconds, ends[-1])) + " |", flush=True)


def main(folder: Path, starts: int) -> None:
    """Print the table."""
    print("| | " + " | ".join(LINES.values()) + " | together, s |\n" + "|---" * (len(LINES) + 2) + "|")
    show("first start with this model and data", measure(folder, "auto", "nf4"))
    for name, mode, quantization in (
        ("NF4", "auto", "nf4"),
        ("NF4, `--engine-mode eager`", "eager", "nf4"),
        ("FP8", "auto", "fp8"),
    ):
        for _ in range(starts):
            show(name, measure(folder, mode, quantization))
    for _ in range(starts):
        begun = time.perf_counter()
        subprocess.run([sys.executable, "-c", TRL], check=True, capture_output=True)
        print(f"| `import` of TRL's trainer | {time.perf_counter() - begun:.1f} | | | | | |", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--starts", type=int, default=4)
    given = parser.parse_args()
    main(given.folder, given.starts)
