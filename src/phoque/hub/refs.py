"""Is a name a Hub repository or a path on this machine? One rule for every command; and fetching into the cache.

A name is a Hub id if it has the form OWNER/NAME, does not start with `.`, `/` or `~`, and no file or folder has that
name here. A file or folder inside a repository is written OWNER/NAME/PATH or OWNER/NAME#PATH, a dataset split
OWNER/NAME:SPLIT.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from phoque.hub.repo import Repo
from phoque.hub.store import Snapshot

_ID = r"(?P<repo>[\w-][\w.-]*/[\w.-]+)"
_REF = re.compile(rf"^{_ID}(?:(?P<mark>[/#:])(?P<inside>.*))?$")


@dataclass(frozen=True)
class HubRef:
    """A repository, and what it is asked for: a path inside it, or the split of a dataset."""

    repo: str
    path: str = ""
    split: str = ""


def local_path(name: str) -> Path | None:
    """The file or folder of this name on this machine, or None if there is none."""
    path = Path(name).expanduser()
    return path if path.exists() else None


def hub_ref(name: str) -> HubRef | None:
    """The Hub repository that a name refers to, or None if it is a path on this machine (existing or not)."""
    match = _REF.match(name)
    if match is None or local_path(name) is not None:
        return None
    inside = (match["inside"] or "").strip("/")
    return HubRef(match["repo"], split=inside) if match["mark"] == ":" else HubRef(match["repo"], path=inside)


def hub_id(name: str) -> str | None:
    """The Hub id OWNER/NAME if `name` is exactly that and not a path on this machine, else None."""
    ref = hub_ref(name)
    return ref.repo if ref and ref.repo == name else None


def fetch_to_cache(repo: Repo, snapshot: Snapshot, paths: Iterable[str], cache: Path, kind: str) -> Path:
    """Fetch files of one commit into `cache/<kind>/<owner>--<name>-<commit>` and return that folder."""
    folder = cache / kind / f"{repo.name.replace('/', '--')}-{snapshot.sha[:12]}"
    for path in paths:
        if not repo.is_current(snapshot, path, folder):
            repo.fetch(snapshot, path, folder)
    return folder
