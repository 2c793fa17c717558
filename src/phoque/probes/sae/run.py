"""`phoque compare-sae`: from settings to a run folder."""

import shutil
import time
from pathlib import Path
from typing import Any

from phoque.console import Console
from phoque.files import run_folder
from phoque.hub.upload import opened_for_run, pushed_run
from phoque.probes.sae import files, report
from phoque.probes.sae.comparison import Comparison, Found
from phoque.probes.sae.plan import planned
from phoque.probes.sae.summary import answer_rows, summarised
from phoque.settings.compare_sae import SaeSettings
from phoque.settings.fields import Resolved


def compare(resolved: Resolved[SaeSettings], cache: Path, console: Console, dry_run: bool) -> dict[str, Any]:
    """Do what the settings ask for; return {folder, overall, quality, ...}.

    Raises PhoqueError (2) for what cannot be compared, and (1) for a failed upload if that was asked for.
    """
    s, begun = resolved.settings, time.monotonic()
    plan = planned(resolved, cache, console, weights=not dry_run)
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
    found = Comparison(resolved, plan, cache, console).run()
    summary = summarised(resolved, plan, found)
    summary["run"]["seconds"] = round(time.monotonic() - begun, 1)
    folder = _written(s, found, summary)
    for text in found.warnings:
        console.warn(text)
    result = {
        "folder": str(folder),
        "report": str(folder / report.NAME),
        "overall": summary["overall"],
        "quality": summary["sae"]["quality"],
        "layer": summary["layer"]["block_index"],
        "warnings": summary["warnings"],
        "scores": summary["scores"]["contrasts"],
    }
    return result | (pushed_run(repo, folder, s, console) if repo else {})


def _written(s: SaeSettings, found: Found, summary: dict[str, Any]) -> Path:
    """The run folder, and the reports once more where the user wants them."""
    with run_folder(s.output_dir.expanduser(), "sae") as (staging, folder):
        summary["run"]["name"] = folder.name
        files.write_json(staging / files.JSON, summary)
        files.write_features(staging / files.FEATURES, [(one.layer, one.table) for one in found.blocks])
        files.write_rows(staging / files.PROMPTS, summary["prompt_shifts"])
        files.write_rows(staging / files.LAYERS, summary["baselines"]["layer_curve"])
        files.write_answers(staging / files.ANSWERS, answer_rows(found))
        for (layer, n), home in found.homes.items():
            name = f"block-{layer}" + (f"-seed-{n}" if n else "")
            shutil.copytree(home / "sae", staging / files.DICTIONARIES / name)
        report.write(staging, folder.name)
    for target, name in ((s.report_json, files.JSON), (s.report_md, files.MARKDOWN)):
        if target:
            target.expanduser().parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(folder / name, target.expanduser())
    return folder
