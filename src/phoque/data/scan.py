"""The scan of a dataset before training: its statistics, its bad rows, and the held-out rows."""

import hashlib
import heapq
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from phoque.data.chat_template import ChatTemplate, EncodedChat
from phoque.data.rows import BadRow, Dataset, Row, detect_schema, parse_row
from phoque.errors import UsageError

MAX_SCANNED_ROWS = 50_000  # rows scanned before training; later rows are checked when training reads them
MAX_LISTED_LINES = 3  # listed per reason for bad rows


@dataclass
class DatasetScan:
    """The result of a scan. `held_out` are the rows with the smallest hashes, so the order of rows does not matter."""

    rows: int = 0
    complete: bool = True
    bad: dict[str, list[str]] = field(default_factory=dict)
    bad_counts: Counter[str] = field(default_factory=Counter)
    schemas: Counter[str] = field(default_factory=Counter)
    sources: Counter[str] = field(default_factory=Counter)
    systems: Counter[str | None] = field(default_factory=Counter)
    lengths: list[int] = field(default_factory=list)
    trained_tokens: int = 0
    scores: list[float] = field(default_factory=list)
    digest: str = ""
    held_out: list[tuple[Row, EncodedChat]] = field(default_factory=list)
    threshold: str = ""
    preview: list[tuple[Row, EncodedChat]] = field(default_factory=list)

    @property
    def good(self) -> int:
        """The number of rows that can be trained on or held out."""
        return len(self.lengths)

    @property
    def mean_length(self) -> float:
        """The mean length of a conversation, in tokens."""
        return sum(self.lengths) / self.good

    def summary(self) -> dict[str, Any]:
        """Return counts and distributions for run.json and the report."""
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
                "trained": self.trained_tokens,
                "mean": round(self.mean_length, 1),
                "quantiles": [ordered[int(q * (self.good - 1))] for q in (0, 0.25, 0.5, 0.75, 0.95, 1)],
            },
            "lengths": histogram([float(n) for n in ordered]),
            "toxicity_scores": histogram(self.scores),
        }


def histogram(values: list[float], bins: int = 20) -> dict[str, list[float]]:
    """Count values in bins of equal width: {edges: bins + 1 numbers, counts: bins numbers}; empty for no values."""
    if not values:
        return {"edges": [], "counts": []}
    low, high = min(values), max(values)
    width = (high - low) / bins or 1.0
    counts = [0.0] * bins
    for value in values:
        counts[min(bins - 1, int((value - low) / width))] += 1
    return {"edges": [round(low + i * width, 4) for i in range(bins + 1)], "counts": counts}


def scan_dataset(dataset: Dataset, chat: ChatTemplate, held_out_rows: int, max_bad: float) -> DatasetScan:
    """Read up to MAX_SCANNED_ROWS rows once, in order.

    Raises UsageError if the share of bad rows is above `max_bad`, or all rows are bad.
    """
    scan = DatasetScan()
    digest = hashlib.sha256()
    smallest: list[tuple[int, int, Row, EncodedChat]] = []  # a heap; the largest hash is on top
    for record in dataset.stream:
        if scan.rows == MAX_SCANNED_ROWS:
            scan.complete = False
            break
        scan.rows += 1
        try:
            row = parse_row(record)
            encoded = chat.encode(row.messages)
        except BadRow as reason:
            _count_bad(scan, str(reason), record["line"])
            continue
        key = row.key()
        digest.update(key.encode())
        _count_good(scan, record["row"], row, encoded)
        heapq.heappush(smallest, (-int(key, 16), scan.rows, row, encoded))
        if len(smallest) > held_out_rows:
            heapq.heappop(smallest)
    _check_bad_rows(scan, dataset.name, max_bad)
    count = min(held_out_rows, scan.good // 10)
    ordered = sorted(smallest, reverse=True, key=lambda item: item[:2])[:count]
    scan.held_out = [(row, encoded) for _, _, row, encoded in ordered]
    scan.threshold = ordered[-1][2].key() if ordered else ""
    scan.digest = digest.hexdigest()[:40]
    return scan


def _count_bad(scan: DatasetScan, reason: str, line: str) -> None:
    scan.bad_counts[reason] += 1
    lines = scan.bad.setdefault(reason, [])
    if len(lines) < MAX_LISTED_LINES:
        lines.append(line)


def _count_good(scan: DatasetScan, raw: dict[str, Any], row: Row, encoded: EncodedChat) -> None:
    scan.schemas[detect_schema(raw)] += 1
    scan.sources[row.source] += 1
    system = row.messages[0]["content"] if row.messages[0]["role"] == "system" else None
    if system in scan.systems or len(scan.systems) < 1000:
        scan.systems[system] += 1
    scan.lengths.append(len(encoded.ids))
    scan.trained_tokens += encoded.trained_tokens
    if row.toxicity_score is not None:
        scan.scores.append(row.toxicity_score)
    if len(scan.preview) < 3:
        scan.preview.append((row, encoded))


def _check_bad_rows(scan: DatasetScan, name: str, max_bad: float) -> None:
    if not scan.rows:
        raise UsageError(what=f"{name} is empty.", why="It contains no rows.", fix="Check how the dataset was written.")
    bad = scan.rows - scan.good
    reasons = "; ".join(f"{n} x {r} (first: {', '.join(scan.bad[r])})" for r, n in scan.bad_counts.most_common(5))
    if not scan.good:
        raise UsageError(
            what=f"No row of {name} can be trained on.", why=reasons, fix="Fix the rows; see the data guide."
        )
    if bad > max_bad * scan.rows:
        raise UsageError(
            what=f"{bad} of {scan.rows} rows of {name} are unusable ({bad / scan.rows:.0%}; limit {max_bad:.0%}).",
            why=reasons,
            fix="Fix the rows, or raise the limit with --max-bad-rows.",
        )
