"""Render a probe's report.html, its README.md for the Hub and two pictures from the files of the run folder."""

import csv
import html
import json
from pathlib import Path
from typing import Any

from phoque.probes.persona_vectors.files import ANSWERS, CONTROL_VECTOR, LAYERS, SAFETENSORS, SUMMARY, VECTORS
from phoque.reports.html import Series, figure, heat_map, line_plot, page, table

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
READING_GUIDE = """<ul>
<li><b>Block</b> counts from 0 and means the residual stream after that decoder block, before the final norm.</li>
<li><b>AUROC</b> is the probability that an answer to a held-out question under the persona's prompt projects further
along the vector than one under the neutral prompt; 0.5 is chance. The vector was extracted from other questions.</li>
<li>The <b>placebo</b> is a vector from the same method with a polite paraphrase in place of the persona. If its AUROC
is as high, the vector separates prompts, not personas. At the <b>last prompt token</b> it nearly always is, because
that token has attended to the system prompt.</li>
<li><b>Transfer</b> reads the persona's text after a neutral prompt, so that only the text itself can differ.</li>
<li>The <b>coefficient</b> is in units of the mean norm of the residual stream at that block. A crossed-out cell is not
coherent. The framed cell was selected on the validation questions; all results below are on the test questions.</li>
<li><b>Intervals</b> are 95 % bootstrap intervals over questions; p-values are from sign flips of paired differences. A
question is one observation, however many tokens, paraphrases or samples it has.</li></ul>"""


def write_report(run: Path, name: str) -> None:
    """Write the report, the model card and its pictures into a run folder."""
    summary = json.loads((run / SUMMARY).read_text("utf-8"))
    layers, answers = _read_csv(run / LAYERS), _read_csv(run / ANSWERS)
    parts = [
        _render_header(summary),
        _render_evidence(layers, summary),
        _render_sweep(summary),
        _render_conditions(summary),
        _render_answers(answers),
        _render_notes(summary),
    ]
    (run / REPORT).write_text(page(f"phoque psm-probe: {name}", "".join(parts)), encoding="utf-8")
    _draw_pictures(run, layers, summary)
    (run / CARD).write_text(_render_card(name, summary), encoding="utf-8")


def _read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as f:
        return list(csv.DictReader(f))


def _render_header(summary: dict[str, Any]) -> str:
    models, selected = summary["models"], summary["selected"]
    base = html.escape(f"{models['base']['name']} ({models['base']['origin']})")
    tuned = "".join(f", {k}: {html.escape(v)}" for k, v in models["adapters"].items())
    warnings = "".join(f'<p class="warning">{html.escape(w)}</p>' for w in summary["warnings"])
    rows = "".join(
        f'<tr><td><b class="{v["verdict"].split()[0]}">{v["verdict"]}</b></td><td>{VERDICT_QUESTIONS[k]}<br>'
        f'<span class="dim">{k}: {_format(v["number"])}. {html.escape(v["rule"])}</span></td></tr>'
        for k, v in summary["verdicts"].items()
    )
    return (
        f"<h1>phoque psm-probe</h1><div class='dim'>{html.escape(summary['persona']['name'])} in {base}{tuned}</div>"
        f"{warnings}<h2>Verdicts</h2><table><tbody>{rows}</tbody></table>"
        f"<p>Steered at block {selected['layer']} by {selected['coeff_rel_resid']:g} of the residual norm: "
        f"{html.escape(selected['rule'])}. The trait is <i>{html.escape(summary['trait']['scorer'])}</i>.</p>"
    )


def _render_evidence(layers: list[dict[str, str]], summary: dict[str, Any]) -> str:
    response_rows = [row for row in layers if row["extraction"] == "response_avg"]
    prompt_rows = [row for row in layers if row["extraction"] == "prompt_last"]
    plots = [
        figure("AUROC on held-out questions, response tokens", line_plot(_auroc_curves(response_rows), "block")),
        figure(
            "AUROC at the last prompt token, where the placebo is usually as high",
            line_plot(
                [_make_series("persona", prompt_rows, "auroc"), _make_series("placebo", prompt_rows, "placebo_auroc")],
                "block",
            ),
        ),
        figure(
            "split-half reliability of the vector (cosine)",
            line_plot(
                [
                    _make_series("response tokens", response_rows, "split_half_cos"),
                    _make_series("last prompt token", prompt_rows, "split_half_cos"),
                ],
                "block",
            ),
        ),
        figure(
            "length of the vector in residual norms (a scale, not evidence)",
            line_plot([_make_series("response tokens", response_rows, "rel_norm")], "block"),
        ),
    ]
    shift_plots = ""
    for name in summary["models"]["adapters"]:
        for kind, text in (("shift", "over its own answers"), ("same_text", "over the base model's answers")):
            curves = [
                _make_series(
                    "along the vector",
                    response_rows,
                    f"{name}_{kind}_cos",
                    f"{name}_{kind}_cos_ci_low",
                    f"{name}_{kind}_cos_ci_high",
                ),
                _make_series("along the placebo vector", response_rows, f"{name}_{kind}_placebo_cos"),
                _make_series("95 % of random directions", response_rows, f"{name}_{kind}_random_cos_p95"),
            ]
            shift_plots += figure(
                f"shift of the {CONDITION_LABELS[name]} model {text} (cosine)", line_plot(curves, "block")
            )
    if shift_plots:
        shift_plots = f'<h2>The fine-tune</h2><div class="grid2">{shift_plots}</div>'
    return f'<h2>Evidence, block by block</h2><div class="grid2">{"".join(plots)}</div>{shift_plots}'


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


def _render_sweep(summary: dict[str, Any]) -> str:
    trait, nll = (heat_map(*_heat_map_arguments(summary, c)) for c in (summary["trait"]["column"], "nll_base"))
    neutral = summary["sweep"][0]
    text = (
        f"Means on the validation questions. Unsteered answers have trait {neutral[summary['trait']['column']]:.3g} "
        f"and {neutral['nll_base']:.3g} nats per token."
    )
    left = figure(f"trait: {summary['trait']['scorer']} (higher: more of the persona)", trait)
    right = figure("coherence: nats per token under the base model (lower is better)", nll)
    return f'<h2>Steering</h2><p>{text}</p><div class="grid2">{left}{right}</div>'


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


def _render_conditions(summary: dict[str, Any]) -> str:
    columns = {c: name for name, c in summary["scorer_columns"].items()} | MEASUREMENT_LABELS
    rows = [
        (
            CONDITION_LABELS[name],
            *(
                f"{_format(means[c]['mean'])} ({_format(means[c]['ci95'][0])} to {_format(means[c]['ci95'][1])})"
                for c in columns
            ),
        )
        for name, means in summary["conditions"].items()
    ]
    contrast_rows = [
        (
            pair,
            scorer,
            _format(g["diff"]),
            f"{_format(g['ci95'][0])} to {_format(g['ci95'][1])}",
            f"{g['p']:.3f}",
            g["n"],
        )
        for pair, scorers in summary["contrasts"].items()
        for scorer, g in scorers.items()
    ]
    agreement_rows = [(k, _format(v)) for k, v in summary["scorer_agreement"].items()]
    agreement = table(("scorers", "Spearman's rank correlation"), agreement_rows) if agreement_rows else ""
    head = ("contrast", "scorer", "difference", "95 %", "p", "questions")
    return (
        f"<h2>Results on the test questions</h2><div class='scroll'>"
        f"{table(('condition', *columns.values()), rows)}</div>"
        f"<details><summary>Differences, and agreement of the scorers</summary><div class='scroll'>"
        f"{table(head, contrast_rows)}{agreement}</div></details>"
    )


def _render_answers(answers: list[dict[str, str]]) -> str:
    parts = []
    for prompt_id in dict.fromkeys(row["prompt_id"] for row in answers):
        rows = [row for row in answers if row["prompt_id"] == prompt_id and row["sample_idx"] == "greedy"]
        cells = "".join(
            f'<div class="answer"><b>{CONDITION_LABELS[row["condition"]]}</b>'
            f"{html.escape(row['response']) or '(empty)'}</div>"
            for row in rows
        )
        parts.append(f"<h3>{html.escape(rows[0]['prompt'])}</h3><div class='answers'>{cells}</div>")
    return f'<h2>Greedy answers</h2><p class="warning">{CONTENT}</p>{"".join(parts)}'


def _render_notes(summary: dict[str, Any]) -> str:
    rows = [(name, row["value"], row["source"]) for name, row in summary["config"].items()]
    run = summary["run"]
    versions = ", ".join(f"{name} {v}" for name, v in run["versions"].items())
    limits = "".join(f"<li>{html.escape(text)}</li>" for text in summary["limitations"])
    left_out = f"{summary['tokens']['massive']} of {summary['tokens']['massive'] + summary['tokens']['kept']}"
    return (
        f"<h2>How to read this report</h2>{READING_GUIDE}<h2>Limits</h2><ul>{limits}</ul>"
        f"<details><summary>Settings</summary><div class='scroll'>{table(('name', 'value', 'from'), rows)}</div>"
        f"</details><p class='dim'>phoque {run['phoque']}; {html.escape(versions)}; {html.escape(run['device'])}; "
        f"{run['seconds']} s; response tokens left out for massive activations, summed over blocks: {left_out}</p>"
    )


def _format(value: Any) -> str:
    return "–" if value is None else f"{value:.3g}"


def _draw_pictures(run: Path, layers: list[dict[str, str]], summary: dict[str, Any]) -> None:
    """Draw the curves by block and the sweep as PNG files, which a card on the Hub can show."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    response_rows = [row for row in layers if row["extraction"] == "response_avg"]
    fig, axis = pyplot.subplots(figsize=(7, 3.6), layout="constrained")
    for line in _auroc_curves(response_rows):
        x, y = zip(*line.points, strict=True)
        (plotted,) = axis.plot(x, y, marker="o", markersize=3, label=line.name)
        if line.band:
            axis.fill_between(
                x, [b[1] for b in line.band], [b[2] for b in line.band], color=plotted.get_color(), alpha=0.15
            )
    axis.axhline(0.5, color="grey", linewidth=0.8, linestyle=":")
    axis.set(xlabel="block", ylabel="AUROC, held-out questions")
    axis.legend(fontsize=8, frameon=False)
    fig.savefig(run / CURVES_PNG, dpi=130)
    fig, axes = pyplot.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    titles = (f"trait: {summary['trait']['scorer']}", "nats per token under the base model")
    for axis, column, title in zip(axes, (summary["trait"]["column"], "nll_base"), titles, strict=True):
        blocks, strengths, values, labels, selected_cell, incoherent = _heat_map_arguments(summary, column)
        image = axis.imshow(
            [[v if v is not None else float("nan") for v in row] for row in values], origin="lower", aspect="auto"
        )
        axis.set(
            xticks=range(len(strengths)),
            xticklabels=strengths,
            yticks=range(len(blocks)),
            yticklabels=blocks,
            xlabel=labels[1],
            ylabel=labels[0],
        )
        axis.set_title(title, fontsize=10)
        axis.plot(selected_cell[1], selected_cell[0], marker="s", markersize=16, fillstyle="none", color="white")
        for i, j in incoherent:
            axis.plot(j, i, marker="x", color="red", markersize=7)
        fig.colorbar(image, ax=axis)
    fig.savefig(run / SWEEP_PNG, dpi=130)
    pyplot.close("all")


def _render_card(name: str, summary: dict[str, Any]) -> str:
    verdicts = "\n".join(
        f"| {VERDICT_QUESTIONS[k]} | {v['verdict']} | {_format(v['number'])} |" for k, v in summary["verdicts"].items()
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
![Trait and coherence by block and coefficient]({SWEEP_PNG})

`{REPORT}` has all results and explains how to read them. `{LAYERS}`, `{ANSWERS}` and `{SUMMARY}` hold the numbers,
`{VECTORS}` and `{SAFETENSORS}` the vectors. `{CONTROL_VECTOR}` is for llama.cpp (`--control-vector`).
"""
