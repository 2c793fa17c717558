"""The files of a comparison: the report as JSON, three tables, and every answer."""

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy

from phoque.files import to_jsonable

JSON, MARKDOWN = "sae_comparison_report.json", "sae_comparison_report.md"
FEATURES, PROMPTS, LAYERS, ANSWERS = "feature_shifts.csv", "prompt_shifts.csv", "layer_shift.csv", "generations.jsonl"
DICTIONARIES = "sae"
SCHEMA = 1


def write_json(path: Path, report: dict[str, Any]) -> None:
    """The whole report; what is no finite number becomes null."""
    path.write_text(json.dumps(to_jsonable(report), indent=1), encoding="utf-8")


def write_features(path: Path, tables: Sequence[tuple[int, dict[str, Any]]]) -> None:
    """A row a block and feature, of all features, whether they shifted or not."""
    with path.open("w", newline="", encoding="utf-8") as f:
        table = csv.writer(f)
        table.writerow(["layer", *tables[0][1]])
        for layer, columns in tables:
            for values in zip(*(_column(own) for own in columns.values()), strict=True):
                table.writerow([layer, *values])


def _column(values: Any) -> list[str]:
    if values.dtype == bool:
        return [str(int(v)) for v in values]
    if numpy.issubdtype(values.dtype, numpy.integer):
        return [str(v) for v in values]
    return ["" if numpy.isnan(v) else f"{v:.6g}" for v in values]


def write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """A table of rows that share their columns."""
    with path.open("w", newline="", encoding="utf-8") as f:
        table = csv.DictWriter(f, list(rows[0]))
        table.writeheader()
        table.writerows({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows)


def write_answers(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """A line an answer."""
    with path.open("w", encoding="utf-8") as f:
        f.writelines(json.dumps(to_jsonable(row), ensure_ascii=False) + "\n" for row in rows)
