"""The section with a probe's verdicts in the card of an adapter."""

import pytest

from phoque.artifacts import Upload
from phoque.probes.card_section import render_section, replace_section

VERDICT = {"verdict": "yes", "number": 0.9, "unit": "AUROC", "n": 24}
UPLOAD = Upload("harbour/probes", "c0ffee", "runs/psm 1", "http://hub/datasets/harbour/probes/tree/c0ffee/runs/psm%201")


def section(verdict: str) -> str:
    return render_section("psm-probe", {"adopts": VERDICT | {"verdict": verdict}}, UPLOAD, "ab" * 32)


def test_a_section_names_the_run_and_the_weights():
    text = section("yes")
    assert "[`runs/psm 1`](http://hub/datasets/harbour/probes/tree/c0ffee/runs/psm%201)" in text
    assert "`abababababababab`" in text and "| adopts | yes | 0.9 AUROC (n = 24) |" in text


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_an_earlier_section_is_replaced_and_all_else_stays(newline):
    card = newline.join(["# Seal", "", "My own words.", ""])
    once = replace_section(card, "psm-probe", section("yes"))
    both = replace_section(once, "compare-sae", section("maybe"))
    twice = replace_section(both, "psm-probe", section("no"))
    assert twice == both.replace("| adopts | yes |", "| adopts | no |")
    assert twice.startswith(card.rstrip()) and twice.count("## Probe results") == 1
    assert twice.count("\n") == twice.count(newline) and "maybe" in twice


def test_words_after_a_damaged_section_are_kept():
    """Somebody deleted the end marker and wrote on."""
    card = replace_section("# Seal", "psm-probe", section("yes")).replace(
        "<!-- end of phoque psm-probe -->", "My words."
    )
    for command, verdict in (("compare-sae", "maybe"), ("psm-probe", "no"), ("psm-probe", "yes"), ("psm-probe", "no")):
        card = replace_section(card, command, section(verdict))
    assert "My words." in card and "maybe" in card
    assert card.count("<!-- phoque psm-probe -->") == card.count("<!-- end of phoque psm-probe -->") == 1
