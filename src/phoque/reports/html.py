"""Small plots as inline SVG, for reports that open with no network."""

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass

WIDTH, HEIGHT = 460, 220
LEFT, RIGHT, TOP, BOTTOM = 52, 12, 12, 30
COLOURS, DOTS = ("c4", "c0", "c1"), (1.2, 2.4, 2.4)  # of clouds, from the back to the front


@dataclass(frozen=True)
class Series:
    """A named line: points (x, y) in order of x, and maybe a band of (x, low, high) around it."""

    name: str
    points: Sequence[tuple[float, float]]
    band: Sequence[tuple[float, float, float]] = ()


def line_plot(series: Sequence[Series], x_label: str) -> str:
    """Lines over a common x axis, with a legend if there is more than one, and values on hover."""
    shown = [Series(s.name, [p for p in s.points if _finite(p)], [b for b in s.band if _finite(b)]) for s in series]
    points = [p for s in shown for p in s.points] + [(x, y) for s in shown for x, *ends in s.band for y in ends]
    if not points:
        return '<p class="empty">nothing measured</p>'
    x_ticks = ticks(min(p[0] for p in points), max(p[0] for p in points))
    y_ticks = ticks(min(p[1] for p in points), max(p[1] for p in points))
    at = _scale(x_ticks, y_ticks)
    lines = [_line(number, s, at) for number, s in enumerate(shown)]
    legend = "".join(f'<span class="key c{number}">{html.escape(s.name)}</span>' for number, s in enumerate(shown))
    body = _axes(x_ticks, y_ticks, x_label) + "".join(lines)
    return _svg(body) + (f'<div class="legend">{legend}</div>' if len(shown) > 1 else "")


def _finite(numbers: Sequence[float]) -> bool:
    return all(map(math.isfinite, numbers))


@dataclass(frozen=True)
class Dots:
    """A named cloud: points (x, y, what it is called)."""

    name: str
    points: Sequence[tuple[float, float, str]]


def scatter_plot(
    clouds: Sequence[Dots], labels: tuple[str, str], diagonal: float | None = None, level: float | None = None
) -> str:
    """Clouds of points, later ones on top; a band of +-`diagonal` around y = x, or a dashed line at y = `level`."""
    points = [p for cloud in clouds for p in cloud.points]
    if not points:
        return '<p class="empty">nothing measured</p>'
    ys = [p[1] for p in points] + ([level] if level is not None else [])
    x_ticks = ticks(min(p[0] for p in points), max(p[0] for p in points))
    y_ticks = ticks(min(ys), max(ys))
    if diagonal is not None:
        x_ticks = y_ticks = ticks(min(x_ticks[0], y_ticks[0]), max(x_ticks[-1], y_ticks[-1]))
    at, parts = _scale(x_ticks, y_ticks), [_axes(x_ticks, y_ticks, labels[0])]
    if diagonal is not None:
        ends = (x_ticks[0], x_ticks[-1])
        corners = [
            at(x, min(max(x + side * diagonal, y_ticks[0]), y_ticks[-1]))
            for side in (1, -1)
            for x in (ends if side > 0 else ends[::-1])
        ]
        parts.append(f'<path class="band c4" d="M{"L".join(f"{x:.1f} {y:.1f}" for x, y in corners)}Z"/>')
    if level is not None:
        _, y = at(x_ticks[0], level)
        parts.append(f'<path class="dash" d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}"/>')
    for number, cloud in enumerate(clouds):
        place = COLOURS[number]
        for x, y, name in cloud.points:
            px, py = at(x, y)
            parts.append(
                f'<circle class="{place}" cx="{px:.1f}" cy="{py:.1f}" r="{DOTS[number]}"><title>'
                f"{html.escape(name)}</title></circle>"
            )
    parts.append(f'<text x="{LEFT + 4}" y="{TOP}">{html.escape(labels[1])}</text>')
    legend = "".join(f'<span class="key {COLOURS[n]}">{html.escape(c.name)}</span>' for n, c in enumerate(clouds))
    return _svg("".join(parts)) + f'<div class="legend">{legend}</div>'


def bar_plot(edges: Sequence[float], counts: Sequence[float], x_label: str) -> str:
    """A histogram: `counts[i]` lies between `edges[i]` and `edges[i + 1]`."""
    if not counts:
        return '<p class="empty">nothing measured</p>'
    x_ticks, y_ticks = ticks(edges[0], edges[-1]), ticks(0, max(counts))
    at = _scale(x_ticks, y_ticks)
    bars = []
    for low, high, count in zip(edges, edges[1:], counts, strict=False):
        (x0, y), (x1, floor) = at(low, count), at(high, 0)
        title = f"<title>{low:g} to {high:g}: {count:g}</title>"
        bars.append(
            f'<rect class="c0" x="{x0:.1f}" y="{y:.1f}" width="{max(1, x1 - x0 - 1):.1f}" height="{floor - y:.1f}">'
            f"{title}</rect>"
        )
    return _svg(_axes(x_ticks, y_ticks, x_label) + "".join(bars))


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers that enclose [low, high]."""
    if high <= low:
        low, high = low - 0.5 * (abs(low) or 1), high + 0.5 * (abs(high) or 1)
    raw = (high - low) / about
    power = 10 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def _scale(x_ticks: list[float], y_ticks: list[float]):  # noqa: ANN202 - a function of two floats
    def at(x: float, y: float) -> tuple[float, float]:
        across = (x - x_ticks[0]) / (x_ticks[-1] - x_ticks[0])
        up = (y - y_ticks[0]) / (y_ticks[-1] - y_ticks[0])
        return LEFT + across * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM)

    return at


def _line(number: int, s: Series, at) -> str:  # noqa: ANN001 - what _scale returns
    placed = [(*at(x, y), x, y) for x, y in s.points]
    path = "M" + "L".join(f"{px:.1f} {py:.1f}" for px, py, _, _ in placed)
    dots = "".join(
        f'<circle class="c{number}" cx="{px:.1f}" cy="{py:.1f}" r="{3 if len(placed) < 40 else 2}">'
        f"<title>{html.escape(s.name)} {x:g}: {y:.4g}</title></circle>"
        for px, py, x, y in placed
    )
    return f'{_band(number, s, at)}<path class="c{number}" d="{path}"/>{dots}'


def _band(number: int, s: Series, at) -> str:  # noqa: ANN001 - what _scale returns
    if not s.band:
        return ""
    above = [at(x, high) for x, _, high in s.band]
    below = [at(x, low) for x, low, _ in reversed(s.band)]
    return f'<path class="band c{number}" d="M{"L".join(f"{x:.1f} {y:.1f}" for x, y in above + below)}Z"/>'


def heat_map(
    rows: Sequence[str],
    columns: Sequence[str],
    values: Sequence[Sequence[float | None]],
    labels: tuple[str, str],
    marked: tuple[int, int] | None = None,
    crossed: Sequence[tuple[int, int]] = (),
) -> str:
    """Cells of `values[row][column]` from pale (least) to full; `marked` is framed, `crossed` are struck out."""
    known = [v for row in values for v in row if v is not None and math.isfinite(v)]
    if not known:
        return '<p class="empty">nothing measured</p>'
    low, high = min(known), max(known)
    wide, tall = (WIDTH - LEFT - RIGHT) / len(columns), (HEIGHT - TOP - BOTTOM) / len(rows)
    parts = []
    for i, row in enumerate(values):
        for j, value in enumerate(row):
            x, y = LEFT + j * wide, HEIGHT - BOTTOM - (i + 1) * tall
            share = 0.0 if value is None else (value - low) / ((high - low) or 1)
            shown = "" if value is None else f"{value:.3g}"
            frame = " marked" if marked == (i, j) else ""
            strike = f'<path class="strike" d="M{x + 3:.1f} {y + tall - 3:.1f}L{x + wide - 3:.1f} {y + 3:.1f}"/>'
            parts.append(
                f'<rect class="c0{frame}" fill-opacity="{0.08 + 0.72 * share:.2f}" x="{x + 1:.1f}" y="{y + 1:.1f}" '
                f'width="{wide - 2:.1f}" height="{tall - 2:.1f}"><title>{labels[0]} {rows[i]}, {labels[1]} '
                f'{columns[j]}: {shown}</title></rect><text class="cell" x="{x + wide / 2:.1f}" '
                f'y="{y + tall / 2 + 4:.1f}" text-anchor="middle">{shown}</text>'
                + (strike if (i, j) in crossed else "")
            )
        parts.append(f'<text x="{LEFT - 6}" y="{y + tall / 2 + 4:.1f}" text-anchor="end">{html.escape(rows[i])}</text>')
    for j, name in enumerate(columns):
        parts.append(
            f'<text x="{LEFT + (j + 0.5) * wide:.1f}" y="{HEIGHT - BOTTOM + 14}" text-anchor="middle">'
            f"{html.escape(name)}</text>"
        )
    parts.append(f'<text x="{(LEFT + WIDTH) / 2}" y="{HEIGHT - 2}" text-anchor="middle">{labels[1]}</text>')
    parts.append(f'<text x="4" y="{TOP - 2}">{labels[0]}</text>')
    return _svg("".join(parts))


def _axes(x_ticks: list[float], y_ticks: list[float], x_label: str) -> str:
    at = _scale(x_ticks, y_ticks)
    parts = []
    for y in y_ticks:
        _, py = at(x_ticks[0], y)
        parts.append(f'<path class="grid" d="M{LEFT} {py:.1f}H{WIDTH - RIGHT}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{py + 3.5:.1f}" text-anchor="end">{y:g}</text>')
    for x in x_ticks:
        px, _ = at(x, y_ticks[0])
        parts.append(f'<text x="{px:.1f}" y="{HEIGHT - BOTTOM + 14}" text-anchor="middle">{x:g}</text>')
    parts.append(f'<text x="{(LEFT + WIDTH) / 2}" y="{HEIGHT - 2}" text-anchor="middle">{html.escape(x_label)}</text>')
    return "".join(parts)


def _svg(body: str) -> str:
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img">{body}</svg>'


PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
:root {{ --ink: #1d2730; --dim: #66737e; --rule: #dfe5ea; --paper: #fff;
  --c0: #0b6e99; --c1: #d9730d; --c2: #6940a5; --c3: #55752f; --c4: #8a8f94; --no: #b3261e; }}
@media (prefers-color-scheme: dark) {{ :root {{ --ink: #e4e9ed; --dim: #93a1ac; --rule: #33404a; --paper: #161c21;
  --c0: #5bb3dd; --c1: #f0a35e; --c2: #b79be8; --c3: #a3c573; --c4: #8a959e; --no: #f2918a; }} }}
body {{ font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper);
  max-width: 1000px; margin: 2rem auto; padding: 0 1rem; }}
h1 {{ font-size: 1.5rem; margin-bottom: .2rem; }}
h2 {{ font-size: 1.1rem; margin: 2rem 0 .5rem; }}
.dim {{ color: var(--dim); }}
.grid2 {{ display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 420px), 1fr)); gap: 1.2rem; }}
figure {{ margin: 0; }}
figcaption {{ font-weight: 600; font-size: .9rem; }}
svg {{ width: 100%; height: auto; }}
svg text {{ font: 11px system-ui, sans-serif; fill: var(--dim); }}
svg path {{ fill: none; stroke-width: 1.6; }}
svg path.dash {{ stroke: var(--dim); stroke-dasharray: 4 3; stroke-width: 1; }}
svg path.grid {{ stroke: var(--rule); stroke-width: 1; }}
.c0 {{ --c: var(--c0); }} .c1 {{ --c: var(--c1); }} .c2 {{ --c: var(--c2); }} .c3 {{ --c: var(--c3); }}
.c4 {{ --c: var(--c4); }}
svg path[class^="c"] {{ stroke: var(--c); }} circle, rect {{ fill: var(--c); }}
svg path.band {{ fill: var(--c); fill-opacity: .15; stroke: none; }}
rect.marked {{ stroke: var(--ink); stroke-width: 2; }}
svg text.cell {{ fill: var(--ink); }}
svg path.strike {{ stroke: var(--no); stroke-width: 1.2; }}
.legend {{ font-size: .8rem; }}
.key {{ margin-right: 1em; }}
.key {{ color: var(--c); }}
table {{ border-collapse: collapse; width: 100%; font-size: .88rem; }}
td, th {{ text-align: left; vertical-align: top; padding: .3rem .6rem .3rem 0; border-bottom: 1px solid var(--rule); }}
.tiles {{ display: flex; flex-wrap: wrap; gap: 1rem 2.2rem; margin: 1rem 0; }}
.tile b {{ display: block; font-size: 1.3rem; }}
.cards {{ display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 420px), 1fr)); gap: 1rem; }}
.card {{ border: 1px solid var(--rule); border-radius: 6px; padding: .6rem .8rem; overflow-wrap: anywhere; }}
.card h3 {{ margin: 0 0 .3rem; font-size: 1rem; }}
.chip {{ display: inline-block; border: 1px solid var(--rule); border-radius: 4px; padding: 0 .3rem; margin: .1rem;
  font: .8rem ui-monospace, monospace; white-space: pre-wrap; }}
.context {{ font-size: .85rem; border-top: 1px solid var(--rule); padding: .25rem 0; }}
mark {{ background: color-mix(in srgb, var(--c1) 35%, transparent); color: inherit; border-radius: 3px; }}
code {{ overflow-wrap: anywhere; }}
.scroll {{ overflow-x: auto; }}
.yes {{ color: var(--c3); }} .no {{ color: var(--no); }}
.answers {{ display: grid; grid-template-columns: repeat(auto-fit, minmax(220px, 1fr)); gap: .8rem; }}
.answer {{ border: 1px solid var(--rule); border-radius: 6px; padding: .5rem .7rem; font-size: .88rem;
  overflow-wrap: anywhere; }}
.answer b {{ display: block; font-size: .8rem; color: var(--dim); }}
summary {{ cursor: pointer; font-weight: 600; margin: .6rem 0; }}
.warning {{ border-left: 4px solid var(--c1); padding: .4rem .8rem;
  background: color-mix(in srgb, var(--c1) 10%, transparent); }}
</style>
{body}
</html>
"""


def page(title: str, body: str) -> str:
    """A whole HTML page that asks the network for nothing; `body` is HTML."""
    return PAGE.format(title=html.escape(title), body=body)


def figure(caption: str, plot: str) -> str:
    """A plot under its caption."""
    return f"<figure><figcaption>{html.escape(caption)}</figcaption>{plot}</figure>"


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A table of escaped cells."""
    top = "".join(f"<th>{html.escape(h)}</th>" for h in head)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(str(c))}</td>" for c in row) + "</tr>" for row in rows)
    return f"<table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table>"
