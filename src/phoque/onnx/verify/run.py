"""`phoque verify-onnx`: run the levels in order, up to --level or as far as this machine can."""

from pathlib import Path
from typing import Any

from phoque.console import Console
from phoque.errors import PhoqueError
from phoque.hub.client import Hub
from phoque.hub.repo import Repo
from phoque.models.source import Source, resolve
from phoque.onnx.session import SUFFIXES
from phoque.onnx.verify.checks import LEVELS, Verdict
from phoque.onnx.verify.export_dir import ExportDir, HubExport, LocalExport
from phoque.onnx.verify.files import check_files
from phoque.onnx.verify.graph import check_graphs
from phoque.onnx.verify.js_client import check_browser, check_node
from phoque.onnx.verify.ort import check_ort
from phoque.settings.fields import Resolved
from phoque.settings.verify_onnx import VerifySettings


def verify_export(resolved: Resolved[VerifySettings], cache: Path, console: Console, dry_run: bool) -> dict[str, Any]:
    """Verify an export; return the verdict as a dictionary, with the export's `name` and its local `folder`."""
    s = resolved.settings
    export = open_export(resolved, cache, console)
    if dry_run:
        return {"name": export.name, "files": len(export.sizes), "settings": resolved.provenance()}
    reference = None
    if s.reference:
        reference = resolve(s.reference, None, resolved.secrets.hub, cache, console.say)
    verdict = _run_levels(export, s, reference, cache, console)
    if s.report_md:
        s.report_md.write_text(verdict.as_markdown(export.name))
    return verdict.as_dict() | {"name": export.name, "folder": str(export.folder)}


def verify_folder(folder: Path, dtypes: list[str], level: Any, console: Console, reference: Source) -> Verdict:
    """Verify a folder that was just exported, up to `level`."""
    s = VerifySettings(local_dir=folder, dtype=dtypes, level=level)
    return _run_levels(LocalExport(folder), s, reference, folder, console)


def open_export(resolved: Resolved[VerifySettings], cache: Path, console: Console) -> ExportDir:
    """Return the export that the settings name. Raises PhoqueError (2) unless exactly one of the two options is set."""
    s = resolved.settings
    if bool(s.repo_id) == bool(s.local_dir):
        raise PhoqueError(
            "No single export is named.",
            "Exactly one of --repo-id and --local-dir must be set.",
            "Give a repository or a folder.",
        )
    if s.local_dir:
        return LocalExport(s.local_dir.expanduser())
    hub = Hub(resolved.secrets.hub, console.say, s.hub_patience)
    return HubExport(Repo(hub, s.repo_id), s.revision, cache)


def _run_levels(
    export: ExportDir, s: VerifySettings, reference: Source | None, cache: Path, console: Console
) -> Verdict:
    verdict = Verdict(s.level)
    last_level = LEVELS.index(s.level or LEVELS[-1])
    layout, available = check_files(export, verdict)
    if unknown := [dtype for dtype in s.dtype if dtype not in SUFFIXES]:
        raise PhoqueError(
            f"There is no precision {unknown[0]!r}.", f"phoque knows {', '.join(SUFFIXES)}.", "Fix --dtype."
        )
    if (unavailable := [dtype for dtype in s.dtype if dtype not in available]) and not verdict.failed_checks():
        raise PhoqueError(
            f"{export.name} has no {unavailable[0]}.",
            f"It has {', '.join(available)}.",
            "Give one of them as --dtype, or omit --dtype.",
        )
    dtypes = [dtype for dtype in available if not s.dtype or dtype in s.dtype]
    if last_level >= 1 and "config.json" in export.sizes and not _has_unreadable_config(verdict):
        console.say(f"{export.name}: checking the graphs")
        check_graphs(export, layout, dtypes, verdict)
    if last_level >= 2:
        if verdict.failed_checks():
            for level in LEVELS[2 : last_level + 1]:
                verdict.skip(level, "the export runs", "a check of an earlier level failed")
            return verdict
        console.say(f"{export.name}: running the graphs in ONNX Runtime")
        check_ort(export.fetch_all(), layout, dtypes, reference, verdict)
    if last_level >= 3:
        check_node(export.fetch_all(), layout, dtypes, s, cache, console, verdict)
    if last_level >= 4:
        check_browser(export.fetch_all(), layout, dtypes, s, cache, console, verdict)
    return verdict


def _has_unreadable_config(verdict: Verdict) -> bool:
    """Whether the files that the graph level needs (config.json and a known architecture) failed their checks."""
    return any(check.asks.startswith(("the root folder's", "Transformers.js has")) for check in verdict.failed_checks())
