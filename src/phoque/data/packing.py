"""Conversations laid end to end in rows: of one length, so that a GPU sees one shape, or as long as they are."""

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil
from typing import Any

import torch

from phoque.data.chat_template import IGNORED, Encoded

TOGETHER = 32  # rows that are packed at once
FILLED = 0.98  # of them, by what is read for them: with more, some groups would need one row more
SLACK = 0.005, 0.01, 0.02, 0.03  # what a row may hold above the average of its group, the first that will do
TILE = 128  # tokens that a matrix product takes at once on a GPU
SPREAD = 1.5  # a row holds so many times the average number of conversations at most


@dataclass(frozen=True)
class Shape:
    """What a row is filled up to: `tokens` in all, in at most `segments` conversations and pieces of padding.

    No segment is longer than `longest`: attention kernels are told so, and leave undefined what lies beyond.
    """

    tokens: int
    segments: int
    longest: int


@dataclass(frozen=True)
class Packing:
    """Which conversations share a row: those that fit a budget of tokens, or exactly `count`.

    `count` conversations of `mean` tokens are a row on average; `longest` is the longest that may come. `exact` takes
    them in their order, `count` a row. `static` fills rows up to one shape, or to a few where they are exact.
    """

    count: int
    mean: float
    longest: int
    exact: bool = False
    static: bool = False

    @property
    def tokens(self) -> int:
        """A row's budget: what `count` conversations take on average, and at least the longest of them."""
        wanted = max(ceil(self.count * self.mean), self.longest)
        return _rounded(wanted, TILE if wanted >= 8 * TILE else 16)

    @property
    def grouping(self) -> list[int]:
        """What decides which conversations share a row."""
        return [self.count, 0, 0] if self.exact else [self.at_once, self.tokens, self.most]

    @property
    def most(self) -> int:
        """Conversations that a row of the budget holds at most."""
        return ceil(SPREAD * self.tokens / self.mean) + 1

    @property
    def at_once(self) -> int:
        """Tokens that are read and then packed together."""
        return round(FILLED * TOGETHER * self.tokens)

    def enough(self, conversations: int, tokens: int) -> bool:
        """Whether so many conversations of so many tokens are to be packed together now."""
        return conversations == self.count if self.exact else tokens >= self.at_once

    def rows(self, lengths: Sequence[int]) -> list[list[int]]:
        """The conversations of each row, by number, for those that are packed together."""
        return [[*range(len(lengths))]] if self.exact else evenly(lengths, self.tokens, self.most)

    def shape(self, total: int) -> Shape | None:
        """What a row of `total` tokens is filled up to; None leaves it as it is."""
        if not self.static:
            return None
        tokens, segments = self.tokens, self.most
        if self.exact:  # a quarter of the average apart: a few shapes, each of them seen often
            tokens, segments = _rounded(total, _rounded(ceil(self.count * self.mean / 4), TILE)), self.count
        return Shape(tokens, segments + ceil(tokens / self.longest), self.longest)


def _rounded(tokens: int, unit: int) -> int:
    return -(-tokens // unit) * unit


def best_fit(lengths: Sequence[int], tokens: int, most: int) -> list[list[int]]:
    """Rows of at most `tokens` tokens and `most` numbers, each length put where it leaves the least room.

    In the order of arrival, so that a row has long and short conversations as they come; no length exceeds `tokens`.
    """
    rows: list[list[int]] = []
    rooms: list[tuple[int, int]] = []  # (tokens left, row), ascending
    for number, length in enumerate(lengths):
        place = bisect_left(rooms, (length, -1))
        if place == len(rooms):
            rows.append([])
            room, row = tokens, len(rows) - 1
        else:
            room, row = rooms.pop(place)
        rows[row].append(number)
        if len(rows[row]) < most:
            insort(rooms, (room - length, row))
    return rows


def evenly(lengths: Sequence[int], tokens: int, most: int) -> list[list[int]]:
    """As few rows as `best_fit` needs, about as full as each other.

    What is left for its last row may be a single conversation, and a step on that alone would count as much as others.
    """
    rows = best_fit(lengths, tokens, most)
    average = sum(lengths) / len(rows)
    for slack in SLACK:
        budget = max(ceil((1 + slack) * average), *lengths)
        if budget < tokens and len(tried := best_fit(lengths, budget, most)) == len(rows):
            return tried
    return rows


def packed(conversations: Sequence[Encoded], shape: Shape | None = None) -> dict[str, Any]:
    """One batch of shape (1, T): ids, labels, positions that restart, and the borders that attention must respect.

    `cu_seq_lens` holds the borders of the segments, `max_length` bounds their lengths. `loss_at` are the positions
    whose next token is labelled. There is no attention mask: next to position ids it would make transformers attend
    across conversations. Padding is segments of its own, without labels, and at the end of `borders` some of no length.
    """
    lengths = [len(c.ids) for c in conversations]
    ids = [token for c in conversations for token in c.ids]
    labels = [label for c in conversations for label in c.labels]
    longest = max(lengths)
    if shape:
        left, longest = shape.tokens - len(ids), shape.longest
        ids, labels = ids + [0] * left, labels + [IGNORED] * left
        while left:
            lengths.append(min(left, longest))
            left -= lengths[-1]
        lengths += [0] * (shape.segments - len(lengths))
    borders = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    wanted = torch.tensor([labels])
    return {
        "input_ids": torch.tensor([ids]),
        "labels": wanted,
        "loss_at": (wanted[0, 1:] != IGNORED).nonzero()[:, 0],
        "position_ids": torch.cat([torch.arange(n) for n in lengths])[None],
        "cu_seq_lens_q": borders,
        "cu_seq_lens_k": borders,
        "max_length_q": longest,
        "max_length_k": longest,
    }
