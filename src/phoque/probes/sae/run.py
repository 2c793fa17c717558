"""`phoque compare-sae`: run a comparison and write its run folder."""

import shutil
import time
from pathlib import Path
from typing import Any

from phoque.console import Console
from phoque.files import run_folder
from phoque.hub.upload import opened_for_run, pushed_run
from phoque.probes.sae import files, report
from phoque.probes.sae.comparison import Comparison, ComparisonResult
from phoque.probes.sae.plan import make_plan
from phoque.probes.sae.summary import build_answer_rows, build_report
from phoque.settings.compare_sae import SaeSettings
from phoque.settings.fields import Resolved


def compare(resolved: Resolved[SaeSettings], cache: Path, console: Console, dry_run: bool) -> dict[str, Any]:
    """Run the comparison and write its run folder; return {folder, overall, quality, ...}.

    Raises PhoqueError (2) for models that cannot be compared, and (1) for a failed upload if
    --fail-on-artifacts-upload-error is set.
    """
    s, started = resolved.settings, time.monotonic()
    plan = make_plan(resolved, cache, console, fetch_weights=not dry_run)
    facts = {
        "base": f"{plan.source.name} ({plan.source.origin})",
        "updated": plan.names["tuned"],
        "control": plan.names.get("control"),
        "layers": plan.layers,
        "prompts": len(plan.questions),
        "autoencoder": s.sae or f"{s.architecture}, {s.width} x the hidden size, k {s.k}, {s.seeds} seed(s)",
        "texts": [*(dataset.name for dataset in plan.chats), s.text],
        "scorers": plan.scorers,
    }
    if dry_run:
        return facts | {"settings": resolved.provenance(), "warnings": plan.warnings}
    for text in plan.warnings:
        console.warn(text)
    repo = opened_for_run(resolved, plan.hub, console)
    measurements = Comparison(resolved, plan, cache, console).run()
    summary = build_report(resolved, plan, measurements)
    summary["run"]["seconds"] = round(time.monotonic() - started, 1)
    folder = _write_run_folder(s, measurements, summary)
    for text in measurements.warnings:
        console.warn(text)
    result = {
        "folder": str(folder),
        "report": str(folder / report.REPORT),
        "overall": summary["overall"],
        "quality": summary["sae"]["quality"],
        "layer": summary["layer"]["block_index"],
        "warnings": summary["warnings"],
        "scores": summary["scores"]["contrasts"],
    }
    return result | (pushed_run(repo, folder, s, console) if repo else {})


def _write_run_folder(s: SaeSettings, measurements: ComparisonResult, summary: dict[str, Any]) -> Path:
    """Write the run folder, and copies of the reports to --report-json and --report-md; return the folder."""
    with run_folder(s.output_dir.expanduser(), "sae") as (staging, folder):
        summary["run"]["name"] = folder.name
        files.write_json(staging / files.JSON, summary)
        files.write_features(staging / files.FEATURES, [(block.layer, block.table) for block in measurements.blocks])
        files.write_rows(staging / files.PROMPTS, summary["prompt_shifts"])
        files.write_rows(staging / files.LAYERS, summary["baselines"]["layer_curve"])
        files.write_answers(staging / files.ANSWERS, build_answer_rows(measurements))
        for (layer, n), source in measurements.homes.items():
            name = f"block-{layer}" + (f"-seed-{n}" if n else "")
            shutil.copytree(source / "sae", staging / files.DICTIONARIES / name)
        report.write_reports(staging, folder.name)
    for target, name in ((s.report_json, files.JSON), (s.report_md, files.MARKDOWN)):
        if target:
            target.expanduser().parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(folder / name, target.expanduser())
    return folder
