"""`phoque verify-onnx`: run the levels in order, up to --level or as far as this machine can."""

from pathlib import Path
from typing import Literal

from phoque.checks import Verdict, VerifyResult
from phoque.errors import UsageError
from phoque.hub.repo import Repo
from phoque.models.source import Source, find_model
from phoque.onnx.session import SUFFIXES
from phoque.onnx.verify.export_dir import ExportDir, HubExport, LocalExport
from phoque.onnx.verify.files import CONFIG_CHECKS, check_files
from phoque.onnx.verify.graph import check_graphs
from phoque.onnx.verify.js_client import check_browser, check_node
from phoque.onnx.verify.ort import check_ort
from phoque.results import DryRun
from phoque.services import Services
from phoque.settings.fields import Resolved
from phoque.settings.verify_onnx import LEVELS, VerifySettings


def verify_export(resolved: Resolved[VerifySettings], services: Services, *, dry_run: bool) -> VerifyResult | DryRun:
    """Check an export level by level, up to --level or as far as this machine can."""
    s = resolved.settings
    export = open_export(s, services)
    if dry_run:
        return DryRun({"name": export.name, "files": len(export.sizes)}, resolved.provenance())
    reference = find_model(s.reference, None, services) if s.reference else None
    verdict = _run_levels(export, s, reference, services)
    if s.report_md:
        s.report_md.write_text(verdict.as_markdown(export.name))
    return VerifyResult(verdict, export.name, str(export.folder))


def verify_folder(
    folder: Path,
    dtypes: list[str],
    level: Literal["files", "graph", "ort"],
    reference: Source,
    services: Services,
    *,
    name: str,
) -> Verdict:
    """Verify a folder that was just exported as `name`, up to `level`."""
    s = VerifySettings(local_dir=folder, dtype=dtypes, level=level)
    return _run_levels(LocalExport(folder, name), s, reference, services)


def open_export(s: VerifySettings, services: Services) -> ExportDir:
    """Return the export that the settings name."""
    if s.local_dir:
        return LocalExport(s.local_dir)
    return HubExport(Repo(services.hub, s.repo_id), s.revision, services.cache)


def _run_levels(export: ExportDir, s: VerifySettings, reference: Source | None, services: Services) -> Verdict:
    verdict, console = Verdict(LEVELS, s.level), services.console
    last_level = LEVELS.index(s.level or LEVELS[-1])
    layout, available = check_files(export, verdict)
    if unknown := [dtype for dtype in s.dtype if dtype not in SUFFIXES]:
        raise UsageError(
            what=f"There is no precision {unknown[0]!r}.",
            why=f"phoque knows {', '.join(SUFFIXES)}.",
            fix="Fix --dtype.",
        )
    if (unavailable := [dtype for dtype in s.dtype if dtype not in available]) and not verdict.failed_checks():
        raise UsageError(
            what=f"{export.name} has no {unavailable[0]}.",
            why=f"It has {', '.join(available)}.",
            fix="Give one of them as --dtype, or omit --dtype.",
        )
    dtypes = [dtype for dtype in available if not s.dtype or dtype in s.dtype]
    if last_level >= 1 and "config.json" in export.sizes and not verdict.has_failed(*CONFIG_CHECKS):
        console.stage(f"{export.name}: checking the graphs")
        check_graphs(export, layout, dtypes, verdict)
    if last_level >= 2:
        if verdict.failed_checks():
            for level in LEVELS[2 : last_level + 1]:
                verdict.skip(level, "the export runs", "a check of an earlier level failed")
            return verdict
        console.stage(f"{export.name}: running the graphs in ONNX Runtime")
        check_ort(export.fetch_all(), layout, dtypes, reference, verdict)
    if last_level >= 3:
        check_node(export.fetch_all(), layout, dtypes, s, services, verdict)
    if last_level >= 4:
        check_browser(export.fetch_all(), layout, dtypes, s, services, verdict)
    return verdict
