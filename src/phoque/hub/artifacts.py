"""A run's folder as an artifact in a repository on the Hub."""

from pathlib import Path

from phoque.hub.checkpoints import Repo


def push_run(repo: Repo, folder: Path, under: str) -> str:
    """Bring a run folder to `<under>/<its name>`, as one commit that is read back; return the commit."""
    place = "/".join(part for part in (under.strip("/"), folder.name) if part)
    files = {f"{place}/{f.relative_to(folder)}": f for f in sorted(folder.rglob("*")) if f.is_file()}
    return repo.push(files, f"Add {place}", lambda _: [])
