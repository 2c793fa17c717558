"""Flag > environment > .env.secrets > preset > default, with provenance; secrets stay secret."""

import re
from pathlib import Path

import pytest

from phoque.errors import PhoqueError
from phoque.settings.base import Origin, Secrets, env_name, flag_names, resolved
from phoque.settings.presets import PRESETS
from phoque.settings.train import TrainSettings

SPEC_NAMES = {
    "HF_TOKEN", "WANDB_API_KEY", "WANDB_PROJECT", "WANDB_LOG_MODEL", "DATASET_REPO", "MAX_STEPS", "FORCE_FRESH_START",
    "BASE_MODEL", "OUTPUT_DIR",
}  # fmt: skip


def settle(flags=None, **options):
    return resolved(TrainSettings, flags or {}, PRESETS, **options)


def test_each_source_beats_the_next(monkeypatch, tmp_path):
    file = tmp_path / ".env.secrets"
    file.write_text("MAX_STEPS=3\nPHOQUE_SEED=3\nDATASET_REPO=from-file\n")
    file.chmod(0o600)
    monkeypatch.setenv("MAX_STEPS", "2")
    monkeypatch.setenv("PHOQUE_SEED", "2")
    got, warnings = settle({"max_steps": 1, "preset": "demo"})
    s = got.settings
    assert (s.max_steps, s.seed, s.dataset, s.batch_size) == (1, 2, "from-file", PRESETS["demo"]["batch_size"])
    assert got.origins["max_steps"] == Origin("flag", "--max-steps")
    assert got.origins["seed"] == Origin("environment", "PHOQUE_SEED")
    assert got.origins["dataset"] == Origin(".env.secrets", "DATASET_REPO")
    assert got.origins["batch_size"].source == "preset demo"
    assert got.origins["lora_rank"].source == "default"
    assert not warnings


def test_every_name_of_the_spec_is_read():
    names = {env_name(TrainSettings, n) for n in TrainSettings.model_fields}
    assert names | {env_name(Secrets, n) for n in Secrets.model_fields} >= SPEC_NAMES


def test_spec_names_are_flags_in_kebab_case():
    assert flag_names(TrainSettings, "dataset") == ["--dataset", "--dataset-repo"]
    assert flag_names(TrainSettings, "fresh_start") == ["--fresh-start", "--force-fresh-start"]


def test_settings_are_frozen():
    with pytest.raises(Exception, match="frozen"):
        settle()[0].settings.max_steps = 5


@pytest.mark.parametrize("where", ["environment", "file"])
def test_a_misspelt_name_is_an_error_with_a_suggestion(monkeypatch, tmp_path, where):
    if where == "environment":
        monkeypatch.setenv("PHOQUE_LORA_RNAK", "8")
    else:
        (tmp_path / ".env.secrets").write_text("PHOQUE_LORA_RNAK=8\n")
    with pytest.raises(PhoqueError) as caught:
        settle()
    assert caught.value.code == 2 and "PHOQUE_LORA_RANK" in caught.value.fix


def test_a_spec_name_misspelt_in_the_file_is_an_error(tmp_path):
    (tmp_path / ".env.secrets").write_text("WANDB_PROJEKT=x\n")
    with pytest.raises(PhoqueError, match="WANDB_PROJEKT"):
        settle()


def test_a_bad_value_names_flag_and_variable_but_never_shows_it(monkeypatch):
    monkeypatch.setenv("MAX_STEPS", "hf_secretsecret")
    with pytest.raises(PhoqueError) as caught:
        settle()
    text = caught.value.what + caught.value.why + caught.value.fix
    assert "--max-steps" in text and "MAX_STEPS" in text and "secretsecret" not in text


def test_secrets_have_no_flag_and_are_never_shown(phoque, monkeypatch, rows, tiny_llama):
    monkeypatch.setenv("HF_TOKEN", "hf_donotshow")
    monkeypatch.setenv("WANDB_API_KEY", "wandb_donotshow")
    got, _ = settle()
    assert got.secrets.hf_token.get_secret_value() == "hf_donotshow"
    assert "donotshow" not in repr(got) + str(got.provenance())
    assert "--hf-token" not in phoque("train", "--help").out
    ran = phoque("train", "--base-model", tiny_llama, "--dataset", rows, "--dry-run", "--json")
    assert ran.json["settings"]["hf_token"] == {
        "value": "set", "source": "environment", "name": "HF_TOKEN",
        "meaning": Secrets.model_fields["hf_token"].description,
    }  # fmt: skip
    assert "donotshow" not in ran.out + ran.err


def test_the_token_of_hf_auth_login_is_found(home):
    (home / "hf").mkdir(exist_ok=True)
    (home / "hf" / "token").write_text("hf_saved")
    try:
        import subprocess
        import sys

        code = (
            "from phoque.settings.base import resolved\nfrom phoque.settings.train import TrainSettings\n"
            "r, _ = resolved(TrainSettings, {}, {})\n"
            "print(r.origins['hf_token'].source, r.secrets.hf_token.get_secret_value())"
        )
        out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
        assert out.split("\n")[0] == "hf auth login hf_saved"
    finally:
        (home / "hf" / "token").unlink()


def test_secrets_file_can_be_named_and_must_exist(tmp_path):
    file = tmp_path / "other.env"
    file.write_text("HF_TOKEN=hf_x\n")
    file.chmod(0o644)
    got, warnings = settle(env_file=file)
    assert got.secrets.hf_token and "chmod 600" in warnings[0]
    with pytest.raises(PhoqueError, match="No such secrets file"):
        settle(env_file=tmp_path / "none.env")


@pytest.mark.parametrize("name", TrainSettings.not_yet)
def test_a_name_of_the_spec_that_does_not_work_yet_is_never_ignored(monkeypatch, name):
    monkeypatch.setenv(name, "harbour/seal")
    with pytest.raises(PhoqueError, match=name) as caught:
        settle()
    assert caught.value.code == 2


def test_an_unknown_preset_is_an_error():
    with pytest.raises(PhoqueError) as caught:
        settle({"preset": "dmo"})
    assert "demo" in caught.value.fix


def test_micro_batches_must_divide_the_batch():
    with pytest.raises(PhoqueError, match="do not go together"):
        settle({"batch_size": 16, "micro_batch": 5})


def test_env_example_documents_every_name_and_no_other():
    text = (Path(__file__).parents[2] / ".env.example").read_text()
    documented = set(re.findall(r"^#?\s?([A-Z][A-Z_]+)=", text, re.M))
    names = {env_name(TrainSettings, n) for n in TrainSettings.model_fields}
    assert documented == names | {env_name(Secrets, n) for n in Secrets.model_fields}
