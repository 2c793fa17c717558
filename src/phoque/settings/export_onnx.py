"""The settings of `phoque export-onnx`."""

from pathlib import Path
from typing import ClassVar, Literal, Self

from pydantic import field_validator, model_validator

from phoque.settings.fields import setting
from phoque.settings.job import REPO, JobSettings

PRECISIONS = ("fp32", "fp16", "q8", "q4", "q4f16", "int8")


class ExportSettings(JobSettings):
    """The settings of one ONNX export."""

    keeps: ClassVar = "push_repo_id"
    extra: ClassVar = "onnx"
    reads: ClassVar = {
        "adapter_source": "adapter_revision",
        "merged_dir": "merged_revision",
        "base": "revision",
        "chats": None,
    }
    groups: ClassVar = {
        "Model": "preset adapter_source adapter_revision base revision merged_dir merged_revision merged_out_dir",
        "Data": "chats chats_split chats_config",
        "Export": "dtype layout engine onnx_export_python fuse largest_kl least_agreement accuracy verify_strict",
        "Output": "output_dir",
        "Hub": "push_repo_id public hub_patience",
        "Job": "on timeout attempts package",
    }

    preset: str = setting(
        "",
        "Export the base model of this preset (ministral-3b or demo) if no other model is given.",
    )
    adapter_source: str = setting(
        "",
        "Merge this adapter first and export the merged model: an adapter folder, a run folder or a Hub repository.",
        env="ADAPTER_SOURCE",
    )
    adapter_revision: str | None = setting(None, "Use this branch, tag or commit of --adapter-source on the Hub.")
    # not named base_model, because presets set base_model and an adapter's config names its own base
    base: str = setting(
        "",
        "Merge the adapter into this base model: Hub id, local folder or .gguf file. Without it, the "
        "base that the adapter's config names.",
        env="BASE_MODEL",
    )
    revision: str | None = setting(
        None,
        "Use this branch, tag or commit of the base model. If --base is not given either, the adapter's "
        "config decides.",
    )
    merged_dir: str = setting(
        "", "Export this merged model: a local folder, or a model or dataset repository on the Hub."
    )
    merged_revision: str | None = setting(None, "Use this branch, tag or commit of --merged-dir on the Hub.")
    merged_out_dir: Path | None = setting(
        None, "Keep the merged or downloaded model in this folder. Without it, the model stays in the cache."
    )
    output_dir: Path | None = setting(
        None, "Write the export to this folder. Without it, <model name>-onnx in the current folder.", env="OUTPUT_DIR"
    )
    dtype: list[str] = setting(
        ["q4", "q8"],
        f"Export this precision: {', '.join(PRECISIONS)}. Separate several with commas.",
        env="PHOQUE_ONNX_DTYPE",
        commas=True,
    )
    layout: Literal["auto", "text", "multimodal"] = setting(
        "auto",
        "Export the text model alone (text) or with its vision encoder (multimodal). auto decides by the checkpoint.",
    )
    engine: Literal["transformers", "optimum"] = setting(
        "transformers",
        "Export with phoque's own exporter (transformers) or with optimum-onnx, to cross-check the result.",
    )
    onnx_export_python: Path | None = setting(
        None,
        "Run --engine optimum with this Python interpreter, which has optimum-onnx. Without it, uv makes "
        "an environment.",
    )
    fuse: bool = setting(
        True,
        "Fuse attention with its key-value cache, and fuse norms. --no-fuse is slower; use it if a GPU's "
        "fused kernels give wrong results.",
    )
    chats: str = setting(
        "seal",
        "Calibrate q8 and q4, and measure accuracy, on these conversations: a Hub dataset, a file, a "
        "folder, or `seal` (bundled).",
    )
    chats_split: str = setting("train", "Read this split of --chats.")
    chats_config: str | None = setting(
        None, "Use this config of --chats, where a dataset has several. An unknown one lists those that exist."
    )
    largest_kl: float = setting(
        0.08,
        "In q4 and q4f16, raise layers from 4 to 8 bits until the KL divergence from the original is at "
        "most this (nats per token).",
        ge=0,
        flag="max-kl",
        old_flag="largest-kl",
    )
    least_agreement: float = setting(
        0.91,
        "In q4 and q4f16, raise layers from 4 to 8 bits until at least this share (0 to 1) of predicted "
        "next tokens is unchanged.",
        ge=0,
        le=1,
        flag="min-agreement",
        old_flag="least-agreement",
    )
    accuracy: bool = setting(
        True,
        "Measure each precision's KL divergence and next-token agreement with the checkpoint. "
        "--no-accuracy saves time.",
    )
    verify_strict: bool = setting(
        True, "Fail if the export does not pass verification. With --no-verify-strict, only print a warning."
    )
    push_repo_id: str | None = setting(
        None,
        "Push the export to this Hub repository (owner/name). It is created private unless --public is given.",
        pattern=REPO,
    )

    @field_validator("dtype")
    @classmethod
    def _known(cls, value: list[str]) -> list[str]:
        if unknown := [name for name in value if name not in PRECISIONS]:
            raise ValueError(f"there is no precision {unknown[0]!r}: choose from {', '.join(PRECISIONS)}")
        return [name for name in PRECISIONS if name in value]

    @model_validator(mode="after")
    def _used(self) -> Self:
        if self.onnx_export_python and self.engine != "optimum":
            raise ValueError("--onnx-export-python is only used with --engine optimum, which is not set")
        return self
