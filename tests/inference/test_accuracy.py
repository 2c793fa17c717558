"""The conversations by which precisions are calibrated and measured."""

import pytest
from tests.rows import row, write_rows

from phoque.errors import UsageError
from phoque.inference.accuracy import load_chats
from phoque.models.source import Source


def test_one_conversation_cannot_calibrate_and_measure(tiny_llama, tmp_path):
    source = Source("tiny", tiny_llama, "0", "test")
    write_rows(tmp_path / "two.jsonl", [row(1), row(2)])
    calibration, held_out = load_chats(source, str(tmp_path / "two.jsonl"), "train", None)
    assert len(calibration) == len(held_out) == 1
    write_rows(tmp_path / "one.jsonl", [row(1), row(1) | {"messages": []}])
    with pytest.raises(UsageError, match="Only one conversation"):
        load_chats(source, str(tmp_path / "one.jsonl"), "train", None)
