"""Sizes of rows that are kept between scans: the same result, only new rows encoded, nothing that could be wrong."""

import json

import pytest
from tests import tiny
from tests.rows import write_rows

from phoque.data.chat_template import ChatTemplate
from phoque.data.readers import open_dataset
from phoque.data.row_sizes import CHECKED_ROWS, MIN_KEPT_ROWS, RowSizes, find_sizes_file
from phoque.data.scan import SHOWN_ROWS, scan_dataset

ROWS, HELD_OUT = MIN_KEPT_ROWS + 200, 8


class CountingTemplate(ChatTemplate):
    """A chat template that counts the rows it encodes."""

    encoded = 0

    def encode_row(self, row):
        self.encoded += 1
        return super().encode_row(row)


def make_rows(count):
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"Tide {n}?"},
                {"role": "assistant", "content": f"Low, gull {n * n}."},
            ]
        }
        for n in range(count)
    ]
    rows[7]["messages"][1]["content"] = "gull " * 600  # too long
    return rows


@pytest.fixture
def model(tmp_path):
    folder = tmp_path / "model"
    tiny.tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def scan(tmp_path, model):
    def run(rows, max_length=512, default_system=""):
        path = write_rows(tmp_path / "rows.jsonl", rows)
        chat = CountingTemplate(tiny.tokenizer(), default_system, max_length)
        file = find_sizes_file(tmp_path / "cache", str(path), model, chat)
        found = scan_dataset(open_dataset(str(path)), chat, HELD_OUT, 0.05, sizes=RowSizes(chat, file))
        return found, chat.encoded

    return run


def kept(tmp_path):
    return sorted((tmp_path / "cache").rglob("*.json"))


def test_a_second_scan_finds_the_same_and_encodes_next_to_nothing(scan, tmp_path):
    rows = make_rows(ROWS)
    first, encoded = scan(rows)
    assert encoded == ROWS + HELD_OUT + SHOWN_ROWS and len(kept(tmp_path)) == 1
    again, encoded = scan(rows)
    assert again == first and again.bad_counts.total() == 1 and encoded == CHECKED_ROWS + HELD_OUT + SHOWN_ROWS
    plain = ChatTemplate(tiny.tokenizer(), "", 512)
    assert scan_dataset(open_dataset(str(tmp_path / "rows.jsonl")), plain, HELD_OUT, 0.05) == first


def test_only_changed_rows_are_encoded_again(scan):
    rows = make_rows(ROWS)
    scan(rows)
    rows[900]["messages"][1]["content"] = "High."
    changed, encoded = scan(rows)
    assert encoded == 1 + CHECKED_ROWS + HELD_OUT + SHOWN_ROWS
    assert scan(rows)[0] == changed


def test_another_setting_or_tokenizer_finds_nothing(scan, model, tmp_path):
    rows = make_rows(ROWS)
    whole = ROWS + HELD_OUT + SHOWN_ROWS
    scan(rows)
    assert scan(rows, max_length=4096)[1] == whole and scan(rows, default_system="You are a seal.")[1] == whole
    (model / "tokenizer_config.json").write_text(json.dumps({"chat_template": "other"}))
    assert scan(rows)[1] == whole and len(kept(tmp_path)) == 4


def test_what_is_wrong_or_damaged_is_not_used(scan, tmp_path):
    rows = make_rows(ROWS)
    first, _ = scan(rows)
    (file,) = kept(tmp_path)
    sizes = json.loads(file.read_text())
    file.write_text(json.dumps({key: [99, 9, []] for key in sizes}))
    assert scan(rows)[0] == first and json.loads(file.read_text()) == sizes
    file.write_text("{")
    assert scan(rows)[0] == first and json.loads(file.read_text()) == sizes


def test_small_datasets_and_templates_with_a_date_keep_nothing(scan, model, tmp_path):
    scan(make_rows(50))
    assert not kept(tmp_path)
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = "{% set today = strftime_now('%d') %}" + tokenizer.chat_template
    assert find_sizes_file(tmp_path, "rows", model, ChatTemplate(tokenizer, "", 512)) is None
