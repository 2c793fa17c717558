"""Held-out rows: chosen by a hash, with every copy and near-duplicate of them kept out of training."""

import zlib
from collections import Counter
from dataclasses import dataclass, field

import numpy

from phoque.data.rows import Row

SKETCH_SIZE = 32  # hashes per row; the standard error of a similarity of 0.8 is 0.07
SIMILAR = 0.7  # rows of at least this estimated similarity are near-duplicates
LONG_WORD = 20  # mean characters per word above which a text is taken as one without spaces
MIN_SHINGLES = 8  # shorter texts are compared exactly, since one word changes most of their shingles
_MIX = numpy.array([0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9], dtype=numpy.uint64)

Sketch = tuple[int, ...]


def sketch_row(row: Row) -> Sketch:
    """The SKETCH_SIZE smallest hashes of the word trigrams of the row's answers, or an empty sketch of a short row.

    The Jaccard similarity of two rows is estimated from such sketches (Broder 1997, "On the resemblance and
    containment of documents"). Answers alone are compared, because the held-out loss is measured on them: many rows may
    share a long instruction. Case and punctuation at word ends have no part in a sketch.
    """
    answers = [text for text in row.dialogue if text.startswith("assistant")]
    words = [zlib.crc32(word.strip(".,;:!?\"'()*").encode()) for text in answers for word in _split_words(text)]
    if len(words) < MIN_SHINGLES + 2:
        return ()
    hashes = numpy.array(words, dtype=numpy.uint64)
    shingles = hashes[:-2] * _MIX[0] + hashes[1:-1] * _MIX[1] + hashes[2:] * _MIX[2]
    return tuple(numpy.unique(shingles ^ (shingles >> numpy.uint64(29)))[:SKETCH_SIZE].tolist())


def _split_words(text: str) -> list[str]:
    """The words of a text after its role; its characters in a script that does not separate words by spaces."""
    words = text.split()[1:]
    return words if sum(map(len, words)) <= LONG_WORD * len(words) else list("".join(words))


def estimate_similarity(first: Sketch, second: Sketch) -> float:
    """The estimated Jaccard similarity of two rows, from 0 to 1."""
    smallest = sorted(set(first) | set(second))[:SKETCH_SIZE]
    return len(set(first) & set(second) & set(smallest)) / len(smallest)


@dataclass
class HeldOut:
    """Which rows are not trained on: those whose key is at most `threshold` or in `keys`, and those that nearly repeat
    a held-out row, whose sketches are `sketches`.

    `exact` compares messages as they are, and nothing else: the rule of runs that were begun before data_rules 2.
    """

    threshold: str = ""
    exact: bool = False
    sketches: list[Sketch] = field(default_factory=list)
    keys: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        self._rows_of: dict[int, list[int]] = {}
        for index, sketch in enumerate(self.sketches):
            for value in sketch:
                self._rows_of.setdefault(value, []).append(index)

    def key(self, row: Row) -> str:
        """The key that decides whether a row is held out."""
        return row.exact_key() if self.exact else row.key()

    def excludes(self, row: Row) -> bool:
        """Whether a row is held out, or too similar to a row that is."""
        if not self.threshold and not self.keys:
            return False
        return self.holds(self.key(row)) or self.is_similar(sketch_row(row))

    def holds(self, key: str) -> bool:
        """Whether rows with this key are held out."""
        return key <= self.threshold or key in self.keys

    def is_similar(self, sketch: Sketch) -> bool:
        """Whether a held-out row has nearly the same text."""
        if not self._rows_of or not sketch:
            return False
        shared = Counter(index for value in sketch for index in self._rows_of.get(value, ()))
        return any(
            count >= SIMILAR * min(len(sketch), len(self.sketches[index])) / 2
            and estimate_similarity(sketch, self.sketches[index]) >= SIMILAR
            for index, count in shared.items()
        )
