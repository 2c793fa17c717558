"""report.html of a run: settings, data, curves and samples. It opens without a network."""

import html
import json
import shlex
from pathlib import Path
from typing import Any

from phoque.console import format_breakdown, format_duration, shorten
from phoque.reports.html import Series, bar_plot, figure, line_plot, page, table
from phoque.training.metrics_log import METRICS, SAMPLES, read_lines

NAME = "report.html"
OVERFITTING = 0.01  # a relative change of the held-out loss that counts
FEW_ROWS = 32  # held-out rows
MAX_SOURCES = 20  # rows of the table of sources
WARNING = "The answers after training are those of the persona in the training data; at step 0 the model is untrained."


def write_report(run: Path) -> Path:
    """Write the report of a run folder from its run.json, metrics.jsonl and samples.jsonl; return its path."""
    record = json.loads((run / "run.json").read_text())
    metrics, samples = read_lines(run / METRICS), read_lines(run / SAMPLES)
    parts = [
        _render_header(record),
        _render_conclusion(metrics, record, run),
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


def conclude(metrics: list[dict[str, Any]], record: dict[str, Any]) -> list[str]:
    """What a run's numbers say, in sentences: did the held-out loss fall, where was it lowest, is it overfitting."""
    measured = [(row["step"], row["held_out_loss"]) for row in metrics if row.get("held_out_loss") is not None]
    if len(measured) < 2:
        return ["The held-out loss was not measured after training, so this run cannot be judged by its loss."]
    (_, before), (step, after) = measured[0], measured[-1]
    best_step, best = min(measured, key=lambda pair: pair[1])
    count = record["data"]["held_out"]
    if after >= before:
        return [
            f"The held-out loss did not fall: {before:.3f} before training, {after:.3f} after {step} steps.",
            "The model did not get better at the held-out conversations. Check the data, or lower --learning-rate.",
        ]
    sentences = [
        f"The held-out loss fell by {1 - after / before:.0%}, from {before:.3f} to {after:.3f}, on {count} "
        f"conversations that were not trained on."
    ]
    if best_step != step and after > best * (1 + OVERFITTING):
        sentences.append(
            f"It was lowest at step {best_step} ({best:.3f}) and has risen since: the run overfits. Use about "
            f"{best_step} steps, or more data."
        )
    elif len(measured) == 2:
        sentences.append("It was measured before and after training only, so this run shows no trend.")
    elif measured[-2][1] > after * (1 + OVERFITTING):
        sentences.append("It was still falling at the end: more steps are likely to lower it further.")
    else:
        sentences.append(f"It has hardly changed since step {measured[-2][0]}: more steps are unlikely to help much.")
    if count < FEW_ROWS:
        sentences.append(f"{count} held-out conversations are few; the loss of other conversations may differ.")
    return sentences


def _render_conclusion(metrics: list[dict[str, Any]], record: dict[str, Any], run: Path) -> str:
    if "result" not in record:
        return ""
    sentences = " ".join(conclude(metrics, record))
    command = f"phoque merge --adapter-source {shlex.quote(str(run))}"
    return f"<p>{html.escape(sentences)}</p><p>Next: <code>{html.escape(command)}</code></p>"


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
    shown = [(caption, series) for caption, series in plots if any(len(s.points) > 2 for s in series)]
    figures = "".join(figure(caption, line_plot(series, "step")) for caption, series in shown)
    return f'<h2>Training</h2><div class="grid2">{figures}</div>'


def _render_samples(samples: list[dict[str, Any]]) -> str:
    if not samples:
        return ""
    steps = sorted({row["step"] for row in samples})
    answers = {(row["prompt"], row["step"]): row["response"] for row in samples}
    prompts = list(dict.fromkeys(row["prompt"] for row in samples))
    head = ("prompt", f"step {steps[0]}", f"step {steps[-1]}")
    rows = [(p, answers.get((p, steps[0]), ""), answers.get((p, steps[-1]), "")) for p in prompts]
    every = table(("step", "prompt", "response"), [(r["step"], r["prompt"], r["response"]) for r in samples])
    return (
        f'<h2>Samples</h2><p class="warning">{WARNING}</p><div class="scroll">{table(head, rows)}</div>'
        f'<details><summary>All samples</summary><div class="scroll">{every}</div></details>'
    )


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
    rows = [
        (row.get("flag", name), row["value"], row["source"], row["meaning"]) for name, row in record["settings"].items()
    ]
    head = ("setting", "value", "from", "meaning")
    chosen = [row for row in rows if row[2] != "default"]
    versions = ", ".join(f"{name} {v}" for name, v in record["versions"].items())
    return (
        f'<h2>Settings</h2><div class="scroll">{table(head, chosen)}</div>'
        f'<details><summary>All settings</summary><div class="scroll">{table(head, rows)}</div></details>'
        f'<p class="dim">phoque {record["phoque"]}; {html.escape(versions)}; attention: '
        f"{html.escape(record.get('attention', ''))}; layers: {html.escape(_describe_engine(record))}</p>"
    )
