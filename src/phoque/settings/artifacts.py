"""Settings of the commands whose run folder can be pushed to the Hub as an artifact."""

from typing import Literal

from phoque.settings.fields import setting
from phoque.settings.job import REPO, JobSettings


class ArtifactSettings(JobSettings):
    """Where the run folder is pushed to."""

    artifacts_repo_id: str | None = setting(
        None,
        "Push the run folder to this Hub repository, which is created as private.",
        env="ARTIFACTS_REPO_ID",
        pattern=REPO,
    )
    artifacts_repo_type: Literal["dataset", "model"] = setting(
        "dataset", "Type of the Hub repository for the run folder.", env="ARTIFACTS_REPO_TYPE"
    )
    artifacts_path_in_repo: str = setting(
        "runs", "Folder in that repository in which each run gets its own folder.", env="ARTIFACTS_PATH_IN_REPO"
    )
    fail_on_artifacts_upload_error: bool = setting(
        False, "Exit with code 1 if the upload fails, instead of a warning.", env="FAIL_ON_ARTIFACTS_UPLOAD_ERROR"
    )
