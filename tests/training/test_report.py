"""The report of a run: what it concludes from the numbers, and what it shows."""

import json
import re
from pathlib import Path

import pytest

from phoque.training.report import conclude, write_report


def record(held_out: int = 64) -> dict:
    return {"data": {"held_out": held_out}}


def without_scripts(run: Path) -> str:
    return re.sub(r"<script.*?</script>", "", (run / "report.html").read_text(), flags=re.DOTALL)


def metrics(*losses: float) -> list[dict]:
    return [{"step": 10 * index, "held_out_loss": loss} for index, loss in enumerate(losses)]


@pytest.mark.parametrize(
    ("losses", "held_out", "words"),
    [
        ((4.0, 3.0, 2.0), 64, ["fell by 50%", "still falling"]),
        ((4.0, 2.0, 1.999), 64, ["hardly changed since step 10"]),
        ((4.0, 2.0, 2.5), 64, ["lowest at step 10 (2.000)", "overfits", "about 10 steps"]),
        ((4.0, 4.2), 64, ["did not fall", "--learning-rate"]),
        ((4.0, 2.0), 8, ["no trend", "8 held-out conversations are few"]),
        ((4.0,), 64, ["not measured"]),
    ],
)
def test_a_conclusion_follows_from_the_held_out_loss(losses, held_out, words):
    text = " ".join(conclude(metrics(*losses), record(held_out)))
    assert all(word in text for word in words), text


def test_losses_of_other_held_out_rows_are_not_concluded_from():
    text = " ".join(conclude(metrics(4.0, 3.0, 1.0, 1.2), record() | {"held_out_since": 10}))
    assert "did not fall: 1.000 at step 20, the first with these held-out rows, 1.200 after 30 steps" in text


def test_a_report_concludes_and_names_the_next_command(phoque, tiny_llama, rows, tmp_path):
    run = tmp_path / "run"
    command = ["train", "--base-model", tiny_llama, "--dataset", rows, "--quantization", "fp32", "--output-dir", run]
    out = phoque(*command, "--max-steps", 4, "--save-steps", 2, "--sample-every", 4, "--prompt", "Gull <b>?").out
    assert out.rstrip().splitlines()[-2] == f"next: phoque merge --adapter-source {run}"
    assert out.rstrip().splitlines()[-1] == f"try it: phoque chat {run}"
    page = without_scripts(run)
    assert "held-out loss" in page and f"phoque merge --adapter-source {run}" in page
    assert "Gull &lt;b&gt;?" in page and "<b>?" not in page and "http" not in page.replace("http-equiv", "")
    assert "All settings" in page and "--max-steps" in page


def test_many_and_long_sources_are_cut(phoque, tiny_llama, tmp_path):
    from tests.rows import row, write_rows

    rows = write_rows(tmp_path / "x.jsonl", [row(n, source=f"thread/{n}/{'x' * 500}\u001b[2J") for n in range(400)])
    run = tmp_path / "run"
    command = ["train", "--base-model", tiny_llama, "--dataset", rows, "--quantization", "fp32", "--output-dir", run]
    ran = phoque(*command, "--max-steps", 2, "--sample-every", 0)
    assert max(map(len, ran.err.splitlines())) < 600 and "and 394 others" in ran.err and "\u001b" not in ran.err
    summary = json.loads((run / "run.json").read_text())["data"]
    assert len(summary["sources"]) == 50 and summary["other_sources"] == 350
    write_report(run)
    assert "380 other sources" in without_scripts(run) and len(without_scripts(run)) < 200_000
    assert "\u001b" not in phoque(*command, "--max-steps", 2, "--dry-run").out
