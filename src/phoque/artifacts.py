"""A run folder as an artifact in a repository on the Hub."""

from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from phoque.errors import PhoqueError, PublicRepoError, RunError
from phoque.hub.client import describe_error
from phoque.hub.repo import Repo
from phoque.services import Services
from phoque.settings.artifacts import ArtifactsSettings
from phoque.settings.environment import in_job


@dataclass(frozen=True)
class Upload:
    """Where a run folder was pushed: the repository, the commit, and the folder in it; `url` is that folder's."""

    repo: str
    commit: str
    path: str
    url: str


def open_artifacts_repo(s: ArtifactsSettings, services: Services) -> Repo | None:
    """The repository that the run folder will be pushed to, checked before anything is computed; None if not named.

    If it cannot be written the run continues with a warning, but not in a Job, and not with
    --fail-on-artifacts-upload-error. Raises
    PublicRepoError for a public one in either case.
    """
    if not s.artifacts_repo_id:
        return None
    repo, warn = Repo(services.hub, s.artifacts_repo_id, s.artifacts_repo_type), services.console.warn
    try:
        services.secrets.require_hub(repo.name)
        repo.open(s.access, warn)
    except PublicRepoError:
        raise  # what is private must not become public
    except Exception as error:
        if s.fail_on_artifacts_upload_error or in_job():  # a Job's disk is deleted
            raise
        why = error.what if isinstance(error, PhoqueError) else describe_error(error)
        warn(f"{repo.name} cannot be written ({why}): the run is kept on this machine only")
        return None
    return repo


def push_run_folder(repo: Repo, folder: Path, s: ArtifactsSettings, services: Services) -> Upload | None:
    """Push the run folder to `<path in repo>/<its name>` as one commit that is read back.

    A failure is a warning and returns None, or a RunError with --fail-on-artifacts-upload-error; nothing local is lost.
    """
    from huggingface_hub.constants import REPO_TYPES_URL_PREFIXES

    prefix = "/".join(part for part in (s.artifacts_path_in_repo.strip("/"), folder.name) if part)
    files = {f"{prefix}/{f.relative_to(folder)}": f for f in sorted(folder.rglob("*")) if f.is_file()}
    try:
        commit = repo.push(files, f"Add {prefix}", lambda _: [])
        kind = REPO_TYPES_URL_PREFIXES.get(repo.kind, "")
        url = f"{services.hub.api.endpoint}/{kind}{repo.name}/tree/{commit}/{quote(prefix)}"
        return Upload(repo.name, commit, prefix, url)
    except Exception as error:
        if s.fail_on_artifacts_upload_error:
            raise RunError(
                what=f"The run could not be uploaded to {repo.name}.",
                why=describe_error(error),
                fix=f"The files are complete in {folder}: fix the cause, and upload that folder with `hf upload`.",
            ) from error
        services.console.warn(
            f"the run could not be uploaded to {repo.name} ({describe_error(error)}); it is complete in {folder}"
        )
        return None
