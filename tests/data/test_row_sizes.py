"""Sizes of rows that are kept between scans: the same result, only new rows encoded, nothing that could be wrong."""

import json
from datetime import date

import pytest
from tests import tiny
from tests.rows import write_rows

from phoque.data.chat_template import ChatTemplate
from phoque.data.readers import open_dataset
from phoque.data.row_sizes import MIN_KEPT_ROWS, RowSizes, find_sizes_file
from phoque.data.scan import ENCODED_ROWS, scan_dataset
from phoque.data.turns import BadRow
from phoque.models.source import list_tokenizer_files

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
        file = find_sizes_file(tmp_path / "cache", str(path), list_tokenizer_files(model), chat)
        found = scan_dataset(open_dataset(str(path)), chat, HELD_OUT, 0.05, sizes=RowSizes(chat, file))
        return found, chat.encoded

    return run


def kept(tmp_path):
    return sorted((tmp_path / "cache").rglob("*.json"))


def test_a_second_scan_finds_the_same_and_encodes_few_rows(scan, tmp_path):
    rows = make_rows(ROWS)
    first, encoded = scan(rows)
    assert encoded == ROWS and len(kept(tmp_path)) == 1
    again, encoded = scan(rows)
    assert again == first and again.bad_counts.total() == 1 and ENCODED_ROWS <= encoded < 100
    plain = ChatTemplate(tiny.tokenizer(), "", 512)
    assert scan_dataset(open_dataset(str(tmp_path / "rows.jsonl")), plain, HELD_OUT, 0.05) == first


def test_only_changed_rows_are_encoded_again(scan):
    rows = make_rows(ROWS)
    scan(rows)
    _, few = scan(rows)
    for row in rows[900:1000]:
        row["messages"][1]["content"] += " High."
    changed, encoded = scan(rows)
    assert few < encoded <= few + 100 + HELD_OUT and scan(rows)[0] == changed


def test_another_setting_or_tokenizer_finds_nothing(scan, model, tmp_path):
    rows = make_rows(ROWS)
    scan(rows)
    assert scan(rows, max_length=4096)[1] == ROWS and scan(rows, default_system="You are a seal.")[1] == ROWS
    (model / "tokenizer_config.json").write_text(json.dumps({"chat_template": "other"}))
    assert scan(rows)[1] == ROWS and len(kept(tmp_path)) == 4


def test_what_is_wrong_or_damaged_is_not_used(scan, tmp_path):
    rows = make_rows(ROWS)
    first, _ = scan(rows)
    (file,) = kept(tmp_path)
    sizes = json.loads(file.read_text())
    file.write_text(json.dumps({key: [99, 9, []] for key in sizes}))
    assert scan(rows)[0] == first and json.loads(file.read_text()) == sizes
    file.write_text("{")
    assert scan(rows)[0] == first and json.loads(file.read_text()) == sizes


def test_a_row_that_is_refused_now_is_counted_as_bad(tmp_path, model, scan):
    """The name of the file does not tell everything; rows that are shown or held out are encoded each time."""
    rows = make_rows(ROWS)
    scan(rows)
    (file,) = kept(tmp_path)

    class Stricter(ChatTemplate):
        def encode_row(self, row):
            if "Tide 3?" in row.first_question:
                raise BadRow("stricter")
            return super().encode_row(row)

    chat = Stricter(tiny.tokenizer(), "", 512)
    found = scan_dataset(open_dataset(str(tmp_path / "rows.jsonl")), chat, HELD_OUT, 0.05, sizes=RowSizes(chat, file))
    assert found.bad_counts["stricter"] == 1


def test_no_text_is_kept(scan, tmp_path):
    rows = make_rows(ROWS)
    rows[8]["messages"][1]["content"] = "secret <|im_end|>"
    rows[9]["messages"][0]["content"] = "secret"
    assert scan(rows)[0].bad_counts.total() == 2
    (file,) = kept(tmp_path)
    entries = json.loads(file.read_text())
    assert len(entries) == ROWS - 2 and all(set(key) <= set("0123456789abcdef") for key in entries)
    assert all(isinstance(tokens, int) and notes == [] for tokens, _, notes in entries.values())


def test_a_cache_that_cannot_be_written_stops_nothing(scan, tmp_path):
    (tmp_path / "cache").write_text("a file where the folder should be")
    assert scan(make_rows(ROWS))[0].good == ROWS - 1


def test_small_datasets_and_templates_with_a_date_keep_nothing(scan, model, tmp_path):
    scan(make_rows(50))
    assert not kept(tmp_path)
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = "{% set today = strftime_now('%d') %}" + tokenizer.chat_template
    files = list_tokenizer_files(model)
    assert find_sizes_file(tmp_path, "rows", files, ChatTemplate(tokenizer, "", 512)) is None
    dates = [ChatTemplate(tokenizer, "", 512, today=date(2026, 11, day)) for day in (8, 9)]
    assert len({find_sizes_file(tmp_path, "rows", files, chat) for chat in dates}) == 2
