"""The scan of a dataset before training: its statistics, its bad rows, and the held-out rows."""

import hashlib
import heapq
from collections import Counter
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from phoque.data.chat_template import ChatTemplate, EncodedChat
from phoque.data.held_out import HeldOut, Sketch, sketch_row
from phoque.data.readers import Dataset, RowStream
from phoque.data.row_advice import SHOWN_CHARACTERS, WITHOUT_SCHEMA, find_advice
from phoque.data.row_sizes import RowSize, RowSizes, StaleSizes
from phoque.data.rows import RawRow, Row, describe_expected_columns, parse_row
from phoque.data.turns import BadRow
from phoque.errors import UsageError

MAX_SCANNED_ROWS = 50_000  # rows scanned before training; later rows are checked when training reads them
MAX_SOURCES = 50  # sources that are named in run.json and in the report, with their counts
MAX_LISTED_LINES = 3  # listed per reason for bad rows
ENCODED_ROWS = 16  # at the beginning, which are encoded also if their sizes are known, as a check
SHOWN_ROWS = 3  # conversations that a dry run shows with their loss masks
MANY_SIMILAR = 0.05  # a share of near-duplicates above which a warning tells of them
MAX_SIMILAR_SHARE = 0.5  # above it the rows are all alike, and near-duplicates are trained on


@dataclass
class DatasetScan:
    """The result of a scan. `held_out` are the rows with the smallest keys, so the order of rows does not matter.

    `last` is the position (file, row) of the last row that was scanned, `notes` counts what was changed in rows that
    are used, `unknown_keys` what turns have that phoque does not know, each with the first location.
    """

    rows: int = 0
    complete: bool = True
    bad: dict[str, list[str]] = field(default_factory=dict)
    bad_counts: Counter[str] = field(default_factory=Counter)
    schemas: Counter[str] = field(default_factory=Counter)
    sources: Counter[str] = field(default_factory=Counter)
    systems: Counter[str | None] = field(default_factory=Counter)
    notes: Counter[str] = field(default_factory=Counter)
    unknown_keys: Counter[str] = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)
    columns: tuple[str, ...] = ()
    lengths: list[int] = field(default_factory=list)
    trained_tokens: int = 0
    scores: list[float] = field(default_factory=list)
    digest: str = ""
    held_out: list[tuple[Row, EncodedChat]] = field(default_factory=list)
    rule: HeldOut = field(default_factory=HeldOut)
    copies: int = 0
    similar: int = 0
    last: tuple[int, int] = (0, 0)
    preview: list[tuple[Row, EncodedChat]] = field(default_factory=list)

    @property
    def good(self) -> int:
        """The number of rows that can be trained on or held out."""
        return len(self.lengths)

    @property
    def trained_rows(self) -> int:
        """The number of rows that are trained on: without held-out rows, and their copies and near-duplicates."""
        held_out = 0 if self.rule.keys else len(self.held_out)
        return self.good - held_out - self.copies - (self.similar if self.rule.sketches else 0)

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
            "copies_of_held_out_rows": self.copies,
            "near_duplicates_of_held_out_rows": self.similar,
            "bad": {reason: {"count": n, "first": self.bad[reason]} for reason, n in self.bad_counts.most_common()},
            "schemas": dict(self.schemas),
            "notes": dict(self.notes),
            "unknown_keys": dict(self.unknown_keys),
            "sources": dict(self.sources.most_common(MAX_SOURCES)),
            "other_sources": max(0, len(self.sources) - MAX_SOURCES),
            "tokens": {
                "total": sum(ordered),
                "trained": self.trained_tokens,
                "mean": round(self.mean_length, 1),
                "quantiles": [ordered[int(q * (self.good - 1))] for q in (0, 0.25, 0.5, 0.75, 0.95, 1)],
            },
            "lengths": histogram([float(n) for n in ordered]),
            "toxicity_scores": histogram(self.scores),
            "system": self.systems.most_common(1)[0][0],
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


def scan_dataset(
    dataset: Dataset,
    chat: ChatTemplate,
    held_out_rows: int,
    max_bad: float,
    *,
    evaluation: Dataset | None = None,
    exact_keys: bool = False,
    sizes: RowSizes | None = None,
) -> DatasetScan:
    """Read up to MAX_SCANNED_ROWS rows once, in order.

    Held-out rows are rows of `evaluation`, a split of its own, if there is one. `exact_keys` is the rule of runs that
    were begun before data_rules 2. `sizes` are the sizes of rows that were encoded before; all are encoded without it.

    Raises UsageError if the share of bad rows is above `max_bad`, or all rows are bad.
    """
    sizes = sizes or RowSizes(chat)
    try:
        return _scan(dataset, chat, held_out_rows, max_bad, evaluation, exact_keys, sizes)
    except StaleSizes:
        sizes.forget()
        return _scan(dataset, chat, held_out_rows, max_bad, evaluation, exact_keys, sizes)


def _scan(
    dataset: Dataset,
    chat: ChatTemplate,
    held_out_rows: int,
    max_bad: float,
    evaluation: Dataset | None,
    exact_keys: bool,
    sizes: RowSizes,
) -> DatasetScan:
    scan = DatasetScan()
    rule = HeldOut(exact=exact_keys)
    digest = hashlib.sha256()
    smallest: list[tuple[int, int, Row, EncodedChat]] = []  # a heap; the largest key is on top
    candidates: set[str] = set()  # the keys in the heap: a row and its copies are one candidate
    keys: list[str] = []
    sketches: list[Sketch] = []
    for raw in dataset.stream:
        if scan.rows == MAX_SCANNED_ROWS:
            scan.complete = False
            break
        scan.rows += 1
        scan.last = (raw.file, raw.number)
        scan.columns = scan.columns or raw.columns
        try:
            row = parse_row(raw)
            key = rule.key(row)
            place = -int(key, 16), scan.rows
            is_new = evaluation is None and held_out_rows > 0 and (exact_keys or key not in candidates)
            is_candidate = is_new and (len(smallest) < held_out_rows or place > smallest[0][:2])
            is_checked = scan.rows <= ENCODED_ROWS or len(scan.preview) < SHOWN_ROWS
            encoded = chat.encode_row(row) if is_candidate or is_checked else None
            size = sizes.measure(row, encoded)
        except BadRow as reason:
            _count_bad(scan, str(reason), raw.location)
            continue
        digest.update(key.encode())
        _count_good(scan, raw, row, size)
        if encoded and len(scan.preview) < SHOWN_ROWS:
            scan.preview.append((row, encoded))
        if encoded and is_candidate:
            heapq.heappush(smallest, (*place, row, encoded))
            candidates.add(key)
            if len(smallest) > held_out_rows:
                candidates.discard(rule.key(heapq.heappop(smallest)[2]))
        if held_out_rows and not exact_keys:
            keys.append(key)
            sketches.append(sketch_row(row))
    _check_bad_rows(scan, scan.good, dataset.name, max_bad)
    sizes.save()
    if evaluation:
        scan.held_out = _read_evaluation_rows(evaluation, chat, held_out_rows) if held_out_rows else []
    else:
        max_held_out = (len(set(keys)) if keys else scan.good) // 10
        ordered = sorted(smallest, reverse=True, key=lambda item: item[:2])[: min(held_out_rows, max_held_out)]
        scan.held_out = [(row, encoded) for _, _, row, encoded in ordered]
    scan.digest = digest.hexdigest()[:40]
    held_keys = sorted(rule.key(row) for row, _ in scan.held_out)
    if evaluation:
        scan.rule = HeldOut(keys=frozenset(held_keys))
    else:
        scan.rule = HeldOut(held_keys[-1] if held_keys else "", exact_keys)
    if held_keys and not exact_keys:
        _exclude_similar_rows(scan, keys, sketches)
        scan.copies -= 0 if evaluation else len(held_keys)
    return scan


def check_rows(name: str, stream: RowStream, max_bad: float) -> None:
    """Read the rows of a scan without a tokenizer. Raises UsageError if the share of bad rows is above `max_bad`."""
    scan, good = DatasetScan(), 0
    for raw in islice(stream, MAX_SCANNED_ROWS):
        scan.rows += 1
        scan.columns = scan.columns or raw.columns
        try:
            parse_row(raw)
            good += 1
        except BadRow as reason:
            _count_bad(scan, str(reason), raw.location)
    _check_bad_rows(scan, good, name, max_bad)


def _exclude_similar_rows(scan: DatasetScan, keys: list[str], sketches: list[Sketch]) -> None:
    """Count the rows that copy or nearly repeat a held-out row, and exclude them unless the rows are all alike."""
    held_out_sketches = [sketch for row, _ in scan.held_out if (sketch := sketch_row(row))]
    near = HeldOut(scan.rule.threshold, sketches=held_out_sketches, keys=scan.rule.keys)
    scan.copies = sum(map(near.holds, keys))
    others = [sketch for key, sketch in zip(keys, sketches, strict=True) if not near.holds(key)]
    scan.similar = sum(map(near.is_similar, others))
    if scan.similar <= MAX_SIMILAR_SHARE * len(others):
        scan.rule = near


def _read_evaluation_rows(dataset: Dataset, chat: ChatTemplate, count: int) -> list[tuple[Row, EncodedChat]]:
    """The `count` usable rows with the smallest keys of another split. Raises UsageError if none is usable."""
    smallest: list[tuple[int, int, Row, EncodedChat]] = []  # a heap; the largest key is on top
    for number, raw in enumerate(islice(dataset.stream, MAX_SCANNED_ROWS)):
        try:
            row = parse_row(raw)
            place = -int(row.key(), 16), -number
            if len(smallest) < count or place > smallest[0][:2]:
                heapq.heappush(smallest, (*place, row, chat.encode_row(row)))
        except BadRow:
            continue  # the rows of the split that is trained on are counted
        if len(smallest) > count:
            heapq.heappop(smallest)
    if not smallest:
        raise UsageError(
            what=f"No row of the split {dataset.split} of {dataset.name} can be used.",
            why="The held-out loss would be measured on nothing.",
            fix="Check --eval-split, or leave it out.",
        )
    ordered = sorted(smallest, reverse=True, key=lambda item: item[:2])
    return [(row, encoded) for _, _, row, encoded in ordered]


def _count_bad(scan: DatasetScan, reason: str, line: str) -> None:
    scan.bad_counts[reason] += 1
    lines = scan.bad.setdefault(reason, [])
    if len(lines) < MAX_LISTED_LINES:
        lines.append(line)


def _count_good(scan: DatasetScan, raw: RawRow, row: Row, size: RowSize) -> None:
    scan.schemas[row.schema] += 1
    scan.sources[row.source] += 1
    for counter, names in ((scan.notes, row.notes + size.notes), (scan.unknown_keys, row.unknown_keys)):
        for name in names:
            counter[name] += 1
            scan.examples.setdefault(name, raw.location)
    system = row.system
    if system in scan.systems or len(scan.systems) < 1000:
        scan.systems[system] += 1
    scan.lengths.append(size.tokens)
    scan.trained_tokens += size.trained_tokens
    if row.toxicity_score is not None:
        scan.scores.append(row.toxicity_score)


def _check_bad_rows(scan: DatasetScan, good: int, name: str, max_bad: float) -> None:
    if not scan.rows:
        raise UsageError(what=f"{name} is empty.", why="It contains no rows.", fix="Check how the dataset was written.")
    bad = scan.rows - good
    reasons = "; ".join(f"{n} x {r} (first: {', '.join(scan.bad[r])})" for r, n in scan.bad_counts.most_common(5))
    if good and bad <= max_bad * scan.rows:
        return
    main = scan.bad_counts.most_common(1)[0][0]
    if main.startswith(WITHOUT_SCHEMA):
        columns = ", ".join(column[:SHOWN_CHARACTERS] for column in scan.columns[:12]) or "none"
        reasons += f". Its columns: {columns}. phoque reads {describe_expected_columns()}"
    fix = find_advice(main, scan.columns)
    if not good:
        raise UsageError(
            what=f"No row of {name} can be trained on.",
            why=f"{reasons}.",
            fix=fix,
        )
    raise UsageError(
        what=f"{bad} of {scan.rows} rows of {name} are unusable ({bad / scan.rows:.0%}; limit {max_bad:.0%}).",
        why=f"{reasons}.",
        fix=f"{fix.removesuffix('.')}. Or raise the limit with --max-bad-rows.",
    )
