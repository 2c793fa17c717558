"""Settings of commands that upload the folder of a run: where it goes."""

from typing import ClassVar, Literal

from phoque.settings.fields import setting
from phoque.settings.job import REPO, PublishedSettings

ARTIFACTS_GROUP = "artifacts_repo_id artifacts_repo_type artifacts_path_in_repo fail_on_artifacts_upload_error"


class ArtifactsSettings(PublishedSettings):
    """The Hub repository of the run folder."""

    keeps: ClassVar = "artifacts_repo_id"

    artifacts_repo_id: str | None = setting(
        None,
        "Upload the run folder to this Hub repository (owner/name). It is created private unless --public is given.",
        env="ARTIFACTS_REPO_ID",
        pattern=REPO,
    )
    artifacts_repo_type: Literal["dataset", "model"] = setting(
        "dataset", "Create --artifacts-repo-id as a repository of this type.", env="ARTIFACTS_REPO_TYPE"
    )
    artifacts_path_in_repo: str = setting(
        "runs",
        "Upload each run into a folder of its own below this path in --artifacts-repo-id.",
        env="ARTIFACTS_PATH_IN_REPO",
    )
    fail_on_artifacts_upload_error: bool = setting(
        False,
        "Exit with code 1 if the upload to --artifacts-repo-id fails. Without it, a failed upload is a warning.",
        env="FAIL_ON_ARTIFACTS_UPLOAD_ERROR",
    )
