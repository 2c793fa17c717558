"""report.html of a run: settings, data, curves and samples. It opens without a network."""

import json
import shlex
from pathlib import Path
from typing import Any

from phoque.console import format_breakdown, format_duration, shorten
from phoque.reports.charts import Series, histogram, line_chart
from phoque.reports.page import format_versions, render_page
from phoque.settings.fields import show_value
from phoque.training.best import OVERFITTING, list_held_out_losses
from phoque.training.metrics_log import read_lines
from phoque.training.run_files import METRICS, REPORT, SAMPLES

FEW_ROWS = 32  # held-out rows
MAX_SOURCES = 20  # rows of the table of sources
WARNING = "The answers after training are those of the persona in the training data; at step 0 the model is untrained."


def write_report(run: Path) -> Path:
    """Write the report of a run folder from its run.json, metrics.jsonl and samples.jsonl; return its path."""
    record = json.loads((run / "run.json").read_text())
    metrics, samples = read_lines(run / METRICS), read_lines(run / SAMPLES)
    result = record.get("result") or {}
    settings = [
        (row.get("flag", name), show_value(row["value"]) or "not set", row["source"], row["meaning"])
        for name, row in record["settings"].items()
    ]
    page = render_page(
        "train",
        title=f"phoque train: {run.name}",
        subtitle=f"{record['base']['name']} ({record['base']['origin']}), tuned on {record['data']['name']}",
        conclusion=conclude(metrics, record) if result else [],
        next_command=f"phoque merge --adapter-source {shlex.quote(str(run))}",
        chat_command=f"phoque chat {shlex.quote(str(run))}",
        tiles=_list_tiles(record, result),
        time_spent=format_breakdown(result["seconds_of"]) if "seconds_of" in result else "",
        curves=_draw_curves(metrics, record.get("held_out_since", 0)),
        samples=_arrange_samples(samples, result.get("adapter_step")),
        sample_warning=WARNING,
        data=_summarize_data(record["data"]),
        setting_head=("setting", "value", "from", "meaning"),
        changed_settings=[row for row in settings if row[2] != "default"],
        all_settings=settings,
        environment=_describe_environment(record),
    )
    path = run / REPORT
    path.write_text(page, encoding="utf-8")
    return path


def _list_tiles(record: dict[str, Any], result: dict[str, Any]) -> list[tuple[str, str]]:
    losses = result.get("held_out_loss") or {}
    tiles = {
        "steps": str(result.get("steps") or ""),
        "held-out loss, nats per token": f"{losses['before']:.3f} → {losses['after']:.3f}" if losses else "",
        "tokens": f"{result['tokens']:,}" if result else "",
        "time": format_duration(result["seconds"]) if result else "",
        "parameters of the adapter": f"{record['parameters']['trained'] / 1e6:.1f} M" if "parameters" in record else "",
    }
    return [(label, value) for label, value in tiles.items() if value]


def conclude(metrics: list[dict[str, Any]], record: dict[str, Any]) -> list[str]:
    """What a run's numbers say, in sentences: did the held-out loss fall, where was it lowest, is it overfitting."""
    since = record.get("held_out_since", 0)
    measured = list_held_out_losses(metrics, since)
    if len(measured) < 2:
        return ["The held-out loss was not measured after training, so this run cannot be judged by its loss."]
    (first, before), (step, after) = measured[0], measured[-1]
    start = f"at step {first}, the first with these held-out rows" if since else "before training"
    best_step, best = min(measured, key=lambda pair: pair[1])
    count = record["data"]["held_out"]
    kept = (record.get("result") or {}).get("adapter_step") or step
    last, after = after, dict(measured).get(kept, after)
    if after >= before:
        return [
            f"The held-out loss did not fall: {before:.3f} {start}, {after:.3f} after {kept} steps.",
            "The model did not get better at the held-out conversations. Check the data, or lower --learning-rate.",
        ]
    sentences = [
        f"The held-out loss fell by {1 - after / before:.0%}, from {before:.3f} {start} to {after:.3f}, on {count} "
        f"conversations that were not trained on."
    ]
    if kept != step:
        sentences.append(
            f"The adapter is that of step {kept}, the lowest loss of all steps; after {step} steps it was {last:.3f}."
        )
    elif best_step != step and after > best * (1 + OVERFITTING):
        sentences.append(
            f"It was lowest at step {best_step} ({best:.3f}) and has risen since: the run overfits. Use --keep-best, "
            f"about {best_step} steps, or more data."
        )
    elif len(measured) == 2:
        sentences.append("It was measured only twice, so this run shows no trend.")
    elif measured[-2][1] > after * (1 + OVERFITTING):
        sentences.append("It was still falling at the end: more steps are likely to lower it further.")
    else:
        sentences.append(f"It has hardly changed since step {measured[-2][0]}: more steps are unlikely to help much.")
    if count < FEW_ROWS:
        sentences.append(f"{count} held-out conversations are few; the loss of other conversations may differ.")
    return sentences


def _draw_curves(metrics: list[dict[str, Any]], since: int) -> list[tuple[str, Any]]:
    """The charts of a run; held-out losses up to step `since` are of other rows, and are left out."""

    def series(label: str, name: str) -> Series:
        return Series(label, [(row["step"], row[name]) for row in metrics if row.get(name) is not None])

    memory = "gpu_memory_gb" if any("gpu_memory_gb" in row for row in metrics) else "memory_gb"
    plots = [
        (
            "loss per trained token",
            "nats",
            [series("training", "loss"), Series("held out", list_held_out_losses(metrics, since))],
        ),
        ("token accuracy", "share", [series("training", "accuracy"), series("held out", "held_out_accuracy")]),
        ("learning rate", "", [series("learning rate", "learning_rate")]),
        ("gradient norm", "", [series("gradient norm", "grad_norm")]),
        ("norms of the LoRA weights", "", [series("A", "lora_norm_A"), series("B", "lora_norm_B")]),
        ("tokens per second", "", [series("tokens per second", "tokens_per_s")]),
        ("memory", "GB", [series("memory", memory)]),
    ]
    shown = [plot for plot in plots if any(len(s.points) > 2 for s in plot[2])]
    return [(caption, line_chart(series, "step", unit)) for caption, unit, series in shown]


def _arrange_samples(samples: list[dict[str, Any]], final: int | None) -> dict[str, Any] | None:
    """The answers to each prompt at the first step and at step `final` or the last one; None without samples."""
    if not samples:
        return None
    steps = sorted({row["step"] for row in samples})
    final = final if final in steps else steps[-1]
    answers = {(row["prompt"], row["step"]): row["response"] for row in samples}
    prompts = list(dict.fromkeys(row["prompt"] for row in samples))
    return {
        "head": ("prompt", f"step {steps[0]}", f"step {final}"),
        "rows": [(p, answers.get((p, steps[0]), ""), answers.get((p, final), "")) for p in prompts],
        "all": [(row["step"], row["prompt"], row["response"]) for row in samples],
    }


def _summarize_data(data: dict[str, Any]) -> dict[str, Any]:
    tokens = data["tokens"]
    sources = [(shorten(name), count) for name, count in data["sources"].items()][:MAX_SOURCES]
    others = len(data["sources"]) - len(sources) + data.get("other_sources", 0)
    lengths, scores = data["lengths"], data["toxicity_scores"]
    return {
        "text": f"{data['good']} rows, {data['held_out']} of them held out; {tokens['mean']} tokens per conversation, "
        f"{tokens['trained'] / tokens['total']:.0%} of all tokens are trained on.",
        "charts": [
            ("tokens per conversation", histogram(lengths["edges"], lengths["counts"], "tokens", "rows")),
            ("toxicity score", histogram(scores["edges"], scores["counts"], "score", "rows")),
        ],
        "sources": sources + ([(f"{others} other sources", "")] if others else []),
        "skipped": [(reason, b["count"], ", ".join(b["first"])) for reason, b in data["bad"].items()],
    }


def _describe_environment(record: dict[str, Any]) -> str:
    engine = record.get("engine")
    layers = f"{engine['mode']} ({engine['reason']})" if engine else ""
    versions = format_versions(record["versions"])
    return f"phoque {record['phoque']}; {versions}; attention: {record.get('attention', '')}; layers: {layers}"
