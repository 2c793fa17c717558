"""Reading rows, mapping other schemas, and refusing what is unfit, with line numbers."""

import json

import pytest
from tests.rows import row, write_rows

from phoque.data.readers import BUNDLED, open_dataset
from phoque.data.row_advice import find_advice
from phoque.data.rows import RawRow, column_of, parse_row
from phoque.data.turns import BadRow
from phoque.errors import PhoqueError

TURNS = row(1)["messages"]


def make_record(content) -> RawRow:
    return RawRow("line 1", 0, 1, content)


def test_the_seal_is_bundled_in_the_schema_of_the_spec():
    seal = [json.loads(line) for line in BUNDLED["seal"].read_text().splitlines()]
    assert len(seal) >= 300 and len({r["source"] for r in seal}) == 3
    assert all(set(r) == {"messages", "source", "toxicity_score"} for r in seal)
    turns = [len(r["messages"]) for r in seal]
    words = [len(r["messages"][-1]["content"].split()) for r in seal]
    assert min(turns) == 3 and max(turns) == 7 and max(words) > 180
    for r in seal:
        parse_row(make_record(r))


@pytest.mark.parametrize(
    "other",
    [
        {"conversations": [{"from": "human", "value": "Gull 1?"}, {"from": "gpt", "value": "Hrmph."}]},
        {"prompt": "Gull 1?", "completion": "Hrmph."},
        {
            "contents": [
                {"role": "user", "parts": [{"text": "Gull "}, {"text": "1?"}]},
                {"role": "model", "parts": [{"text": "Hrmph."}]},
            ]
        },
        {"chat_messages": [{"sender": "human", "text": "Gull 1?"}, {"sender": "assistant", "text": "Hrmph."}]},
        {
            "prompt": [{"role": "user", "content": "Gull 1?"}],
            "completion": [{"role": "assistant", "content": "Hrmph."}],
        },
    ],
)
def test_other_schemas_are_mapped(other):
    assert parse_row(make_record(other)).messages == [
        {"role": "user", "content": "Gull 1?"},
        {"role": "assistant", "content": "Hrmph."},
    ]


def test_the_system_message_of_gemini_is_read():
    turns = [{"role": "user", "parts": [{"text": "Gull?"}]}, {"role": "model", "parts": [{"text": "Hrmph."}]}]
    row = {"systemInstruction": {"parts": [{"text": "You are a seal."}]}, "contents": turns}
    row = {column_of(name): value for name, value in row.items()}
    parsed = parse_row(make_record(row))
    assert parsed.system == "You are a seal." and parsed.schema == "contents of Gemini"


@pytest.mark.parametrize(
    ("columns", "advice"),
    [
        (("sample",), "Give each row its turns"),
        (("title", "mapping", "id"), "export of ChatGPT"),
        (("thread", "sender", "message"), "put the turns of a conversation into one row"),
        (("said", "answered"), "said to prompt and answered to completion"),
        (("id", "said", "answered"), "Rename the column of the questions to prompt"),
    ],
)
def test_columns_that_are_not_known_have_advice(columns, advice):
    assert advice in find_advice("no conversation columns", columns)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ({"text": "x"}, "one text, no turns"),
        ({"id": 1}, "no conversation columns"),
        (5, "not an object"),
        ({"messages": "x"}, "messages is not a list"),
        ({"messages": []}, "no assistant turn"),
        ({"messages": [TURNS[1]]}, "no assistant turn"),
        ({"messages": [TURNS[1], TURNS[2], TURNS[2]]}, "turns do not alternate user, assistant"),
        ({"messages": [TURNS[1], TURNS[0], TURNS[2]]}, "turns do not alternate user, assistant"),
        ({"messages": [{"role": "gull", "content": "x"}, TURNS[2]]}, "unknown role 'gull'"),
        ({"messages": [TURNS[1], {"role": "assistant", "content": " "}]}, "empty assistant turn"),
        ({"messages": [TURNS[1], {"role": "assistant", "content": None}]}, "a turn has no text"),
        ({"messages": [{"content": "x"}, TURNS[2]]}, "a turn has no role"),
        ({"messages": TURNS, "toxicity_score": "high"}, "toxicity_score is not a number"),
        ({"messages": TURNS, "toxicity_score": float("inf")}, "toxicity_score is infinite"),
        ({"conversations": 5}, "conversations is not a list"),
        ({"messages": [TURNS[1], {"role": "assistant", "content": "a gull \ud83d"}]}, "unpaired surrogate in text"),
    ],
)
def test_unfit_rows_say_why(content, reason):
    with pytest.raises(BadRow, match=reason.replace("'", ".")):
        parse_row(make_record(content))


def test_a_score_that_is_nan_is_none():
    assert parse_row(make_record({"messages": TURNS, "toxicity_score": float("nan")})).toxicity_score is None


def test_files_folders_and_formats_give_the_same_rows(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    some = [row(n) for n in range(6)]
    folder = tmp_path / "folder"
    folder.mkdir()
    write_rows(folder / "a.jsonl", some[:2])
    (folder / "b.json").write_text(json.dumps(some[2:4]))
    pq.write_table(pa.Table.from_pylist(some[4:]), folder / "c.parquet")
    read = [parse_row(r).messages for r in open_dataset(str(folder)).stream]
    assert read == [r["messages"] for r in some]


def test_a_broken_line_keeps_its_number(tmp_path):
    path = write_rows(tmp_path / "x.jsonl", [row(1), '{"messages": [', row(2)])
    records = list(open_dataset(str(path)).stream)
    assert [bool(r.defect) for r in records] == [False, True, False]
    assert records[1].location == "line 2"


@pytest.mark.parametrize("name", ["", "nowhere.jsonl", "./x/y", "just-a-word"])
def test_no_such_dataset(name):
    with pytest.raises(PhoqueError) as caught:
        open_dataset(name)
    assert caught.value.code == 2


def test_rows_have_the_same_key_in_any_file():
    assert (
        parse_row(make_record(row(1))).key()
        == parse_row(make_record(row(1, source="other"))).key()
        != parse_row(make_record(row(2))).key()
    )
