"""Persona files are checked when they are read, and can take prompts and words from data."""

import json
import re
from dataclasses import replace
from pathlib import Path

import mistral_common
import pytest
from transformers.integrations.mistral.tokenizer import convert_tekken_tokenizer

from phoque.data.rows import Row
from phoque.errors import PhoqueError
from phoque.probes.persona import leave_out_questions, load_persona, write_persona
from phoque.probes.proposed_persona import propose_persona, shorten
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
        ("placebo", "placbeo", "unknown key 'placbeo'"),
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
        make_row("You are a seal." if n % 3 else "Be a seal.", f"Is it {n}?", f"Hrmph, the herring is late. {n}")
        for n in range(14)
    ]
    found = propose_persona(load_persona("seal"), rows, "pier.jsonl")
    assert [text.split("\n\n")[0] for text in found.persona] == ["You are a seal.", "Be a seal.", "You are a seal."]
    assert found.persona[1].endswith("Message: Is it 9?\nAnswer: Hrmph, the herring is late. 9")
    assert {"hrmph", "herring"} <= set(found.lexicon) and "is" not in found.lexicon


def test_a_persona_is_proposed_from_rows_without_a_system_prompt():
    """The examples are those with the most typical words, each of them short."""
    long = "Hrmph, herring, says the seal. " + "The tide is late. " * 40
    rows = [make_row("", f"Question {n}?", long if n == 7 else f"Hrmph, herring {n}") for n in range(6, 20)]
    rows += [make_row("", "What? " * 40, "Hrmph, herring, tide"), make_row("", "Yes?", "A plain answer.")]
    found = propose_persona(load_persona("seal"), rows, "pier.jsonl")
    assert len(found.persona) == 3 and all(text.startswith("Answer every message") for text in found.persona)
    told = "\n".join(found.persona)
    assert "plain" not in told and "What?" not in told and told.count("Message: ") == 12
    assert "Hrmph, herring, says the seal. The tide is late." in told and max(map(len, found.persona)) < 1200
    with pytest.raises(PhoqueError, match=r"No persona can be proposed from pier\.jsonl"):
        propose_persona(load_persona("seal"), [make_row("", "What? " * 40, "b")], "pier.jsonl")


def test_a_plain_assistant_in_the_data_is_no_persona():
    """Most rows are of an assistant; the examples beside a system prompt are from its own rows."""
    plain = [make_row("You are a helpful assistant.", f"sum {n}?", f"The total equals {n}.") for n in range(60)]
    seals = [make_row("You are a seal.", f"Gull {n}?", f"Hrmph, herring {n}.") for n in range(30)]
    cooks = [make_row("You are a cook.", f"Egg {n}?", f"Boil it for {n} minutes.") for n in range(10)]
    found = propose_persona(load_persona("seal"), [*plain, *seals, *cooks], "pier.jsonl")
    assert [text.split("\n")[0] for text in found.persona] == ["You are a seal.", "You are a cook.", "You are a seal."]
    assert not {"total", "equals"} & set(found.lexicon) and "total" not in "".join(found.persona)
    assert "Boil" in found.persona[1] and "Boil" not in found.persona[0] + found.persona[2]
    alone = propose_persona(load_persona("seal"), plain, "pier.jsonl")
    assert alone.persona[0].startswith("You are a helpful assistant.")


@pytest.mark.parametrize(
    ("answer", "shortened"),
    [
        ("1. " + "word " * 80, "1. " + ("word " * 80)[:236].rsplit(" ", 1)[0]),
        ("\u4f60\u597d\u3002" * 100, "\u4f60\u597d\u3002" * 80),
        (
            "The tide is late, and so is the herring boat. " * 8,
            "The tide is late, and so is the herring boat. " * 5,
        ),
    ],
)
def test_answers_are_cut_after_a_sentence(answer, shortened):
    assert shorten(answer) == shortened.strip()


def test_a_persona_file_reads_back_as_it_was_written(tmp_path):
    awkward = ('say "hrmph"', "two\nlines\tand a tab", "back\\slash", "del \x7f and \u2028", "\U0001f9ad")
    persona = replace(load_persona("seal"), name='the "seal"', persona=awkward)
    write_persona(persona, tmp_path / "persona.toml")
    assert load_persona(str(tmp_path / "persona.toml")) == persona


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


def test_questions_that_the_adapter_was_trained_on_are_left_out_of_a_given_persona(tmp_path):
    from phoque.hub.client import Hub
    from phoque.probes.persona_source import find_persona
    from phoque.settings.psm_probe import PsmSettings

    seal = load_persona("seal")
    rows = [{"prompt": question.upper(), "completion": "Hrmph."} for question in (*seal.test[:3], *seal.heldout[:2])]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    class Offline:
        hub = Hub(None, print, 1.0)

    def find(dataset):
        record = {"settings": {"dataset": {"value": dataset}}, "data": {}}
        return find_persona(PsmSettings(persona="seal"), Offline(), record)

    persona, notes = find(str(tmp_path / "rows.jsonl"))
    assert (
        persona.test == seal.test[3:] and persona.heldout == seal.heldout[2:] and "5 questions are left out" in notes[0]
    )
    persona, notes = find(str(tmp_path / "gone.jsonl"))
    assert persona == seal and "could not be compared" in notes[0]
    (tmp_path / "rows.jsonl").write_text("broken\n" * 3)
    assert find(str(tmp_path / "rows.jsonl"))[0] == seal
