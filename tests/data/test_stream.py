"""The first reading, the held-out rows, and a stream that goes on exactly where it stopped."""

import json

import pytest
from tests import tiny
from tests.rows import row, write_rows

from phoque.data.chat_template import ChatTemplate
from phoque.data.held_out import HeldOut
from phoque.data.packing import Packing, build_batch
from phoque.data.readers import open_dataset
from phoque.data.scan import scan_dataset
from phoque.data.stream import BadRowLimit, TrainStream
from phoque.errors import PhoqueError


@pytest.fixture(scope="module")
def chat():
    return ChatTemplate(tiny.tokenizer(), "", 512)


def exact_packing(count):
    return Packing(count, 60.0, 512, exact=True)


def open_rows(path):
    return open_dataset(str(path), "train", None, None)


def test_bad_rows_are_counted_by_reason_with_their_first_lines(tmp_path, chat):
    bad = [row(messages=[]), "{", row(messages=[]), row(messages=[]), row(messages=[])]
    path = write_rows(tmp_path / "x.jsonl", [row(n) for n in range(95)] + bad)
    found = scan_dataset(open_rows(path), chat, 8, 0.05)
    assert found.good == 95 and dict(found.bad_counts) == {"no assistant turn": 4, "broken JSON": 1}
    assert found.bad["no assistant turn"] == ["line 96", "line 98", "line 99"]


def test_too_many_bad_rows_stop_the_run(tmp_path, chat):
    path = write_rows(tmp_path / "x.jsonl", [row(n) for n in range(9)] + ["{"])
    with pytest.raises(PhoqueError, match="1 of 10 rows") as caught:
        scan_dataset(open_rows(path), chat, 0, 0.05)
    assert "line 10" in caught.value.why and "--max-bad-rows" in caught.value.fix
    assert scan_dataset(open_rows(path), chat, 0, 0.1).good == 9


def test_no_good_row_stops_the_run_whatever_is_allowed(tmp_path, chat):
    with pytest.raises(PhoqueError, match="No row"):
        scan_dataset(open_rows(write_rows(tmp_path / "x.jsonl", ["{", "["])), chat, 0, 1.0)


def test_held_out_rows_are_the_same_in_any_order_and_never_trained_on(tmp_path, chat):
    some = [row(n) for n in range(40)]
    found = scan_dataset(open_rows(write_rows(tmp_path / "a.jsonl", some)), chat, 4, 0.05)
    again = scan_dataset(open_rows(write_rows(tmp_path / "b.jsonl", some[::-1])), chat, 4, 0.05)
    kept = {r.key() for r, _ in found.held_out}
    assert len(kept) == 4 and kept == {r.key() for r, _ in again.held_out}
    stream = TrainStream(open_rows(tmp_path / "a.jsonl"), chat, held_out=found.rule, packing=exact_packing(1), seed=0)
    texts = [tuple(b["input_ids"][0].tolist()) for _, b in zip(range(36), stream, strict=False)]
    assert len(set(texts)) == 36  # each row once in a pass
    held = {tuple(e.ids) for _, e in found.held_out}
    assert not held & set(texts)
    assert stream.epoch == 0


def test_each_pass_has_every_row_once_in_another_order(rows, chat):
    stream = iter(
        TrainStream(
            open_rows(rows),
            chat,
            held_out=HeldOut(),
            packing=exact_packing(1),
            seed=0,
        )
    )
    first, second = ([next(stream)["input_ids"][0].tolist() for _ in range(40)] for _ in range(2))
    assert first != second and sorted(first) == sorted(second)


@pytest.mark.parametrize("window", [7, 1000])
@pytest.mark.parametrize(("size", "stop"), [(3, n) for n in (0, 1, 7, 13, 21, 27)] + [(4, 10)])  # 4 x 10: all rows
def test_a_stream_resumes_exactly(rows, chat, size, stop, window, monkeypatch):
    monkeypatch.setattr("phoque.data.stream.SHUFFLE_WINDOW", window)

    def stream():
        return TrainStream(
            open_rows(rows),
            chat,
            held_out=HeldOut(),
            packing=exact_packing(size),
            seed=5,
        )

    whole = stream()
    batches = [b["input_ids"].tolist() for _, b in zip(range(30), whole, strict=False)]
    cut = stream()
    taken = iter(cut)
    for _ in range(stop):
        next(taken)
    state = json.loads(json.dumps(cut.state_dict()))
    resumed = stream()
    resumed.load_state_dict(state)
    rest = [b["input_ids"].tolist() for _, b in zip(range(30 - stop), resumed, strict=False)]
    assert rest == batches[stop:]
    assert len({str(b) for b in batches}) == 30
    assert resumed.tokens_seen == whole.tokens_seen and resumed.rows_seen == whole.rows_seen


def test_a_packed_row_has_borders_and_restarting_positions(chat):
    talks = [chat.encode(row(n)["messages"]) for n in (1, 22)]
    batch = build_batch(talks)
    a, b = (len(t.ids) for t in talks)
    assert batch["cu_seq_lens_q"].tolist() == [0, a, a + b]
    assert batch["position_ids"][0].tolist() == [*range(a), *range(b)]
    assert batch["input_ids"][0].tolist() == talks[0].ids + talks[1].ids
    assert batch["labels"][0, a] == -100 and "attention_mask" not in batch


def test_a_pass_without_a_row_to_train_on_is_an_error_and_no_endless_loop(tmp_path, chat):
    path = write_rows(tmp_path / "x.jsonl", [row(1)] * 40)
    everything = HeldOut("f" * 32)
    with pytest.raises(PhoqueError, match="gave no row"):
        next(iter(TrainStream(open_rows(path), chat, held_out=everything, packing=exact_packing(2), seed=0)))


def bad_after_the_scan(tmp_path, chat, monkeypatch, share: int) -> TrainStream:
    """A stream of 6,000 rows of which the first 1,000 were scanned and one in `share` of the others is bad."""
    monkeypatch.setattr("phoque.data.scan.MAX_SCANNED_ROWS", 1000)
    rows = [row(n) if n < 1000 or n % share else row(messages=[]) for n in range(6000)]
    path = write_rows(tmp_path / "x.jsonl", rows)
    scan = scan_dataset(open_rows(path), chat, 0, 0.05)
    assert not scan.complete and scan.rows == 1000
    limit = BadRowLimit(0.05, scan.last)
    return TrainStream(open_rows(path), chat, held_out=scan.rule, packing=exact_packing(8), seed=0, limit=limit)


@pytest.mark.parametrize(("share", "stops"), [(21, False), (10, True)])  # 4.8 % and 10 % of the later rows
def test_later_rows_stop_a_run_only_beyond_the_limit(tmp_path, chat, monkeypatch, share, stops):
    stream = bad_after_the_scan(tmp_path, chat, monkeypatch, share)
    for _ in zip(range(700), stream, strict=False):
        pass
    assert bool(stream.problem) == stops
    if stops:
        assert "--max-bad-rows" in stream.problem.fix and stream.problem.code == 2


@pytest.mark.parametrize("seed", range(6))
def test_a_share_of_bad_rows_that_the_scan_accepted_never_stops_a_run(tmp_path, chat, seed):
    rows = [row(n) if n % 20 else row(messages=[]) for n in range(1200)]  # exactly the limit
    path = write_rows(tmp_path / "x.jsonl", rows)
    scan = scan_dataset(open_rows(path), chat, 4, 0.05)
    stream = TrainStream(open_rows(path), chat, held_out=scan.rule, packing=exact_packing(8), seed=seed)
    for _ in zip(range(300), stream, strict=False):
        pass
    assert stream.epoch >= 1 and stream.problem is None
