"""Rows of one length: every conversation once, best where it fits, little padding, and exactly where it went on."""

import itertools
import json
import random

import pytest
import torch
from tests import tiny
from tests.rows import write_rows

from phoque.data.chat_template import ChatTemplate, EncodedChat
from phoque.data.held_out import HeldOut
from phoque.data.packing import TIGHT, Packing, build_batch, pack_best_fit, pack_evenly
from phoque.data.readers import open_dataset
from phoque.data.stream import TrainStream
from phoque.prefetch import Prefetcher


@pytest.fixture(scope="module")
def chat():
    return ChatTemplate(tiny.tokenizer(), "", 512)


@pytest.fixture(scope="module")
def short_chats(tmp_path_factory):
    """300 short chats of lengths as they occur: many short ones, a few long."""
    rng = random.Random(5)
    rows = []
    for number in range(300):
        answer = "gull " * max(1, min(80, int(rng.lognormvariate(1.6, 0.8))))
        turns = [{"role": "user", "content": f"Tide {number}?"}, {"role": "assistant", "content": answer}]
        rows.append({"messages": turns, "source": "pier", "toxicity_score": 0.0})
    return write_rows(tmp_path_factory.mktemp("talks") / "rows.jsonl", rows)


def open_stream(short_chats, chat, packing):
    return TrainStream(
        open_dataset(str(short_chats), "train", None, None),
        chat,
        held_out=HeldOut(),
        packing=packing,
        seed=0,
    )


def take_rows(stream, count):
    return [b for _, b in zip(range(count), stream, strict=False)]


def test_best_fit_keeps_to_the_budget_and_leaves_the_least_room():
    assert pack_best_fit([60, 30, 50, 40, 30, 10], 100, 9) == [[0, 1, 5], [2, 3], [4]]
    assert pack_best_fit([10] * 7, 100, 3) == [[0, 1, 2], [3, 4, 5], [6]]
    lengths = [random.Random(1).randint(1, 100) for _ in range(500)]
    rows = pack_best_fit(lengths, 100, 9)
    assert sorted(n for row in rows for n in row) == [*range(500)]
    assert all(sum(lengths[n] for n in row) <= 100 for row in rows)


@pytest.mark.parametrize("count", [4, 8, 16])
@pytest.mark.parametrize("spread", [0.0, 0.3, 0.7])
def test_rows_are_about_as_full_as_each_other_and_at_most_one_more_of_them(count, spread):
    rng = random.Random(2)
    for _ in range(20):
        drawn = [max(24, min(1024, int(rng.lognormvariate(4.7, spread)))) for _ in range(2000)]
        packing = Packing(count, sum(drawn) / len(drawn), max(drawn))
        totals = itertools.accumulate(drawn)
        lengths = drawn[: 1 + next(n for n, total in enumerate(totals) if total >= packing.group_tokens)]
        rows = packing.rows(lengths)
        assert sorted(n for row in rows for n in row) == [*range(len(lengths))]
        best = pack_best_fit(lengths, packing.tokens, packing.max_conversations)
        assert len(rows) <= len(best) + 1 and max(map(len, rows)) <= packing.max_conversations
        fills = [sum(lengths[n] for n in row) for row in rows]
        assert max(fills) <= packing.tokens and min(fills) > 0.7 * max(fills)


def test_a_run_of_an_earlier_version_keeps_its_rows(short_chats, chat):
    old, new = Packing(4, 60.0, 512, method=TIGHT), Packing(4, 60.0, 512)
    stream = open_stream(short_chats, chat, old)
    batches = [batch["input_ids"].tolist() for batch in take_rows(stream, 60)]
    assert batches != [batch["input_ids"].tolist() for batch in take_rows(open_stream(short_chats, chat, new), 60)]
    cut, resumed = open_stream(short_chats, chat, old), open_stream(short_chats, chat, new)
    take_rows(cut, 5)
    state = json.loads(json.dumps(cut.state_dict()))
    assert len(state["grouping"]) == 3 and not resumed.load_state_dict(state)
    assert [batch["input_ids"].tolist() for batch in take_rows(resumed, 55)] == batches[5:]
    assert len(resumed.state_dict()["grouping"]) == 3
    for other in (Packing(16, 60.0, 512), Packing(4, 60.0, 512, exact=True)):  # a change begins new groups anyway
        changed = open_stream(short_chats, chat, other)
        assert changed.load_state_dict(state) and changed.packing == other


def test_rows_of_best_fit_are_kept_if_no_even_ones_fit():
    assert pack_evenly([60, 50, 10], 100, 9) == [[0], [1, 2]] and pack_evenly([5], 100, 9) == [[0]]
    assert pack_evenly([60, 60, 40, 40], 100, 1) == [[0], [1], [2], [3]]


def test_a_budget_is_what_so_many_conversations_take_and_at_least_the_longest():
    assert Packing(16, 131.0, 1024).tokens == 2176 and Packing(16, 20.0, 100).tokens == 320
    assert Packing(2, 20.0, 900).tokens == 912


@pytest.mark.thorough
def test_a_pass_has_every_conversation_once_under_five_percent_padding_in_one_shape(short_chats, chat):
    lengths = [len(chat.encode(json.loads(line)["messages"]).ids) for line in short_chats.read_text().splitlines()]
    packing = Packing(16, sum(lengths) / 300, max(lengths), static=True)
    stream, plain = (
        open_stream(short_chats, chat, packing),
        open_stream(short_chats, chat, Packing(300, 1.0, 512, exact=True)),
    )
    shapes, found = set(), []
    while len(found) < 600 or stream.state_dict()["taken"]:  # whole groups
        batch = take_rows(stream, 1)[0]
        shapes.add((batch["input_ids"].shape, len(batch["cu_seq_lens_q"]), batch["max_length_q"]))
        borders = batch["cu_seq_lens_q"].tolist()
        real = batch["labels"][0] != -100
        for a, b in itertools.pairwise(borders):
            if real[a:b].any():
                found.append(tuple(batch["input_ids"][0, a:b].tolist()))
    assert len(shapes) == 1 and stream.padding < 0.04 and len(found) == stream.rows_seen
    whole = take_rows(plain, 1)[0]
    borders = whole["cu_seq_lens_q"].tolist()
    passed = [tuple(whole["input_ids"][0, a:b].tolist()) for a, b in itertools.pairwise(borders)]
    times, rest = divmod(len(found), 300)
    assert all(times <= found.count(one) <= times + (rest > 0) for one in passed)


def test_padding_is_segments_of_its_own_that_carry_no_loss(short_chats, chat):
    first = [chat.encode(json.loads(line)["messages"]) for line in short_chats.read_text().splitlines()[:3]]
    real = sum(len(t.ids) for t in first)
    shape = Packing(3, real / 3, 40, static=True).shape(real)
    batch = build_batch(first, type(shape)(real + 100, 9, 40))
    borders = batch["cu_seq_lens_q"].tolist()
    assert borders[3:] == [real, real + 40, real + 80, real + 100, *[real + 100] * 3] and len(borders) == 10
    assert batch["position_ids"][0, real : real + 40].tolist() == [*range(40)]
    assert (batch["labels"][0, real:] == -100).all() and batch["loss_at"].max() < real
    plain = build_batch(first)
    assert torch.equal(batch["loss_at"], plain["loss_at"])
    assert (plain["labels"][0, plain["loss_at"] + 1] != -100).all()
    assert len(plain["loss_at"]) == sum(t.trained_tokens for t in first)


@pytest.mark.parametrize("stop", [1, 5, 31, 40])
def test_packed_rows_resume_exactly_also_inside_a_group(short_chats, chat, stop):
    packing = Packing(4, 60.0, 512)
    whole = open_stream(short_chats, chat, packing)
    batches = [b["input_ids"].tolist() for b in take_rows(whole, 60)]
    cut = open_stream(short_chats, chat, packing)
    take_rows(cut, stop)
    resumed = open_stream(short_chats, chat, packing)
    resumed.load_state_dict(json.loads(json.dumps(cut.state_dict())))
    assert [b["input_ids"].tolist() for b in take_rows(resumed, 60 - stop)] == batches[stop:]
    assert (resumed.tokens_seen, resumed.rows_seen, resumed.epoch) == (whole.tokens_seen, whole.rows_seen, whole.epoch)


def test_rows_packed_in_another_way_begin_their_group_anew_and_lose_nothing(short_chats, chat):
    cut = open_stream(short_chats, chat, Packing(4, 60.0, 512))
    take_rows(cut, 5)
    state = json.loads(json.dumps(cut.state_dict()))
    for other in (Packing(4, 60.0, 512, exact=True), Packing(2, 60.0, 512), Packing(2, 60.0, 600)):
        again = open_stream(short_chats, chat, other)
        moved = other.grouping != Packing(4, 60.0, 512).grouping
        assert again.load_state_dict(state) == moved
        rows = take_rows(again, 8)  # would never come if the rows taken of the old group were skipped in the new one
        assert len(rows) == 8 and again.rows_seen > state["rows_seen"]
    assert not open_stream(short_chats, chat, Packing(4, 60.0, 512)).load_state_dict(state)


def test_a_state_from_before_there_were_budgets_goes_on(short_chats, chat):
    exact = Packing(4, 60.0, 512, exact=True)
    whole = open_stream(short_chats, chat, exact)
    batches = [b["input_ids"].tolist() for b in take_rows(whole, 6)]
    old = {
        "place": {"epoch": 0, "window": 0, "start": None, "used": 8},
        "rows_seen": 8,
        "bad_seen": 0,
        "tokens_seen": 500,
    }
    resumed = open_stream(short_chats, chat, exact)
    resumed.load_state_dict(old)
    assert [b["input_ids"].tolist() for b in take_rows(resumed, 4)] == batches[2:] and resumed.rows_seen == 24


def test_exact_rows_have_so_many_conversations_in_few_shapes(short_chats, chat):
    packing = Packing(4, 60.0, 512, exact=True, static=True)
    batches = take_rows(open_stream(short_chats, chat, packing), 60)
    assert len({b["input_ids"].shape for b in batches}) <= 8
    assert {int((b["position_ids"][0, : b["loss_at"].max() + 1] == 0).sum()) for b in batches} == {4}


def test_what_is_made_ahead_comes_in_order_and_fails_where_it_did():
    def items():
        yield from range(5)
        raise ValueError("the tide")

    found = []
    with pytest.raises(ValueError, match="the tide"), Prefetcher(items(), 2) as made:
        found.extend(made)
    assert found == [0, 1, 2, 3, 4]
    with Prefetcher(iter(range(10**9)), 4) as made:  # endless for a test: the thread ends with the block
        assert next(iter(made)) == 0
    assert not made._thread.is_alive()


@pytest.mark.slow
def test_a_million_rows_stream_in_constant_memory(tmp_path, chat):
    import psutil

    path = tmp_path / "rows.jsonl"
    line = '{"messages": [{"role": "user", "content": "Tide %d?"}, {"role": "assistant", "content": "Low."}]}\n'
    with path.open("w") as f:
        for number in range(1_000_000):
            f.write(line % number)
    stream = iter(open_stream(path, chat, Packing(64, 45.0, 60, static=True)))
    sizes = []
    for number in range(1, 3001):  # 190,000 rows: beyond the first windows
        next(stream)
        if number % 500 == 0:
            sizes.append(psutil.Process().memory_info().rss / 1e6)
    assert max(sizes[2:]) < sizes[1] + 60, sizes


def test_the_first_token_of_a_conversation_carries_no_loss():
    """The token before it belongs to another conversation."""
    whole = EncodedChat([5, 6, 7], [5, 6, 7])
    batch = build_batch([whole, whole])
    assert batch["loss_at"].tolist() == [0, 1, 3, 4]
    assert len(batch["loss_at"]) == 2 * whole.trained_tokens
