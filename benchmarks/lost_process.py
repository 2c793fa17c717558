"""One of two processes of a run is killed or frozen in a step: how long the command takes to end, and what it says.

    uv run python benchmarks/lost_process.py --model scaling/3B --rows scaling/rows.jsonl --out lost

The model and the rows are those that scaling.py writes. Process 0 or 1 gets SIGKILL or SIGSTOP while both train, with
captured steps; the other one then waits in an all-reduce of NCCL, or of gloo, by which processes agree on stopping.
Then the same command runs again and has to continue from the newest checkpoint. Gloo is in `faults.py --together`.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

SAVE, WARM, MORE = 20, 45, 5  # steps: between checkpoints, before the signal, and after the newest checkpoint
TIMEOUT_S = 180.0


def find_process(folder: Path, rank: int) -> int:
    """The process id of one process of the run in a folder."""
    for path in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            environment = (path / "environ").read_bytes().split(b"\0")
            arguments = (path / "cmdline").read_bytes().split(b"\0")
            if f"RANK={rank}".encode() in environment and str(folder).encode() in arguments:
                return int(path.name)
    raise SystemExit(f"No process {rank} of {folder} was found.")


def last_step(folder: Path) -> int:
    """The last step that the run has logged."""
    path = folder / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.is_file() else []
    steps = [json.loads(line).get("step", 0) for line in lines if line.endswith("}")]
    return max(steps, default=0)


def newest_checkpoint(folder: Path) -> int:
    """The step of the newest checkpoint."""
    return max((int(path.name.split("-")[1]) for path in folder.glob("checkpoint-*")), default=0)


def wait_for_step(process: subprocess.Popen[str], folder: Path, step: int) -> None:
    """Wait until the run has logged a step. Ends this script with the output if it ends or hangs before."""
    deadline = time.monotonic() + TIMEOUT_S
    while last_step(folder) < step:
        if process.poll() is not None or time.monotonic() > deadline:
            process.kill()
            raise SystemExit(f"step {step} was not reached:\n{process.communicate()[0]}")
        time.sleep(0.05)


def strike(model: Path, rows: Path, folder: Path, rank: int, number: signal.Signals) -> str:
    """Train, send a signal to one process, and train again; return a row of the table."""
    shutil.rmtree(folder, ignore_errors=True)
    command = [sys.executable, "-m", "phoque", "train", "--base-model", model, "--dataset", rows, "--gpus", 2]
    command += ["--batch-size", 16, "--micro-batch", 8, "--save-steps", SAVE, "--log-every", 1, "--held-out-rows", 0]
    command += ["--sample-every", 0, "--engine-mode", "graph", "--output-dir", folder, "--yes"]
    environment = os.environ | {"WANDB_MODE": "disabled"}

    def start(steps: int) -> subprocess.Popen[str]:
        words = list(map(str, [*command, "--max-steps", steps]))
        return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)

    process = start(1_000_000)
    wait_for_step(process, folder, WARM)
    target = find_process(folder, rank)
    begun = time.monotonic()
    os.kill(target, number)
    text, _ = process.communicate(timeout=TIMEOUT_S)
    seconds = time.monotonic() - begun
    errors = [line for line in text.splitlines() if "Error" in line or "Process" in line]
    checkpoint, reached = newest_checkpoint(folder), last_step(folder)
    again = start(1_000_000)
    wait_for_step(again, folder, reached + MORE)
    again.terminate()
    continued, _ = again.communicate(timeout=TIMEOUT_S)
    has_continued = f"checkpoint-{checkpoint}" in continued and last_step(folder) >= reached + MORE
    print(text[-1500:], "\n---\n", continued[-1500:], file=sys.stderr)
    message = " / ".join(errors)[:160]
    cells = f"{number.name}, process {rank}", f"{seconds:.1f}", process.returncode, message
    cells += f"{checkpoint} of {reached}", "yes" if has_continued else "no"
    return f"| {' | '.join(map(str, cells))} |"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--rows", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("lost"))
    parser.add_argument("--signals", nargs="+", default=["SIGKILL", "SIGSTOP"])
    arguments = parser.parse_args()
    print("| signal | seconds to the end | exit code | message | newest checkpoint | continued |")
    print("|---|---|---|---|---|---|")
    for number in map(signal.Signals.__getitem__, arguments.signals):
        for rank in (0, 1):
            print(strike(arguments.model, arguments.rows, arguments.out.absolute(), rank, number), flush=True)
