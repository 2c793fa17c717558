"""Charts and pages of reports: what is not finite is left out, texts are escaped, and PNG files show the same chart."""

import json
import re

import pytest

from phoque.reports.charts import Dots, Series, heat_map, histogram, line_chart, scatter_chart, write_png
from phoque.reports.page import render_page


def values_of(spec):
    return [layer["data"]["values"] for layer in spec["layer"]]


def test_values_that_are_not_finite_are_left_out():
    (points,) = values_of(line_chart([Series("a", [(0, 1), (1, float("nan")), (2, 3)])], "step"))
    assert [point["y"] for point in points] == [1, 3]
    assert line_chart([Series("a", [(0, float("inf"))])], "step") is None
    assert scatter_chart([Dots("a", [])], ("x", "y")) is None and histogram([], [], "x", "rows") is None
    assert heat_map(["1"], ["2"], [[None]], ("a", "b")) is None


def test_one_line_has_no_legend_and_bands_lie_below_their_lines():
    one = line_chart([Series("a", [(0, 1), (1, 2)])], "step")
    assert one["layer"][0]["encoding"]["color"]["legend"] is None
    two = line_chart([Series("a", [(0, 1)], [(0, 0.5, 1.5)]), Series("b", [(0, 2)])], "step")
    area, line = two["layer"]
    assert area["mark"]["type"] == "area" and line["encoding"]["color"]["legend"]["symbolOpacity"] == 1


def test_a_page_escapes_texts_and_cannot_be_left_by_a_name_in_a_chart():
    chart = line_chart([Series("</script><b>gull", [(0, 1), (1, 2)])], "step")
    page = render_page("charts", title="a <b> & c", charts=[("<i>", chart), ("nothing", None)])
    assert "a &lt;b&gt; &amp; c" in page and "&lt;i&gt;" in page and "<b>gull" not in page
    assert "Nothing was measured." in page
    (spec,) = re.findall(r'<script type="application/json" id="chart-1">(.*?)</script>', page, re.DOTALL)
    assert json.loads(spec)["layer"][0]["data"]["values"][0]["series"] == "</script><b>gull"


@pytest.mark.parametrize(
    "spec",
    [
        line_chart([Series("a", [(0, 1), (1, 2)], [(0, 0, 2), (1, 1, 3)]), Series("b", [(0, 2), (1, 1)])], "block"),
        scatter_chart([Dots("a", [(0, 1, "x")]), Dots("b", [(1, 2, "y")])], ("base", "updated"), 0.5, 1.0),
        histogram([0, 1, 2], [3, 4], "tokens", "rows"),
        heat_map(["1", "2"], ["a", "b"], [[0.1, None], [0.3, 0.4]], ("block", "coefficient"), (0, 0), [(1, 1)]),
    ],
)
def test_every_chart_is_drawn_as_a_picture(spec, tmp_path):
    write_png(spec, tmp_path / "chart.png")
    content = (tmp_path / "chart.png").read_bytes()
    width = int.from_bytes(content[16:20], "big")
    assert content.startswith(b"\x89PNG") and width > 800 and len(content) > 3000
