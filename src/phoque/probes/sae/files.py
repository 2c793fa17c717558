"""The files of a comparison: the JSON report, three CSV tables, and every answer."""

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
    """Write the report as JSON; numbers that are not finite become null."""
    path.write_text(json.dumps(to_jsonable(report), indent=1), encoding="utf-8")


def write_features(path: Path, tables: Sequence[tuple[int, dict[str, Any]]]) -> None:
    """Write one CSV row per block and feature, for all features, whether they shifted or not."""
    with path.open("w", newline="", encoding="utf-8") as f:
        table = csv.writer(f)
        table.writerow(["layer", *tables[0][1]])
        for layer, columns in tables:
            for values in zip(*(_format_column(column) for column in columns.values()), strict=True):
                table.writerow([layer, *values])


def _format_column(values: Any) -> list[str]:
    if values.dtype == bool:
        return [str(int(v)) for v in values]
    if numpy.issubdtype(values.dtype, numpy.integer):
        return [str(v) for v in values]
    return ["" if numpy.isnan(v) else f"{v:.6g}" for v in values]


def write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write rows that share their columns as a CSV table."""
    with path.open("w", newline="", encoding="utf-8") as f:
        table = csv.DictWriter(f, list(rows[0]))
        table.writeheader()
        table.writerows({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows)


def write_answers(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write one JSON line per answer."""
    with path.open("w", encoding="utf-8") as f:
        f.writelines(json.dumps(to_jsonable(row), ensure_ascii=False) + "\n" for row in rows)
