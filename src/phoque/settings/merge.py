"""The settings of `phoque merge`."""

from pathlib import Path
from typing import ClassVar, Literal

from phoque.files import MERGE_RECORD
from phoque.settings.fields import name_after, setting
from phoque.settings.job import JOB_GROUP, REPO, PublishedSettings


class MergeSettings(PublishedSettings):
    """The settings of one merge."""

    keeps: ClassVar = "push_repo_id"
    required: ClassVar = ("adapter_source",)
    main_input: ClassVar = "adapter_source"
    output_record: ClassVar = (MERGE_RECORD, "a merged model")
    reads: ClassVar = {"adapter_source": "adapter_revision", "base_model": "revision"}
    groups: ClassVar = {
        "Model": "preset adapter_source adapter_revision base_model revision",
        "Output": "output_dir dtype proof",
        "Hub": "push_repo_id public gated hub_patience",
        "Job": JOB_GROUP,
    }

    preset: str = setting(
        "",
        "Merge into the base model of this preset (ministral-3b or demo). Without it, the base that the adapter's "
        "config names.",
    )
    adapter_source: str = setting(
        "",
        "Merge this LoRA adapter: its folder, a run folder of phoque train, or a Hub repository.",
        env="ADAPTER_SOURCE",
    )
    adapter_revision: str | None = setting(None, "Use this branch, tag or commit of --adapter-source on the Hub.")
    base_model: str = setting(
        "",
        "Merge into this base model: a Hub id, a local folder or a .gguf file. Without it, the base that "
        "the adapter's config names.",
        env="BASE_MODEL",
    )
    revision: str | None = setting(
        None,
        "Use this branch, tag or commit of the base model. If --base-model is not given either, the "
        "adapter's config decides.",
    )
    output_dir: Path | None = setting(
        None,
        "Write the merged model to this folder. Without it, <adapter name>-merged in the current folder.",
        env="OUTPUT_DIR",
    )
    dtype: Literal["bf16", "fp16", "fp32"] = setting(
        "bf16", "Store the merged weights in this type. fp32 takes twice the space of bf16 and fp16."
    )
    proof: bool = setting(
        True,
        "Compare the merged model with base + adapter, one loaded after the other, and fail if they "
        "differ. --no-proof saves time.",
    )
    push_repo_id: str | None = setting(
        None,
        "Push the merged model to this Hub repository (owner/name). It is created private unless --public is given.",
        pattern=REPO,
    )

    @property
    def folder(self) -> Path:
        """The output folder: --output-dir, or <adapter name>-merged."""
        return self.output_dir or Path(f"{name_after(self.adapter_source)}-merged")
