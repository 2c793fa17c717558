"""`phoque --help` beside `hf --help` and `trl --help`: the best of ten starts of each, on this machine.

Run: uv run python benchmarks/startup.py
"""

import subprocess
import sys
import time
from pathlib import Path


def best_of(command: list[str], starts: int = 10) -> float:
    """Seconds of the fastest start."""
    taken = []
    for _ in range(starts):
        begun = time.perf_counter()
        subprocess.run(command, capture_output=True, check=True)
        taken.append(time.perf_counter() - begun)
    return min(taken)


def main() -> None:
    """Print the table that the README shows."""
    bin_folder = Path(sys.executable).parent
    print("| command | seconds |\n|---|---|")
    for name in ("phoque", "hf", "trl"):
        print(f"| `{name} --help` | {best_of([str(bin_folder / name), '--help']):.2f} |", flush=True)


if __name__ == "__main__":
    main()
