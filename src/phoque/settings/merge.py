"""The settings of `phoque merge`, under the names of the spec."""

from pathlib import Path
from typing import ClassVar, Literal

from phoque.settings.fields import setting
from phoque.settings.job import REPO, JobSettings


class MergeSettings(JobSettings):
    """What one merge is asked to do."""

    keeps: ClassVar = "push_repo_id"
    reads: ClassVar = {"adapter_source": "adapter_revision", "base_model": "revision"}

    adapter_source: str = setting("", "adapter: a folder, a run folder, or a Hub repository", env="ADAPTER_SOURCE")
    adapter_revision: str | None = setting(None, "branch, tag or commit of an adapter on the Hub")
    base_model: str = setting(
        "", "Hub id, local folder or .gguf file; default the one that the adapter names", env="BASE_MODEL"
    )
    revision: str | None = setting(None, "branch, tag or commit of the base; default the one that the adapter names")
    output_dir: Path | None = setting(None, "folder of the merged model; default <adapter>-merged", env="OUTPUT_DIR")
    dtype: Literal["bf16", "fp16", "fp32"] = setting("bf16", "type of the merged weights")
    proof: bool = setting(True, "load base with adapter and the merged model in turn, and compare what they say")
    push_repo_id: str | None = setting(None, "Hub repository for the merged model; made private", pattern=REPO)
