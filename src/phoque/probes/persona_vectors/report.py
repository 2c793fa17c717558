"""report.html of a probe, README.md for a repository's page, and two pictures for it; made from the run's own files."""

import csv
import html
import json
from pathlib import Path
from typing import Any

from phoque.probes.persona_vectors.files import ANSWERS, CONTROL, LAYERS, SUMMARY, TENSORS, VECTORS
from phoque.reports.html import Series, figure, heat_map, line_plot, page, table

NAME, CARD = "report.html", "README.md"
CURVES, MAPS = "layers.png", "sweep.png"
CONTENT = "The answers below may be those of the persona that was trained or asked for."
MEANINGS = {
    "follows": "Does the model follow the persona's prompt?",
    "separable": "Is there a direction that tells the persona from neutral on questions it was not made from?",
    "specific": "Is it the persona's, and not that of any change of prompt?",
    "causal": "Does adding it cause the behaviour, more than random directions do?",
    "coherent": "Do steered answers still make sense?",
    "tuned_moves_along_vector": "Did the fine-tune move along it?",
}
NAMES = {
    "neutral": "neutral prompt",
    "persona": "persona's prompt",
    "neutral_plus_vector": "neutral + vector",
    "neutral_plus_random": "neutral + random",
    "neutral_minus_vector": "neutral − vector",
    "tuned": "fine-tuned",
    "control": "control fine-tune",
}
MEASURED = {
    "nll_base": "nats a token",
    "distinct2": "distinct-2",
    "n_tokens": "tokens",
    "pathway_mass_mean": "lexicon comes next",
}
READING = """<ul>
<li><b>Block</b> counts from 0 and means the residual stream after that decoder block, before the final norm.</li>
<li><b>AUROC</b> is the chance that a held-out question's answer under the persona's prompt lies further along the
vector than one under the neutral prompt: 0.5 is chance. The vector was made from other questions.</li>
<li>The <b>placebo</b> is the same method with a polite paraphrase for a persona. Where it does as well, the vector
tells prompts apart, not personas. The <b>last prompt token</b> nearly always does: it has read the system prompt.</li>
<li><b>Transfer</b> reads the persona's text after a neutral prompt: what is left is in the text itself.</li>
<li>The <b>coefficient</b> is in units of the mean norm of the residual stream at that block. A struck-out cell is not
coherent; the framed one was chosen on the validation questions, and everything else is reported on the test questions.
</li>
<li><b>Intervals</b> are 95 %, bootstrapped over questions; p-values flip signs of paired differences; a question is one
observation, however many tokens, paraphrases or samples it has.</li></ul>"""


def write(run: Path, name: str) -> None:
    """Write the report, the card and its pictures into a run folder."""
    summary = json.loads((run / SUMMARY).read_text("utf-8"))
    layers, answers = _rows(run / LAYERS), _rows(run / ANSWERS)
    parts = [
        _head(summary),
        _layers(layers, summary),
        _sweep(summary),
        _conditions(summary),
        _answers(answers),
        _about(summary),
    ]
    (run / NAME).write_text(page(f"phoque psm-probe: {name}", "".join(parts)), encoding="utf-8")
    _pictures(run, layers, summary)
    (run / CARD).write_text(_card(name, summary), encoding="utf-8")


def _rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as f:
        return list(csv.DictReader(f))


def _head(summary: dict[str, Any]) -> str:
    models, chosen = summary["models"], summary["selected"]
    base = html.escape(f"{models['base']['name']} ({models['base']['origin']})")
    tuned = "".join(f", {k}: {html.escape(v)}" for k, v in models["adapters"].items())
    warnings = "".join(f'<p class="warning">{html.escape(w)}</p>' for w in summary["warnings"])
    rows = "".join(
        f'<tr><td><b class="{v["verdict"].split()[0]}">{v["verdict"]}</b></td><td>{MEANINGS[k]}<br>'
        f'<span class="dim">{k}: {_short(v["number"])}. {html.escape(v["rule"])}</span></td></tr>'
        for k, v in summary["verdicts"].items()
    )
    return (
        f"<h1>phoque psm-probe</h1><div class='dim'>{html.escape(summary['persona']['name'])} in {base}{tuned}</div>"
        f"{warnings}<h2>Verdicts</h2><table><tbody>{rows}</tbody></table>"
        f"<p>Steered at block {chosen['layer']} by {chosen['coeff_rel_resid']:g} of the residual norm: "
        f"{html.escape(chosen['rule'])}. The trait is <i>{html.escape(summary['trait']['scorer'])}</i>.</p>"
    )


def _layers(layers: list[dict[str, str]], summary: dict[str, Any]) -> str:
    own = [row for row in layers if row["extraction"] == "response_avg"]
    last = [row for row in layers if row["extraction"] == "prompt_last"]
    plots = [
        figure("AUROC on held-out questions, response tokens", line_plot(_curves(own), "block")),
        figure(
            "the same at the last prompt token: the placebo does as well",
            line_plot([_series("persona", last, "auroc"), _series("placebo", last, "placebo_auroc")], "block"),
        ),
        figure(
            "halves of the questions agree (cosine)",
            line_plot(
                [
                    _series("response tokens", own, "split_half_cos"),
                    _series("last prompt token", last, "split_half_cos"),
                ],
                "block",
            ),
        ),
        figure(
            "length of the vector, in residual norms: no evidence, but the scale",
            line_plot([_series("response tokens", own, "rel_norm")], "block"),
        ),
    ]
    moved = ""
    for name in summary["models"]["adapters"]:
        for kind, what in (("shift", "in its own answers"), ("same_text", "reading the base model's answers")):
            curves = [
                _series(
                    "along the vector",
                    own,
                    f"{name}_{kind}_cos",
                    f"{name}_{kind}_cos_ci_low",
                    f"{name}_{kind}_cos_ci_high",
                ),
                _series("along the placebo's", own, f"{name}_{kind}_placebo_cos"),
                _series("95 % of random directions", own, f"{name}_{kind}_random_cos_p95"),
            ]
            moved += figure(f"how the {NAMES[name]} model moved, {what} (cosine)", line_plot(curves, "block"))
    if moved:
        moved = f'<h2>The fine-tune</h2><div class="grid2">{moved}</div>'
    return f'<h2>Evidence, block by block</h2><div class="grid2">{"".join(plots)}</div>{moved}'


def _curves(own: list[dict[str, str]]) -> list[Series]:
    return [
        _series("persona", own, "auroc", "auroc_ci_low", "auroc_ci_high"),
        _series("placebo", own, "placebo_auroc"),
        _series("persona's text, neutral prompt", own, "transfer_auroc"),
        _series("95 % of random directions", own, "random_auroc_p95"),
    ]


def _series(name: str, rows: list[dict[str, str]], column: str, low: str = "", high: str = "") -> Series:
    points = [(float(r["layer"]), float(r[column])) for r in rows]
    band = [(float(r["layer"]), float(r[low]), float(r[high])) for r in rows] if low else []
    return Series(name, points, band)


def _sweep(summary: dict[str, Any]) -> str:
    trait, nll = (heat_map(*_map(summary, c)) for c in (summary["trait"]["column"], "nll_base"))
    neutral = summary["sweep"][0]
    text = (
        f"On the validation questions; unsteered answers have {neutral[summary['trait']['column']]:.3g} and "
        f"{neutral['nll_base']:.3g}."
    )
    left = figure(f"trait: {summary['trait']['scorer']}, more is more of the persona", trait)
    right = figure("coherence: nats a token under the base model, less is better", nll)
    return f'<h2>Steering</h2><p>{text}</p><div class="grid2">{left}{right}</div>'


def _map(summary: dict[str, Any], column: str) -> tuple[Any, ...]:
    """Rows, columns, values, labels, the chosen cell and the incoherent ones of a sweep."""
    cells = summary["sweep"][1:]
    layers = sorted({c["layer"] for c in cells})
    strengths = sorted({c["coeff_rel_resid"] for c in cells})
    at = {(c["layer"], c["coeff_rel_resid"]): c for c in cells}
    values = [[at[layer, strength][column] for strength in strengths] for layer in layers]
    chosen = summary["selected"]
    marked = (layers.index(chosen["layer"]), strengths.index(chosen["coeff_rel_resid"]))
    crossed = [(i, j) for i, a in enumerate(layers) for j, b in enumerate(strengths) if not at[a, b]["coherent"]]
    return [str(x) for x in layers], [f"{x:g}" for x in strengths], values, ("block", "coefficient"), marked, crossed


def _conditions(summary: dict[str, Any]) -> str:
    columns = {c: name for name, c in summary["scorer_columns"].items()} | MEASURED
    rows = [
        (
            NAMES[name],
            *(
                f"{_short(found[c]['mean'])} ({_short(found[c]['ci95'][0])} to {_short(found[c]['ci95'][1])})"
                for c in columns
            ),
        )
        for name, found in summary["conditions"].items()
    ]
    gaps = [
        (pair, scorer, _short(g["diff"]), f"{_short(g['ci95'][0])} to {_short(g['ci95'][1])}", f"{g['p']:.3f}", g["n"])
        for pair, scorers in summary["contrasts"].items()
        for scorer, g in scorers.items()
    ]
    agreed = [(k, _short(v)) for k, v in summary["scorer_agreement"].items()]
    both = table(("scorers", "Spearman's rank correlation"), agreed) if agreed else ""
    head = ("contrast", "scorer", "difference", "95 %", "p", "questions")
    return (
        f"<h2>What was measured on the test questions</h2><div class='scroll'>"
        f"{table(('condition', *columns.values()), rows)}</div>"
        f"<details><summary>Differences, and whether the scorers agree</summary><div class='scroll'>"
        f"{table(head, gaps)}{both}</div></details>"
    )


def _answers(answers: list[dict[str, str]]) -> str:
    parts = []
    for number in dict.fromkeys(row["prompt_id"] for row in answers):
        own = [row for row in answers if row["prompt_id"] == number and row["sample_idx"] == "greedy"]
        cells = "".join(
            f'<div class="answer"><b>{NAMES[row["condition"]]}</b>{html.escape(row["response"]) or "(nothing)"}</div>'
            for row in own
        )
        parts.append(f"<h3>{html.escape(own[0]['prompt'])}</h3><div class='answers'>{cells}</div>")
    return f'<h2>Answers, greedy</h2><p class="warning">{CONTENT}</p>{"".join(parts)}'


def _about(summary: dict[str, Any]) -> str:
    rows = [(name, row["value"], row["source"]) for name, row in summary["config"].items()]
    run = summary["run"]
    versions = ", ".join(f"{name} {v}" for name, v in run["versions"].items())
    limits = "".join(f"<li>{html.escape(text)}</li>" for text in summary["limitations"])
    left_out = f"{summary['tokens']['massive']} massive of {summary['tokens']['massive'] + summary['tokens']['kept']}"
    return (
        f"<h2>How to read it</h2>{READING}<h2>Limits</h2><ul>{limits}</ul>"
        f"<details><summary>Settings</summary><div class='scroll'>{table(('name', 'value', 'from'), rows)}</div>"
        f"</details><p class='dim'>phoque {run['phoque']}; {html.escape(versions)}; {html.escape(run['device'])}; "
        f"{run['seconds']} s; response tokens left out, over all blocks: {left_out}</p>"
    )


def _short(value: Any) -> str:
    return "–" if value is None else f"{value:.3g}"


def _pictures(run: Path, layers: list[dict[str, str]], summary: dict[str, Any]) -> None:
    """The layer curves and the sweep as PNG, which a card on the Hub can show."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    own = [row for row in layers if row["extraction"] == "response_avg"]
    fig, axis = pyplot.subplots(figsize=(7, 3.6), layout="constrained")
    for line in _curves(own):
        x, y = zip(*line.points, strict=True)
        (drawn,) = axis.plot(x, y, marker="o", markersize=3, label=line.name)
        if line.band:
            axis.fill_between(
                x, [b[1] for b in line.band], [b[2] for b in line.band], color=drawn.get_color(), alpha=0.15
            )
    axis.axhline(0.5, color="grey", linewidth=0.8, linestyle=":")
    axis.set(xlabel="block", ylabel="AUROC, held-out questions")
    axis.legend(fontsize=8, frameon=False)
    fig.savefig(run / CURVES, dpi=130)
    fig, axes = pyplot.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    titles = (f"trait: {summary['trait']['scorer']}", "nats a token under the base model")
    for axis, column, title in zip(axes, (summary["trait"]["column"], "nll_base"), titles, strict=True):
        names, strengths, values, labels, marked, crossed = _map(summary, column)
        image = axis.imshow(
            [[v if v is not None else float("nan") for v in row] for row in values], origin="lower", aspect="auto"
        )
        axis.set(
            xticks=range(len(strengths)),
            xticklabels=strengths,
            yticks=range(len(names)),
            yticklabels=names,
            xlabel=labels[1],
            ylabel=labels[0],
        )
        axis.set_title(title, fontsize=10)
        axis.plot(marked[1], marked[0], marker="s", markersize=16, fillstyle="none", color="white")
        for i, j in crossed:
            axis.plot(j, i, marker="x", color="red", markersize=7)
        fig.colorbar(image, ax=axis)
    fig.savefig(run / MAPS, dpi=130)
    pyplot.close("all")


def _card(name: str, summary: dict[str, Any]) -> str:
    verdicts = "\n".join(
        f"| {MEANINGS[k]} | {v['verdict']} | {_short(v['number'])} |" for k, v in summary["verdicts"].items()
    )
    warnings = "".join(f"> **{text}**\n>\n" for text in summary["warnings"])
    adapters = "".join(f", {k} `{v}`" for k, v in summary["models"]["adapters"].items())
    chosen = summary["selected"]
    return f"""# {name}

> **Content warning.** {CONTENT} A vector in this folder can make a model speak like that persona: keep it private.

{warnings}
`phoque psm-probe` of *{summary["persona"]["name"]}* in `{summary["models"]["base"]["name"]}`{adapters}.

| | verdict | number |
|---|---|---|
{verdicts}

Steered at block {chosen["layer"]} by {chosen["coeff_rel_resid"]:g} of the residual norm. Blocks count from 0 and mean
the residual stream after the block.

![AUROC by block]({CURVES})
![Trait and coherence by block and coefficient]({MAPS})

`{NAME}` has everything, with how to read it; `{LAYERS}`, `{ANSWERS}` and `{SUMMARY}` are the numbers; `{VECTORS}` and
`{TENSORS}` the vectors; `{CONTROL}` is for llama.cpp (`--control-vector`).
"""
