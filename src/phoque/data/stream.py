"""The endless, resumable stream of packed rows that a run trains on."""

import copy
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any

import numpy
import torch

from phoque.data.chat_template import ChatTemplate, Encoded
from phoque.data.packing import Packing, packed
from phoque.data.rows import BadRow, Dataset, parsed
from phoque.errors import PhoqueError
from phoque.prefetch import Prefetcher

SHUFFLED = 50_000  # rows that are shuffled together
AHEAD = 16  # rows that are made before they are used
_COUNTS = ("rows_seen", "tokens_seen", "filled", "epoch")


@dataclass
class _Place:
    """A place in an endless stream: `used` rows into a window that begins at `start`, datasets' own state."""

    epoch: int = 0
    window: int = 0
    start: dict[str, Any] | None = None
    used: int = 0


class TrainStream:
    """Endless packed rows, shuffled anew each pass; its state resumes it exactly.

    Conversations are shuffled a window at a time and packed a group at a time, so that a state is small (where window
    and group began, how much of them is used) and yet exact: datasets 5.2 resumes its own shuffle buffer empty, which
    loses the rows that were in it. The state is that of the row given last, however far ahead others are read.
    """

    def __init__(
        self, dataset: Dataset, chat: ChatTemplate, threshold: str, packing: Packing, seed: int, max_bad: float
    ) -> None:
        self._reader = _Reader(dataset, chat, threshold, seed, max_bad)
        self.packing, self._seed = packing, seed
        start = {"reader": self._reader.state(), "taken": 0, "grouping": packing.grouping}
        self._state: dict[str, Any] = start | dict.fromkeys(_COUNTS, 0)
        self.waited = 0.0

    @property
    def epoch(self) -> int:
        """Passes over the data that were complete when the last row was read."""
        return self._state["epoch"]

    @property
    def rows_seen(self) -> int:
        """Conversations given so far."""
        return self._state["rows_seen"]

    @property
    def tokens_seen(self) -> int:
        """Their tokens, without padding."""
        return self._state["tokens_seen"]

    @property
    def padding(self) -> float:
        """The share of all rows that is padding."""
        return 1 - self.tokens_seen / self._state["filled"] if self._state["filled"] else 0.0

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Rows, made ahead of their use in a thread of their own; `waited` are the seconds that none was ready."""
        with Prefetcher(self._batches(), AHEAD) as made:
            for batch, state in made:
                self._state, self.waited = state, made.waited
                yield batch

    def state_dict(self) -> dict[str, Any]:
        """Where the stream stands after the last row it gave."""
        return self._state

    def load_state_dict(self, state: dict[str, Any]) -> bool:
        """Go on from a state; call it before the first row is taken.

        Whether conversations come again: where rows are packed in another way now, the group under way begins anew.
        """
        if "reader" not in state:  # written before rows were packed to a budget
            reader = {"place": state["place"], "read": state["rows_seen"], "bad": state["bad_seen"]}
            counts = {"rows_seen": state["rows_seen"], "tokens_seen": state["tokens_seen"]}
            state = {"reader": reader, "taken": 0, "filled": state["tokens_seen"], "epoch": state["place"]["epoch"]}
            state |= counts
        again = bool(state["taken"]) and state["grouping"] != self.packing.grouping
        self._state = state | {"grouping": self.packing.grouping} | ({"taken": 0} if again else {})
        return again

    def _batches(self) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
        """Each row with the state that stands after it."""
        reader, state = self._reader, self._state
        reader.go_to(state["reader"])
        conversations = reader.conversations()
        while True:
            group = self._group(conversations)
            rows = self.packing.rows([len(encoded.ids) for encoded, _ in group])
            # those opened first hold what came first: in their order the loss of a step would follow their place in it
            order = numpy.random.default_rng([self._seed, state["reader"]["read"]]).permutation(len(rows))
            given = sum(len(rows[number]) for number in order[: state["taken"]])
            for taken in range(state["taken"], len(rows)):
                row = [group[number] for number in rows[order[taken]]]
                given += len(row)
                length = sum(len(encoded.ids) for encoded, _ in row)
                shape = self.packing.shape(length)
                done = taken + 1 == len(rows)
                state = {
                    "reader": reader.state() if done else state["reader"],
                    "taken": 0 if done else taken + 1,
                    "grouping": self.packing.grouping,
                    "rows_seen": state["rows_seen"] + len(row),
                    "tokens_seen": state["tokens_seen"] + length,
                    "filled": state["filled"] + (shape.tokens if shape else length),
                    "epoch": group[given - 1][1],
                }
                yield _pinned(packed([encoded for encoded, _ in row], shape)), state

    def _group(self, conversations: Iterator[tuple[Encoded, int]]) -> list[tuple[Encoded, int]]:
        """The next conversations that are packed together."""
        group, tokens = [], 0
        while not self.packing.enough(len(group), tokens):
            group.append(next(conversations))
            tokens += len(group[-1][0].ids)
        return group


def _pinned(batch: dict[str, Any]) -> dict[str, Any]:
    """The batch in memory that a GPU copies from by itself, where there is one."""
    if not torch.cuda.is_available():
        return batch
    return {k: v.pin_memory() if torch.is_tensor(v) else v for k, v in batch.items()}


class _Reader:
    """The endless sequence of conversations that can be trained on, and its place in it."""

    def __init__(self, dataset: Dataset, chat: ChatTemplate, threshold: str, seed: int, max_bad: float) -> None:
        self._rows, self._threshold, self._seed, self._max_bad = dataset.stream, threshold, seed, max_bad
        self._chat = copy.deepcopy(chat)  # a tokenizer is for one thread: others ask the original for samples
        self._place = _Place()
        self._read = self._bad = 0

    def state(self) -> dict[str, Any]:
        """Where it stands after the last conversation it gave."""
        return {"place": asdict(self._place), "read": self._read, "bad": self._bad}

    def go_to(self, state: dict[str, Any]) -> None:
        """Go on from a state."""
        self._place, self._read, self._bad = _Place(**state["place"]), state["read"], state["bad"]

    def conversations(self) -> Iterator[tuple[Encoded, int]]:
        """Each conversation, and how many passes over the data were complete before it."""
        while True:
            read, whole = self._read, self._place == _Place(self._place.epoch)
            for record in self._pass():
                try:
                    row = parsed(record)
                    if row.key() <= self._threshold:
                        continue
                    encoded = self._chat.encode(row.messages)
                except BadRow:
                    self._count_bad()
                    continue
                self._read += 1
                yield encoded, self._place.epoch
            if whole and self._read == read:  # not the rest of a pass: a state may stand after its last row
                raise PhoqueError(
                    "A whole pass over the data gave no row to train on.",
                    "Every row is held out or unfit; rows that say the same are held out together.",
                    "Give it more rows that differ, or --held-out-rows 0.",
                )
            self._place = _Place(self._place.epoch + 1)

    def _pass(self) -> Iterator[dict[str, Any]]:
        """The rest of one pass over the rows, in the order that seed, pass and window give."""
        place = self._place
        reader = self._rows.with_format(None)  # a new reader: one that was resumed would begin there in each pass
        if place.start is not None:
            reader.load_state_dict(place.start)
        rows = iter(reader)
        while window := list(islice(rows, SHUFFLED)):
            order = numpy.random.default_rng([self._seed, place.epoch, place.window]).permutation(len(window))
            for number in order[place.used :]:
                place.used += 1
                yield window[number]
            place.window, place.start, place.used = place.window + 1, reader.state_dict(), 0

    def _count_bad(self) -> None:
        self._bad += 1
        seen = self._read + self._bad
        if seen >= 1000 and self._bad > self._max_bad * seen:
            raise PhoqueError(
                f"{self._bad} of the {seen} rows read so far are unfit.",
                "The rows after the first reading are worse than those in it.",
                "Mend the rows, or allow more with --max-bad-rows.",
            )
