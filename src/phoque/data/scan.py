"""A dataset's first reading: what is in it, what is unfit, what is held out."""

import hashlib
import heapq
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from phoque.data.chat_template import ChatTemplate, Encoded
from phoque.data.rows import BadRow, Dataset, Row, parsed, schema_of
from phoque.errors import PhoqueError

SCANNED = 50_000  # rows read before training; the rest are checked as they come
FIRST_LINES = 3


@dataclass
class DatasetScan:
    """What the first reading found. `held_out` rows are those with the smallest hashes, whatever their order."""

    rows: int = 0
    complete: bool = True
    bad: dict[str, list[str]] = field(default_factory=dict)
    bad_counts: Counter[str] = field(default_factory=Counter)
    schemas: Counter[str] = field(default_factory=Counter)
    sources: Counter[str] = field(default_factory=Counter)
    systems: Counter[str | None] = field(default_factory=Counter)
    lengths: list[int] = field(default_factory=list)
    trained: int = 0
    scores: list[float] = field(default_factory=list)
    digest: str = ""
    held_out: list[tuple[Row, Encoded]] = field(default_factory=list)
    threshold: str = ""
    preview: list[tuple[Row, Encoded]] = field(default_factory=list)

    @property
    def good(self) -> int:
        """Rows that can be trained on or held out."""
        return len(self.lengths)

    @property
    def mean_length(self) -> float:
        """Tokens a conversation."""
        return sum(self.lengths) / self.good

    def summary(self) -> dict[str, Any]:
        """Counts and distributions, fit for run.json and the report."""
        ordered = sorted(self.lengths)
        return {
            "rows": self.rows,
            "every_row_read": self.complete,
            "good": self.good,
            "held_out": len(self.held_out),
            "bad": {reason: {"count": n, "first": self.bad[reason]} for reason, n in self.bad_counts.most_common()},
            "schemas": dict(self.schemas),
            "sources": dict(self.sources.most_common()),
            "tokens": {
                "total": sum(ordered),
                "trained": self.trained,
                "mean": round(self.mean_length, 1),
                "quantiles": [ordered[int(q * (self.good - 1))] for q in (0, 0.25, 0.5, 0.75, 0.95, 1)],
            },
            "lengths": histogram([float(n) for n in ordered]),
            "toxicity_scores": histogram(self.scores),
        }


def histogram(values: list[float], bins: int = 20) -> dict[str, list[float]]:
    """Counts in equal bins: {edges: bins + 1 numbers, counts: bins numbers}; empty for no values."""
    if not values:
        return {"edges": [], "counts": []}
    low, high = min(values), max(values)
    width = (high - low) / bins or 1.0
    counts = [0.0] * bins
    for value in values:
        counts[min(bins - 1, int((value - low) / width))] += 1
    return {"edges": [round(low + i * width, 4) for i in range(bins + 1)], "counts": counts}


def scan_dataset(dataset: Dataset, chat: ChatTemplate, held_out_rows: int, max_bad: float) -> DatasetScan:
    """Read the rows once, in order. Raises PhoqueError (2) if more than `max_bad` of them are unfit, or all are."""
    found = DatasetScan()
    digest = hashlib.sha256()
    smallest: list[tuple[int, int, Row, Encoded]] = []  # a heap of the smallest hashes, largest first
    for record in dataset.stream:
        if found.rows == SCANNED:
            found.complete = False
            break
        found.rows += 1
        try:
            row = parsed(record)
            encoded = chat.encode(row.messages)
        except BadRow as reason:
            _count_bad(found, str(reason), record["line"])
            continue
        key = row.key()
        digest.update(key.encode())
        _count_good(found, record["row"], row, encoded)
        heapq.heappush(smallest, (-int(key, 16), found.rows, row, encoded))
        if len(smallest) > held_out_rows:
            heapq.heappop(smallest)
    _refuse_bad(found, dataset.name, max_bad)
    kept = min(held_out_rows, found.good // 10)
    ordered = sorted(smallest, reverse=True, key=lambda item: item[:2])[:kept]
    found.held_out = [(row, encoded) for _, _, row, encoded in ordered]
    found.threshold = ordered[-1][2].key() if ordered else ""
    found.digest = digest.hexdigest()[:40]
    return found


def _count_bad(found: DatasetScan, reason: str, line: str) -> None:
    found.bad_counts[reason] += 1
    lines = found.bad.setdefault(reason, [])
    if len(lines) < FIRST_LINES:
        lines.append(line)


def _count_good(found: DatasetScan, raw: dict[str, Any], row: Row, encoded: Encoded) -> None:
    found.schemas[schema_of(raw)] += 1
    found.sources[row.source] += 1
    system = row.messages[0]["content"] if row.messages[0]["role"] == "system" else None
    if system in found.systems or len(found.systems) < 1000:
        found.systems[system] += 1
    found.lengths.append(len(encoded.ids))
    found.trained += encoded.trained
    if row.toxicity_score is not None:
        found.scores.append(row.toxicity_score)
    if len(found.preview) < 3:
        found.preview.append((row, encoded))


def _refuse_bad(found: DatasetScan, name: str, max_bad: float) -> None:
    if not found.rows:
        raise PhoqueError(f"{name} is empty.", "There is no row in it.", "Check how it was written.")
    bad = found.rows - found.good
    reasons = "; ".join(f"{n} x {r} (first: {', '.join(found.bad[r])})" for r, n in found.bad_counts.most_common(5))
    if not found.good:
        raise PhoqueError(f"No row of {name} can be trained on.", reasons, "Mend the rows; see the README on data.")
    if bad > max_bad * found.rows:
        raise PhoqueError(
            f"{bad} of {found.rows} rows of {name} are unfit ({bad / found.rows:.0%}, allowed are {max_bad:.0%}).",
            reasons,
            "Mend the rows, or allow more with --max-bad-rows.",
        )
