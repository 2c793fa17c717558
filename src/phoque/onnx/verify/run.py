"""`phoque verify-onnx`: the levels in order, as far as asked or as far as this machine can."""

from pathlib import Path
from typing import Any

from phoque.console import Console
from phoque.errors import PhoqueError
from phoque.hub.client import Hub
from phoque.hub.repo import Repo
from phoque.models.source import Source, resolve
from phoque.onnx.session import SUFFIXES
from phoque.onnx.verify.checks import LEVELS, Verdict
from phoque.onnx.verify.export_dir import ExportDir, Local, OnHub
from phoque.onnx.verify.files import check_files
from phoque.onnx.verify.graph import check_graphs
from phoque.onnx.verify.js_client import check_browser, check_node
from phoque.onnx.verify.ort import check_ort
from phoque.settings.fields import Resolved
from phoque.settings.verify_onnx import VerifySettings


def verified(resolved: Resolved[VerifySettings], cache: Path, console: Console, dry_run: bool) -> dict[str, Any]:
    """Do what the settings ask for; return the verdict as a dictionary, with `name`, and `folder` if it is all here."""
    s = resolved.settings
    place = place_of(resolved, cache, console)
    if dry_run:
        return {"name": place.name, "files": len(place.sizes), "settings": resolved.provenance()}
    reference = None
    if s.reference:
        reference = resolve(s.reference, None, resolved.secrets.hub, cache, console.say)
    verdict = _levels(place, s, reference, cache, console)
    if s.report_md:
        s.report_md.write_text(verdict.as_markdown(place.name))
    return verdict.as_dict() | {"name": place.name, "folder": str(place.folder)}


def verified_folder(folder: Path, dtypes: list[str], level: Any, console: Console, reference: Source) -> Verdict:
    """The levels up to one of a folder that was just made."""
    s = VerifySettings(local_dir=folder, dtype=dtypes, level=level)
    return _levels(Local(folder), s, reference, folder, console)


def place_of(resolved: Resolved[VerifySettings], cache: Path, console: Console) -> ExportDir:
    """The export that the settings name, in a folder or on the Hub."""
    s = resolved.settings
    if bool(s.repo_id) == bool(s.local_dir):
        raise PhoqueError(
            "Which export?", "Exactly one of --repo-id and --local-dir names it.", "Name a repository or a folder."
        )
    if s.local_dir:
        return Local(s.local_dir.expanduser())
    hub = Hub(resolved.secrets.hub, console.say, s.hub_patience)
    return OnHub(Repo(hub, s.repo_id), s.revision, cache)


def _levels(place: ExportDir, s: VerifySettings, reference: Source | None, cache: Path, console: Console) -> Verdict:
    verdict = Verdict(s.level)
    last = LEVELS.index(s.level or LEVELS[-1])
    layout, there = check_files(place, verdict)
    if unknown := [dtype for dtype in s.dtype if dtype not in SUFFIXES]:
        raise PhoqueError(
            f"There is no precision {unknown[0]!r}.", f"phoque knows {', '.join(SUFFIXES)}.", "See --dtype."
        )
    if (absent := [dtype for dtype in s.dtype if dtype not in there]) and not verdict.failed():
        raise PhoqueError(
            f"{place.name} has no {absent[0]}.",
            f"There is {', '.join(there)}.",
            "Name one of them, or leave --dtype out.",
        )
    dtypes = [dtype for dtype in there if not s.dtype or dtype in s.dtype]
    if last >= 1 and "config.json" in place.sizes and not _broken(verdict):
        console.say(f"{place.name}: looking at the graphs")
        check_graphs(place, layout, dtypes, verdict)
    if last >= 2:
        if verdict.failed():
            for level in LEVELS[2 : last + 1]:
                verdict.leave_out(level, "the export runs", "what failed above would fail here too")
            return verdict
        console.say(f"{place.name}: running it under ONNX Runtime")
        check_ort(place.whole(), layout, dtypes, reference, verdict)
    if last >= 3:
        check_node(place.whole(), layout, dtypes, s, cache, console, verdict)
    if last >= 4:
        check_browser(place.whole(), layout, dtypes, s, cache, console, verdict)
    return verdict


def _broken(verdict: Verdict) -> bool:
    """Whether the root's files, on which the graph level leans, are not readable."""
    return any(check.asks.startswith(("the root's", "Transformers.js has")) for check in verdict.failed())
