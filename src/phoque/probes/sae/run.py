"""`phoque compare-sae`: run a comparison and write its run folder."""

import shutil
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from phoque.distributed.processes import current
from phoque.files import run_folder
from phoque.probes.destination import prepare_probe
from phoque.probes.persona_source import show_settings
from phoque.probes.sae import files, report
from phoque.probes.sae.comparison import Comparison, ComparisonResult
from phoque.probes.sae.dictionary import write_dictionary
from phoque.probes.sae.plan import make_plan
from phoque.probes.sae.summary import build_answer_rows, build_report
from phoque.results import DryRun, RunFolderResult
from phoque.services import Services
from phoque.settings.compare_sae import SaeSettings
from phoque.settings.fields import Resolved


@dataclass(frozen=True, kw_only=True)
class CompareResult(RunFolderResult):
    """The counts of reported features, the quality of the autoencoder, and the scores of the answers."""

    verdicts: dict[str, Any]
    overall: dict[str, Any]
    quality: dict[str, Any]
    layer: int
    scores: dict[str, Any]


def compare_models(
    resolved: Resolved[SaeSettings], services: Services, *, dry_run: bool
) -> CompareResult | DryRun | None:
    """Compare two models feature by feature and write the run folder.

    Where several processes compare together, each calls this, and process 0 alone writes and returns a result. Raises
    UsageError for models that cannot be compared, RunError for a failed upload if
    --fail-on-artifacts-upload-error is set.
    """
    s, console, started = resolved.settings, services.console, time.monotonic()
    resolve_inputs = partial(make_plan, resolved, services, weights=not dry_run)
    plan, destination = prepare_probe("compare-sae", resolve_inputs, s, services, dry_run=dry_run)
    if dry_run:
        facts = {
            "base": f"{plan.source.name} ({plan.source.origin})",
            "updated": plan.names["tuned"],
            "controls": [plan.names[name] for name in plan.controls],
            "layers": plan.layers,
            "prompts": len(plan.questions),
            "autoencoder": s.sae
            or f"{s.architecture}, {s.width} x the hidden size, k {s.k}, {s.seeds} seed{'s' if s.seeds > 1 else ''}",
            "texts": [*(dataset.name for dataset in plan.chats), s.text],
            "scorers": plan.scorers,
        }
        return DryRun(facts, show_settings(resolved, "base_model", plan.source, plan.tuned), plan.warnings)
    current().check_same((plan.source.weights, plan.persona.sha256, plan.names))
    for text in plan.warnings:
        console.warn(text)
    measurements = Comparison(s, plan, services).run()
    if measurements is None:
        return None
    summary = build_report(resolved, plan, measurements)
    summary["run"]["seconds"] = round(time.monotonic() - started, 1)
    folder = _write_run_folder(s, measurements, summary)
    for text in measurements.warnings:
        console.warn(text)
    upload = destination.deliver("compare-sae", folder, summary["verdicts"], s, services)
    return CompareResult(
        folder=str(folder),
        report=str(folder / report.REPORT),
        verdicts=summary["verdicts"],
        overall=summary["overall"],
        quality=summary["sae"]["quality"],
        layer=summary["layer"]["block_index"],
        warnings=summary["warnings"],
        scores=summary["scores"]["contrasts"],
        repo=upload.repo if upload else None,
        commit=upload.commit if upload else None,
    )


def _write_run_folder(s: SaeSettings, measurements: ComparisonResult, summary: dict[str, Any]) -> Path:
    """Write the run folder, and copies of the reports to --report-json and --report-md; return the folder."""
    with run_folder(s.output_dir, "sae") as (staging, folder):
        summary["run"]["name"] = folder.name
        files.write_json(staging / files.JSON, summary)
        files.write_features(staging / files.FEATURES, [(block.layer, block.table) for block in measurements.blocks])
        files.write_rows(staging / files.PROMPTS, summary["prompt_shifts"])
        files.write_rows(staging / files.LAYERS, summary["baselines"]["layer_curve"])
        files.write_answers(staging / files.ANSWERS, build_answer_rows(measurements))
        for (layer, n), source in measurements.homes.items():
            name = f"block-{layer}" + (f"-seed-{n}" if n else "")
            shutil.copytree(source / "sae", staging / files.DICTIONARIES / name)
        for block in measurements.blocks:
            if block.difference is not None:
                write_dictionary(block.difference, staging / files.DICTIONARIES / f"block-{block.layer}-difference")
        report.write_reports(staging, folder.name)
    for target, name in ((s.report_json, files.JSON), (s.report_md, files.MARKDOWN)):
        if target:
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(folder / name, target)
    return folder
