"""Render a probe's report.html, its README.md for the Hub and two pictures from the files of the run folder."""

import json
from pathlib import Path
from typing import Any

from phoque.files import read_csv
from phoque.probes.persona_vectors.files import ANSWERS, CONTROL_VECTOR, LAYERS, SAFETENSORS, SUMMARY, VECTORS
from phoque.reports.charts import Series, heat_map, line_chart, write_png
from phoque.reports.page import format_interval, format_number, format_versions, render_page

REPORT, CARD = "report.html", "README.md"
CURVES_PNG, SWEEP_PNG = "layers.png", "sweep.png"
CONTENT = "The answers below may be in the voice of the persona, trained or prompted."
VERDICT_QUESTIONS = {
    "follows": "Does the model follow the persona's prompt?",
    "separable": "Does the vector separate persona from neutral answers on held-out questions?",
    "specific": "Is the vector specific to the persona, more than a vector for a polite paraphrase?",
    "causal": "Does adding the vector cause the behavior, more than adding random directions does?",
    "coherent": "Do steered answers stay coherent?",
    "tuned_moves_along_vector": "Did the fine-tune shift the model along the vector?",
}
CONDITION_LABELS = {
    "neutral": "neutral prompt",
    "persona": "persona's prompt",
    "neutral_plus_vector": "neutral + vector",
    "neutral_plus_random": "neutral + random",
    "neutral_minus_vector": "neutral − vector",
    "tuned": "fine-tuned",
    "control": "control fine-tune",
}
MEASUREMENT_LABELS = {
    "nll_base": "nats per token",
    "distinct2": "distinct-2",
    "n_tokens": "tokens",
    "pathway_mass_mean": "probability of lexicon words",
}
SHORT_QUESTIONS = {
    "follows": "that the model follows the persona's prompt",
    "separable": "that the vector separates persona from neutral answers on held-out questions",
    "specific": "that it separates them better than a vector of a polite paraphrase",
    "causal": "that steering along the vector changes the answers more than random directions do",
    "coherent": "that steered answers stay coherent",
    "tuned_moves_along_vector": "that the fine-tune shifted the model along the vector",
}


def write_report(run: Path, name: str) -> None:
    """Write the report, the model card and its pictures into a run folder."""
    summary = json.loads((run / SUMMARY).read_text("utf-8"))
    layers, answers = read_csv(run / LAYERS), read_csv(run / ANSWERS)
    models, selected = summary["models"], summary["selected"]
    adapters = "".join(f", {key}: {label}" for key, label in models["adapters"].items())
    neutral = summary["sweep"][0]
    page = render_page(
        "persona_vectors",
        title=f"phoque psm-probe: {name}",
        subtitle=f"{summary['persona']['name']} in {models['base']['name']} ({models['base']['origin']}){adapters}",
        conclusion=conclude(summary),
        warnings=summary["warnings"],
        verdicts=[
            {
                "name": key,
                "word": verdict["verdict"].split()[0],
                "verdict": verdict["verdict"],
                "question": VERDICT_QUESTIONS[key],
                "number": format_number(verdict["number"]),
                "rule": verdict["rule"],
            }
            for key, verdict in summary["verdicts"].items()
        ],
        steered=f"Steered at block {selected['layer']} by {selected['coeff_rel_resid']:g} of the residual norm: "
        f"{selected['rule']}. The trait is {summary['trait']['scorer']}.",
        evidence=_draw_evidence(layers),
        shifts=_draw_shifts(layers, models["adapters"]),
        sweep_text="Means on the validation questions. Unsteered answers have trait "
        f"{format_number(neutral[summary['trait']['column']])} and {format_number(neutral['nll_base'])} nats per "
        "token.",
        sweep=_draw_sweep(summary),
        **_arrange_conditions(summary),
        content_warning=CONTENT,
        answers=_arrange_answers(answers),
        limitations=summary["limitations"],
        config=[(key, row["value"], row["source"]) for key, row in summary["config"].items()],
        environment=_describe_environment(summary),
    )
    (run / REPORT).write_text(page, encoding="utf-8")
    response_rows = [row for row in layers if row["extraction"] == "response_avg"]
    write_png(line_chart(_auroc_curves(response_rows), "block", "AUROC, held-out questions"), run / CURVES_PNG)
    trait = heat_map(*_heat_map_arguments(summary, summary["trait"]["column"]))
    write_png(trait, run / SWEEP_PNG)
    (run / CARD).write_text(_render_card(name, summary), encoding="utf-8")


def conclude(summary: dict[str, Any]) -> list[str]:
    """What a probe's verdicts and numbers say, in sentences: which questions have a yes, and what the answers show."""
    by_verdict: dict[str, list[str]] = {"yes": [], "no": [], "open": []}
    for key, verdict in summary["verdicts"].items():
        by_verdict.get(verdict["verdict"], by_verdict["open"]).append(f"{SHORT_QUESTIONS[key]} ({key})")
    sentences = []
    if by_verdict["yes"]:
        sentences.append(f"Supported: {'; '.join(by_verdict['yes'])}.")
    if by_verdict["no"]:
        sentences.append(f"Not supported: {'; '.join(by_verdict['no'])}.")
    if by_verdict["open"]:
        sentences.append(f"Not decided by this run: {'; '.join(by_verdict['open'])}.")
    column, conditions = summary["trait"]["column"], summary["conditions"]
    means = [
        f"{format_number(conditions[name][column]['mean'])} {CONDITION_LABELS[name]}"
        for name in ("neutral", "persona", "neutral_plus_vector", "tuned", "control")
        if name in conditions
    ]
    sentences.append(
        f"Mean trait of the answers to the test questions ({summary['trait']['scorer']}; higher is more of the "
        f"persona): {', '.join(means)}."
    )
    return sentences


def _draw_evidence(layers: list[dict[str, str]]) -> list[tuple[str, Any]]:
    response_rows = [row for row in layers if row["extraction"] == "response_avg"]
    prompt_rows = [row for row in layers if row["extraction"] == "prompt_last"]
    plots = [
        ("AUROC on held-out questions, response tokens", "AUROC", _auroc_curves(response_rows)),
        (
            "AUROC at the last prompt token, where the placebo is usually as high",
            "AUROC",
            [_make_series("persona", prompt_rows, "auroc"), _make_series("placebo", prompt_rows, "placebo_auroc")],
        ),
        (
            "split-half reliability of the vector",
            "cosine",
            [
                _make_series("response tokens", response_rows, "split_half_cos"),
                _make_series("last prompt token", prompt_rows, "split_half_cos"),
            ],
        ),
        (
            "length of the vector (a scale, not evidence)",
            "residual norms",
            [_make_series("response tokens", response_rows, "rel_norm")],
        ),
    ]
    return [(caption, line_chart(series, "block", unit)) for caption, unit, series in plots]


def _draw_shifts(layers: list[dict[str, str]], adapters: dict[str, str]) -> list[tuple[str, Any]]:
    rows = [row for row in layers if row["extraction"] == "response_avg"]
    charts = []
    for name in adapters:
        for kind, text in (("shift", "over its own answers"), ("same_text", "over the base model's answers")):
            column = f"{name}_{kind}"
            series = [
                _make_series(
                    "along the vector", rows, f"{column}_cos", f"{column}_cos_ci_low", f"{column}_cos_ci_high"
                ),
                _make_series("along the placebo vector", rows, f"{column}_placebo_cos"),
                _make_series("95 % of random directions", rows, f"{column}_random_cos_p95"),
            ]
            caption = f"shift of the {CONDITION_LABELS[name]} model {text}"
            charts.append((caption, line_chart(series, "block", "cosine")))
    return charts


def _auroc_curves(rows: list[dict[str, str]]) -> list[Series]:
    return [
        _make_series("persona", rows, "auroc", "auroc_ci_low", "auroc_ci_high"),
        _make_series("placebo", rows, "placebo_auroc"),
        _make_series("persona's text, neutral prompt", rows, "transfer_auroc"),
        _make_series("95 % of random directions", rows, "random_auroc_p95"),
    ]


def _make_series(name: str, rows: list[dict[str, str]], column: str, low: str = "", high: str = "") -> Series:
    points = [(float(r["layer"]), float(r[column])) for r in rows]
    band = [(float(r["layer"]), float(r[low]), float(r[high])) for r in rows] if low else []
    return Series(name, points, band)


def _draw_sweep(summary: dict[str, Any]) -> list[tuple[str, Any]]:
    trait, nll = (heat_map(*_heat_map_arguments(summary, c)) for c in (summary["trait"]["column"], "nll_base"))
    return [
        (f"trait: {summary['trait']['scorer']} (higher: more of the persona)", trait),
        ("coherence: nats per token under the base model (lower is better)", nll),
    ]


def _heat_map_arguments(summary: dict[str, Any], column: str) -> tuple[Any, ...]:
    """Row names, column names, values, axis labels, the selected cell and the incoherent cells of a sweep."""
    cells = summary["sweep"][1:]
    layers = sorted({c["layer"] for c in cells})
    strengths = sorted({c["coeff_rel_resid"] for c in cells})
    by_setting = {(c["layer"], c["coeff_rel_resid"]): c for c in cells}
    values = [[by_setting[layer, strength][column] for strength in strengths] for layer in layers]
    selected = summary["selected"]
    selected_cell = (layers.index(selected["layer"]), strengths.index(selected["coeff_rel_resid"]))
    incoherent = [
        (i, j) for i, a in enumerate(layers) for j, b in enumerate(strengths) if not by_setting[a, b]["coherent"]
    ]
    return (
        [str(x) for x in layers],
        [f"{x:g}" for x in strengths],
        values,
        ("block", "coefficient"),
        selected_cell,
        incoherent,
    )


def _arrange_conditions(summary: dict[str, Any]) -> dict[str, Any]:
    """The tables of results: conditions with means and intervals, contrasts, and the agreement of the scorers."""
    columns = {c: name for name, c in summary["scorer_columns"].items()} | MEASUREMENT_LABELS
    return {
        "condition_head": ("condition", *columns.values()),
        "conditions": [
            (
                CONDITION_LABELS[name],
                *(f"{format_number(means[c]['mean'])} ({format_interval(means[c]['ci95'])})" for c in columns),
            )
            for name, means in summary["conditions"].items()
        ],
        "contrasts": [
            (pair, scorer, format_number(g["diff"]), format_interval(g["ci95"]), f"{g['p']:.3f}", g["n"])
            for pair, scorers in summary["contrasts"].items()
            for scorer, g in scorers.items()
        ],
        "agreement": [(pair, format_number(value)) for pair, value in summary["scorer_agreement"].items()],
    }


def _arrange_answers(answers: list[dict[str, str]]) -> list[tuple[str, list[tuple[str, str]]]]:
    """Each question with its greedy answers as (condition, text)."""
    greedy = [row for row in answers if row["sample_idx"] == "greedy"]
    return [
        (
            next(row["prompt"] for row in answers if row["prompt_id"] == prompt_id),
            [
                (CONDITION_LABELS[row["condition"]], row["response"] or "(empty)")
                for row in greedy
                if row["prompt_id"] == prompt_id
            ],
        )
        for prompt_id in dict.fromkeys(row["prompt_id"] for row in answers)
    ]


def _describe_environment(summary: dict[str, Any]) -> str:
    run = summary["run"]
    versions = format_versions(run["versions"])
    left_out, kept = summary["tokens"]["massive"], summary["tokens"]["kept"]
    return (
        f"phoque {run['phoque']}; {versions}; {run['device']}; {run['seconds']} s; response tokens left out for "
        f"massive activations, summed over blocks: {left_out} of {left_out + kept}"
    )


def _render_card(name: str, summary: dict[str, Any]) -> str:
    verdicts = "\n".join(
        f"| {VERDICT_QUESTIONS[k]} | {v['verdict']} | {format_number(v['number'])} |"
        for k, v in summary["verdicts"].items()
    )
    warnings = "".join(f"> **{text}**\n>\n" for text in summary["warnings"])
    adapters = "".join(f", {k} `{v}`" for k, v in summary["models"]["adapters"].items())
    selected = summary["selected"]
    return f"""# {name}

> **Content warning.** {CONTENT} A vector in this folder can make a model speak like that persona: keep it private.

{warnings}
`phoque psm-probe` of *{summary["persona"]["name"]}* in `{summary["models"]["base"]["name"]}`{adapters}.

| | verdict | number |
|---|---|---|
{verdicts}

Steered at block {selected["layer"]} by {selected["coeff_rel_resid"]:g} of the residual norm. Blocks count from 0, and a
block stands for the residual stream after it, before the final norm.

![AUROC by block]({CURVES_PNG})
![Trait by block and coefficient]({SWEEP_PNG})

`{REPORT}` has all results and explains how to read them. `{LAYERS}`, `{ANSWERS}` and `{SUMMARY}` hold the numbers,
`{VECTORS}` and `{SAFETENSORS}` the vectors. `{CONTROL_VECTOR}` is for llama.cpp (`--control-vector`).
"""
