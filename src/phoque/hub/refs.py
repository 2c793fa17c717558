"""Is a name a Hub repository or a path on this machine? One rule for every command; and fetching into the cache.

A name is a Hub id if it has the form OWNER/NAME, does not start with `.`, `/` or `~`, and no file or folder has that
name here. `runs/...` is always a path, that of a run: elsewhere it would name another's repository. A file or folder
inside a repository is written OWNER/NAME/PATH or OWNER/NAME#PATH, a dataset split OWNER/NAME:SPLIT.
"""

import difflib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from phoque.files import expand_user, local_path
from phoque.hub.repo import Repo
from phoque.hub.store import Snapshot

RUNS = "runs"  # the folder of runs without --output-dir
_ID = r"(?P<repo>[\w-][\w.-]*/[\w.-]+)"
_REF = re.compile(rf"^{_ID}(?:(?P<mark>[/#:])(?P<inside>.*))?$")


@dataclass(frozen=True)
class HubRef:
    """A repository, and what it is asked for: a path inside it, or the split of a dataset."""

    repo: str
    path: str = ""
    split: str = ""


def hub_ref(name: str) -> HubRef | None:
    """The Hub repository that a name refers to, or None if it is a path on this machine (existing or not)."""
    match = _REF.match(name)
    if match is None or local_path(name) is not None:
        return None
    if match["repo"].startswith(f"{RUNS}/"):
        return None
    inside = (match["inside"] or "").strip("/")
    return HubRef(match["repo"], split=inside) if match["mark"] == ":" else HubRef(match["repo"], path=inside)


def hub_id(name: str) -> str | None:
    """The Hub id OWNER/NAME if `name` is exactly that and not a path on this machine, else None."""
    ref = hub_ref(name)
    return ref.repo if ref and ref.repo == name else None


def suggest_path(name: str, otherwise: str = "Check the path.") -> str:
    """`Did you mean ...?` with the path that is nearest to `name`, beside it or in `runs/`; or else `otherwise`."""
    path = expand_user(name)
    if path.parts[:1] == (RUNS,) and not Path(RUNS).is_dir():
        return f"Run the command in the folder that has `{RUNS}`; there is none in {Path.cwd()}."
    try:
        siblings = {other.name: path.with_name(other.name) for other in path.parent.glob("*")}
        runs = {other.name: other for other in Path(RUNS).glob("*")}
    except (OSError, ValueError):  # a name that is too long, or empty
        return otherwise
    for target, others in ((path.name, siblings), (name, runs)):
        # without their endings, which are alike and tell little; of equal names the one with the same ending
        same_last = sorted(others, key=lambda other: Path(other).suffix == Path(target).suffix)
        stems = {Path(other).stem: other for other in same_last}
        for near in difflib.get_close_matches(Path(target).stem, stems, 1, 0.7):
            if others[stems[near]] == path:
                continue
            return f"Did you mean {others[stems[near]]}?"
    return otherwise


def fetch_to_cache(repo: Repo, snapshot: Snapshot, paths: Iterable[str], cache: Path, kind: str) -> Path:
    """Fetch files of one commit into `cache/<kind>/<owner>--<name>-<commit>` and return that folder."""
    folder = cache / kind / f"{repo.name.replace('/', '--')}-{snapshot.sha[:12]}"
    for path in paths:
        if not repo.is_current(snapshot, path, folder):
            repo.fetch(snapshot, path, folder)
    return folder
