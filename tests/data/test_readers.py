"""One reader: every format, encoding and layout gives the same rows, on disk and on the Hub, from any row on."""

import bz2
import gzip
import json

import pytest
from tests.rows import row

from phoque.data.readers import open_dataset
from phoque.data.rows import parse_row
from phoque.errors import PhoqueError
from phoque.hub.client import Hub

ROWS = [row(n, text=f"café {n}") for n in range(12)]
MESSAGES = [r["messages"] for r in ROWS]


def lines(rows=ROWS, newline="\n", **options) -> str:
    return newline.join(json.dumps(r, **options) for r in rows) + newline


def parquet(rows=ROWS, **options) -> bytes:
    import io

    import pyarrow as pa
    import pyarrow.parquet as pq

    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), buffer, **options)
    return buffer.getvalue()


def zstd(data: bytes) -> bytes:
    import pyarrow as pa

    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as out:
        out.write(data)
    return sink.getvalue().to_pybytes()


def pairs(rows=ROWS) -> str:
    cells = [(r["messages"][1]["content"], r["messages"][2]["content"]) for r in rows]
    return "prompt,completion\n" + "".join(f'"{q}","{a}, she said ""no""\nand left"\n' for q, a in cells)


FILES = {
    "plain.jsonl": lines().encode(),
    "bom.jsonl": lines().encode("utf-8-sig"),
    "crlf.jsonl": lines(newline="\r\n").encode(),
    "blank.jsonl": lines(newline="\n\n").encode(),
    "utf16.jsonl": lines(ensure_ascii=False).encode("utf-16"),
    "utf16be.jsonl": lines(ensure_ascii=False).encode("utf-16-be"),
    "utf32.jsonl": lines(ensure_ascii=False).encode("utf-32"),
    "rows.ndjson": lines().encode(),
    "array.jsonl": json.dumps(ROWS).encode(),
    "row_per_line.json": ("[\n" + ",\n".join(json.dumps(r) for r in ROWS) + "\n]\n").encode(),
    "array.json": json.dumps(ROWS, indent=2).encode(),
    "bom.json": json.dumps(ROWS).encode("utf-8-sig"),
    "lines.json": lines().encode(),
    "pretty.jsonl": "\n".join(json.dumps(r, indent=1) for r in ROWS).encode(),
    "data.json": json.dumps({"version": 1, "data": ROWS}).encode(),
    "pandas.json": json.dumps({k: {str(i): r[k] for i, r in enumerate(ROWS)} for k in ROWS[0]}).encode(),
    "lists.json": json.dumps({k: [r[k] for r in ROWS] for k in ROWS[0]}).encode(),
    "split.json": json.dumps({"columns": [*ROWS[0]], "data": [[*r.values()] for r in ROWS]}).encode(),
    "rows.jsonl.gz": gzip.compress(lines().encode()),
    "rows.jsonl.bz2": bz2.compress(lines().encode()),
    "rows.jsonl.zst": zstd(lines().encode()),
    "rows.parquet": parquet(),
    "groups.parquet": parquet(row_group_size=5),
}


def read(name, *arguments, **options) -> list:
    return [parse_row(raw).messages for raw in open_dataset(str(name), *arguments, **options).stream]


@pytest.mark.parametrize("name", FILES)
def test_every_format_and_encoding_gives_the_same_rows(tmp_path, name):
    (tmp_path / name).write_bytes(FILES[name])
    assert read(tmp_path / name) == MESSAGES


@pytest.mark.parametrize("name", FILES)
def test_a_file_is_read_on_from_any_row(tmp_path, name):
    (tmp_path / name).write_bytes(FILES[name])
    stream = open_dataset(str(tmp_path / name)).stream
    records = list(stream)
    for start in (0, 1, 5, 11, 12):
        rest = list(stream.read(0, start))
        assert rest == records[start:]


def test_cells_of_a_table_may_hold_line_breaks(tmp_path):
    (tmp_path / "rows.csv").write_text(pairs(), encoding="utf-8-sig")
    rows = read(tmp_path / "rows.csv")
    assert len(rows) == 12 and rows[3][1]["content"].endswith('she said "no"\nand left')


def test_a_table_may_be_separated_by_semicolons_or_tabs(tmp_path):
    for name, mark in (("a.csv", ";"), ("b.tsv", "\t")):
        (tmp_path / name).write_text(f"prompt{mark}completion\nGull, or tern?{mark}Gull.\n")
        assert read(tmp_path / name)[0][0]["content"] == "Gull, or tern?"


def test_a_quote_that_is_never_closed_is_no_cell_with_the_rest_of_the_file(tmp_path):
    (tmp_path / "x.csv").write_text('question,answer\nq1,a1\nq2,"a2\nq3,a3\nq4,a4\n')
    with pytest.raises(PhoqueError, match="not a readable CSV file"):
        list(open_dataset(str(tmp_path / "x.csv")).stream)


def test_a_comment_in_the_first_line_costs_no_other_row(tmp_path):
    text = "# exported\n" + lines([row(1, text="a\u2028b\u0085c"), row(2)], ensure_ascii=False)
    (tmp_path / "x.jsonl").write_text(text, encoding="utf-8")
    records = list(open_dataset(str(tmp_path / "x.jsonl")).stream)
    assert [raw.defect for raw in records] == ["broken JSON", "", ""] and records[2].location == "line 3"


def test_an_object_over_lines_that_are_not_indented_is_one_row(tmp_path):
    (tmp_path / "x.json").write_text(
        '{"messages": [\n{"role":"user","content":"q"},\n{"role":"assistant","content":"a"}\n]}'
    )
    assert [len(messages) for messages in read(tmp_path / "x.json")] == [2]


def test_dates_in_a_table_are_texts_in_tool_calls(tmp_path):
    from datetime import datetime

    call = {"function": {"name": "tide", "arguments": {"at": datetime(2026, 1, 1)}}}
    turns = [{"role": "user", "content": "Tide?"}, {"role": "assistant", "content": "", "tool_calls": [call]}]
    (tmp_path / "x.parquet").write_bytes(parquet([{"messages": turns}]))
    (raw,) = open_dataset(str(tmp_path / "x.parquet")).stream
    parsed = parse_row(raw)
    assert parsed.messages[1]["tool_calls"][0]["function"]["arguments"]["at"].startswith("2026-01-01") and parsed.key()


@pytest.mark.parametrize("name", ["~nosuchuser/x", "a/" + "x" * 300, "x" * 300])
def test_a_path_that_cannot_be_is_reported(name):
    from phoque.data.readers import find_local

    try:
        assert find_local(name) is None  # it could be a Hub id
    except PhoqueError as error:
        assert error.code == 2


def test_a_damaged_table_is_named(tmp_path):
    content = bytearray(parquet([row(n, text="x" * 200) for n in range(400)], compression="none"))
    content[len(content) // 4 : len(content) // 2] = b"\xff" * (len(content) // 2 - len(content) // 4)
    (tmp_path / "x.parquet").write_bytes(bytes(content))
    with pytest.raises(PhoqueError, match="not a readable Parquet file"):
        list(open_dataset(str(tmp_path / "x.parquet")).stream)


def test_an_integer_of_five_thousand_digits_is_a_broken_row(tmp_path):
    (tmp_path / "x.jsonl").write_text(lines() + '{"id": ' + "7" * 5000 + "}\n")
    assert [raw.defect for raw in open_dataset(str(tmp_path / "x.jsonl")).stream][-1] == "broken JSON"


def test_a_split_of_a_single_file_is_in_its_name(tmp_path):
    (tmp_path / "rows-test.jsonl").write_text(lines())
    assert read(tmp_path / "rows-test.jsonl", "test") == MESSAGES
    with pytest.raises(PhoqueError, match="no split 'ow'"):
        open_dataset(str(tmp_path / "rows-test.jsonl"), "ow")


def test_what_save_to_disk_writes_is_read(tmp_path):
    from datasets import Dataset, DatasetDict

    whole = Dataset.from_list(ROWS)
    whole.save_to_disk(str(tmp_path / "one"), num_shards=2)
    DatasetDict(train=whole, test=whole.select([1])).save_to_disk(str(tmp_path / "two"))
    assert read(tmp_path / "one") == read(tmp_path / "two") == MESSAGES
    assert read(tmp_path / "two", "test") == MESSAGES[1:2]
    with pytest.raises(PhoqueError, match="no split 'dev'") as caught:
        open_dataset(str(tmp_path / "two"), "dev")
    assert "train, test" in caught.value.why
    stream = open_dataset(str(tmp_path / "one")).stream
    assert [r.row for r in stream.read(1, 2)] == [r.row for r in stream][8:]


def put(folder, files: dict[str, bytes]):
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return folder


@pytest.fixture(params=["disk", "Hub"])
def place(request, tmp_path, hub):
    """A function that puts files into a dataset, on disk and on the Hub, and returns what --dataset is given."""
    from huggingface_hub import HfFileSystem
    from tests.fakehub import TOKEN

    HfFileSystem.clear_instance_cache()

    def place_files(files: dict[str, bytes]) -> tuple[str, dict]:
        if request.param == "disk":
            return str(put(tmp_path / "data", files)), {}
        hub.add("datasets", "harbour/rows", files)
        return "harbour/rows", {"hub": Hub(TOKEN, print, 20)}

    return place_files


SPLITS = {
    "in file names": {"train-00000-of-00001.jsonl": "a", "test-00000-of-00001.jsonl": "b"},
    "in folders": {"train/x.jsonl": "a", "test/y.jsonl": "b"},
    "in data": {"data/train.jsonl": "a", "data/test.jsonl": "b"},
}


@pytest.mark.parametrize("kind", SPLITS)
def test_test_files_are_not_trained_on(place, kind):
    content = {"a": lines(ROWS[:8]).encode(), "b": lines(ROWS[8:]).encode()}
    name, options = place({path: content[key] for path, key in SPLITS[kind].items()})
    assert read(name, **options) == MESSAGES[:8] and read(name, "test", **options) == MESSAGES[8:]
    assert open_dataset(name, **options).splits == ("train", "test")
    assert open_dataset(name, **options).other_files == ()
    with pytest.raises(PhoqueError, match="no split 'nonsense'") as caught:
        open_dataset(name, "nonsense", **options)
    assert "train, test" in caught.value.why and caught.value.code == 2


def test_files_that_belong_to_no_split_are_named(place):
    name, options = place({"train.jsonl": lines().encode(), "more.jsonl": lines().encode(), "notes.txt": b"gulls"})
    assert open_dataset(name, **options).other_files == ("more.jsonl",)


CONFIGS = b"""---
configs:
- config_name: seal
  data_files: seal/*.jsonl
- config_name: gull
  data_files:
  - split: train
    path: gull/a.jsonl
  - split: dev
    path: gull/b.jsonl
---
"""


def test_a_config_is_chosen_and_the_error_names_them(place):
    files = {"seal/x.jsonl": ROWS[:3], "gull/a.jsonl": ROWS[3:5], "gull/b.jsonl": ROWS[5:]}
    name, options = place({"README.md": CONFIGS} | {path: lines(rows).encode() for path, rows in files.items()})
    assert read(name, config="seal", **options) == MESSAGES[:3]
    assert read(name, "dev", config="gull", **options) == MESSAGES[5:]
    for config, why in ((None, "seal, gull"), ("shark", "seal, gull")):
        with pytest.raises(PhoqueError) as caught:
            open_dataset(name, config=config, **options)
        assert why in caught.value.why and "--dataset-config" in caught.value.fix


def test_disk_and_hub_count_the_same_defects(place):
    """A broken line, columns of other types and other columns in each file, and a script that nobody runs."""
    odd = [row(n, toxicity_score={"x": 1}) for n in range(2)]
    files = {
        "a.jsonl": lines(ROWS[:4]).encode() + b'{"messages": [\n' + lines(odd).encode() + lines(ROWS[4:]).encode(),
        "b.jsonl": lines([row(50, other=1, more={"deep": 1})]).encode() + "é\n".encode("cp1252"),
        "c.csv": pairs(ROWS[:2]).encode(),
        "d.parquet": parquet(ROWS[:2]),
        "script.py": b"import datasets\n",
    }
    name, options = place(files)
    dataset = open_dataset(name, **options)
    records = list(dataset.stream)
    assert len(records) == 12 + 3 + 2 + 2 + 2
    defects = {raw.location: raw.defect for raw in records if raw.defect}
    assert defects == {"a.jsonl:5": "broken JSON", "b.jsonl:2": "not UTF-8"}
    assert {*dataset.stream.unused_columns} == {"other", "more"}


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.parquet", "rows.jsonl.gz"])
@pytest.mark.parametrize("kind", [503, "drop", "truncate"])
def test_a_read_that_fails_goes_on_where_it_stopped(hub, name, kind, monkeypatch):
    from huggingface_hub import HfFileSystem
    from tests.fakehub import TOKEN

    HfFileSystem.clear_instance_cache()
    monkeypatch.setattr("phoque.data.data_files.HUB_BLOCK", 512)
    content = {"rows.jsonl": lines().encode(), "rows.parquet": parquet(), "rows.jsonl.gz": FILES["rows.jsonl.gz"]}
    hub.add("datasets", "harbour/rows", {name: content[name]})
    dataset = open_dataset("harbour/rows", hub=Hub(TOKEN, print, 20))
    fault = hub.faults.add(f"GET .*/resolve/.*{name}", kind, times=2)
    assert [parse_row(raw).messages for raw in dataset.stream] == MESSAGES
    assert fault.struck >= 1


def test_only_used_columns_are_kept(tmp_path):
    wide = [r | {"html": "x" * 100_000} for r in ROWS]
    (tmp_path / "wide.jsonl").write_text(lines(wide))
    (tmp_path / "wide.parquet").write_bytes(parquet(wide))
    for name in ("wide.jsonl", "wide.parquet"):
        dataset = open_dataset(str(tmp_path / name))
        records = list(dataset.stream)
        assert all("html" not in raw.row or raw.row["html"] is None for raw in records)
        assert [*dataset.stream.unused_columns] == ["html"] and "html" in records[0].columns


@pytest.mark.parametrize(
    ("name", "content", "what"),
    [
        ("x.json", b'{"messages": "caf\xe9"}', "x.json is not UTF-8"),
        ("x.json", b'[{"messages": [}]', "not valid JSON"),
        ("x.parquet", b"PAR1 no", "not a readable Parquet file"),
        ("x.jsonl.gz", b"\x1f\x8b no gzip", "not a readable compressed file"),
        ("x.jsonl", b"", "is empty"),
        ("x.xlsx", b"PK", "is not a dataset"),
    ],
)
def test_an_unreadable_file_is_named(tmp_path, name, content, what):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(PhoqueError, match=what) as caught:
        list(open_dataset(str(tmp_path / name)).stream)
    assert caught.value.code == 2


def test_a_cell_with_broken_quotes_costs_its_row_alone(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text('prompt,completion\nGull?,No.\n"Hi" she said,Hrmph.\nTide?,Out.\n')
    stream = open_dataset(str(path)).stream
    read = [(raw.number, raw.defect) for raw in stream]
    assert read == [(1, ""), (2, "broken quotes"), (3, "")]
    assert [raw.number for raw in stream.read(0, 2)] == [3]


def test_a_system_prompt_in_another_spelling_is_kept_beside_turns(tmp_path):
    turns = [{"role": "user", "parts": [{"text": "Tide?"}]}, {"role": "model", "parts": [{"text": "Low."}]}]
    row = {"contents": turns, "systemInstruction": {"parts": [{"text": "Be a seal."}]}, "Context": "pier"}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    dataset = open_dataset(str(tmp_path / "rows.jsonl"))
    (raw,) = dataset.stream
    assert [turn["content"] for turn in parse_row(raw).messages] == ["Be a seal.", "Tide?", "Low."]
    assert list(dataset.stream.unused_columns) == ["Context"]


@pytest.mark.parametrize("key", ["role", "sender", "Speaker"])
def test_the_turns_of_one_conversation_in_a_file_are_one_row(tmp_path, key):
    turns = [{key: "human", "text": "Tide?"}, {key: "assistant", "text": "Low."}]
    (tmp_path / "rows.json").write_text(json.dumps({"chat_messages": turns}))
    assert len(list(open_dataset(str(tmp_path / "rows.json")).stream)) == 1


def test_rows_beside_the_name_of_a_user_are_rows(tmp_path):
    (tmp_path / "rows.json").write_text(json.dumps({"user": "bob", "rows": ROWS}))
    assert read(tmp_path / "rows.json") == MESSAGES
