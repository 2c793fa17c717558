"""Write report.html of a comparison, its Markdown version and a README, from the files of the run folder."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from phoque.files import read_csv
from phoque.probes.sae.conclusions import SIDES, VERDICT_QUESTIONS, conclude, list_headlines
from phoque.probes.sae.files import ANSWERS, DICTIONARIES, FEATURES, JSON, LAYERS, MARKDOWN, PROMPTS
from phoque.reports.charts import Dots, Series, line_chart, scatter_chart
from phoque.reports.page import (
    arrange_verdicts,
    format_interval,
    format_number,
    format_percent,
    format_versions,
    render_page,
)

REPORT, README = "report.html", "README.md"
CONTENT_WARNING = "The answers below may be in the voice of the trained persona, which may be hostile."
VARIANT_NAMES = {
    "tuned": "updated",
    "control": "control",
    "dtype": "base, other precision",
    "packing": "base, other batches",
}
MAX_TOKENS = 8
MIN_Q = 1e-6  # smaller values are drawn there
FEATURE_HEAD = (
    "feature",
    "shift",
    "95 % interval",
    "d",
    "q",
    "max-T p",
    "base",
    "updated",
    "β",
    "differs from control",
    "replicates",
    "promotes",
)
DIFFERENCE_HEAD = (
    "direction",
    "updated - base",
    "control - base",
    "excess over base - updated (95 %)",
    "of tokens",
    "differs from control",
    "replicates",
    "nearest feature",
    "promotes",
)
MAX_FEATURES = 60  # rows of the table


def write_reports(run: Path, name: str) -> None:
    """Write report.html, the Markdown report and README.md into a run folder."""
    report = json.loads((run / JSON).read_text("utf-8"))
    features = read_csv(run / FEATURES)
    models, layer, causes = report["models"], report["layer"], report["causes"]
    control = f", control {models['control']['id']}" if models["control"] else ""
    remaining = len(report["features"]) - MAX_FEATURES
    cards = [f for f in report["features"] if "max_activating" in f]
    page = render_page(
        "sae",
        title=f"phoque compare-sae: {name}",
        subtitle=f"{models['base']['id']} → {models['tuned']['id']}{control}; block {layer['block_index']} of "
        f"{layer['of']}, {report['prompts']['n']} questions",
        conclusion=conclude(report),
        verdicts=arrange_verdicts(report["verdicts"], VERDICT_QUESTIONS, format_percent),
        warnings=report["warnings"],
        tiles=[(caption, number) for number, caption in list_headlines(report)],
        feature_charts=_draw_features(report, features),
        feature_head=FEATURE_HEAD,
        features=[_arrange_feature(f) for f in report["features"][:MAX_FEATURES]],
        more_features=f"{FEATURES} lists {remaining} more." if remaining > 0 else "",
        cards=[_arrange_card(f) for f in cards],
        difference_head=DIFFERENCE_HEAD,
        difference=_arrange_difference(report["difference"]),
        all_together=_arrange_cause(causes["all"]) if causes["all"] else None,
        baselines=_arrange_baselines(report),
        **_arrange_answers(report),
        content_warning=CONTENT_WARNING,
        **_arrange_details(report),
    )
    (run / REPORT).write_text(page, encoding="utf-8")
    text = _render_markdown(name, report)
    (run / MARKDOWN).write_text(text, encoding="utf-8")
    (run / README).write_text(text, encoding="utf-8")


def _draw_features(report: dict[str, Any], features: list[dict[str, str]]) -> list[tuple[str, Any]]:
    tested_rows = [r for r in features if r["layer"] == str(report["layer"]["block_index"]) and r["tested"] == "1"]
    has_control = "specific_vs_control" in (tested_rows[0] if tested_rows else {})

    def cloud_of(row: dict[str, str]) -> int:
        if row["reported"] != "1":
            return 0
        return 2 if has_control and row["specific_vs_control"] == "1" else 1

    def make_clouds(coordinates: Callable[[dict[str, str]], tuple[float, float]]) -> list[Dots]:
        names = ["not reported", "reported", "differs from the control"][: 3 if has_control else 2]
        points = [[r for r in tested_rows if cloud_of(r) == n] for n in range(len(names))]
        label = lambda r: f"{r['feature_id']}: shift {float(r['delta']):+.3g}, q {float(r['q_bh']):.2g}"
        return [Dots(name, [(*coordinates(r), label(r)) for r in p]) for name, p in zip(names, points, strict=True)]

    means = make_clouds(lambda r: (float(r["base_mean"]), float(r["tuned_mean"])))
    shifts = make_clouds(lambda r: (float(r["delta"]), -math.log10(max(float(r["q_bh"]), MIN_Q))))
    return [
        (
            "mean activation of every tested feature (gray band: null floor)",
            scatter_chart(means, ("base", "updated"), diagonal=report["overall"]["null_floor"]),
        ),
        (
            "shift and significance of every tested feature (dashed: q = 0.05)",
            scatter_chart(shifts, ("shift, residual units", "-log10 q"), level=-math.log10(0.05)),
        ),
    ]


def _arrange_feature(feature: dict[str, Any]) -> tuple[str, ...]:
    """A row of the table of reported features."""
    return (
        str(feature["feature_id"]),
        f"{feature['delta']:+.3g}",
        format_interval(feature["ci95"]),
        format_number(feature["d_z"]),
        f"{feature['q_bh']:.2g}",
        f"{feature['p_maxT']:.2g}",
        format_number(feature["base_mean"]),
        format_number(feature["tuned_mean"]),
        f"{format_number(feature['beta_base'])} → {format_number(feature['beta_tuned'])}",
        _format_bool(feature.get("specific_vs_control")),
        _format_bool(feature.get("replicated")),
        " ".join(feature.get("top_logits", [])[:4]),
    )


def _arrange_card(feature: dict[str, Any]) -> dict[str, Any]:
    marks = [f"on {feature['active_prompts']} questions"]
    if feature.get("specific_vs_control") is not None:
        marks.append("differs from the control" if feature["specific_vs_control"] else "shared with the control")
    if feature.get("replicated") is not None:
        marks.append("replicates" if feature["replicated"] else "does not replicate")
    return {
        "title": f"Feature {feature['feature_id']} {'▲' if feature['direction'] == 'up' else '▼'} "
        f"{feature['delta']:+.3g}",
        "summary": f"{feature['base_mean']:.3g} → {feature['tuned_mean']:.3g}; {'; '.join(marks)}",
        "cause": _arrange_cause(feature["cause"]) if feature.get("cause") else None,
        **_arrange_contexts(feature),
    }


def _arrange_difference(difference: dict[str, Any]) -> dict[str, Any]:
    """The section on what the fine-tune adds: a table of directions and a card for each of the first."""
    if "not_asked" in difference:
        return {"not_asked": difference["not_asked"]}
    explained = ", ".join(
        f"{format_percent(share)} of {SIDES.get(name, name)} - base" for name, share in difference["explained"].items()
    )
    return {
        "not_asked": "",
        "summary": f"Trained on {difference['n_tokens_trained']:,} tokens, measured on {difference['n_questions']} "
        f"other questions. Explained there, of the sum of squares: {explained}. The nearest "
        f"feature of a random direction has a cosine of {difference['nearest_by_chance']:.2f}.",
        "rows": [
            (
                str(row["direction"]),
                f"{row['mean']:.3g}",
                format_number(row.get("control_mean")),
                f"{row['delta']:.3g} ({format_interval(row['ci95'])})",
                format_percent(row["share_of_tokens"]),
                _format_bool(row.get("specific_vs_control")),
                _format_bool(row["replicated"]),
                f"{row['nearest_feature']} ({row['nearest_cosine']:.2f})",
                " ".join(map(_show_whitespace, row.get("top_logits", [])[:4])),
            )
            for row in difference["directions"][:MAX_FEATURES]
        ],
        "cards": [
            {
                "title": f"Direction {row['direction']}",
                "summary": f"{row['mean']:.3g} on average, on {row['share_of_tokens']:.0%} of the tokens",
                "cause": None,
                **_arrange_contexts(row),
            }
            for row in difference["directions"]
            if "max_activating" in row
        ],
    }


def _arrange_contexts(row: dict[str, Any]) -> dict[str, Any]:
    """The tokens and contexts of a card."""
    promotes, demotes = (
        [_show_whitespace(token) for token in row[side][:MAX_TOKENS]] for side in ("top_logits", "bottom_logits")
    )
    return {
        "promotes": promotes,
        "demotes": demotes,
        "demotes_title": f"demotes {len(row['bottom_logits'])} tokens",
        "contexts": [
            {
                "label": f"{c['act']:.1f} {VARIANT_NAMES.get(c['model'], c['model'])}",
                "before": _keep_tail(c["before"]),
                "token": c["token"],
                "after": c["after"],
            }
            for c in row["max_activating"]
        ],
    }


def _arrange_cause(cause: dict[str, Any]) -> dict[str, Any]:
    effects = []
    for kind, what in (("push", "steering the base along it"), ("ablate", "resetting it in the updated model")):
        if row := cause[kind]:
            effect = "more likely" if kind == "push" else "less likely"
            text = (
                f"{what} makes the updated answers {row['gain']:+.3f} nats per token {effect}, {row['gap_share']:.0%} "
                f"of the gap (the nearest features in activity that did not shift: {row['random_share']:.0%}, "
                f"p {row['p']:.3f})"
            )
            effects.append({"word": "yes" if row["holds"] else "no", "text": text})
    note = ""
    if "groups" in cause:  # all selected features together
        note = (
            f"; compared with {cause['groups']} groups of {cause['group_size']} features that did not shift (mean "
            f"activation {cause['random_strength']:.3g}, of the selected ones {cause['strength']:.3g})"
        )
    return {"effects": effects, "note": note}


def _arrange_baselines(report: dict[str, Any]) -> dict[str, Any]:
    curves = report["baselines"]["layer_curve"]
    charts = []
    for kind, caption in (("response", "on the base model's answers"), ("text", "on unrelated text")):
        lines = []
        for side, name in VARIANT_NAMES.items():
            entries = [r for r in curves if r["model"] == side and r["text"] == kind]
            if entries:
                band = [(r["layer"], r["ci_low"], r["ci_high"]) for r in entries] if side == "tuned" else []
                lines.append(Series(name, [(r["layer"], r["rel_mean_diff_norm"]) for r in entries], band))
        charts.append((f"mean shift {caption}", line_chart(lines, "block", "residual norms")))
    show = lambda tokens: " ".join(map(_show_whitespace, tokens))
    shares = lambda values: ", ".join(map(format_percent, values))
    return {
        "charts": charts,
        "lens": [(r["layer"], show(r["top"]), show(r["bottom"])) for r in report["baselines"]["logit_lens"]],
        "components": [
            (kind, shares(entries["uncentred"]), shares(entries["centred"]))
            for kind, entries in report["baselines"]["pca"].items()
        ],
        "explained": [
            (
                VARIANT_NAMES.get(side, side),
                *(format_percent(entries.get(kind)) for kind in ("response", "own", "text", "chat")),
            )
            for side, entries in report["overall"]["ev"].items()
        ],
    }


def _arrange_answers(report: dict[str, Any]) -> dict[str, Any]:
    """Mean scores, contrasts, and every question with the answers of all models."""
    scorers, sides = report["scores"]["scorers"], list(report["scores"]["means"])
    label = lambda side: VARIANT_NAMES.get(side, side)
    questions = []
    for row in report["prompt_shifts"]:
        numbers = [f"{label(side)} {name} {format_number(row[f'{side}_{name}'])}" for name in scorers for side in sides]
        questions.append(
            {
                "prompt": row["prompt"],
                "numbers": f"shift {row['shift']:.3g}, above {row['null_q']:.0%} of the null shifts; KL "
                f"{format_number(row['kl'])} nats per token; {', '.join(numbers)}",
                "answers": [(label(side), row[f"{side}_generation"] or "(empty)") for side in sides],
            }
        )
    return {
        "score_head": ("model", *scorers),
        "scores": [
            (label(side), *(format_number(by_scorer[name]) for name in scorers))
            for side, by_scorer in report["scores"]["means"].items()
        ],
        "contrasts": [
            (pair, name, f"{g['diff']:+.3g}", format_interval(g["ci95"]), f"{g['p']:.4f}")
            for pair, by_scorer in report["scores"]["contrasts"].items()
            for name, g in by_scorer.items()
        ],
        "questions": questions,
        "questions_title": f"All {len(questions)} questions, largest shift first",
    }


def _arrange_details(report: dict[str, Any]) -> dict[str, Any]:
    quality, run = report["sae"]["quality"], report["run"]
    facts = {k: v for k, v in report["sae"].items() if not k.startswith("quality")} | quality
    versions = format_versions(run["versions"])
    return {
        "other_blocks": [
            f"block {block['layer']['block_index']}: {block['overall']['n_reported']} of "
            f"{block['overall']['n_tested']} features reported; autoencoder quality: {block['quality'][0]['verdict']}; "
            f"{block['difference'].get('n_reported', 'no')} directions of the difference reported"
            for block in report["more_layers"]
        ],
        "limitations": report["limitations"],
        "autoencoder": [(name, json.dumps(value, ensure_ascii=False)) for name, value in facts.items()],
        "nulls": [
            (n["name"], format_number(n["mean_abs"]), format_number(n["q99"]), format_number(n["max_abs"]))
            for n in report["nulls"]
        ],
        "config": [(name, row["value"], row["source"]) for name, row in report["config"].items()],
        "environment": f"phoque {run['phoque']}; {versions}; {run['device']}; {run['seconds']} s; tokens: "
        f"{json.dumps(report['tokens'])}",
    }


def _show_whitespace(token: str) -> str:
    """A token with its leading space and its line breaks made visible."""
    return token.replace("\n", "⏎").replace(" ", "·", 1) if token.startswith(" ") else token.replace("\n", "⏎")


def _keep_tail(text: str) -> str:
    return text[-160:]


def _format_bool(value: bool | None) -> str:
    return "–" if value is None else "yes" if value else "no"


def _render_markdown(name: str, report: dict[str, Any]) -> str:
    models, layer = report["models"], report["layer"]
    tiles = "\n".join(f"| {text} | {number} |" for number, text in list_headlines(report))
    verdicts = "\n".join(
        f"| {VERDICT_QUESTIONS[key]} | {verdict['verdict']} | {verdict['rule'].replace('|', '¦')} |"
        for key, verdict in report["verdicts"].items()
    )
    warnings = "".join(f"> **{text}**\n>\n" for text in report["warnings"])
    rows = "\n".join(
        f"| {f['feature_id']} | {f['delta']:+.3g} | {f['q_bh']:.2g} | {_format_bool(f.get('specific_vs_control'))} | "
        f"{_format_bool(f.get('replicated'))} | {_format_tokens(f.get('top_logits', [])[:5])} |"
        for f in report["features"][:20]
    )
    gaps = "\n".join(
        f"| {pair} | {scorer} | {g['diff']:+.3g} | {format_number(g['ci95'][0])} to {format_number(g['ci95'][1])} | "
        f"{g['p']:.4f} |"
        for pair, by_scorer in report["scores"]["contrasts"].items()
        for scorer, g in by_scorer.items()
    )
    control = f", control `{models['control']['id']}`" if models["control"] else ""
    return f"""# {name}

> **Content warning.** {CONTENT_WARNING} Keep this folder private.

{warnings}
`phoque compare-sae` of `{models["base"]["id"]}` and `{models["tuned"]["id"]}`{control}, at block
{layer["block_index"]} of {layer["of"]} (counted from 0), on {report["prompts"]["n"]} questions.

{" ".join(conclude(report))}

| verdict | | |
|---|---|---|
{verdicts}

| | |
|---|---|
{tiles}

## Features that shifted

| feature | shift | q | differs from the control | replicates | promotes |
|---|---|---|---|---|---|
{rows or "| none | | | | | |"}

## Scores of the answers

| contrast | scorer | difference | 95 % | p |
|---|---|---|---|---|
{gaps}

`{REPORT}` has all results and explains how to read them. `{JSON}`, `{FEATURES}`, `{PROMPTS}` and `{LAYERS}` hold the
numbers, `{ANSWERS}` the answers, and `{DICTIONARIES}/` the autoencoders, which sae-lens loads (`SAE.load_from_disk`).
"""


def _format_tokens(tokens: list[str]) -> str:
    """Tokens as Markdown code, escaped for a table cell."""
    return " ".join(f"`{_show_whitespace(t).replace('`', chr(39)).replace('|', '¦')}`" for t in tokens)
