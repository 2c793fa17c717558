"""Secrets: stripped and checked when they are read, replaced in output, and given to no program that needs none."""

import json
import os
import sys
from pathlib import Path

import pytest

from phoque.console import Console
from phoque.errors import PhoqueError, UsageError
from phoque.settings.environment import SECRET_VARIABLES, environment_without_secrets
from phoque.settings.fields import Secrets, env_names
from phoque.settings.resolve import _read_secrets


@pytest.mark.parametrize("value", ["hf_harbour\n", " hf_harbour", "hf_harbour\r\n"])
def test_the_space_that_copying_adds_is_stripped(value, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", value)
    assert _read_secrets(Path("none"))[0].hub == "hf_harbour"


@pytest.mark.parametrize("name", ["HF_TOKEN", "WANDB_API_KEY", "OPENAI_API_KEY"])
@pytest.mark.parametrize("value", ["hf_härbour", "hf_\x07harbour"])
def test_what_no_token_has_is_refused_without_showing_it(name, value, monkeypatch):
    monkeypatch.setenv(name, value)
    with pytest.raises(UsageError) as caught:
        _read_secrets(Path("none"))
    shown = f"{caught.value.what} {caught.value.why} {caught.value.fix}"
    assert name in shown and "bour" not in shown


def test_a_command_says_which_variable_it_is_and_never_its_value(phoque, tiny_llama, rows):
    command = ["train", "--base-model", tiny_llama, "--dataset", rows, "--hub-model-id", "harbour/x", "--dry-run"]
    ran = phoque(*command, env={"HF_TOKEN": "hf_här bour_secret"}, expect=2)
    assert "HF_TOKEN" in ran.error[0] and "bour_secret" not in ran.err + ran.out


def test_output_is_cleared_of_secrets_whatever_prints_them(capsys):
    console = Console()
    console.hide(["hf_harbour_secret", "abc"])
    console._out = sys.stdout
    console.say("listing with Bearer hf_harbour_secret")
    console.warn("hf_harbour_secret")
    console.error(PhoqueError(what="hf_harbour_secret", why="b'Bearer hf_harbour_secret'", fix="abcdef"))
    console.result({}, lambda: "hf_harbour_secret", "")
    console.json = True
    console.result({"a": "hf_harbour_secret"}, str, "")
    out, err = capsys.readouterr()
    assert "hf_harbour_secret" not in out + err and err.count("***") == 4 and out.count("***") == 2
    assert "abcdef" in err  # a text as short as a word is left alone


def test_json_stays_json_whatever_characters_it_holds(capsys):
    console = Console()
    console._out, console.json = sys.stdout, True
    console.result({"a": "Bonjour\u00a0!\u200b"}, str, "")
    assert json.loads(capsys.readouterr().out) == {"a": "Bonjour\u00a0!\u200b"}


def test_every_secret_is_withheld_from_programs(monkeypatch):
    assert {variable for name in Secrets.model_fields for variable in env_names(Secrets, name)} <= {*SECRET_VARIABLES}
    for name in SECRET_VARIABLES:
        monkeypatch.setenv(name, "hf_harbour_secret")
    environment = environment_without_secrets(MORE="1")
    assert "hf_harbour_secret" not in environment.values() and environment["MORE"] == "1"
    assert environment["PATH"] == os.environ["PATH"]


def test_a_scorer_command_and_npm_see_no_secret(monkeypatch, tmp_path):
    from phoque.errors import RunError
    from phoque.onnx.verify.js_client import CLIENT
    from phoque.probes.scorers.remote import command

    seen, code = tmp_path / "seen.json", "import json, os, sys; json.dump(dict(os.environ), open(sys.argv[1], 'w'))"
    script = tmp_path / "npm"
    script.write_text(f"#!{sys.executable}\nimport sys\nsys.argv = ['npm', {str(seen)!r}]\n{code}\nsys.exit(1)\n")
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("HF_TOKEN", "hf_harbour_secret")
    for run in (lambda: CLIENT.install(tmp_path / "cache", Console()), lambda: command("c", str(script)).score([])):
        with pytest.raises(RunError):
            run()
        environment = json.loads(seen.read_text())
        assert "HF_TOKEN" not in environment and "PATH" in environment
        seen.unlink()
