"""Rows are dealt to processes, each of which encodes its own alone; together they have the rows of one process."""

import json
from itertools import islice

import pytest
from tests import tiny

from phoque.data.chat_template import ChatTemplate
from phoque.data.packing import Packing
from phoque.data.readers import open_dataset
from phoque.data.row_sizes import RowSizes
from phoque.data.scan import scan_dataset
from phoque.data.stream import TrainStream
from phoque.distributed.processes import Processes
from phoque.errors import RunError
from phoque.training.dealt_rows import DealtStream

STEPS, ROWS_PER_STEP = 6, 4


@pytest.fixture
def chat():
    return ChatTemplate(tiny.tokenizer(), "", 512)


@pytest.fixture
def open_stream(rows, chat, tmp_path):
    """Open the stream of one process that trains alone, or of process `rank` of `size`."""
    dataset, sizes = open_dataset(str(rows)), RowSizes(chat, tmp_path / "sizes.json")
    scan = scan_dataset(dataset, chat, 4, 0.05, sizes=sizes)
    arguments = {"held_out": scan.rule, "packing": Packing(3, scan.mean_length, max(scan.lengths)), "seed": 3}

    def open_one(rank=0, size=1):
        if size == 1:
            return TrainStream(dataset, chat, **arguments)
        processes = Processes(rank, size)
        dealing = {"rows_per_step": ROWS_PER_STEP, "processes": processes, "sizes": sizes}
        return DealtStream(dataset, chat, **arguments, **dealing)

    return open_one


def tokens_of(batch):
    return tuple(batch["input_ids"][0].tolist())


@pytest.mark.parametrize("size", [2, 4])
def test_the_processes_have_the_rows_of_one_process_step_by_step(open_stream, size):
    alone, counted = open_stream(), []
    wanted = [list(islice(rows, ROWS_PER_STEP)) for rows in [iter(alone)] for _ in range(STEPS)]
    for step in wanted:
        counted.append(sum(len(batch["loss_at"]) for batch in step))
    shares, states = [], []
    for rank in range(size):
        stream = open_stream(rank, size)
        rows = iter(stream)
        share = []
        for step in range(STEPS):
            batches = list(islice(rows, ROWS_PER_STEP // size))
            share.append(dict(zip(stream.step.numbers, map(tokens_of, batches), strict=True)))
            assert stream.step.trained_tokens == counted[step]
        shares.append(share)
        states.append(json.dumps(stream.state_dict()))
    for step in range(STEPS):
        together = {number: row for share in shares for number, row in share[step].items()}
        assert [together[number] for number in range(ROWS_PER_STEP)] == [tokens_of(batch) for batch in wanted[step]]
    assert len(set(states)) == 1 and states[0] == json.dumps(alone.state_dict())


def test_a_dealt_stream_resumes_exactly_with_another_number_of_processes(open_stream):
    whole = [tokens_of(batch) for batch in islice(open_stream(), STEPS * ROWS_PER_STEP)]
    first = open_stream(1, 2)
    list(islice(first, 2 * ROWS_PER_STEP // 2))
    state, rest = json.loads(json.dumps(first.state_dict())), []
    for rank in range(4):
        stream = open_stream(rank, 4)
        stream.load_state_dict(state)
        rest += [tokens_of(batch) for batch in islice(stream, STEPS - 2)]
    assert sorted(rest) == sorted(whole[2 * ROWS_PER_STEP :])


def test_a_process_encodes_only_the_rows_that_it_trains_on(open_stream, monkeypatch):
    encoded = []
    original = ChatTemplate.encode_row
    monkeypatch.setattr(ChatTemplate, "encode_row", lambda self, row: encoded.append(row) or original(self, row))
    stream = open_stream(1, 4)
    packed = list(islice(stream._make_batches(), STEPS))  # without the thread that prepares rows ahead
    conversations = sum(int((batch["position_ids"] == 0).sum()) for batch, _ in packed)
    assert len(encoded) == conversations > STEPS


def test_sizes_that_no_longer_hold_end_the_run(open_stream, monkeypatch):
    original = ChatTemplate.encode
    longer = lambda self, messages, **more: original(self, [*messages[:-1], messages[-1] | {"content": "seal"}], **more)
    stream = open_stream(0, 2)
    monkeypatch.setattr(ChatTemplate, "encode", longer)
    with pytest.raises(RunError, match="another number of tokens") as caught:
        list(islice(stream, STEPS))
    assert "sizes.json" in caught.value.why


def test_rows_without_a_known_size_are_encoded_to_be_packed(open_stream):
    stream, other = open_stream(0, 2), open_stream(0, 2)
    other._reader.sizes.forget()
    assert [tokens_of(b) for b in islice(stream, STEPS)] == [tokens_of(b) for b in islice(other, STEPS)]
