"""The fault table and a part of the soak of benchmarks/faults.py."""

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
SCRIPT = Path(__file__).parents[2] / "benchmarks" / "faults.py"


def ran(*arguments: str) -> str:
    done = subprocess.run([sys.executable, SCRIPT, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    return done.stdout


def test_every_fault_of_the_table_is_survived():
    """Without plain Trainer beside it, which the benchmark runs: that takes as long again."""
    assert "faults: 43 injected, 43 survived, 0 steps lost" in ran("--no-peer")


def test_every_fault_is_survived_in_a_folder_of_a_bucket():
    assert "faults: 34 injected, 34 survived, 0 steps lost" in ran("--folder")


def test_twenty_kills_and_faults_of_one_run_lose_no_step():
    assert "20 kills and faults over one run, 0 steps lost" in ran("--soak", "20")
