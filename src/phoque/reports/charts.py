"""Charts of reports as Vega-Lite specifications: drawn by the page with hover and zoom, and as PNG files for cards.

One palette is readable on light and dark pages and by color-blind readers; text takes the page's own color.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Spec = dict[str, Any]
HEIGHT = 220  # pixels
BAR_STEP = 15  # pixels from one bar to the next
PALETTE = ("#3b8bc2", "#e07b39", "#2aa17c", "#b07cc6", "#8a8f94")
GRAY = PALETTE[-1]
MAX_TICKS = 8
PNG_WIDTH, PNG_SCALE = 520, 2.0
# a legend of its own opacity: in a chart with bands it would be as pale as they are
LEGEND = {"orient": "bottom", "title": None, "columns": 2, "labelLimit": 400, "symbolOpacity": 1}
# without a modifier key the page scrolls, also on a phone
ZOOM = {
    "name": "zoom",
    "select": {
        "type": "interval",
        "translate": "[pointerdown[event.shiftKey], window:pointerup] > window:pointermove!",
        "zoom": "wheel![event.shiftKey]",
    },
    "bind": "scales",
}


@dataclass(frozen=True)
class Series:
    """A named line: points (x, y) in order of x, and maybe a band of (x, low, high) around it."""

    name: str
    points: Sequence[tuple[float, float]]
    band: Sequence[tuple[float, float, float]] = ()


@dataclass(frozen=True)
class Dots:
    """A named cloud: points (x, y, what it is called)."""

    name: str
    points: Sequence[tuple[float, float, str]]


def bar_chart(bars: Sequence[tuple[str, float]], x_label: str, marked: str) -> Spec | None:
    """Horizontal bars in the given order, the one named `marked` in color; None if no value is finite."""
    values = [{"name": name, "value": value, "marked": name == marked} for name, value in bars if _is_finite(value)]
    if not values:
        return None
    content = {
        "data": {"values": values},
        "mark": {"type": "bar", "tooltip": True},
        "encoding": {
            "y": {"field": "name", "type": "nominal", "sort": None, "title": None, "axis": {"labelOverlap": False}},
            "x": {"field": "value", "type": "quantitative", "title": x_label},
            "color": {
                "field": "marked",
                "type": "nominal",
                "scale": {"domain": [True, False], "range": [PALETTE[1], GRAY]},
                "legend": None,
            },
        },
    }
    return _chart(content) | {"height": {"step": BAR_STEP}}


def line_chart(series: Sequence[Series], x_label: str, y_label: str = "") -> Spec | None:
    """Lines over a common x axis, with a legend if there is more than one; None if no value is finite."""
    points: list[Spec] = [{"x": x, "y": y, "series": s.name} for s in series for x, y in s.points if _is_finite(x, y)]
    if not points:
        return None
    bands = [
        {"x": x, "low": low, "high": high, "series": s.name}
        for s in series
        for x, low, high in s.band
        if _is_finite(x, low, high)
    ]
    names = list(dict.fromkeys(str(point["series"]) for point in points))
    measured = sorted({point["x"] for point in points})
    is_counted = all(float(value).is_integer() for value in measured)
    ticks: Spec = {"tickMinStep": 1, "format": ",d"} if is_counted else {}
    if len(measured) <= MAX_TICKS:  # a tick for each; ticks between two of them would be rounded to either
        ticks = {"values": measured, "format": ",d" if is_counted else ",.6~g", "labelOverlap": "greedy"}
    x: Spec = {
        "field": "x",
        "type": "quantitative",
        "scale": {"zero": False, "nice": False},
        "axis": {"title": x_label, "grid": False} | ticks,
    }
    color = _color(names, PALETTE, has_legend=len(names) > 1)
    y: Spec = {
        "field": "y",
        "type": "quantitative",
        "scale": {"zero": False},
        "axis": {"title": y_label or None, "format": ",.6~g"},
    }
    tooltip = [
        {"field": "series", "title": "line"},
        {"field": "x", "title": x_label},
        {"field": "y", "title": y_label or "value", "format": ".4~g"},
    ]
    layers: list[Spec] = [
        {
            "mark": {"type": "line", "strokeWidth": 1.6, "point": {"size": 26 if len(points) < 200 else 10}},
            "data": {"values": points},
            "encoding": {"x": x, "y": y, "color": color, "tooltip": tooltip},
            "params": [ZOOM],
        }
    ]
    if bands:
        area = {"x": x, "y": y | {"field": "low"}, "y2": {"field": "high"}, "color": color}
        layers.insert(0, {"mark": {"type": "area", "opacity": 0.15}, "data": {"values": bands}, "encoding": area})
    return _chart({"layer": layers})


def scatter_chart(
    clouds: Sequence[Dots], labels: tuple[str, str], diagonal: float | None = None, level: float | None = None
) -> Spec | None:
    """Clouds of points, later ones on top; a band of +-`diagonal` around y = x, or a dashed line at y = `level`."""
    points: list[Spec] = [
        {"x": x, "y": y, "name": name, "cloud": cloud.name, "order": order}
        for order, cloud in enumerate(clouds)
        for x, y, name in cloud.points
        if _is_finite(x, y)
    ]
    if not points:
        return None
    names = [cloud.name for cloud in clouds]
    axes = [
        {"field": field, "type": "quantitative", "axis": {"title": label, "format": ",.6~g"}}
        for field, label in zip("xy", labels, strict=True)
    ]
    layers: list[Spec] = []
    if diagonal is not None:
        low, high = (pick(p[axis] for p in points for axis in "xy") for pick in (min, max))
        band = [{"x": x, "low": x - diagonal, "high": x + diagonal} for x in (low, high)]
        layers.append(
            {
                "mark": {"type": "area", "opacity": 0.25, "color": GRAY},
                "data": {"values": band},
                "encoding": {"x": axes[0], "y": axes[1] | {"field": "low"}, "y2": {"field": "high"}},
            }
        )
    if level is not None:
        layers.append(
            {
                "mark": {"type": "rule", "strokeDash": [4, 3], "color": GRAY},
                "data": {"values": [{"y": level}]},
                "encoding": {"y": axes[1]},
            }
        )
    layers.append(
        {
            "mark": {"type": "circle", "opacity": 0.8},
            "data": {"values": points},
            "encoding": {
                "x": axes[0],
                "y": axes[1],
                "color": _color(names, (GRAY, *PALETTE), has_legend=True, field="cloud"),
                "size": {"field": "order", "type": "quantitative", "scale": {"range": [12, 36]}, "legend": None},
                "order": {"field": "order"},
                "tooltip": [{"field": "name", "title": "feature"}, {"field": "cloud", "title": "group"}],
            },
            "params": [ZOOM],
        }
    )
    return _chart({"layer": layers})


def histogram(edges: Sequence[float], counts: Sequence[float], x_label: str, y_label: str) -> Spec | None:
    """Bars: `counts[i]` lies between `edges[i]` and `edges[i + 1]`; None without counts."""
    if not counts:
        return None
    bars = [
        {"low": low, "high": high, "count": count, "range": f"{low:g} to {high:g}"}
        for low, high, count in zip(edges, edges[1:], counts, strict=False)
    ]
    return _chart(
        {
            "mark": {"type": "bar", "color": PALETTE[0]},
            "data": {"values": bars},
            "encoding": {
                "x": {
                    "field": "low",
                    "type": "quantitative",
                    "bin": "binned",
                    "scale": {"zero": False},
                    "axis": {"title": x_label, "grid": False},
                },
                "x2": {"field": "high"},
                "y": {"field": "count", "type": "quantitative", "axis": {"title": y_label, "tickMinStep": 1}},
                "tooltip": [{"field": "range", "title": x_label}, {"field": "count", "title": y_label}],
            },
        }
    )


def heat_map(
    rows: Sequence[str],
    columns: Sequence[str],
    values: Sequence[Sequence[float | None]],
    labels: tuple[str, str],
    marked: tuple[int, int] | None = None,
    crossed: Sequence[tuple[int, int]] = (),
) -> Spec | None:
    """Cells of `values[row][column]` from pale (least) to full; `marked` is framed, `crossed` are struck out."""
    cells: list[Spec] = [
        {
            "row": rows[i],
            "column": columns[j],
            "value": value,
            "frame": 2.5 if marked == (i, j) else 0,
            "mark": "✕" if (i, j) in crossed else "",
        }
        for i, row in enumerate(values)
        for j, value in enumerate(row)
        if value is not None and math.isfinite(value)
    ]
    if not cells:
        return None
    position = {
        "x": {"field": "column", "type": "nominal", "sort": [*columns], "axis": {"title": labels[1], "labelAngle": 0}},
        "y": {"field": "row", "type": "nominal", "sort": [*reversed(rows)], "axis": {"title": labels[0]}},
    }
    low, high = (pick(cell["value"] for cell in cells) for pick in (min, max))
    shade = {
        "field": "value",
        "type": "quantitative",
        "scale": {"domain": [low, high if high > low else low + 1], "range": [0.08, 0.8]},
        "legend": None,
    }
    tooltip = [{"field": "row", "title": labels[0]}, {"field": "column", "title": labels[1]}, {"field": "value"}]
    number = {"field": "value", "type": "quantitative", "format": ".3~g"}
    return _chart(
        {
            "data": {"values": cells},
            "layer": [
                {
                    "mark": {"type": "rect", "fill": PALETTE[0], "stroke": PALETTE[1]},
                    "encoding": position
                    | {
                        "fillOpacity": shade,
                        "strokeWidth": {"field": "frame", "type": "quantitative", "scale": None},
                        "tooltip": tooltip,
                    },
                },
                {"mark": {"type": "text", "color": "currentColor"}, "encoding": position | {"text": number}},
                {
                    "mark": {"type": "text", "fontSize": 22, "color": "#b3261e", "opacity": 0.7},
                    "encoding": position | {"text": {"field": "mark", "type": "nominal"}},
                },
            ],
        }
    )


def write_png(spec: Spec | None, path: Path) -> None:
    """Draw a chart as a PNG file on white; nothing is written for a chart without values."""
    if spec is None:
        return
    import vl_convert

    path.write_bytes(vl_convert.vegalite_to_png(spec | {"width": PNG_WIDTH, "background": "white"}, scale=PNG_SCALE))


def _is_finite(*numbers: float) -> bool:
    return all(map(math.isfinite, numbers))


def _color(names: Sequence[str], colors: Sequence[str], *, has_legend: bool, field: str = "series") -> Spec:
    return {
        "field": field,
        "type": "nominal",
        "scale": {"domain": [*names], "range": [*colors[: len(names)]]},
        "legend": LEGEND if has_legend else None,
    }


def _chart(content: Spec) -> Spec:
    """Add what all charts share. Text is drawn in the page's color, grid lines in a gray that suits any page."""
    return {
        "$schema": "https://vega.github.io/schema/vega-lite/v6.json",
        "width": "container",
        "height": HEIGHT,
        "autosize": {"type": "fit", "contains": "padding"},
        "background": "transparent",
        "config": {
            "view": {"stroke": None},
            "font": "system-ui, sans-serif",
            "axis": {
                "labelColor": "currentColor",
                "titleColor": "currentColor",
                "titleFontWeight": "normal",
                "gridColor": GRAY,
                "gridOpacity": 0.25,
                "domain": False,
                "tickColor": GRAY,
                "labelOverlap": True,
            },
            "legend": {"labelColor": "currentColor", "symbolStrokeWidth": 2},
        },
    } | content
