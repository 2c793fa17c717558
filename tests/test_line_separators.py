"""Texts may hold characters that str.splitlines takes for the end of a line; in JSON lines they are none."""

import json
import os
import sys

from phoque.npm import NpmClient
from phoque.probes.persona import load_persona
from phoque.probes.sae.prompts import find_questions
from phoque.probes.scorers import ScoredAnswer
from phoque.probes.scorers.remote import command
from phoque.training.control import _read_complete_lines

TEXT = "Hrmph.\u2028The tide\u0085turns.\u001c"


def as_line(value):
    return json.dumps(value, ensure_ascii=False) + "\n"


def write_program(path, line):
    """A program that writes a line, whatever its input."""
    path.write_text(f"#!{sys.executable}\nimport sys\nsys.stdin.read()\nsys.stdout.buffer.write({line.encode()!r})\n")
    path.chmod(0o755)
    return path


def test_an_answer_of_a_javascript_client_is_read(tmp_path, monkeypatch):
    client = NpmClient("the client", 1, {}, scripts=tmp_path / "scripts")
    client.folder(tmp_path).mkdir(parents=True)
    write_program(tmp_path / "node", as_line({"text": TEXT}))
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert client.run("answer.mjs", {}, tmp_path, 60) == {"text": TEXT}


def test_the_labels_of_a_scorer_command_are_read(tmp_path):
    program = write_program(tmp_path / "score", as_line({f"gull{TEXT}": 0.5}))
    assert command("command", str(program)).score([ScoredAnswer("Gull?", "No.", None)]) == [{f"gull{TEXT}": 0.5}]


def test_a_prompt_is_one_line_of_a_file(tmp_path):
    questions = [f"{number} {TEXT}?" for number in range(24)]
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(as_line({"prompt": question}) for question in questions))
    found, _ = find_questions(str(file), load_persona("seal"))
    assert found == questions


def test_rows_of_a_control_that_were_cut_off_end_at_the_last_newline(tmp_path):
    lines = [as_line({"text": f"{number} {TEXT} é"}) for number in range(3)]
    file = tmp_path / "rows.jsonl"
    file.write_bytes("".join(lines).encode()[:-4])  # within a character
    assert _read_complete_lines(file) == lines[:2]
    assert _read_complete_lines(tmp_path / "none.jsonl") == []
