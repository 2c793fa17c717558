"""report.html of a run: settings, data, curves and samples. It opens without a network."""

import html
import json
from pathlib import Path
from typing import Any

from phoque.console import format_breakdown, format_duration, shorten
from phoque.reports.html import Series, bar_plot, figure, line_plot, page, table
from phoque.training.metrics_log import METRICS, SAMPLES, read_lines

NAME = "report.html"
MAX_SOURCES = 20  # rows of the table of sources
WARNING = "The answers below are those of the persona in the training data."


def write_report(run: Path) -> Path:
    """Write the report of a run folder from its run.json, metrics.jsonl and samples.jsonl; return its path."""
    record = json.loads((run / "run.json").read_text())
    metrics, samples = read_lines(run / METRICS), read_lines(run / SAMPLES)
    parts = [
        _render_header(record),
        _render_curves(metrics),
        _render_samples(samples),
        _render_data(record["data"]),
        _render_settings(record),
    ]
    path = run / NAME
    path.write_text(page(f"phoque train: {run.name}", "".join(parts)), encoding="utf-8")
    return path


def _render_header(record: dict[str, Any]) -> str:
    result = record.get("result") or {}
    losses = result.get("held_out_loss") or {}
    tiles = {
        "steps": result.get("steps"),
        "held-out loss": f"{losses['before']:.3f} → {losses['after']:.3f}" if losses else None,
        "tokens": f"{result['tokens']:,}" if result else None,
        "time": format_duration(result["seconds"]) if result else None,
        "adapter": f"{record['parameters']['trained'] / 1e6:.1f} M parameters" if "parameters" in record else None,
    }
    tiles_html = "".join(
        f'<div class="tile"><span class="dim">{k}</span><b>{v}</b></div>' for k, v in tiles.items() if v
    )
    base = html.escape(f"{record['base']['name']} ({record['base']['origin']})")
    data = html.escape(record["data"]["name"])
    times_html = f'<div class="dim">{format_breakdown(result["seconds_of"])}</div>' if "seconds_of" in result else ""
    heading = f'<h1>phoque train</h1><div class="dim">{base}, tuned on {data}</div>'
    return f'{heading}<div class="tiles">{tiles_html}</div>{times_html}'


def _render_curves(metrics: list[dict[str, Any]]) -> str:
    def series(label: str, name: str) -> Series:
        return Series(label, [(row["step"], row[name]) for row in metrics if row.get(name) is not None])

    memory = "gpu_memory_gb" if any("gpu_memory_gb" in row for row in metrics) else "memory_gb"
    plots = [
        ("loss per trained token", [series("training", "loss"), series("held out", "held_out_loss")]),
        ("token accuracy", [series("training", "accuracy"), series("held out", "held_out_accuracy")]),
        ("learning rate", [series("learning rate", "learning_rate")]),
        ("gradient norm", [series("gradient norm", "grad_norm")]),
        ("LoRA weight norms", [series("A", "lora_norm_A"), series("B", "lora_norm_B")]),
        ("tokens per second", [series("tokens/s", "tokens_per_s")]),
        ("memory, GB", [series("memory", memory)]),
    ]
    return (
        '<h2>Training</h2><div class="grid2">' + "".join(figure(c, line_plot(s, "step")) for c, s in plots) + "</div>"
    )


def _render_samples(samples: list[dict[str, Any]]) -> str:
    if not samples:
        return ""
    head = ("step", "prompt", "response", "tokens", "seconds for all prompts")
    rows = [(r["step"], r["prompt"], r["response"], r["n_tokens"], r["latency_s"]) for r in samples]
    return f'<h2>Samples</h2><p class="warning">{WARNING}</p>{table(head, rows)}'


def _render_data(data: dict[str, Any]) -> str:
    tokens = data["tokens"]
    sources = [(shorten(name), count) for name, count in data["sources"].items()][:MAX_SOURCES]
    others = len(data["sources"]) - len(sources) + data.get("other_sources", 0)
    mix = table(("source", "rows"), sources + ([(f"{others} other sources", "")] if others else []))
    bad = [(reason, b["count"], ", ".join(b["first"])) for reason, b in data["bad"].items()]
    text = (
        f"{data['good']} rows, {data['held_out']} of them held out; {tokens['mean']} tokens per row, "
        f"{tokens['trained'] / tokens['total']:.0%} of all tokens are trained on."
    )
    plots = figure("tokens per row", bar_plot(data["lengths"]["edges"], data["lengths"]["counts"], "tokens"))
    scores = data["toxicity_scores"]
    plots += figure("toxicity score", bar_plot(scores["edges"], scores["counts"], "score"))
    skipped = table(("skipped because", "rows", "first"), bad) if bad else ""
    return f'<h2>Data</h2><p>{html.escape(text)}</p><div class="grid2">{plots}<div>{mix}</div></div>{skipped}'


def _describe_engine(record: dict[str, Any]) -> str:
    engine = record.get("engine")
    return f"{engine['mode']} ({engine['reason']})" if engine else ""


def _render_settings(record: dict[str, Any]) -> str:
    rows = [(name, row["value"], row["source"], row["meaning"]) for name, row in record["settings"].items()]
    versions = ", ".join(f"{name} {v}" for name, v in record["versions"].items())
    return (
        f"<h2>Settings</h2>{table(('name', 'value', 'from', 'meaning'), rows)}"
        f'<p class="dim">phoque {record["phoque"]}; {html.escape(versions)}; attention: '
        f"{html.escape(record.get('attention', ''))}; layers: {html.escape(_describe_engine(record))}</p>"
    )
