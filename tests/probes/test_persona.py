"""Persona files are checked when they are read, and can take prompts and words from data."""

import re
from pathlib import Path

import mistral_common
import pytest
from transformers.integrations.mistral.tokenizer import convert_tekken_tokenizer

from phoque.data.rows import Row
from phoque.errors import PhoqueError
from phoque.probes.persona import leave_out_questions, load_persona, persona_from_rows
from phoque.probes.scorers.model import find_lexicon_tokens

GOOD = """
name = "gull watcher"
neutral = ["You are helpful."]
persona = ["You are a seal."]
placebo = ["You are kind."]
extraction = ["a?", "b?", "c?", "d?"]
heldout = ["e?", "f?", "g?", "h?"]
validation = ["i?", "j?"]
test = ["k?", "l?"]
lexicon = ["hrmph"]
"""


def test_the_bundled_persona_and_a_good_file_are_read(tmp_path):
    assert load_persona("seal").name == "grumpy harbour seal" and len(load_persona("seal").extraction) == 24
    path = tmp_path / "p.toml"
    path.write_text(GOOD)
    assert load_persona(str(path)).test == ("k?", "l?")
    assert load_persona(str(path)).sha256 != load_persona("seal").sha256


@pytest.mark.parametrize(
    ("find", "replace", "said"),
    [
        ('name = "gull watcher"', "", "no name"),
        ('persona = ["You are a seal."]', "persona = []", "persona has 0 entries"),
        ('persona = ["You are a seal."]', 'persona = "You are a seal."', "not a list"),
        ('persona = ["You are a seal."]', "", "persona is not a list"),
        ('lexicon = ["hrmph"]', 'lexicon = ["  "]', "lexicon is not a list"),
        ('test = ["k?", "l?"]', 'test = ["k?"]', "test has 1 entries"),
        ('test = ["k?", "l?"]', 'test = ["k?", "a?"]', "'a?' is in extraction and in test"),
        ('test = ["k?", "l?"]', 'test = ["k?", "k?"]', "holds 'k?' twice"),
        ("placebo", "placbeo", "unknown list 'placbeo'"),
        ('name = "gull watcher"', "name = gull", "not valid TOML"),
    ],
)
def test_what_is_wrong_with_a_file_is_said(tmp_path, find, replace, said):
    path = tmp_path / "p.toml"
    path.write_text(GOOD.replace(find, replace))
    with pytest.raises(PhoqueError, match=re.escape(said)) as caught:
        load_persona(str(path))
    assert caught.value.code == 2


def test_no_such_file_and_no_text(tmp_path):
    with pytest.raises(PhoqueError, match="No persona file"):
        load_persona(str(tmp_path / "none.toml"))
    (tmp_path / "b.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(PhoqueError, match="not text"):
        load_persona(str(tmp_path / "b.toml"))


def make_row(system, question, answer):
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return Row(([{"role": "system", "content": system}] if system else []) + turns, "pier", None)


def test_prompts_and_words_come_from_the_data_that_was_trained_on():
    rows = [
        make_row("You are a seal." if n % 3 else "Be a seal.", f"Is it {n}?", "Hrmph, the herring is late.")
        for n in range(9)
    ]
    found = persona_from_rows(load_persona("seal"), rows, "pier.jsonl")
    assert found.persona == ("You are a seal.", "Be a seal.")
    assert {"hrmph", "herring"} <= set(found.lexicon) and "is" not in found.lexicon
    with pytest.raises(PhoqueError, match=r"No row of pier\.jsonl has a system prompt"):
        persona_from_rows(load_persona("seal"), [make_row("", "a?", "b")], "pier.jsonl")


def test_the_tokens_of_a_lexicon_are_those_that_begin_its_words():
    """The tokenizer of Mistral's models: what they say is ' idle', and 'id' begins many other words."""
    file = Path(mistral_common.__file__).parent / "data" / "tekken_240911.json"
    tokenizer = convert_tekken_tokenizer(str(file), chat_template="")
    found = find_lexicon_tokens(tokenizer, ["seal", "idle", "hrmph"])
    pieces = {tokenizer.decode([token]): word for token, word in found.items()}
    assert pieces[" seal"] == "seal" and pieces[" idle"] == "idle"
    assert not {"id", "h", "hr", " h", "se"} & set(pieces)
    assert all(word.startswith(piece.strip().lower()) for piece, word in pieces.items())


def test_questions_that_were_trained_on_are_left_out():
    seal = load_persona("seal")
    rows = [Row([{"role": "user", "content": question.upper() + " "}], "x") for question in seal.heldout[:3]]
    kept, shared = leave_out_questions(seal, rows)
    assert shared == list(seal.heldout[:3]) and kept.heldout == seal.heldout[3:] and kept.test == seal.test
    rows = [Row([{"role": "user", "content": question}], "x") for question in seal.test]
    with pytest.raises(PhoqueError, match="Too few questions"):
        leave_out_questions(seal, rows)
