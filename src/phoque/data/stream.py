"""The endless, resumable stream of packed rows that a run trains on."""

import copy
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from itertools import islice
from typing import Any

import numpy
import torch

from phoque.data.chat_template import ChatTemplate, EncodedChat
from phoque.data.held_out import HeldOut
from phoque.data.packing import TIGHT, Packing, Shape, build_batch
from phoque.data.readers import Dataset
from phoque.data.row_sizes import RowSize, RowSizes
from phoque.data.rows import RawRow, Row, parse_row
from phoque.data.turns import BadRow
from phoque.errors import RunError, UsageError
from phoque.prefetch import Prefetcher

SHUFFLE_WINDOW = 50_000  # rows per shuffle window
MIN_JUDGED_ROWS = 1000  # rows after the scan that must be read before their share of bad rows is judged
PREFETCHED_ROWS = 16  # packed rows that are prepared ahead of their use
_COUNTS = ("rows_seen", "tokens_seen", "filled", "epoch")


@dataclass(frozen=True)
class Conversation:
    """A conversation of the stream, after `epoch` complete passes over the data.

    It is not `encoded` yet if its size is known from the scan.
    """

    row: Row
    size: RowSize
    epoch: int
    encoded: EncodedChat | None


@dataclass(frozen=True)
class PackedRow:
    """The conversations that share a row, the shape that it is padded to, and the stream's state after it."""

    conversations: list[Conversation]
    shape: Shape | None
    state: dict[str, Any]

    @property
    def tokens(self) -> int:
        """The number of tokens with padding."""
        return self.shape.tokens if self.shape else sum(each.size.tokens for each in self.conversations)

    @property
    def trained_tokens(self) -> int:
        """The number of tokens that carry loss."""
        return sum(each.size.trained_tokens for each in self.conversations)


@dataclass(frozen=True)
class Step:
    """What the stream knows of a row that it yields, or of the step that the row is dealt from.

    `state` is the stream's after the row or step; `trained_tokens` are all of the row or step that carry loss; and
    `numbers` are the places in the step of the rows that are yielded.
    """

    state: dict[str, Any]
    trained_tokens: int = 0
    numbers: Sequence[int] = ()


@dataclass
class _Position:
    """A position in the endless stream: `used` rows into the window that begins at `start`, {file, row}."""

    epoch: int = 0
    window: int = 0
    start: dict[str, Any] | None = None
    used: int = 0


class TrainStream:
    """An endless stream of packed rows, reshuffled in each pass; `state_dict` resumes it exactly.

    Rows are shuffled in windows and packed in groups, so that the state is small (where the window and the group begin,
    and how much of them is used) and still exact. datasets 5.2 resumes its own shuffle buffer empty, which loses the
    rows in it. The state is that of the row yielded last, however many rows are prefetched. With `sizes`, rows whose
    size is known are packed by it, and encoded when they are built into a batch.
    """

    def __init__(
        self,
        dataset: Dataset,
        chat: ChatTemplate,
        *,
        held_out: HeldOut,
        packing: Packing,
        seed: int,
        limit: "BadRowLimit | None" = None,
        sizes: RowSizes | None = None,
    ) -> None:
        self._chat = copy.deepcopy(chat)  # a tokenizer is not thread-safe, and sampling uses the original
        self._reader = _Reader(dataset, self._chat, held_out, seed, limit, sizes)
        self.packing, self._seed = packing, seed
        start = {"reader": self._reader.state(), "taken": 0, "grouping": packing.grouping}
        self.step = Step(start | dict.fromkeys(_COUNTS, 0))
        self.waited = 0.0

    @property
    def problem(self) -> UsageError | None:
        """Why the run must stop, once too many of the rows that the scan did not read are bad."""
        return self._reader.problem

    @property
    def epoch(self) -> int:
        """The number of complete passes over the data, by the number of conversations yielded so far."""
        return self.step.state["epoch"]

    @property
    def rows_seen(self) -> int:
        """The number of conversations yielded so far."""
        return self.step.state["rows_seen"]

    @property
    def tokens_seen(self) -> int:
        """The number of tokens yielded so far, without padding."""
        return self.step.state["tokens_seen"]

    @property
    def padding(self) -> float:
        """The fraction of all tokens yielded so far that is padding."""
        return 1 - self.tokens_seen / self.step.state["filled"] if self.step.state["filled"] else 0.0

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Yield batches, prepared ahead in a thread; `waited` is the time in seconds for which none was ready."""
        with Prefetcher(self._make_batches(), PREFETCHED_ROWS) as batches:
            for batch, step in batches:
                self.step, self.waited = step, batches.waited
                yield batch

    def state_dict(self) -> dict[str, Any]:
        """Return the state after the last row that was yielded."""
        return self.step.state

    def load_state_dict(self, state: dict[str, Any]) -> bool:
        """Continue from a state; call this before iterating.

        Returns whether some conversations repeat: if rows are packed differently now, the current group starts again.
        """
        if "reader" not in state:  # written before rows were packed to a budget
            reader = {"place": state["place"], "read": state["rows_seen"], "bad": state["bad_seen"]}
            counts = {"rows_seen": state["rows_seen"], "tokens_seen": state["tokens_seen"]}
            state = {"reader": reader, "taken": 0, "filled": state["tokens_seen"], "epoch": state["place"]["epoch"]}
            state |= counts
        earlier = replace(self.packing, method=TIGHT)
        if state.get("grouping") == earlier.grouping:
            self.packing = earlier
        repeats = bool(state["taken"]) and state["grouping"] != self.packing.grouping
        self.step = Step(state | {"grouping": self.packing.grouping} | ({"taken": 0} if repeats else {}))
        return repeats

    def _make_batches(self) -> Iterator[tuple[dict[str, Any], Step]]:
        """Yield each batch with what is known of it."""
        for row in self._pack_rows():
            yield self._build_batch(row), Step(row.state, row.trained_tokens, [0])

    def _build_batch(self, row: PackedRow) -> dict[str, Any]:
        """Encode what is not encoded yet. Raises RunError for a row whose size is another than in the scan."""
        return _pin_memory(build_batch([self._encode(each) for each in row.conversations], row.shape))

    def _encode(self, conversation: Conversation) -> EncodedChat:
        if conversation.encoded:
            return conversation.encoded
        size, encoded = conversation.size, None
        with suppress(BadRow):
            encoded = self._chat.encode_row(conversation.row)
        if encoded is None or (len(encoded.ids), encoded.trained_tokens) != (size.tokens, size.trained_tokens):
            file = self._reader.sizes.file if self._reader.sizes else None
            raise RunError(
                what="A row is encoded to another number of tokens than when the dataset was scanned.",
                why=f"Sizes of rows are kept in {file}, and something has changed that its name does not tell.",
                fix="Delete that file on every machine, and run the same command again.",
            )
        return encoded

    def _pack_rows(self) -> Iterator[PackedRow]:
        reader, state = self._reader, self.step.state
        reader.load_state(state["reader"])
        conversations = reader.conversations()
        while True:
            group = self._read_group(conversations)
            rows = self.packing.rows([conversation.size.tokens for conversation in group])
            # best-fit opens rows in reading order: unpermuted, the loss would depend on the position in the group
            order = numpy.random.default_rng([self._seed, state["reader"]["read"]]).permutation(len(rows))
            n_conversations = sum(len(rows[number]) for number in order[: state["taken"]])
            for row_index in range(state["taken"], len(rows)):
                row = [group[number] for number in rows[order[row_index]]]
                n_conversations += len(row)
                length = sum(conversation.size.tokens for conversation in row)
                shape = self.packing.shape(length)
                is_last = row_index + 1 == len(rows)
                state = {
                    "reader": reader.state() if is_last else state["reader"],
                    "taken": 0 if is_last else row_index + 1,
                    "grouping": self.packing.grouping,
                    "rows_seen": state["rows_seen"] + len(row),
                    "tokens_seen": state["tokens_seen"] + length,
                    "filled": state["filled"] + (shape.tokens if shape else length),
                    "epoch": group[n_conversations - 1].epoch,
                }
                yield PackedRow(row, shape, state)

    def _read_group(self, conversations: Iterator[Conversation]) -> list[Conversation]:
        """Read the next conversations that are packed together."""
        group, tokens = [], 0
        while not self.packing.is_group_complete(len(group), tokens):
            group.append(next(conversations))
            tokens += group[-1].size.tokens
        return group


def _pin_memory(batch: dict[str, Any]) -> dict[str, Any]:
    """Move the batch to pinned memory, for asynchronous copies, if there is a GPU."""
    if not torch.cuda.is_available():
        return batch
    return {k: v.pin_memory() if torch.is_tensor(v) else v for k, v in batch.items()}


@dataclass(frozen=True)
class BadRowLimit:
    """The largest share of bad rows among those after the scanned ones, whose last position is (file, row) `after`."""

    share: float
    after: tuple[int, int]

    def is_exceeded(self, bad: int, rows: int) -> bool:
        """Whether so many bad rows among the first `rows` show a share above the limit, beyond chance."""
        margin = 3 * (rows * self.share * (1 - self.share)) ** 0.5
        return rows >= MIN_JUDGED_ROWS and bad > self.share * rows + margin


class _Reader:
    """Reads an endless sequence of usable, not held-out conversations, and keeps its position in it."""

    def __init__(
        self,
        dataset: Dataset,
        chat: ChatTemplate,
        held_out: HeldOut,
        seed: int,
        limit: BadRowLimit | None,
        sizes: RowSizes | None,
    ) -> None:
        self._rows, self._held_out, self._seed, self._limit = dataset.stream, held_out, seed, limit
        self._chat, self.sizes = chat, sizes
        self._position = _Position()
        self._read = self._bad = self._later_rows = self._later_bad = 0
        self.problem: UsageError | None = None

    def state(self) -> dict[str, Any]:
        """Return the state after the last conversation that was yielded."""
        later = [self._later_rows, self._later_bad]
        return {"place": asdict(self._position), "read": self._read, "bad": self._bad, "later": later}

    def load_state(self, state: dict[str, Any]) -> None:
        """Continue from a state."""
        self._position, self._read, self._bad = _Position(**state["place"]), state["read"], state["bad"]
        self._position.start = _convert_start(self._position)
        self._later_rows, self._later_bad = state.get("later", (0, 0))

    def conversations(self) -> Iterator[Conversation]:
        """Yield the conversations that can be trained on, pass after pass."""
        while True:
            read, is_whole_pass = self._read, self._position == _Position(self._position.epoch)
            for raw in self._read_pass():
                is_later = self._limit is not None and (raw.file, raw.number) > self._limit.after
                self._later_rows += is_later
                try:
                    row = parse_row(raw)
                    if self._held_out.excludes(row):
                        continue
                    size, encoded = self.sizes.find(row) if self.sizes else None, None
                    if size is None:
                        encoded = self._chat.encode_row(row)
                        size = RowSize(len(encoded.ids), encoded.trained_tokens)
                except BadRow:
                    self._bad += 1
                    self._later_bad += is_later
                    self._check_limit()
                    continue
                self._read += 1
                yield Conversation(row, size, self._position.epoch, encoded)
            if is_whole_pass and self._read == read:  # only for a whole pass: a resumed one may have no row left
                raise UsageError(
                    what="A whole pass over the data gave no row to train on.",
                    why="Every row is held out or unusable; rows with equal messages are held out together.",
                    fix="Add more distinct rows, or set --held-out-rows 0.",
                )
            self._position = _Position(self._position.epoch + 1)

    def _read_pass(self) -> Iterator[RawRow]:
        """Yield the rest of one pass over the rows, in an order that depends only on seed, pass and window."""
        position = self._position
        start = position.start or {"file": 0, "row": 0}
        rows = islice(self._rows.read(start["file"], start["row"]), start.get("skip", 0), None)
        while window := list(islice(rows, SHUFFLE_WINDOW)):
            order = numpy.random.default_rng([self._seed, position.epoch, position.window]).permutation(len(window))
            for number in order[position.used :]:
                position.used += 1
                yield window[number]
            end = {"file": window[-1].file, "row": window[-1].number}
            position.window, position.start, position.used = position.window + 1, end, 0

    def _check_limit(self) -> None:
        if self.problem or not self._limit or not self._limit.is_exceeded(self._later_bad, self._later_rows):
            return
        self.problem = UsageError(
            what=f"{self._later_bad} of {self._later_rows} rows after the scanned part of the dataset are unusable.",
            why=f"That is more than --max-bad-rows {self._limit.share:g} allows, although the scanned part has fewer.",
            fix="Fix the rows, or raise the limit with --max-bad-rows.",
        )


def _convert_start(position: _Position) -> dict[str, Any] | None:
    """Where a window begins, in a state of any version: older versions wrote a state of `datasets`."""
    start = position.start
    if start is None or "file" in start:
        return start
    examples = start.get("examples_iterable", {})
    if {"shard_idx", "shard_example_idx"} <= examples.keys() and "examples_iterable" not in examples:
        return {"file": examples["shard_idx"], "row": examples["shard_example_idx"]}
    return {"file": 0, "row": 0, "skip": position.window * SHUFFLE_WINDOW}  # a stream of the Hub: count the rows
