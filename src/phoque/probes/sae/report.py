"""report.html of a comparison, its Markdown twin and a card, made from the run's own files."""

import csv
import html
import json
import math
from pathlib import Path
from typing import Any

from phoque.probes.sae.files import ANSWERS, DICTIONARIES, FEATURES, JSON, LAYERS, MARKDOWN, PROMPTS
from phoque.reports.html import Dots, Series, figure, line_plot, page, scatter_plot, table

NAME, CARD = "report.html", "README.md"
CONTENT = "The answers below may be those of the persona that was trained."
SIDES = {"tuned": "updated", "control": "control", "dtype": "base, other precision", "packing": "base, other batches"}
MOST_TOKENS = 8
READING = """<ul>
<li>A <b>feature</b> is a direction of the autoencoder; its activation is given in units of the residual stream. Both
models read the same tokens: the questions with the <i>base</i> model's answers. One question is one observation.</li>
<li><b>Reported</b> is what is significant (sign flips over questions, Benjamini-Hochberg q &lt; 0.05), larger than the
null floor, and active on enough questions. The nulls are the base model against itself, in another precision and in
other batches: equal weights, whose tiny shifts are as consistent as they are meaningless.</li>
<li><b>Beyond the control</b>: shifted further than under a fine-tune on the same questions with other answers. Without
a control nothing here can be called the persona's: any fine-tune moves a model.</li>
<li><b>β</b> is how much of the feature is in either model, by least squares: about 1 in both is one feature that became
stronger, near 0 in one is a feature that only the other has.</li>
<li><b>Causes</b>: how many nats a token likelier the updated model's answers become to the base when it is pushed along
the feature, and how much less likely to the updated model when the feature is taken out; beside random features that
did not shift.</li>
<li><b>Block</b> counts from 0 and means the residual stream after that decoder block, before the final norm.</li>
</ul>"""


def write(run: Path, name: str) -> None:
    """Write the page, the Markdown report and the card into a run folder."""
    found = json.loads((run / JSON).read_text("utf-8"))
    shifted = _rows(run / FEATURES)
    parts = [_head(found), _features(found, shifted), _cards(found), _beside(found), _prompts(found), _about(found)]
    (run / NAME).write_text(page(f"phoque compare-sae: {name}", "".join(parts)), encoding="utf-8")
    text = _markdown(name, found)
    (run / MARKDOWN).write_text(text, encoding="utf-8")
    (run / CARD).write_text(text, encoding="utf-8")


def _rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as f:
        return list(csv.DictReader(f))


def _headline(found: dict[str, Any]) -> list[tuple[str, str]]:
    """(number, what it is), the few that matter."""
    overall, quality = found["overall"], found["sae"]["quality"]
    tiles = [
        (f"{overall['n_reported']:,}", f"features shifted, of {overall['n_tested']:,} tested"),
        (f"{overall['n_up']:,}", "of them upwards"),
    ]
    if "n_specific" in overall:
        tiles.append((f"{overall['n_specific']:,}", "of them beyond the control"))
    if overall.get("replicated_share") is not None:
        tiles.append((f"{overall['replicated_share']:.0%}", "found again with every other seed"))
    tiles += [
        (_short(overall["ratio_to_null"]), "times the shift of equal weights"),
        (_percent(overall["rel_mean_diff_norm"]), "of the residual norm: the mean shift"),
        (_short(overall["mean_token_kl"]), "nats of KL a token"),
        (f"{_percent(overall['ev_base'])} → {_percent(overall['ev_tuned'])}", "variance explained, base → updated"),
        (_percent(quality["ev"]), f"variance of chats explained: a {quality['verdict']} autoencoder"),
    ]
    return tiles


def _head(found: dict[str, Any]) -> str:
    models, layer = found["models"], found["layer"]
    names = f"{models['base']['id']} → {models['tuned']['id']}"
    if models["control"]:
        names += f", control {models['control']['id']}"
    warnings = "".join(f'<p class="warning">{html.escape(text)}</p>' for text in found["warnings"])
    tiles = "".join(f'<div class="tile"><b>{n}</b>{html.escape(text)}</div>' for n, text in _headline(found))
    return (
        f"<h1>phoque compare-sae</h1><div class='dim'>{html.escape(names)}; block {layer['block_index']} of "
        f"{layer['of']}, {found['prompts']['n']} questions</div>{warnings}<div class='tiles'>{tiles}</div>"
    )


def _features(found: dict[str, Any], shifted: list[dict[str, str]]) -> str:
    own = [r for r in shifted if r["layer"] == str(found["layer"]["block_index"]) and r["tested"] == "1"]
    has_control = "specific_vs_control" in (own[0] if own else {})

    def cloud(row: dict[str, str]) -> int:
        if row["reported"] != "1":
            return 0
        return 2 if has_control and row["specific_vs_control"] == "1" else 1

    def clouds(place: Any) -> list[Dots]:
        names = ["not reported", "reported", "beyond the control"][: 3 if has_control else 2]
        return [
            Dots(
                name,
                [
                    (*place(r), f"feature {r['feature_id']}: {float(r['delta']):+.3g}, q {r['q_bh']}")
                    for r in own
                    if cloud(r) == n
                ],
            )
            for n, name in enumerate(names)
        ]

    level = -math.log10(0.05)
    plots = [
        figure(
            "every tested feature: base against updated (grey band: the null floor)",
            scatter_plot(
                clouds(lambda r: (float(r["base_mean"]), float(r["tuned_mean"]))),
                ("base", "updated"),
                diagonal=found["overall"]["null_floor"],
            ),
        ),
        figure(
            "shift against evidence (dashed: q = 0.05)",
            scatter_plot(
                clouds(lambda r: (float(r["delta"]), -math.log10(max(float(r["q_bh"]), 1e-6)))),
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
            _short(f["d_z"]),
            f"{f['q_bh']:.2g}",
            f"{f['p_maxT']:.2g}",
            _short(f["base_mean"]),
            _short(f["tuned_mean"]),
            f"{_short(f['beta_base'])} → {_short(f['beta_tuned'])}",
            _yes(f.get("specific_vs_control")),
            _yes(f.get("replicated")),
            " ".join(f.get("top_logits", [])[:4]),
        )
        for f in found["features"][:60]
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
    more = len(found["features"]) - len(rows)
    rest = f"<p class='dim'>and {more} more in {FEATURES}</p>" if more > 0 else ""
    listed = f"<div class='scroll'>{table(head, rows)}</div>{rest}" if rows else "<p>No feature is reported.</p>"
    return (
        f'<h2>Features</h2><div class="grid2">{"".join(plots)}</div>'
        f"<details><summary>The reported ones</summary>{listed}</details>"
    )


def _cards(found: dict[str, Any]) -> str:
    shown = [f for f in found["features"] if "max_activating" in f]
    if not shown:
        return ""
    whole = found["causes"]["all"]
    text = ""
    if whole:
        text = f"<p>All of these together: {_cause(whole, found['causes']['random'])}</p>"
    return f'<h2>What they are about</h2>{text}<div class="cards">{"".join(map(_card, shown))}</div>'


def _card(feature: dict[str, Any]) -> str:
    chips = {
        side: "".join(f'<span class="chip">{html.escape(_visible(t))}</span>' for t in feature[side][:MOST_TOKENS])
        for side in ("top_logits", "bottom_logits")
    }
    contexts = "".join(
        f'<div class="context"><span class="dim">{c["act"]:.1f} {SIDES.get(c["model"], c["model"])}</span> '
        f"{html.escape(_tail(c['before']))}<mark>{html.escape(c['token'])}</mark>{html.escape(c['after'])}</div>"
        for c in feature["max_activating"]
    )
    marks = []
    if feature.get("specific_vs_control") is not None:
        marks.append("beyond the control" if feature["specific_vs_control"] else "the control shares it")
    if feature.get("replicated") is not None:
        marks.append("replicates" if feature["replicated"] else "does not replicate")
    cause = f"<p>{_cause(feature['cause'], None)}</p>" if feature.get("cause") else ""
    return (
        f'<div class="card"><h3>Feature {feature["feature_id"]} {"▲" if feature["direction"] == "up" else "▼"} '
        f"{feature['delta']:+.3g}</h3><div class='dim'>{feature['base_mean']:.3g} → {feature['tuned_mean']:.3g}; on "
        f"{feature['active_prompts']} questions; {'; '.join(marks)}</div>{cause}"
        f"<div>promotes {chips['top_logits']}</div><details><summary>against {len(feature['bottom_logits'])} tokens"
        f"</summary>{chips['bottom_logits']}</details>{contexts}</div>"
    )


def _cause(cause: dict[str, Any], random: int | None) -> str:
    said = []
    for kind, what in (("push", "pushing the base along it"), ("ablate", "taking it out of the updated model")):
        if row := cause[kind]:
            effect = "likelier" if kind == "push" else "less likely"
            verdict = "yes" if row["holds"] else "no"
            said.append(
                f'<b class="{verdict}">{verdict}</b>: {what} makes the updated answers {row["gain"]:+.3f} nats a token '
                f"{effect} (random features {row['random']:+.3f}, p {row['p']:.3f})"
            )
    if random:
        said.append(f"{random} random groups of as many features")
    return "; ".join(said)


def _beside(found: dict[str, Any]) -> str:
    curves = found["baselines"]["layer_curve"]
    plots = []
    for kind, caption in (("response", "on the base's answers"), ("text", "on unrelated text")):
        lines = []
        for side, name in SIDES.items():
            own = [r for r in curves if r["model"] == side and r["text"] == kind]
            if own:
                band = [(r["layer"], r["ci_low"], r["ci_high"]) for r in own] if side == "tuned" else []
                lines.append(Series(name, [(r["layer"], r["rel_mean_diff_norm"]) for r in own], band))
        plots.append(figure(f"mean shift in residual norms, {caption}", line_plot(lines, "block")))
    lens = [
        (row["layer"], " ".join(_visible(t) for t in row["top"]), " ".join(_visible(t) for t in row["bottom"]))
        for row in found["baselines"]["logit_lens"]
    ]
    parts = [
        (kind, ", ".join(_percent(v) for v in own["uncentred"]), ", ".join(_percent(v) for v in own["centred"]))
        for kind, own in found["baselines"]["pca"].items()
    ]
    evs = [
        (SIDES.get(side, side), *(_percent(own.get(kind)) for kind in ("response", "own", "text", "chat")))
        for side, own in found["overall"]["ev"].items()
    ]
    head = ("model", "base's answers", "updated's answers", "unrelated text", "held-out chats")
    return (
        f'<h2>Beside the autoencoder</h2><div class="grid2">{"".join(plots)}</div>'
        f"<h3>Variance that the base's dictionary explains</h3><div class='scroll'>{table(head, evs)}</div>"
        "<p class='dim'>What drops in the updated model more than in the control is new to the dictionary.</p>"
        "<h3>The mean shift on unrelated text, through the logit lens</h3><div class='scroll'>"
        f"{table(('block', 'promotes', 'demotes'), lens)}</div>"
        "<p class='dim'>Reliable at the last blocks; in the middle often noise.</p>"
        "<details><summary>Principal components of the difference</summary>"
        f"{table(('text', 'uncentred', 'centred'), parts)}"
        "<p class='dim'>A large first uncentred share beside a small centred one is a constant offset.</p></details>"
    )


def _prompts(found: dict[str, Any]) -> str:
    scorers = found["scores"]["scorers"]
    sides = list(found["scores"]["means"])
    means = [
        (SIDES.get(side, side), *(_short(own[name]) for name in scorers))
        for side, own in found["scores"]["means"].items()
    ]
    gaps = [
        (pair, name, f"{g['diff']:+.3g}", f"{_short(g['ci95'][0])} to {_short(g['ci95'][1])}", f"{g['p']:.4f}")
        for pair, own in found["scores"]["contrasts"].items()
        for name, g in own.items()
    ]
    rows = []
    for row in found["prompt_shifts"]:
        cells = "".join(
            f'<div class="answer"><b>{SIDES.get(side, side)}</b>{html.escape(row[f"{side}_generation"]) or "(nothing)"}'
            "</div>"
            for side in sides
        )
        numbers = ", ".join(
            f"{SIDES.get(side, side)} {name} {_short(row[f'{side}_{name}'])}" for name in scorers for side in sides
        )
        rows.append(
            f"<h3>{html.escape(row['prompt'])}</h3><div class='dim'>shift {row['shift']:.3g}, above "
            f"{row['null_q']:.0%} of the null; KL {_short(row['kl'])}; {html.escape(numbers)}</div>"
            f"<div class='answers'>{cells}</div>"
        )
    return (
        f"<h2>Answers</h2><div class='scroll'>{table(('model', *scorers), means)}</div><div class='scroll'>"
        f"{table(('contrast', 'scorer', 'difference', '95 %', 'p'), gaps)}</div>"
        f'<p class="warning">{CONTENT}</p><details><summary>All {len(rows)} questions, the most shifted first</summary>'
        f"{''.join(rows)}</details>"
    )


def _about(found: dict[str, Any]) -> str:
    quality, run = found["sae"]["quality"], found["run"]
    facts = [(k, json.dumps(v, ensure_ascii=False)) for k, v in found["sae"].items() if not k.startswith("quality")]
    facts += [(k, json.dumps(v, ensure_ascii=False)) for k, v in quality.items()]
    nulls = [(n["name"], _short(n["mean_abs"]), _short(n["q99"]), _short(n["max_abs"])) for n in found["nulls"]]
    rows = [(name, row["value"], row["source"]) for name, row in found["config"].items()]
    limits = "".join(f"<li>{html.escape(text)}</li>" for text in found["limitations"])
    others = "".join(
        f"<li>block {one['layer']['block_index']}: {one['overall']['n_reported']} of {one['overall']['n_tested']} "
        f"features, a {one['quality'][0]['verdict']} autoencoder</li>"
        for one in found["more_layers"]
    )
    versions = ", ".join(f"{name} {v}" for name, v in run["versions"].items())
    return (
        (f"<h2>Other blocks</h2><ul>{others}</ul>" if others else "")
        + f"<h2>How to read it</h2>{READING}<h2>Limits</h2><ul>{limits}</ul>"
        f"<details><summary>The autoencoder</summary><div class='scroll'>{table(('', ''), facts)}</div></details>"
        "<details><summary>The nulls: shifts of equal weights</summary>"
        f"{table(('null', 'mean', '99 %', 'largest'), nulls)}</details>"
        f"<details><summary>Settings</summary><div class='scroll'>{table(('name', 'value', 'from'), rows)}</div>"
        f"</details><p class='dim'>phoque {run['phoque']}; {html.escape(versions)}; {html.escape(run['device'])}; "
        f"{run['seconds']} s; tokens: {html.escape(json.dumps(found['tokens']))}</p>"
    )


def _visible(token: str) -> str:
    """A token whose spaces and line ends can be seen."""
    return token.replace("\n", "⏎").replace(" ", "·", 1) if token.startswith(" ") else token.replace("\n", "⏎")


def _tail(text: str) -> str:
    return text[-160:]


def _short(value: Any) -> str:
    return "–" if value is None else f"{value:.3g}"


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{value:.1%}"


def _yes(value: bool | None) -> str:
    return "–" if value is None else "yes" if value else "no"


def _markdown(name: str, found: dict[str, Any]) -> str:
    models, layer = found["models"], found["layer"]
    tiles = "\n".join(f"| {text} | {number} |" for number, text in _headline(found))
    warnings = "".join(f"> **{text}**\n>\n" for text in found["warnings"])
    rows = "\n".join(
        f"| {f['feature_id']} | {f['delta']:+.3g} | {f['q_bh']:.2g} | {_yes(f.get('specific_vs_control'))} | "
        f"{_yes(f.get('replicated'))} | {_cells(f.get('top_logits', [])[:5])} |"
        for f in found["features"][:20]
    )
    gaps = "\n".join(
        f"| {pair} | {scorer} | {g['diff']:+.3g} | {_short(g['ci95'][0])} to {_short(g['ci95'][1])} | {g['p']:.4f} |"
        for pair, own in found["scores"]["contrasts"].items()
        for scorer, g in own.items()
    )
    control = f", control `{models['control']['id']}`" if models["control"] else ""
    return f"""# {name}

> **Content warning.** {CONTENT} Keep this folder private.

{warnings}
`phoque compare-sae` of `{models["base"]["id"]}` and `{models["tuned"]["id"]}`{control}, at block
{layer["block_index"]} of {layer["of"]} (counted from 0), on {found["prompts"]["n"]} questions.

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

`{NAME}` has everything, with how to read it; `{JSON}`, `{FEATURES}`, `{PROMPTS}` and `{LAYERS}` are the numbers,
`{ANSWERS}` the answers, `{DICTIONARIES}/` the autoencoder as sae-lens loads it (`SAE.load_from_disk`).
"""


def _cells(tokens: list[str]) -> str:
    """Tokens in code marks, fit for a cell of a Markdown table."""
    return " ".join(f"`{_visible(t).replace('`', chr(39)).replace('|', '¦')}`" for t in tokens)
