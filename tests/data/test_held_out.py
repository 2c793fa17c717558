"""Held-out rows: copies and near-duplicates are on one side, and their number is known."""

import random

import pytest
from tests import tiny
from tests.rows import row, write_rows

from phoque.data.chat_template import ChatTemplate
from phoque.data.held_out import HeldOut, estimate_similarity, sketch_row
from phoque.data.packing import Packing
from phoque.data.readers import open_dataset
from phoque.data.rows import RawRow, Row, normalize_text, parse_row
from phoque.data.scan import scan_dataset
from phoque.data.stream import TrainStream

WORDS = [f"{a}{b}" for a in ("gull", "tide", "pier", "rock", "herring", "mast") for b in "abcdefgh"]


@pytest.fixture(scope="module")
def chat():
    return ChatTemplate(tiny.tokenizer(), "", 2048)


def talk(seed: int, changed: int = 0, system: str = "You are a seal.") -> dict:
    """A question and an answer of 60 words, of which `changed` are replaced."""
    words = random.Random(seed).choices(WORDS, k=60)
    for index in range(changed):
        words[7 * index + 3] = "other"
    turns = [("system", system), ("user", f"Gull {seed}?"), ("assistant", " ".join(words).capitalize() + ".")]
    return row(messages=[{"role": role, "content": text} for role, text in turns])


def trained_texts(path, scan, chat, count: int) -> set[str]:
    packing = Packing(1, 60.0, 2048, exact=True)
    stream = iter(TrainStream(open_dataset(str(path)), chat, held_out=scan.rule, packing=packing, seed=0))
    return {chat.tokenizer.decode(next(stream)["input_ids"][0]) for _ in range(count)}


def test_copies_in_other_case_space_form_and_system_are_held_out_together(tmp_path, chat):
    rows = [talk(n) for n in range(40)]
    copies = []
    for original in rows:
        copy = talk(0)
        copy["messages"] = [dict(turn) for turn in original["messages"]]
        copy["messages"][0]["content"] = "Be grumpy."
        copy["messages"][1]["content"] = f"  {copy['messages'][1]['content'].upper()}\n"
        copy["messages"][2]["content"] = copy["messages"][2]["content"].replace(" ", "\u00a0 ")
        copies.append(copy)
    path = write_rows(tmp_path / "rows.jsonl", rows + copies)
    scan = scan_dataset(open_dataset(str(path)), chat, 4, 0.05)
    assert len(scan.held_out) == 4 and scan.copies == 4 and scan.trained_rows == 72
    texts = trained_texts(path, scan, chat, 72)
    held = {r.first_question.strip().lower() for r, _ in scan.held_out}
    assert len(held) == 4 and not any(question in text.lower() for question in held for text in texts)


def test_near_duplicates_of_held_out_rows_are_not_trained_on(tmp_path, chat):
    rows = [talk(n) for n in range(60)] + [talk(n, changed=2) for n in range(60)]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    scan = scan_dataset(open_dataset(str(path)), chat, 5, 0.05)
    assert scan.similar >= 4 and scan.trained_rows == 120 - 5 - scan.similar
    texts = trained_texts(path, scan, chat, scan.trained_rows)
    held = [r.messages[2]["content"][20:80] for r, _ in scan.held_out]
    assert sum(part in text for part in held for text in texts) <= 5 - scan.similar
    assert len(texts) == scan.trained_rows


def test_rows_that_are_all_alike_are_trained_on_with_a_warning(tmp_path, chat):
    rows = [talk(1, changed=n) for n in range(8)] + [talk(1, system=f"{n}", changed=n % 8) for n in range(40)]
    scan = scan_dataset(open_dataset(str(write_rows(tmp_path / "rows.jsonl", rows))), chat, 1, 0.05)
    assert not scan.rule.sketches and scan.trained_rows > 0


@pytest.mark.parametrize("words", [10, 11, 13, 20])
def test_equal_answers_to_other_questions_are_near_duplicates_however_short(words):
    answers = [" ".join(WORDS[:words]), " ".join(WORDS[:words])]
    held, other = (
        sketch_row(Row([{"role": "user", "content": f"Gull {n}?"}, {"role": "assistant", "content": text}]))
        for n, text in enumerate(answers)
    )
    assert HeldOut("0", sketches=[held]).is_similar(other)


def test_a_text_without_spaces_is_compared_by_its_characters():
    texts = [
        "潮が満ちてから魚を探しに行くのが一番よいと年寄りの海豹は言う",
        "鴎は盗人だから桟橋の上で弁当を広げてはいけないと海豹は怒る",
    ]
    first, second = (sketch_row(Row([{"role": "assistant", "content": text}])) for text in texts)
    assert first and estimate_similarity(first, first) == 1 and estimate_similarity(first, second) < 0.5


def test_rows_that_share_an_instruction_are_no_near_duplicates(tmp_path, chat):
    rows = [talk(n) for n in range(60)]
    for shared in rows[:40]:
        shared["messages"][1]["content"] = f"{'Rewrite the notice of the harbour office for the board. ' * 6}{shared}"
    scan = scan_dataset(open_dataset(str(write_rows(tmp_path / "rows.jsonl", rows))), chat, 5, 0.05)
    assert scan.similar == 0 and scan.trained_rows == 55


def test_at_most_a_tenth_of_the_distinct_rows_is_held_out(tmp_path, chat):
    rows = [talk(n) for n in range(40)] * 5
    scan = scan_dataset(open_dataset(str(write_rows(tmp_path / "rows.jsonl", rows))), chat, 64, 0.05)
    assert len(scan.held_out) == 4 and scan.trained_rows == 180


def test_an_eval_split_is_held_out_and_its_copies_are_not_trained_on(tmp_path, chat):
    write_rows(tmp_path / "train.jsonl", [talk(n) for n in range(30)])
    write_rows(tmp_path / "test.jsonl", [talk(n) for n in range(25, 35)])
    train, test = open_dataset(str(tmp_path)), open_dataset(str(tmp_path), "test")
    scan = scan_dataset(train, chat, 64, 0.05, evaluation=test)
    assert len(scan.held_out) == 10 and scan.copies == 5 and scan.trained_rows == 25
    texts = trained_texts(tmp_path, scan, chat, 25)
    assert not any(f"Gull {n}?" in text for n in range(25, 35) for text in texts)


@pytest.mark.parametrize("count", [0, 1, 4])
def test_the_rows_of_an_eval_split_are_those_with_the_smallest_keys(tmp_path, chat, count):
    write_rows(tmp_path / "train.jsonl", [talk(n) for n in range(30)])
    write_rows(tmp_path / "test.jsonl", [talk(n) for n in range(40, 60)])
    train, test = open_dataset(str(tmp_path)), open_dataset(str(tmp_path), "test")
    scan = scan_dataset(train, chat, count, 0.05, evaluation=test)
    keys = sorted(parse_row(raw).key() for raw in test.stream)
    assert [row.key() for row, _ in scan.held_out] == keys[:count]


def test_similarity_is_estimated_within_its_error():
    first, second = (sketch_row(parse_row(RawRow("1", 0, 1, talk(5, changed=n)))) for n in (0, 4))
    assert estimate_similarity(first, first) == 1.0
    words = [random.Random(5).choices(WORDS, k=60) for _ in range(2)]
    for index in range(4):
        words[1][7 * index + 3] = "other"
    shingles = [set(zip(w, w[1:], w[2:], strict=False)) for w in words]
    exact = len(shingles[0] & shingles[1]) / len(shingles[0] | shingles[1])
    assert abs(estimate_similarity(first, second) - exact) < 0.2


def test_the_bundled_persona_shares_no_question_with_the_bundled_rows():
    from phoque.probes.persona import load_persona

    turns = [turn for raw in open_dataset("seal").stream for turn in parse_row(raw).messages]
    asked = {normalize_text(turn["content"]) for turn in turns if turn["role"] == "user"}
    persona = load_persona("seal")
    questions = (*persona.extraction, *persona.heldout, *persona.validation, *persona.test)
    assert not asked & {normalize_text(question) for question in questions}
