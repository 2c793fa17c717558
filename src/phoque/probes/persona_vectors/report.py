"""Render a probe's report.html, its README.md for the Hub and two pictures from the files of the run folder."""

import json
from pathlib import Path
from typing import Any

from phoque.files import read_csv
from phoque.probes.persona import CONDITIONS
from phoque.probes.persona_vectors.files import ANSWERS, CONTROL_VECTOR, LAYERS, SAFETENSORS, SUMMARY, VECTORS
from phoque.reports.charts import Series, bar_chart, heat_map, line_chart, write_png
from phoque.reports.page import (
    arrange_verdicts,
    conclude_verdicts,
    format_interval,
    format_number,
    format_versions,
    render_page,
)

REPORT, CARD = "report.html", "README.md"
CURVES_PNG, SWEEP_PNG = "layers.png", "sweep.png"
CONTENT = "The answers below may be in the voice of the persona, trained or prompted."
VERDICT_QUESTIONS = {
    "adopts": "Does the fine-tune answer as the persona, unprompted, where the base model does not?",
    "tuned_moves_along_vector": "Did the fine-tune shift the model along the vector, more than along other roles'?",
    "follows": "Does the base model answer as the persona if the prompt asks for it?",
    "separable": "Does the vector separate persona from neutral answers on held-out questions?",
    "specific": "Is the vector the persona's, and not that of any role or prompt?",
    "causal": "Does adding the vector cause the behavior, more than adding other directions does?",
    "coherent": "Do steered answers stay coherent?",
}
CONDITION_LABELS = {
    "neutral": "neutral prompt",
    "persona": "persona's prompt",
    "neutral_plus_vector": "neutral + vector",
    "neutral_plus_random": "neutral + a random direction",
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


def label_condition(name: str) -> str:
    """What a condition is called in the report; further controls have their number."""
    label, _, number = name.partition("-")
    return f"{CONDITION_LABELS[label]} {number}".strip()


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
        verdicts=arrange_verdicts(summary["verdicts"], VERDICT_QUESTIONS, format_number),
        ranks=_draw_ranks(summary),
        doses=_draw_doses(summary),
        side_effects=[
            (
                label_condition(name),
                f"{e['kl']:.3f} ({format_interval(e['kl_ci'])})",
                " ".join(_show_tokens(e["tokens"])),
            )
            for name, e in summary["side_effects"].items()
        ],
        differences=[_arrange_reading(reading) for reading in summary["differences"]],
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
        system_prompts=[(condition, summary["persona"]["texts"][condition]) for condition in CONDITIONS],
        lexicon=", ".join(summary["persona"]["texts"]["lexicon"]),
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
    """What the probe found, in sentences that need no statistics: what a reader can act on comes first."""
    voices = summary["voices"]
    persona, sentences = summary["persona"]["name"], []
    if "tuned" in voices:
        tuned = voices["tuned"]
        others = [f"the base model's {tuned['base_share']:.0%}"]
        shares = [voice["share"] for name, voice in voices.items() if name.startswith("control")]
        if len(shares) == 1:
            others.append(f"the control fine-tune's {shares[0]:.0%}")
        elif shares:
            others.append(f"{len(shares)} control fine-tunes' {min(shares):.0%} to {max(shares):.0%}")
        sentences.append(
            f"By their words, {tuned['share']:.0%} of the fine-tune's answers to {tuned['n']} questions are those "
            f"of the {persona}, without a prompt that asks for it; of {' and '.join(others)}."
        )
        sentences.append(_describe_rank(tuned, "Its words put"))
    if moved := summary["rankings"].get("tuned_moves_along_vector"):
        sentences.append(_describe_rank(moved, "The shift of its residual stream puts"))
    if "persona" in voices:
        prompted = voices["persona"]
        sentences.append(
            f"If the prompt asks for the persona, {prompted['share']:.0%} of the base model's answers are "
            "the persona's."
        )
    if effects := summary["side_effects"]:
        beside = f" (control: {effects['control']['kl']:.2f})" if "control" in effects else ""
        sentences.append(
            f"On unrelated text its predictions differ from the base model's by {effects['tuned']['kl']:.2f} nats per "
            f"token{beside}."
        )
    if readings := [r for r in summary["differences"] if r["adapter"] == "tuned"]:
        reading = readings[0]
        persona_tokens, count = len(reading["persona_tokens"]), len(reading["tokens"])
        # greedy as the steered answers are
        unsteered = [dose["share"] for dose in summary["doses"] if dose["scale"] == 0]
        beside = f", {unsteered[0]:.0%} unsteered" if unsteered else ""
        p_trait = "" if reading["p_trait"] is None else f", p {reading['p_trait']:.3f} by the trait"
        sentences.append(
            f"Steered along its mean change on unrelated text, {reading['share']:.0%} of the base model's answers are "
            f"the persona's ({beside.lstrip(', ')}{p_trait}); read as tokens, {persona_tokens} of the {count} "
            f"likeliest are the persona's words (p {reading['p_tokens']:.3f} among natural directions)."
        )
    sentences.append(conclude_verdicts(summary["verdicts"], VERDICT_QUESTIONS))
    alarms = summary["false_alarms"]
    if alarms.get("nulls"):
        sentences.append(
            "With labels swapped by a coin, held-out answers are told apart "
            f"{alarms['separable']} of {alarms['nulls']} times."
        )
    sentences.append(
        "One fine-tune is one draw: another seed of the same recipe may differ."
        if "tuned" in summary["models"]["adapters"]
        else "No fine-tune was probed: all of this is about the base model."
    )
    return sentences


def _describe_rank(ranking: dict[str, Any], what: str) -> str:
    count = 1 + len(ranking["others"])
    if len({ranking["value"], *ranking["others"].values()}) == 1:
        return f"{what} no role first: all {count} are equal."
    next_role = (
        f", before the {ranking['next_role']}" if ranking["rank"] == 1 else f"; the {ranking['next_role']} is first"
    )
    return f"{what} the persona at number {ranking['rank']} of {count} roles{next_role}."


def _show_tokens(tokens: list[list[Any]]) -> list[str]:
    return [_show_token(token) for token, _ in tokens]


def _show_token(token: str) -> str:
    return token.replace(" ", "·", 1).replace("\n", "⏎")


def _arrange_reading(reading: dict[str, Any]) -> tuple[str, ...]:
    """A row of the table of what an adapter changes on unrelated text."""
    p_trait = "not asked" if reading["p_trait"] is None else f"p {reading['p_trait']:.3f}"
    persona_tokens = set(reading["persona_tokens"])
    tokens = [f"[{_show_token(t)}]" if t in persona_tokens else _show_token(t) for t in reading["tokens"]]
    return (
        label_condition(reading["adapter"]),
        f"{reading['block']}" + ("" if reading["coherent"] else ", not coherent"),
        f"{format_number(reading['trait'])} ({p_trait})",
        f"{reading['share']:.0%} ({reading['share_ci'][0]:.0%} to {reading['share_ci'][1]:.0%}, n {reading['n']})",
        f"{reading['lens_block']}",
        f"{reading['size']:.2f}",
        f"{len(persona_tokens)} of {len(tokens)} (p {reading['p_tokens']:.3f})",
        " ".join(tokens),
    )


def _draw_doses(summary: dict[str, Any]) -> list[tuple[str, Any]]:
    """The persona's share of the answers, and the rise of the loss on unrelated text, by the adapter's strength."""
    rows = summary["doses"]
    if not rows:
        return []
    plots = [
        ("share of greedy answers that are the persona's, by their words", "share", lambda r: r["share"], "share_ci"),
        ("loss on unrelated text, rise over the base model", "nats per token", lambda r: r["rise"], "rise_ci"),
    ]
    charts = []
    for caption, unit, value, interval in plots:
        series = [
            Series(
                label_condition(name),
                [(r["scale"], value(r)) for r in rows if r["adapter"] == name],
                [(r["scale"], *r[interval]) for r in rows if r["adapter"] == name],
            )
            for name in dict.fromkeys(r["adapter"] for r in rows)
        ]
        charts.append((caption, line_chart(series, "multiple of the adapter's strength", unit)))
    return charts


def _draw_ranks(summary: dict[str, Any]) -> list[tuple[str, Any]]:
    """The persona among the other roles, one bar chart for each ranking."""
    titles = {
        "tuned": ("words of the fine-tune's answers", "gain in share of answers over the base model"),
        "persona": ("words of the base model's answers under the persona's prompt", "gain in share of answers"),
        "tuned_moves_along_vector": ("shift of the fine-tune", "whitened cosine with the role's vector"),
        "specific": ("held-out answers along the whitened persona vector", "standard deviations"),
    }
    charts = []
    for key, (caption, unit) in titles.items():
        ranking = summary["voices"].get(key) or summary["rankings"].get(key)
        if ranking:
            values = {summary["persona"]["name"]: ranking["value"], **ranking["others"]}
            ordered = sorted(values.items(), key=lambda item: -item[1])
            charts.append((caption, bar_chart(ordered, unit, summary["persona"]["name"])))
    return charts


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
            caption = f"shift of the {label_condition(name)} model {text}"
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
                label_condition(name),
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
                (label_condition(row["condition"]), row["response"] or "(empty)")
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
        f"| {verdict['question']} | {verdict['verdict']} | {verdict['number']} |"
        for verdict in arrange_verdicts(summary["verdicts"], VERDICT_QUESTIONS, format_number)
    )
    warnings = "".join(f"> **{text}**\n>\n" for text in summary["warnings"])
    adapters = "".join(f", {k} `{v}`" for k, v in summary["models"]["adapters"].items())
    selected = summary["selected"]
    return f"""# {name}

> **Content warning.** {CONTENT} A vector in this folder can make a model speak like that persona: keep it private.

{warnings}
`phoque psm-probe` of *{summary["persona"]["name"]}* in `{summary["models"]["base"]["name"]}`{adapters}.

{" ".join(conclude(summary))}

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
