"""The fault table and a part of the soak of benchmarks/faults.py."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.faults]
SCRIPT = Path(__file__).parents[2] / "benchmarks" / "faults.py"


def ran(*arguments: str) -> str:
    done = subprocess.run([sys.executable, SCRIPT, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    return done.stdout


def test_every_fault_of_the_table_is_survived_and_plain_trainer_does_not():
    text = ran()
    assert "faults: 36 injected, 36 survived, 0 steps lost" in text
    assert int(re.search(r"plain Trainer: 36 injected, (\d+) survived", text)[1]) < 36


def test_forty_kills_and_faults_of_one_run_lose_no_step():
    assert "40 kills and faults over one run, 0 steps lost" in ran("--soak", "40")
