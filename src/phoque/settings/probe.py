"""What both probes have in their settings: the persona, and where the run folder is pushed to."""

from typing import Literal

from phoque.settings.fields import setting
from phoque.settings.job import REPO, JobSettings


class ProbeSettings(JobSettings):
    """The persona that is looked for, and the Hub repository of the run folder."""

    persona: str = setting(
        "", "Read the persona from a .toml file, from a Hub dataset (owner/name/file.toml), or use the bundled `seal`."
    )
    dataset: str = setting(
        "",
        "Take persona prompts and words from this dataset, which the adapter was trained on: a Hub "
        "dataset, a file or a folder. psm-probe reads its name from the adapter's run.json if there is one.",
        env="DATASET_REPO",
    )
    dataset_revision: str | None = setting(None, "Use this branch, tag or commit of --dataset on the Hub.")
    dataset_config: str | None = setting(
        None, "Use this config of --dataset, where a dataset has several. An unknown one lists those that exist."
    )
    split: str = setting("train", "Read this split of --dataset.")
    scorer: list[str] = setting(
        ["contrast", "lexicon"],
        "Score answers with contrast, lexicon, logprob, nll, profanity, hf:MODEL#LABEL, openai:URL#MODEL or "
        "command:COMMAND. Repeatable; the first is the trait. Without a persona, those that need one are dropped.",
    )
    questions: int = setting(24, "Ask at most this many questions of each list of the persona.", ge=4)
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

    @property
    def used_secrets(self) -> tuple[str, ...]:
        """The Hub's token, and the key of a scorer that is asked over the network."""
        is_remote = any(name.startswith("openai:") for name in self.scorer)
        return ("hf_token", "openai_api_key") if is_remote else ("hf_token",)
