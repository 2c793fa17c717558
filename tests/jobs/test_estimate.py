"""The estimate of a Job beside what was measured."""

import re
from pathlib import Path

import pytest
from benchmarks.family_speed import SHAPES
from transformers import AutoConfig

from phoque.gpus import find_generation
from phoque.jobs.estimate import MEASURED_TFLOPS, estimate_seconds_per_token
from phoque.models.lora import LoraOptions
from phoque.training.dry_run import count_parameters

MEASURED = (Path(__file__).parents[2] / "docs" / "benchmarks" / "training.md").read_text()
MINISTRAL_3B = {"hidden_size": 3072, "intermediate_size": 9216, "num_hidden_layers": 26}


def billions(shape: dict) -> float:
    config = AutoConfig.for_model(**shape)
    counts = count_parameters(config, LoraOptions(rank=16, alpha=64))
    return (counts["base"] - counts["embedding"]) / 1e9


@pytest.mark.parametrize("name", SHAPES)
def test_it_is_within_15_percent_of_what_was_measured(name):
    row = re.search(rf"^\| {re.escape(name)} \| phoque \| [\d.]+ \| ([\d,]+) \|", MEASURED, re.MULTILINE)
    measured = int(row[1].replace(",", ""))
    estimated = 1 / estimate_seconds_per_token(billions(SHAPES[name]), "nf4", MEASURED_TFLOPS)
    assert estimated == pytest.approx(measured, rel=0.15)


@pytest.mark.parametrize(("quantization", "measured"), [("nf4", 33_676), ("fp8", 44_451)])
def test_the_preset_is_too_in_both_precisions(quantization, measured):
    assert f"{measured:,}" in (Path(__file__).parents[2] / "docs" / "guides" / "training.md").read_text()
    shape = SHAPES["Ministral 3 8B"] | MINISTRAL_3B
    estimated = 1 / estimate_seconds_per_token(billions(shape), quantization, MEASURED_TFLOPS)
    assert estimated == pytest.approx(measured, rel=0.15)


@pytest.mark.parametrize(
    ("title", "key"),
    [
        ("A100", "A100"),
        ("L40S", "L40S"),
        ("L4", "L4"),
        ("Nvidia A10G", "A10G"),
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA RTX PRO 6000 Blackwell", "RTX PRO 6000"),
        ("MI300X", ""),
    ],
)
def test_a_gpu_is_known_by_its_name(title, key):
    assert find_generation(title) == key
