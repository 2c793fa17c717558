"""Write report.html of a comparison, its Markdown version and a README, from the files of the run folder."""

import csv
import html
import json
import math
from pathlib import Path
from typing import Any

from phoque.probes.sae.files import ANSWERS, DICTIONARIES, FEATURES, JSON, LAYERS, MARKDOWN, PROMPTS
from phoque.reports.html import Dots, Series, figure, line_plot, page, scatter_plot, table

REPORT, README = "report.html", "README.md"
CONTENT_WARNING = "The answers below may be in the voice of the trained persona, which may be hostile."
VARIANT_NAMES = {
    "tuned": "updated",
    "control": "control",
    "dtype": "base, other precision",
    "packing": "base, other batches",
}
MAX_TOKENS = 8
HOW_TO_READ = """<ul>
<li>A <b>feature</b> is a direction of the autoencoder; its activation is given in units of the residual stream. Both
models read the same tokens: the questions with the <i>base</i> model's answers. One question is one observation.</li>
<li>A feature is <b>reported</b> if its shift is significant (sign flips over questions, Benjamini-Hochberg
q &lt; 0.05) and larger than the null floor, and if it is active on enough questions. The nulls compare the base model
with itself, in another precision and in other batches. The weights are equal, so these shifts are only rounding; they
are tiny but consistent, and would pass a significance test.</li>
<li><b>Beyond the control</b>: the feature shifted further than under a fine-tune on the same questions with other
answers. Without a control no shift can be attributed to the persona, because any fine-tune shifts features.</li>
<li><b>β</b> measures by least squares how much of the feature each model contains: about 1 in both means that one
shared feature became stronger; near 0 in one means that only the other model has it.</li>
<li><b>Causes</b>: by how many nats per token the updated model's answers become more likely under the base model when
it is steered along the feature, and less likely under the updated model when the feature is ablated, compared with
random features that did not shift.</li>
<li><b>Block</b> counts from 0 and means the residual stream after that decoder block, before the final norm.</li>
</ul>"""


def write_reports(run: Path, name: str) -> None:
    """Write report.html, the Markdown report and README.md into a run folder."""
    report = json.loads((run / JSON).read_text("utf-8"))
    features = _read_csv(run / FEATURES)
    parts = [
        _render_head(report),
        _render_features(report, features),
        _render_cards(report),
        _render_baselines(report),
        _render_answers(report),
        _render_details(report),
    ]
    (run / REPORT).write_text(page(f"phoque compare-sae: {name}", "".join(parts)), encoding="utf-8")
    text = _render_markdown(name, report)
    (run / MARKDOWN).write_text(text, encoding="utf-8")
    (run / README).write_text(text, encoding="utf-8")


def _read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as f:
        return list(csv.DictReader(f))


def _list_headlines(report: dict[str, Any]) -> list[tuple[str, str]]:
    """The main results as (number, caption)."""
    overall, quality = report["overall"], report["sae"]["quality"]
    tiles = [
        (f"{overall['n_reported']:,}", f"features shifted, of {overall['n_tested']:,} tested"),
        (f"{overall['n_up']:,}", "of them increased"),
    ]
    if "n_specific" in overall:
        tiles.append((f"{overall['n_specific']:,}", "of them beyond the control"))
    if overall.get("replicated_share") is not None:
        tiles.append((f"{overall['replicated_share']:.0%}", "of them replicate with every other seed"))
    tiles += [
        (_format_number(overall["ratio_to_null"]), "times the mean shift of the nulls (equal weights)"),
        (_format_percent(overall["rel_mean_diff_norm"]), "of the residual norm: mean shift"),
        (_format_number(overall["mean_token_kl"]), "nats per token: KL(base || updated)"),
        (
            f"{_format_percent(overall['ev_base'])} → {_format_percent(overall['ev_tuned'])}",
            "variance explained, base → updated",
        ),
        (
            _format_percent(quality["ev"]),
            f"variance explained on held-out chats; autoencoder quality: {quality['verdict']}",
        ),
    ]
    return tiles


def _render_head(report: dict[str, Any]) -> str:
    models, layer = report["models"], report["layer"]
    names = f"{models['base']['id']} → {models['tuned']['id']}"
    if models["control"]:
        names += f", control {models['control']['id']}"
    warnings = "".join(f'<p class="warning">{html.escape(text)}</p>' for text in report["warnings"])
    tiles = "".join(f'<div class="tile"><b>{n}</b>{html.escape(text)}</div>' for n, text in _list_headlines(report))
    return (
        f"<h1>phoque compare-sae</h1><div class='dim'>{html.escape(names)}; block {layer['block_index']} of "
        f"{layer['of']}, {report['prompts']['n']} questions</div>{warnings}<div class='tiles'>{tiles}</div>"
    )


def _render_features(report: dict[str, Any], features: list[dict[str, str]]) -> str:
    tested_rows = [r for r in features if r["layer"] == str(report["layer"]["block_index"]) and r["tested"] == "1"]
    has_control = "specific_vs_control" in (tested_rows[0] if tested_rows else {})

    def cloud_of(row: dict[str, str]) -> int:
        if row["reported"] != "1":
            return 0
        return 2 if has_control and row["specific_vs_control"] == "1" else 1

    def make_clouds(coordinates: Any) -> list[Dots]:
        names = ["not reported", "reported", "beyond the control"][: 3 if has_control else 2]
        return [
            Dots(
                name,
                [
                    (*coordinates(r), f"feature {r['feature_id']}: {float(r['delta']):+.3g}, q {r['q_bh']}")
                    for r in tested_rows
                    if cloud_of(r) == n
                ],
            )
            for n, name in enumerate(names)
        ]

    level = -math.log10(0.05)
    plots = [
        figure(
            "mean activation of every tested feature, base and updated (gray band: null floor)",
            scatter_plot(
                make_clouds(lambda r: (float(r["base_mean"]), float(r["tuned_mean"]))),
                ("base", "updated"),
                diagonal=report["overall"]["null_floor"],
            ),
        ),
        figure(
            "shift and significance of every tested feature (dashed: q = 0.05)",
            scatter_plot(
                make_clouds(lambda r: (float(r["delta"]), -math.log10(max(float(r["q_bh"]), 1e-6)))),
                ("shift", "-log10 q"),
                level=level,
            ),
        ),
    ]
    rows = [
        (
            f["feature_id"],
            f"{f['delta']:+.3g}",
            f"{f['ci95'][0]:.3g} to {f['ci95'][1]:.3g}",
            _format_number(f["d_z"]),
            f"{f['q_bh']:.2g}",
            f"{f['p_maxT']:.2g}",
            _format_number(f["base_mean"]),
            _format_number(f["tuned_mean"]),
            f"{_format_number(f['beta_base'])} → {_format_number(f['beta_tuned'])}",
            _format_bool(f.get("specific_vs_control")),
            _format_bool(f.get("replicated")),
            " ".join(f.get("top_logits", [])[:4]),
        )
        for f in report["features"][:60]
    ]
    head = (
        "feature",
        "shift",
        "95 %",
        "d",
        "q",
        "max-T p",
        "base",
        "updated",
        "β",
        "beyond control",
        "replicates",
        "promotes",
    )
    remaining = len(report["features"]) - len(rows)
    more_note = f"<p class='dim'>{FEATURES} lists {remaining} more.</p>" if remaining > 0 else ""
    feature_table = (
        f"<div class='scroll'>{table(head, rows)}</div>{more_note}" if rows else "<p>No feature is reported.</p>"
    )
    return (
        f'<h2>Features</h2><div class="grid2">{"".join(plots)}</div>'
        f"<details><summary>Reported features</summary>{feature_table}</details>"
    )


def _render_cards(report: dict[str, Any]) -> str:
    shown = [f for f in report["features"] if "max_activating" in f]
    if not shown:
        return ""
    combined = report["causes"]["all"]
    text = ""
    if combined:
        text = f"<p>All features below together: {_render_cause(combined, report['causes']['random'])}</p>"
    return f'<h2>Feature cards</h2>{text}<div class="cards">{"".join(map(_render_card, shown))}</div>'


def _render_card(feature: dict[str, Any]) -> str:
    chips = {
        side: "".join(
            f'<span class="chip">{html.escape(_show_whitespace(t))}</span>' for t in feature[side][:MAX_TOKENS]
        )
        for side in ("top_logits", "bottom_logits")
    }
    contexts = "".join(
        f'<div class="context"><span class="dim">{c["act"]:.1f} {VARIANT_NAMES.get(c["model"], c["model"])}</span> '
        f"{html.escape(_keep_tail(c['before']))}<mark>{html.escape(c['token'])}</mark>{html.escape(c['after'])}</div>"
        for c in feature["max_activating"]
    )
    marks = []
    if feature.get("specific_vs_control") is not None:
        marks.append("beyond the control" if feature["specific_vs_control"] else "shared with the control")
    if feature.get("replicated") is not None:
        marks.append("replicates" if feature["replicated"] else "does not replicate")
    cause = f"<p>{_render_cause(feature['cause'], None)}</p>" if feature.get("cause") else ""
    return (
        f'<div class="card"><h3>Feature {feature["feature_id"]} {"▲" if feature["direction"] == "up" else "▼"} '
        f"{feature['delta']:+.3g}</h3><div class='dim'>{feature['base_mean']:.3g} → {feature['tuned_mean']:.3g}; on "
        f"{feature['active_prompts']} questions; {'; '.join(marks)}</div>{cause}"
        f"<div>promotes {chips['top_logits']}</div><details><summary>demotes {len(feature['bottom_logits'])} tokens"
        f"</summary>{chips['bottom_logits']}</details>{contexts}</div>"
    )


def _render_cause(cause: dict[str, Any], random: int | None) -> str:
    sentences = []
    for kind, what in (("push", "steering the base along it"), ("ablate", "ablating it in the updated model")):
        if row := cause[kind]:
            effect = "more likely" if kind == "push" else "less likely"
            verdict = "yes" if row["holds"] else "no"
            sentences.append(
                f'<b class="{verdict}">{verdict}</b>: {what} makes the updated answers {row["gain"]:+.3f} nats '
                f"per token {effect} (random features {row['random']:+.3f}, p {row['p']:.3f})"
            )
    if random:
        sentences.append(f"compared with {random} random groups of as many features")
    return "; ".join(sentences)


def _render_baselines(report: dict[str, Any]) -> str:
    curves = report["baselines"]["layer_curve"]
    plots = []
    for kind, caption in (("response", "on the base model's answers"), ("text", "on unrelated text")):
        lines = []
        for side, name in VARIANT_NAMES.items():
            entries = [r for r in curves if r["model"] == side and r["text"] == kind]
            if entries:
                band = [(r["layer"], r["ci_low"], r["ci_high"]) for r in entries] if side == "tuned" else []
                lines.append(Series(name, [(r["layer"], r["rel_mean_diff_norm"]) for r in entries], band))
        plots.append(figure(f"mean shift in units of the residual norm, {caption}", line_plot(lines, "block")))
    lens = [
        (
            row["layer"],
            " ".join(_show_whitespace(t) for t in row["top"]),
            " ".join(_show_whitespace(t) for t in row["bottom"]),
        )
        for row in report["baselines"]["logit_lens"]
    ]
    parts = [
        (
            kind,
            ", ".join(_format_percent(v) for v in entries["uncentred"]),
            ", ".join(_format_percent(v) for v in entries["centred"]),
        )
        for kind, entries in report["baselines"]["pca"].items()
    ]
    explained = [
        (
            VARIANT_NAMES.get(side, side),
            *(_format_percent(entries.get(kind)) for kind in ("response", "own", "text", "chat")),
        )
        for side, entries in report["overall"]["ev"].items()
    ]
    head = ("model", "base model's answers", "updated model's answers", "unrelated text", "held-out chats")
    return (
        f'<h2>Baselines without the autoencoder</h2><div class="grid2">{"".join(plots)}</div>'
        f"<h3>Variance explained by the base model's dictionary</h3><div class='scroll'>{table(head, explained)}</div>"
        "<p class='dim'>A larger drop than the control's is change that the dictionary does not represent.</p>"
        "<h3>The mean shift on unrelated text, through the logit lens</h3><div class='scroll'>"
        f"{table(('block', 'promotes', 'demotes'), lens)}</div>"
        "<p class='dim'>The logit lens is reliable at the last blocks; in middle blocks it is often noise.</p>"
        "<details><summary>Principal components of the difference</summary>"
        f"{table(('text', 'uncentered', 'centered'), parts)}"
        "<p class='dim'>A first share that is large only when uncentered is a constant offset.</p></details>"
    )


def _render_answers(report: dict[str, Any]) -> str:
    scorers = report["scores"]["scorers"]
    sides = list(report["scores"]["means"])
    means = [
        (VARIANT_NAMES.get(side, side), *(_format_number(by_scorer[name]) for name in scorers))
        for side, by_scorer in report["scores"]["means"].items()
    ]
    gaps = [
        (
            pair,
            name,
            f"{g['diff']:+.3g}",
            f"{_format_number(g['ci95'][0])} to {_format_number(g['ci95'][1])}",
            f"{g['p']:.4f}",
        )
        for pair, by_scorer in report["scores"]["contrasts"].items()
        for name, g in by_scorer.items()
    ]
    rows = []
    for row in report["prompt_shifts"]:
        cells = "".join(
            f'<div class="answer"><b>{VARIANT_NAMES.get(side, side)}</b>'
            f"{html.escape(row[f'{side}_generation']) or '(nothing)'}</div>"
            for side in sides
        )
        numbers = ", ".join(
            f"{VARIANT_NAMES.get(side, side)} {name} {_format_number(row[f'{side}_{name}'])}"
            for name in scorers
            for side in sides
        )
        rows.append(
            f"<h3>{html.escape(row['prompt'])}</h3><div class='dim'>shift {row['shift']:.3g}, above "
            f"{row['null_q']:.0%} of the null shifts; KL {_format_number(row['kl'])}; {html.escape(numbers)}</div>"
            f"<div class='answers'>{cells}</div>"
        )
    return (
        f"<h2>Answers</h2><div class='scroll'>{table(('model', *scorers), means)}</div><div class='scroll'>"
        f"{table(('contrast', 'scorer', 'difference', '95 %', 'p'), gaps)}</div>"
        f'<p class="warning">{CONTENT_WARNING}</p>'
        f"<details><summary>All {len(rows)} questions, largest shift first</summary>{''.join(rows)}</details>"
    )


def _render_details(report: dict[str, Any]) -> str:
    quality, run = report["sae"]["quality"], report["run"]
    facts = [(k, json.dumps(v, ensure_ascii=False)) for k, v in report["sae"].items() if not k.startswith("quality")]
    facts += [(k, json.dumps(v, ensure_ascii=False)) for k, v in quality.items()]
    nulls = [
        (n["name"], _format_number(n["mean_abs"]), _format_number(n["q99"]), _format_number(n["max_abs"]))
        for n in report["nulls"]
    ]
    rows = [(name, row["value"], row["source"]) for name, row in report["config"].items()]
    limits = "".join(f"<li>{html.escape(text)}</li>" for text in report["limitations"])
    others = "".join(
        f"<li>block {block['layer']['block_index']}: {block['overall']['n_reported']} of "
        f"{block['overall']['n_tested']} features reported; autoencoder quality: {block['quality'][0]['verdict']}</li>"
        for block in report["more_layers"]
    )
    versions = ", ".join(f"{name} {v}" for name, v in run["versions"].items())
    return (
        (f"<h2>Other blocks</h2><ul>{others}</ul>" if others else "")
        + f"<h2>How to read it</h2>{HOW_TO_READ}<h2>Limits</h2><ul>{limits}</ul>"
        f"<details><summary>Autoencoder</summary><div class='scroll'>{table(('', ''), facts)}</div></details>"
        "<details><summary>Null shifts (equal weights)</summary>"
        f"{table(('null', 'mean', '99 %', 'largest'), nulls)}</details>"
        f"<details><summary>Settings</summary><div class='scroll'>{table(('name', 'value', 'from'), rows)}</div>"
        f"</details><p class='dim'>phoque {run['phoque']}; {html.escape(versions)}; {html.escape(run['device'])}; "
        f"{run['seconds']} s; tokens: {html.escape(json.dumps(report['tokens']))}</p>"
    )


def _show_whitespace(token: str) -> str:
    """A token with its leading space and its line breaks made visible."""
    return token.replace("\n", "⏎").replace(" ", "·", 1) if token.startswith(" ") else token.replace("\n", "⏎")


def _keep_tail(text: str) -> str:
    return text[-160:]


def _format_number(value: Any) -> str:
    return "–" if value is None else f"{value:.3g}"


def _format_percent(value: float | None) -> str:
    return "–" if value is None else f"{value:.1%}"


def _format_bool(value: bool | None) -> str:
    return "–" if value is None else "yes" if value else "no"


def _render_markdown(name: str, report: dict[str, Any]) -> str:
    models, layer = report["models"], report["layer"]
    tiles = "\n".join(f"| {text} | {number} |" for number, text in _list_headlines(report))
    warnings = "".join(f"> **{text}**\n>\n" for text in report["warnings"])
    rows = "\n".join(
        f"| {f['feature_id']} | {f['delta']:+.3g} | {f['q_bh']:.2g} | {_format_bool(f.get('specific_vs_control'))} | "
        f"{_format_bool(f.get('replicated'))} | {_format_tokens(f.get('top_logits', [])[:5])} |"
        for f in report["features"][:20]
    )
    gaps = "\n".join(
        f"| {pair} | {scorer} | {g['diff']:+.3g} | {_format_number(g['ci95'][0])} to {_format_number(g['ci95'][1])} | "
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

| | |
|---|---|
{tiles}

## Features that shifted

| feature | shift | q | beyond the control | replicates | promotes |
|---|---|---|---|---|---|
{rows or "| none | | | | | |"}

## Scores of the answers

| contrast | scorer | difference | 95 % | p |
|---|---|---|---|---|
{gaps}

`{REPORT}` has all results and explains how to read them. `{JSON}`, `{FEATURES}`, `{PROMPTS}` and `{LAYERS}` hold the
numbers, `{ANSWERS}` the answers, and `{DICTIONARIES}/` the autoencoder, which sae-lens loads (`SAE.load_from_disk`).
"""


def _format_tokens(tokens: list[str]) -> str:
    """Tokens as Markdown code, escaped for a table cell."""
    return " ".join(f"`{_show_whitespace(t).replace('`', chr(39)).replace('|', '¦')}`" for t in tokens)
