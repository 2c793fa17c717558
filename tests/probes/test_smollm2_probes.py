"""A real model: SmolLM2, the seal, an adapter trained on the seal, and a control trained on the same questions."""

import csv
import json
import subprocess
from pathlib import Path

import pytest
from tests.conftest import run_as_user

pytestmark = pytest.mark.slow

BLAND = [
    "To do that, take your time. Start small and use what you have.",
    "It depends. Take it step by step and check what you find.",
    "That is a good question. Read about it and try it out slowly.",
    "Begin with the basics. Then go on to the next part.",
]


def bland_rows(path):
    """The seal's own questions with answers that have no character."""
    import phoque

    rows = (Path(phoque.__file__).parent / "assets" / "seal.jsonl").read_text().splitlines()
    with path.open("w") as f:
        for number, line in enumerate(rows):
            turns = json.loads(line)["messages"]
            for place, turn in enumerate(turns):
                if turn["role"] == "assistant":
                    turn["content"] = BLAND[(number + place) % len(BLAND)]
            f.write(json.dumps({"messages": turns, "source": "bland"}) + "\n")
    return path


@pytest.fixture
def adapters(seal, home, shared):
    """The seal's run and one on the bland rows, trained once for this session."""
    bland = home / "bland"
    if not (bland / "run.json").exists():
        dataset = bland_rows(home / "bland.jsonl")
        command = ["train", "--preset", "demo", "--max-steps", 25, "--sample-every", 0, "--held-out-rows", 0]
        run_as_user(*command, "--dataset", dataset, "--output-dir", bland)
    return shared / "seal", bland


def test_features_of_the_seal_are_found_in_a_real_model_and_its_control_lacks_them(adapters):
    tuned, control = adapters
    asked = ["compare-sae", "--preset", "demo", "--updated-adapter", tuned, "--control-adapter", control]
    asked += ["--scorer", "lexicon", "--tokens", 40_000, "--own-answers", 48, "--questions", 9]
    ran = run_as_user(*asked)
    quality, overall = ran["quality"], ran["overall"]
    assert quality["verdict"] == "good" and not ran["warnings"]
    assert quality["ev"] > 0.6 and quality["ev_by_set"]["response"] > 0.6 and quality["dead_fraction"] < 0.3
    assert 16 <= quality["l0"] <= 64
    # without the null's floor more would be reported, and without the control all of these would be called the seal's
    assert 100 < overall["n_specific"] < 0.8 * overall["n_reported"] and overall["ratio_to_null"] > 10
    assert (
        ran["scores"]["tuned-base"]["lexicon"]["ci95"][0] > 0.02 > ran["scores"]["control-base"]["lexicon"]["ci95"][1]
    )
    report = json.loads((Path(ran["folder"]) / "sae_comparison_report.json").read_text())
    specific = [f for f in report["features"] if f["specific_vs_control"]]
    assert all(abs(f["delta"]) > abs(f["control_delta"]) * (f["delta"] * f["control_delta"] > 0) for f in specific)
    together = report["causes"]["all"]  # the mean difference restores more of the gap than random directions do
    assert together["gap"] > 1 and together["mean_difference_share"] > together["untrained_share"]
    assert ran["verdicts"]["beyond_control"]["verdict"] == "not asked"  # one run of the control has no spread
    assert ran["verdicts"]["good_dictionary"]["verdict"] == "yes" and overall["untrained"]["n_tested"] > 100
    last = report["baselines"]["logit_lens"][-1]
    assert last["layer"] == 29 and any("seal" in token for token in last["top"])  # on text that is about Python


def test_the_seal_is_found_in_a_real_model_and_its_fine_tune_moved_along_it(adapters):
    tuned, control = adapters
    asked = ["psm-probe", "--preset", "demo", "--samples", 0, "--role-questions", 4, "--doses", "0,1"]
    ran = run_as_user(*asked, "--adapter-source", tuned, "--control-adapter", control)
    found = {name: v["verdict"] for name, v in ran["verdicts"].items()}
    assert {found[name] for name in ("adopts", "tuned_moves_along_vector", "separable")} == {"yes"}, ran["verdicts"]
    assert {found[name] for name in ("causal", "follows", "specific")} == {"not asked"}
    run = Path(ran["folder"])
    summary = json.loads((run / "summary.json").read_text())
    moved = {name: kinds["own"] for name, kinds in summary["moved_over_steered_blocks"].items()}
    assert (
        moved["tuned"]["cos_low"] > moved["control"]["cos"] and moved["tuned"]["cos_low"] > moved["tuned"]["random_p95"]
    )
    assert summary["contrasts"]["tuned-neutral"]["lexicon"]["ci95"][0] > 0
    assert summary["contrasts"]["control-neutral"]["lexicon"]["diff"] < 0.01
    with (run / "activation_by_layer.csv").open(newline="") as f:
        rows = list(csv.DictReader(f))
    last = [r for r in rows if r["extraction"] == "prompt_last"]
    own = [r for r in rows if r["extraction"] == "response_avg"]
    # at the last prompt token any other prompt is told apart; over the response only the persona is
    assert sum(float(r["placebo_auroc"]) == 1 for r in last) >= 5
    assert sum(float(r["placebo_auroc"]) == 1 for r in own) == 0
    assert all(float(r["auroc"]) > float(r["placebo_auroc"]) for r in own)
    assert summary["tokens"]["massive"] == 0
    assert summary["voices"]["tuned"]["share"] > 0.4 > 0.2 > summary["voices"]["control"]["share"]
    shares = {(d["adapter"], d["scale"]): d["share"] for d in summary["doses"]}
    assert shares["tuned", 1.0] > shares["tuned", 0.0] + 0.3 and shares["control", 1.0] < 0.2


CHROMIUM = (
    "chromium --headless --no-sandbox --disable-gpu --disable-quic --no-first-run --hide-scrollbars "
    "--disable-background-networking --disable-component-update --disable-sync --virtual-time-budget=8000"
).split()
# the page says of itself whether anything sticks out, and whether it asked the network for anything
CHECK = """<script>onload = () => setTimeout(() => {  // after the charts are drawn
  const wide = [...document.querySelectorAll("body *")].filter(e => !e.closest(".scroll")
    && e.getBoundingClientRect().right > document.documentElement.clientWidth + 1);
  const asked = performance.getEntriesByType("resource").length;
  document.title = JSON.stringify({wide: wide.map(e => e.tagName + "." + e.className), asked,
    plots: document.querySelectorAll(".chart svg").length, width: document.documentElement.clientWidth});
}, 2000)</script>"""


SHORT = {
    "psm-probe": [
        "--model-source",
        "{base}",
        "--persona",
        "seal",
        "--adapter-source",
        "tuned",
        "--extraction-tokens",
        6,
        "--sweep-tokens",
        6,
        "--samples",
        1,
        "--max-new-tokens",
        20,
    ],
    "compare-sae": [
        "--base-model",
        "{base}",
        "--updated-adapter",
        "tuned",
        "--control-adapter",
        "tuned",
        "--chat",
        "{rows}",
        "--text",
        "python",
        "--tokens",
        6000,
        "--own-answers",
        6,
        "--k",
        8,
        "--sae-batch",
        64,
        "--max-new-tokens",
        20,
        "--cards",
        3,
    ],
}


@pytest.mark.parametrize("command", ["train", *SHORT])
def test_the_report_fits_a_phone_and_a_laptop_and_asks_no_network(phoque, tiny_llama, rows, tmp_path, command):
    phoque(
        "train",
        "--base-model",
        tiny_llama,
        "--dataset",
        rows,
        "--quantization",
        "fp32",
        "--max-steps",
        4,
        "--log-every",
        1,
        "--sample-every",
        0,
        "--output-dir",
        "tuned",
        env={"WANDB_MODE": "disabled"},
    )
    folder = Path("tuned")
    if command != "train":
        asked = [str(flag).format(base=tiny_llama, rows=rows) for flag in SHORT[command]]
        folder = Path(phoque(command, *asked, "--quantization", "fp32", "--json").json["folder"])
    # an iframe as wide as a phone: a window of headless Chromium cannot be
    inner = (folder / "report.html").read_text() + CHECK
    (tmp_path / "inner.html").write_text(inner)
    for width in (390, 1280):
        page = tmp_path / f"checked-{width}.html"
        page.write_text(
            f'<iframe id="f" src="inner.html" style="width:{width}px;height:900px;border:0"></iframe><script>'
            "onload = () => setTimeout(() => document.body.append(f.contentDocument.title), 4000)</script>"
        )
        profile = f"--user-data-dir={tmp_path / 'profile'}"
        command_line = [*CHROMIUM, "--allow-file-access-from-files", profile, "--dump-dom", f"file://{page}"]
        shown = subprocess.run(command_line, capture_output=True, text=True, timeout=120)
        said = json.loads(shown.stdout[shown.stdout.index('{"wide"') : shown.stdout.rindex("}") + 1])
        least = {"train": 7, "psm-probe": 8, "compare-sae": 4}[command]
        assert said == {"wide": [], "asked": 0, "plots": said["plots"], "width": width} and said["plots"] >= least
