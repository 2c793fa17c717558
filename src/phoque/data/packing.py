"""Packing: conversations are concatenated into rows, padded to one shape for the GPU or left as long as they are."""

import heapq
from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil
from typing import Any

import torch

from phoque.data.chat_template import IGNORE_INDEX, EncodedChat

ROWS_PER_GROUP = 32  # rows per group of conversations that are packed together
GROUP_FILL = 0.98  # share of a group's token budget that is read; with more, some groups would need one more row
TILE = 128  # tokens per tile of a GPU matrix multiplication
TIGHT, EVEN = 1, 2  # methods of packing; a stream's state of the first has no mark of it
MAX_COUNT_RATIO = 1.5  # the most conversations per row, as a multiple of the average
MIN_FILL = 0.75  # of the average; for a row that is emptier, a group is packed into one row more
SLACKS = 0.005, 0.01, 0.02, 0.03  # how far a row of `pack_tightly` may exceed the average of its group


@dataclass(frozen=True)
class Shape:
    """The shape that a row is padded to: `tokens` in total, in `segments` conversations and pieces of padding.

    No segment is longer than `longest` tokens. Attention kernels rely on that: beyond it, their output is undefined.
    """

    tokens: int
    segments: int
    longest: int


@dataclass(frozen=True)
class Packing:
    """Which conversations share a row: as many as fit its token budget, or exactly `count`.

    A row has `count` conversations of `mean` tokens on average; none is longer than `longest` tokens. With `exact`,
    each row has the next `count` conversations in order. With `static`, rows are padded to one shape, or to a few
    shapes if `exact`. The `method` is EVEN, and TIGHT for a run that an earlier version began: its rows stay the same.
    """

    count: int
    mean: float
    longest: int
    exact: bool = False
    static: bool = False
    method: int = EVEN

    @property
    def tokens(self) -> int:
        """The token budget of a row: `count` x `mean`, but at least `longest`, rounded up."""
        budget = max(ceil(self.count * self.mean), self.longest)
        return _round_up(budget, TILE if budget >= 8 * TILE else 16)

    @property
    def grouping(self) -> list[int]:
        """The numbers that decide which conversations share a row; they are stored in the stream's state."""
        if self.exact:
            return [self.count, 0, 0]
        numbers = [self.group_tokens, self.tokens, self.max_conversations]
        return numbers if self.method == TIGHT else [*numbers, self.method]

    @property
    def max_conversations(self) -> int:
        """The most conversations that one row holds."""
        return ceil(MAX_COUNT_RATIO * self.tokens / self.mean) + 1

    @property
    def group_tokens(self) -> int:
        """The number of tokens that are read and packed together as one group."""
        return round(GROUP_FILL * ROWS_PER_GROUP * self.tokens)

    def is_group_complete(self, conversations: int, tokens: int) -> bool:
        """Whether a group of so many conversations and tokens is complete and can be packed."""
        return conversations == self.count if self.exact else tokens >= self.group_tokens

    def rows(self, lengths: Sequence[int]) -> list[list[int]]:
        """Assign the conversations of one group, given their lengths, to rows; return their indices for each row."""
        if self.exact:
            return [[*range(len(lengths))]]
        pack = pack_tightly if self.method == TIGHT else pack_evenly
        return pack(lengths, self.tokens, self.max_conversations)

    def shape(self, total: int) -> Shape | None:
        """Return the shape that a row of `total` tokens is padded to, or None for no padding."""
        if not self.static:
            return None
        tokens, segments = self.tokens, self.max_conversations
        if self.exact:  # steps of a quarter of the average length: only a few shapes, each used often
            tokens, segments = _round_up(total, _round_up(ceil(self.count * self.mean / 4), TILE)), self.count
        return Shape(tokens, segments + ceil(tokens / self.longest), self.longest)


def _round_up(tokens: int, unit: int) -> int:
    return -(-tokens // unit) * unit


def pack_best_fit(lengths: Sequence[int], tokens: int, max_count: int) -> list[list[int]]:
    """Pack lengths into rows of at most `tokens` tokens and `max_count` items; each goes where the least space is left.

    Lengths are packed in the given order, not sorted, so that a row mixes long and short conversations. No length may
    exceed `tokens`. Returns the indices of each row.
    """
    rows: list[list[int]] = []
    spaces: list[tuple[int, int]] = []  # (tokens left, row), ascending
    for number, length in enumerate(lengths):
        index = bisect_left(spaces, (length, -1))
        if index == len(spaces):
            rows.append([])
            space, row = tokens, len(rows) - 1
        else:
            space, row = spaces.pop(index)
        rows[row].append(number)
        if len(rows[row]) < max_count:
            insort(spaces, (space - length, row))
    return rows


def pack_evenly(lengths: Sequence[int], tokens: int, max_count: int) -> list[list[int]]:
    """Pack lengths into as few rows as `pack_best_fit` needs, about equally full, or else into one more.

    The last row of `pack_best_fit` may hold a single conversation, and a step on it would weigh as much as any other.
    """
    fewest = len(pack_best_fit(lengths, tokens, max_count))
    if rows := _spread(lengths, fewest, tokens, max_count):
        return rows
    tight = pack_tightly(lengths, tokens, max_count)
    fills = [sum(lengths[number] for number in row) for row in tight]
    if min(fills) * len(fills) >= MIN_FILL * sum(fills):
        return tight
    return _spread(lengths, fewest + 1, tokens, max_count) or tight


def pack_tightly(lengths: Sequence[int], tokens: int, max_count: int) -> list[list[int]]:
    """Pack lengths as earlier versions did: best fit again, into rows that are a little fuller than the average."""
    rows = pack_best_fit(lengths, tokens, max_count)
    average = sum(lengths) / len(rows)
    for slack in SLACKS:
        budget = max(ceil((1 + slack) * average), *lengths)
        if budget < tokens and len(evened := pack_best_fit(lengths, budget, max_count)) == len(rows):
            return evened
    return rows


def _spread(lengths: Sequence[int], count: int, tokens: int, max_count: int) -> list[list[int]] | None:
    """Assign lengths to `count` rows, the longest first, each to the emptiest row; None if one fits nowhere.

    Graham, Bounds on multiprocessing timing anomalies (1969).
    """
    rows: list[list[int]] = [[] for _ in range(count)]
    fills = [(0, row) for row in range(count)]  # of the rows that may take another conversation
    for number in sorted(range(len(lengths)), key=lambda number: -lengths[number]):
        if not fills or fills[0][0] + lengths[number] > tokens:
            return None
        fill, row = heapq.heappop(fills)
        rows[row].append(number)
        if len(rows[row]) < max_count:
            heapq.heappush(fills, (fill + lengths[number], row))
    return [row for row in rows if row]


def build_batch(conversations: Sequence[EncodedChat], shape: Shape | None = None) -> dict[str, Any]:
    """Concatenate conversations into one batch of shape (1, T); position ids restart with each conversation.

    `cu_seq_lens_q` and `_k` hold the segment borders, `max_length_q` and `_k` an upper bound of segment lengths.
    `loss_at` lists the positions whose next token has a label; the first token of a conversation has none. There is no
    attention mask: with position ids it would make transformers attend across conversations. Padding forms segments
    without labels; empty segments fill the borders up to `shape.segments`.
    """
    lengths = [len(c.ids) for c in conversations]
    ids = [token for c in conversations for token in c.ids]
    labels = [label for c in conversations for label in (IGNORE_INDEX, *c.labels[1:])]
    longest = max(lengths)
    if shape:
        padding, longest = shape.tokens - len(ids), shape.longest
        ids, labels = ids + [0] * padding, labels + [IGNORE_INDEX] * padding
        while padding:
            lengths.append(min(padding, longest))
            padding -= lengths[-1]
        lengths += [0] * (shape.segments - len(lengths))
    borders = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    targets = torch.tensor([labels])
    return {
        "input_ids": torch.tensor([ids]),
        "labels": targets,
        "loss_at": (targets[0, 1:] != IGNORE_INDEX).nonzero()[:, 0],
        "position_ids": torch.cat([torch.arange(n) for n in lengths])[None],
        "cu_seq_lens_q": borders,
        "cu_seq_lens_k": borders,
        "max_length_q": longest,
        "max_length_k": longest,
    }
