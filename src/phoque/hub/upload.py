"""A run's folder as an artifact in a repository on the Hub."""

from pathlib import Path
from typing import Any

from phoque.console import Console
from phoque.errors import FAILED, PhoqueError
from phoque.hub.client import Hub, reason
from phoque.hub.repo import Repo
from phoque.settings.fields import Resolved


def opened_for_run(resolved: Resolved[Any], hub: Hub, console: Console) -> Repo | None:
    """Where the run goes, if it is to go anywhere; it is asked for before anything is computed."""
    s = resolved.settings
    if not s.artifacts_repo_id:
        return None
    repo = Repo(hub, s.artifacts_repo_id, s.artifacts_repo_type)
    try:
        if resolved.secrets.hub is None:
            raise PhoqueError("There is no Hub token.", f"{repo.name} cannot be written without one.", "Set HF_TOKEN.")
        repo.open(s.public, console.warn)
    except Exception as error:
        if s.fail_on_artifacts_upload_error or (isinstance(error, PhoqueError) and "is public" in error.what):
            raise  # what is private must not become public by going on
        why = error.what if isinstance(error, PhoqueError) else reason(error)
        console.warn(f"{repo.name} cannot be written ({why}): the run will stay on this machine")
        return None
    return repo


def pushed_run(repo: Repo, folder: Path, s: Any, console: Console) -> dict[str, str]:
    """{repo, commit} of the run folder, brought to `<path in repo>/<its name>` as one commit that is read back.

    A failure is a warning, or a PhoqueError (1) if the settings ask for that; nothing local is lost either way.
    """
    place = "/".join(part for part in (s.artifacts_path_in_repo.strip("/"), folder.name) if part)
    files = {f"{place}/{f.relative_to(folder)}": f for f in sorted(folder.rglob("*")) if f.is_file()}
    try:
        return {"repo": repo.name, "commit": repo.push(files, f"Add {place}", lambda _: [])}
    except Exception as error:
        if s.fail_on_artifacts_upload_error:
            raise PhoqueError(
                f"The run could not be uploaded to {repo.name}.", reason(error), f"It is complete in {folder}.", FAILED
            ) from error
        console.warn(f"the run could not be uploaded to {repo.name} ({reason(error)}); it is complete in {folder}")
        return {}
