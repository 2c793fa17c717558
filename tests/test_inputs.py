"""What a name stands for: a misspelled run, a merged model given as an adapter, columns in another spelling."""

import json
import shutil
from pathlib import Path

import pytest

from phoque.data.readers import open_dataset
from phoque.data.rows import parse_row
from phoque.errors import UsageError
from phoque.hub.refs import hub_id, suggest_path
from phoque.settings.fields import name_after

OFFLINE = {"HF_ENDPOINT": "http://127.0.0.1:9"}  # nobody listens there


@pytest.fixture
def run() -> Path:
    folder = Path("runs/demo")
    (folder / "adapter").mkdir(parents=True)
    (folder / "run.json").write_text("{}")
    (folder / "adapter" / "adapter_model.safetensors").write_bytes(b"gulls")
    (folder / "adapter" / "adapter_config.json").write_text('{"base_model_name_or_path": "you/model"}')
    return folder


def test_a_folder_with_runs_is_no_owner_on_the_hub(run):
    run.parent.joinpath("you").mkdir()
    Path("you/run").mkdir(parents=True)
    Path("you/run/run.json").write_text("{}")
    assert hub_id("runs/dem") is None and hub_id("you/dem") == "you/dem"
    assert suggest_path("runs/dem") == "Did you mean runs/demo?" == suggest_path("demo")
    assert suggest_path("gulls") == "Check the path." == suggest_path("g" * 5000)


@pytest.mark.parametrize("command", ["chat runs/dem", "merge --adapter-source runs/dem", "train --dataset runs/dem"])
def test_a_misspelled_run_is_not_looked_up_on_the_hub(phoque, run, command):
    error = phoque(*command.split(), env=OFFLINE, expect=2).error
    assert "runs/dem" in error[0] and error[2].endswith("Did you mean runs/demo?")


def test_an_output_is_called_after_its_run(run, tmp_path):
    assert name_after("runs/demo") == "demo" == name_after("runs/demo/adapter") == name_after("runs/demo/")
    assert name_after("you/adapter") == "adapter" and name_after("") == "model"
    assert name_after(".") == tmp_path.name and name_after("models/seal.gguf") == "seal"


def test_a_word_without_a_flag_is_told_which_flag_it_needs(phoque, run):
    for command, fix in (
        ("merge runs/demo", "--adapter-source runs/demo"),
        ("train rows.jsonl", "--dataset rows.jsonl"),
        ("verify-gguf seal/x.gguf", "--local-dir seal/x.gguf"),
    ):
        assert phoque(*command.split(), expect=2).error[2].endswith(f"Put its flag before it: {fix}")
    question = phoque("chat", "runs/demo", "What do gulls eat?", expect=2).error
    assert question[2].endswith("--prompt 'What do gulls eat?'")


def test_columns_in_another_spelling_are_read(tmp_path):
    Path("a.csv").write_text("Prompt , Completion,Source\nGulls?,Hrmph.,pier\nTide?,,pier\n")
    Path("b.jsonl").write_text(json.dumps({"PROMPT": "Text", "prompt": "Gulls?", "completion": "Hrmph."}) + "\n")
    first, second = open_dataset("a.csv").stream
    assert parse_row(first).messages[1]["content"] == "Hrmph." and parse_row(first).source == "pier"
    with pytest.raises(ValueError, match="empty completion"):
        parse_row(second)
    (only,) = open_dataset("b.jsonl").stream
    assert parse_row(only).messages[0]["content"] == "Gulls?"


def test_another_spelling_is_no_column_of_a_row_that_can_be_read_without_it():
    pair = {"prompt": "Gulls?", "completion": "Hrmph."}
    rows = [pair | {"Context": "a pier", "Turns": 2, "Image": "x.png"}, {**pair, "prompt": None, "Prompt": "Tide?"}]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    dataset = open_dataset("rows.jsonl")
    assert [parse_row(row).messages[0]["content"] for row in dataset.stream] == ["Gulls?", "Tide?"]
    assert list(dataset.stream.unused_columns) == ["Context", "Turns", "Image"]


def test_tables_as_spreadsheets_write_them_are_read():
    Path("a.csv").write_text("prompt,completion\nGulls?,Hrmph.,,\n,\nTide?,Low.\n,,,\n")
    rows = list(open_dataset("a.csv").stream)
    assert [parse_row(row).first_question for row in rows] == ["Gulls?", "Tide?"]
    assert [row.number for row in open_dataset("a.csv").stream.read(0, 1)] == [2]
    Path("b.csv").write_text("prompt,completion,completion\nGulls?,Hrmph.,\n")
    with pytest.raises(UsageError, match="names the column 'completion' twice"):
        list(open_dataset("b.csv").stream)


def test_turns_with_capitals_are_read():
    turns = [{"Role": "User", "Content": "Gulls?"}, {"Role": "assistant", "Content": "Hrmph."}]
    Path("rows.json").write_text(json.dumps([{"Messages": turns}]))
    (row,) = open_dataset("rows.json").stream
    assert parse_row(row).messages[1] == {"role": "assistant", "content": "Hrmph."}
    Path("rows.json").write_text(json.dumps([{"messages": [{"who": "user", "says": "Gulls?"}]}]))
    with pytest.raises(ValueError, match="no role, only says, who"):
        parse_row(next(iter(open_dataset("rows.json").stream)))


def test_parquet_columns_in_another_spelling_are_read():
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"Question": ["Gulls?"], "ANSWER": ["Hrmph."], "Rating": [3]}), "rows.parquet")
    dataset = open_dataset("rows.parquet")
    (row,) = dataset.stream
    assert [turn["content"] for turn in parse_row(row).messages] == ["Gulls?", "Hrmph."]
    assert list(dataset.stream.unused_columns) == ["Rating"]


def test_files_of_a_model_beside_the_rows_are_no_rows(rows):
    folder = Path("data")
    folder.mkdir()
    rows.rename(folder / "rows.jsonl")
    for name in ("adapter_config.json", "tokenizer.json", "run.json"):
        (folder / name).write_text('{"r": 16}')
    assert [file.name for file in open_dataset("data").stream.files] == ["rows.jsonl"]


def test_a_run_that_cannot_start_leaves_no_folder(phoque, rows, tiny_llama):
    rows.write_text(rows.read_text() * 40 + '{"messages": []}\n' * 900)  # over 1 MB, so that the run itself reads it
    assert rows.stat().st_size > 2**18
    asked = ["train", "--dataset", rows, "--base-model", tiny_llama, "--quantization", "fp32", "--max-length", 8]
    error = phoque(*asked, "--output-dir", "runs/new", expect=2, env={"WANDB_MODE": "disabled"}).error
    assert "unusable" in error[0] or "can be trained on" in error[0]
    assert not Path("runs/new").exists()
    Path("mine").mkdir()
    phoque(*asked, "--output-dir", "mine", expect=2, env={"WANDB_MODE": "disabled"})
    assert Path("mine").is_dir()


def test_an_export_is_told_from_a_file_and_from_the_other_kind(phoque):
    Path("gguf").mkdir()
    Path("gguf/seal.gguf").write_bytes(b"gulls")
    Path("model.onnx").write_bytes(b"gulls")
    assert phoque("verify-onnx", "--local-dir", "gguf", expect=2).error[2].endswith("verify-gguf --local-dir gguf")
    assert "is a file" in phoque("verify-onnx", "--local-dir", "model.onnx", expect=2).error[0]
    error = phoque("verify-gguf", "--local-dir", "gguf/seel.gguf", expect=2).error
    assert "no file gguf/seel.gguf" in error[0] and "gguf/seal.gguf?" in error[2]
    assert "no folder ~nosuchuser/x" in phoque("verify-gguf", "--local-dir", "~nosuchuser/x", expect=2).error[0]


def test_a_fresh_start_says_in_its_dry_run_what_it_would_delete(phoque, rows, tiny_llama):
    asked = ["train", "--dataset", rows, "--base-model", tiny_llama, "--quantization", "fp32", "--output-dir", "run"]
    asked += ["--max-steps", 1, "--sample-every", 0, "--held-out-rows", 0]
    env = {"WANDB_MODE": "disabled"}
    phoque(*asked, env=env)
    shown = phoque(*asked, "--fresh-start", "--dry-run", "--json", env=env).json["facts"]["run folder"]
    assert "--fresh-start would delete checkpoint-1, adapter" in shown and Path("run/adapter").is_dir()
    asked[asked.index("--max-steps") + 1] = 2
    error = phoque(*asked, env=env, expect=2).error
    assert error[0].endswith("run holds a different run.") and error[2].endswith("--output-dir run-2")


@pytest.mark.parametrize(
    ("command", "what", "fix"),
    [
        (
            ["train", "--preset", "demo", "--output-dir", "--dry-run"],
            "--output-dir has no value",
            "--output-dir=--dry-run",
        ),
        (["train", "--preset", "demo", "--public", "yes"], "'yes' is given without a flag", "--public takes no value"),
        (["train", "--dataset"], "requires an argument", "phoque train --help"),
        (["train", "--dataset", "seal", "--hub-model-id", "clock"], "--hub-model-id has a value", "--hub-model-id"),
        (["train", "--hf-token", "hf_gull"], "no flag --hf-token", "HF_TOKEN"),
        (["train", "--dataset", "my", "seals.jsonl"], "'seals.jsonl' is given without a flag", "'my seals.jsonl'"),
        (["export-gguf", "--dtype", "q8_0", "f16"], "'f16' is given without a flag", "--dtype q8_0,f16"),
        (["train", "--preset", "demo", "--then", "merge", "--dtype", "fp32"], "--dtype", "quotes around"),
        (["verify-onnx", "--local-dir", "runs/demo"], "runs/demo is a run", "phoque export-onnx --adapter-source"),
        (["train", "--config", "section.toml"], "has the section [train]", "Leave out"),
        (["help", "train"], "no command 'help'", "phoque COMMAND --help"),
        (["psm-probe", "--preset", "demo", "--scorer", "lexikon"], "No scorer 'lexikon'", "lexicon"),
        (["chat", "runs/demo", "--prompts-file", "rows.csv"], "is no list of prompts", ".txt"),
    ],
)
def test_what_newcomers_type_is_explained(phoque, run, tiny_llama, command, what, fix):
    Path("section.toml").write_text("[train]\nmax_steps = 3\n")
    Path("rows.csv").write_text("prompt\nGulls?\n")
    (run / "adapter" / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(tiny_llama)}))
    error = phoque(*command, expect=2).error
    assert what in error[0] and fix in error[2] and "hf_gull" not in " ".join(error)


def test_flags_that_do_nothing_here_are_warned_of(phoque):
    ran = phoque("merge", "--adapter-source", "nowhere", "--timeout", "1h", "--detach", "--verbose", expect=2)
    for flag in ("--timeout has no effect without --on", "--detach", "--verbose has no effect without --dry-run"):
        assert flag in ran.err
    assert "no effect" not in phoque("train", "--dataset", "nowhere.jsonl", "--timeout", "1h", expect=2).err


def test_a_second_dataset_is_warned_of(phoque):
    ran = phoque("train", "--dataset", "a.jsonl", "--dataset", "b.jsonl", expect=2)
    assert "--dataset is given twice" in ran.err and "b.jsonl" in ran.error[0]


def test_a_run_is_repeated_from_its_folder(phoque, tiny_llama, rows):
    asked = ["train", "--dataset", rows, "--base-model", tiny_llama, "--quantization", "fp32", "--max-steps", 1]
    env = {"WANDB_MODE": "disabled"}
    phoque(*asked, "--sample-every", 0, "--held-out-rows", 0, "--output-dir", "one", env=env)
    shown = phoque("train", "--config", "one", "--output-dir", "two", "--dry-run", "--json", env=env).json["settings"]
    assert shown["max_steps"]["value"] == 1 and shown["max_steps"]["source"] == "one"


def test_runs_are_looked_up_on_the_hub_in_no_folder(phoque, tmp_path):
    """Whoever owns the name `runs` on the Hub could otherwise answer for somebody's own run."""
    assert hub_id("runs/demo") is None
    for command in (
        "chat runs/demo --prompt hi",
        "merge --adapter-source runs/demo",
        "psm-probe --adapter-source runs/demo",
    ):
        error = phoque(*command.split(), "--dry-run", env=OFFLINE, expect=2).error
        assert error[2].endswith(f"there is none in {tmp_path}.")


@pytest.fixture
def sharded(tiny_llama):
    """A model in two files, which a test may damage."""
    from safetensors.torch import load_file, save_file

    folder = Path("sharded")
    shutil.copytree(tiny_llama, folder)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    shards = {"model-1.safetensors": names[::2], "model-2.safetensors": names[1::2]}
    for file, part in shards.items():
        save_file({name: tensors[name] for name in part}, folder / file)
    weight_map = {name: file for file, part in shards.items() for name in part}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def damage(folder: Path, kind: str) -> None:
    if kind == "tokenizer":
        for file in [*folder.glob("tokenizer*"), *folder.glob("special*"), *folder.glob("vocab*")]:
            file.unlink()
    elif kind == "missing":
        (folder / "model-2.safetensors").unlink()
    elif kind == "cut":
        content = (folder / "model-2.safetensors").read_bytes()
        (folder / "model-2.safetensors").write_bytes(content[: len(content) // 2])


@pytest.mark.parametrize(
    ("kind", "what"),
    [
        ("tokenizer", "sharded has no tokenizer"),
        ("missing", "model-2.safetensors is missing from sharded"),
        ("cut", "The weights in model-2.safetensors cannot be read"),
    ],
)
def test_an_incomplete_model_is_refused_before_torch_is_imported(phoque, sharded, rows, kind, what):
    asked = ["train", "--base-model", "sharded", "--dataset", rows, "--quantization", "fp32", "--dry-run"]
    phoque(*asked)
    damage(sharded, kind)
    for command in (asked, ["chat", "sharded", "--prompt", "hi", "--dry-run"]):
        ran = phoque(*command, expect=2)
        assert what in ran.error[0] and "importing torch" not in ran.err


def test_adapters_of_another_kind_are_refused_everywhere(phoque, run):
    (run / "adapter" / "adapter_config.json").write_text('{"peft_type": "PREFIX_TUNING"}')
    for command in (
        "chat runs/demo --prompt hi",
        "merge --adapter-source runs/demo",
        "psm-probe --adapter-source runs/demo",
    ):
        assert "runs/demo is a PREFIX_TUNING adapter" in phoque(*command.split(), "--dry-run", expect=2).error[0]
    pickled = Path("pickled")
    pickled.mkdir()
    (pickled / "adapter_model.bin").write_bytes(b"gulls")
    assert "pickled" in phoque("merge", "--adapter-source", "pickled", "--dry-run", expect=2).error[0]


def test_what_is_called_gguf_must_be_gguf(phoque):
    Path("seal.gguf").write_text("gulls")
    for command in (
        ["chat", "seal.gguf", "--prompt", "hi"],
        ["train", "--base-model", "seal.gguf", "--dataset", "seal"],
    ):
        assert phoque(*command, "--dry-run", expect=2).error[0].endswith("seal.gguf is not a GGUF file.")


@pytest.mark.parametrize(
    ("name", "fix"),
    [("rows.zip", "Unpack it"), ("rows.tar.gz", "Unpack it"), ("rows.xlsx", "Save the sheet as CSV")],
)
def test_archives_and_spreadsheets_are_told_what_to_become(phoque, name, fix):
    Path("folder").mkdir()
    for path in (Path(name), Path("folder") / name):
        path.write_bytes(b"gulls")
    for dataset in (name, "folder"):
        assert fix in phoque("train", "--preset", "demo", "--dataset", dataset, "--dry-run", expect=2).error[2]


def test_the_address_of_a_dataset_is_told_its_id(phoque):
    url = "https://huggingface.co/datasets/you/rows/tree/main"
    assert "you/rows" in phoque("train", "--preset", "demo", "--dataset", url, expect=2).error[2]


def test_a_run_that_would_be_refused_is_refused_by_the_dry_run(phoque, tiny_llama, rows):
    asked = ["train", "--dataset", rows, "--base-model", tiny_llama, "--quantization", "fp32", "--output-dir", "one"]
    env = {"WANDB_MODE": "disabled"}
    phoque(*asked, "--max-steps", 1, "--sample-every", 0, "--held-out-rows", 0, env=env)
    more = ["--max-steps", 2, "--sample-every", 0, "--held-out-rows", 0, "--dry-run"]
    assert "holds a different run" in phoque(*asked, *more, env=env, expect=2).error[0]


def test_many_epochs_over_few_rows_are_warned_of(phoque, tiny_llama, rows):
    asked = ["train", "--dataset", rows, "--base-model", tiny_llama, "--quantization", "fp32", "--dry-run"]
    assert "by heart: use --epochs 3" in phoque(*asked, "--max-steps", 1000).out
    assert "by heart" not in phoque(*asked, "--max-steps", 10).out


def test_a_line_of_the_secrets_file_that_is_none_stops_the_command(phoque):
    Path(".env.secrets").write_text("# the seal's\nHF_TOKEN: hf_gulls\n")
    Path(".env.secrets").chmod(0o600)
    ran = phoque("train", "--preset", "demo", "--dry-run", expect=2)
    assert ran.error[0].endswith("Line 2 of .env.secrets cannot be read.") and "hf_gulls" not in ran.err


def test_folders_that_others_can_load_are_not_refused(phoque, sharded, tiny_llama, rows):
    """A stale index beside a whole file, no weights yet, a GGUF file with its config, an adapter with a tokenizer."""
    asked = ["train", "--base-model", "model", "--dataset", rows, "--quantization", "fp32", "--dry-run"]
    shutil.copytree(tiny_llama, "model")
    shutil.copy(sharded / "model.safetensors.index.json", "model")
    phoque(*asked)
    Path("model/model.safetensors").unlink()
    phoque(*asked)
    Path("exported").mkdir()
    Path("exported/seal.gguf").write_bytes(b"GGUF")
    Path("exported/config.json").write_text("{}")
    refused = phoque("train", "--base-model", "exported", "--dataset", rows, "--dry-run", expect=2).error
    assert refused[2].endswith("Give the file: exported/seal.gguf.")
    assert phoque("chat", "exported", "--prompt", "hi", "--dry-run", "--json").json["kind"] == "gguf"
    damage(sharded, "tokenizer")
    error = phoque("merge", "--base-model", "sharded", "--adapter-source", "nowhere", "--dry-run", expect=2).error
    assert "tokenizer" not in error[0]


def test_lines_of_the_secrets_file_that_a_shell_reads_are_warned_of(phoque):
    Path(".env.secrets").write_text("set -a\nHF_TOKEN=hf_gulls\n\nexport HF_TOKEN WANDB_API_KEY\n")
    Path(".env.secrets").chmod(0o600)
    ran = phoque("merge", "--adapter-source", "nowhere", expect=2)
    assert "line 1 of .env.secrets" in ran.err and "line 4" in ran.err and "There is no adapter" in ran.error[0]
    Path(".env.secrets").write_text("\n\nHF_TOKEN hf_gulls\n")
    error = phoque("merge", "--adapter-source", "nowhere", expect=2).error
    assert error[0].endswith("Line 3 of .env.secrets cannot be read.") and "hf_gulls" not in " ".join(error)


def test_a_probe_without_a_persona_is_refused_before_torch_is_imported(phoque):
    ran = phoque("psm-probe", expect=2)
    assert "No persona is given" in ran.error[0] and "importing torch" not in ran.err


def test_a_settings_file_with_another_tools_name_of_a_setting_is_told_phoques(phoque, tmp_path):
    file = tmp_path / "run.toml"
    for written, meant in (("lr = 1e-4", "learning_rate"), ("max_seq_length = 512", "max_length")):
        file.write_text(written)
        assert phoque("train", "--config", file, expect=2).error[2].endswith(f"Use {meant}.")
