"""The root command: fast, lazy, and never a traceback."""

import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest
from benchmarks.mistakes import MISTAKES, write_files

from phoque.cli.main import COMMANDS
from phoque.errors import PhoqueError, to_phoque_error
from phoque.version import __version__


def test_help_lists_every_command(phoque):
    out = phoque("--help").out
    assert all(name in out for name in COMMANDS)


def test_help_imports_nothing_heavy():
    code = (
        "import sys\nsys.argv = ['phoque', '--help']\nfrom phoque.cli.main import main\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\n"
        "print([m for m in ('torch', 'transformers', 'pydantic_settings', 'rich.markdown') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.rstrip().endswith("[]")


def test_help_is_fast():
    # The fastest of five: CI's two cores are busy with other tests. benchmarks/startup.py prints the number itself.
    def seconds() -> float:
        begun = time.perf_counter()
        subprocess.run([sys.executable, "-m", "phoque", "--help"], capture_output=True, check=True)
        return time.perf_counter() - begun

    assert min(seconds() for _ in range(5)) < 0.6


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_with_an_example(phoque, name):
    assert f"phoque {name}" in phoque(name, "--help").out


def test_unknown_flag_suggests_the_right_one(phoque):
    error = phoque("train", "--max-step", "3", expect=2).error
    assert "--max-steps" in error[0]


def test_unknown_command(phoque):
    assert "trian" in phoque("trian", expect=2).error[0]


def test_the_module_runs_as_a_process_of_its_own():
    ran = subprocess.run(
        [sys.executable, "-m", "phoque", "train", "--dataset", "x.jsonl"], capture_output=True, text=True
    )
    assert (
        ran.returncode == 2
        and ran.stderr.splitlines()[-3] == "error: There is no file or folder x.jsonl."
        and not ran.stdout
    )


def test_version_names_the_libraries(phoque):
    out = phoque("--version").out
    assert f"phoque {__version__}\n" in out and "transformers 5." in out


def test_a_foreign_error_becomes_three_lines():
    error = to_phoque_error(RuntimeError("first line\nsecond line"))
    assert isinstance(error, PhoqueError) and error.code == 1
    assert error.why == "first line" and "PHOQUE_DEBUG" in error.fix


def test_without_a_command_it_shows_its_help(phoque):
    assert phoque().out == phoque("--help").out


def test_debug_shows_the_traceback(phoque):
    assert "Traceback" not in phoque("train", "--dataset", "nowhere.jsonl", expect=2, env={"PHOQUE_DEBUG": "0"}).err
    ran = phoque("train", "--dataset", "nowhere.jsonl", expect=1, env={"PHOQUE_DEBUG": "1"})
    assert "Traceback" in ran.err


def test_a_misspelled_command_gets_a_suggestion(phoque):
    what, _, fix = phoque("trian", expect=2).error
    assert "'trian'" in what and "Did you mean train?" in fix


def test_values_without_a_flag_are_explained(phoque):
    assert "--dtype q8,q4" in phoque("export-onnx", "--dtype", "q8", "q4", expect=2).error[2]


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_sections_defaults_and_the_width_of_the_terminal(phoque, command):
    text = phoque(command, "--help", env={"COLUMNS": "130"}).out
    assert "\nHub:\n" in text and "\nCommon:\n" in text and "[default: " in text
    assert 110 < max(map(len, text.splitlines())) <= 130
    if command not in ("verify-onnx", "verify-gguf", "chat", "jobs"):
        assert "--preset [ministral-3b|demo]" in text


HEAVY = (
    "torch",
    "transformers",
    "datasets",
    "bitsandbytes",
    "pandas",
    "scipy",
    "sklearn",
    "vl_convert",
    "wandb",
    "trl",
)


def run_and_list_imports(arguments, names, **options):
    """Run a command; return what it did, and those of the names that it has imported, as the last line shows them."""
    script = (
        "import sys; from phoque.cli.main import main; sys.argv[1:] = {}\n"
        "try: main()\nfinally: print([name for name in {} if name in sys.modules], file=sys.__stdout__)"
    )
    command = [sys.executable, "-c", script.format([*map(str, arguments)], names)]
    return subprocess.run(command, capture_output=True, text=True, **options)


def test_a_run_that_compiles_nothing_imports_no_compiler_and_no_tables(rows, tiny_llama, tmp_path):
    arguments = ["train", "--dataset", rows, "--base-model", tiny_llama, "--output-dir", tmp_path / "run"]
    arguments += ["--engine-mode", "eager", "--quantization", "nf4", "--max-steps", 1, "--sample-every", 0]
    unneeded = ("torch._inductor.compile_fx", "datasets", "pandas")  # transformers imports dynamo itself
    ran = run_and_list_imports(arguments, unneeded, timeout=120)
    assert ran.returncode == 0 and ran.stdout.splitlines()[-1] == "[]", ran


def run_without_heavy_imports(arguments, **options):
    """Run a command that has to end with exit code 2 before any of HEAVY is imported."""
    ran = run_and_list_imports(arguments, HEAVY, timeout=60, **options)
    assert ran.returncode == 2 and ran.stdout.strip() == "[]", (ran.stdout, ran.stderr)
    return ran


@pytest.mark.parametrize(
    "arguments",
    [
        ["train", "--dataset", "nosuch.jsonl"],
        ["train", "--preset", "dem"],
        ["train", "--max-step", "3"],
        ["train", "--base-model", "./nosuch", "--dataset", "seal"],
        ["merge", "--adapter-source", "./nosuch"],
        ["export-onnx", "--merged-dir", "nosuch"],
        ["verify-onnx", "--local-dir", "nosuch"],
        ["chat", "./nosuch"],
        ["chat", "nosuch.gguf"],
        ["export-gguf", "--merged-dir", "nosuch"],
        ["export-gguf", "--dtype", "q3"],
        ["verify-gguf", "--local-dir", "nosuch"],
        ["psm-probe", "--preset", "demo", "--persona", "nosuch.toml"],
        ["compare-sae", "--preset", "demo", "--updated-adapter", "./nosuch"],
        ["compare-sae", "--preset", "demo", "--updated-model", "you/seal", "--chats", "nosuch.jsonl"],
    ],
)
def test_a_wrong_path_or_flag_is_reported_before_anything_heavy_is_imported(arguments):
    ran = run_without_heavy_imports(arguments)
    assert len(ran.stderr.splitlines()) == 3 and ran.stderr.startswith("error: ")


@pytest.mark.parametrize(("mistake", "asked"), MISTAKES, ids=[mistake for mistake, _ in MISTAKES])
def test_the_mistakes_of_the_docs_are_three_lines_before_anything_heavy_is_imported(mistake, asked, tmp_path):
    write_files(tmp_path)
    env = {name: value for name, value in os.environ.items() if not name.startswith("HF_TOKEN")}
    ran = run_without_heavy_imports(shlex.split(asked), cwd=tmp_path, env=env | {"HF_HOME": str(tmp_path)})
    lines = [line for line in ran.stderr.splitlines() if not line.startswith("warning")]
    assert [line.split(":")[0].strip() for line in lines] == ["error", "why", "do"], ran.stderr
    assert f"| {mistake} |" in (Path(__file__).parents[1] / "docs" / "benchmarks" / "inputs.md").read_text()
