"""The settings of `phoque export-onnx`, under the names of the spec."""

from pathlib import Path
from typing import ClassVar, Literal, Self

from pydantic import field_validator, model_validator

from phoque.settings.fields import setting
from phoque.settings.job import REPO, JobSettings

PRECISIONS = ("fp32", "fp16", "q8", "q4", "q4f16", "int8")


class ExportSettings(JobSettings):
    """What one export is asked to do."""

    keeps: ClassVar = "push_repo_id"
    extra: ClassVar = "onnx"
    reads: ClassVar = {
        "adapter_source": "adapter_revision",
        "merged_dir": "merged_revision",
        "base": "revision",
        "chats": None,
    }

    preset: str = setting("ministral-3b", "base model and data that go together: ministral-3b, demo")
    adapter_source: str = setting(
        "", "adapter to merge on the way: a folder, a run folder, or a Hub repository", env="ADAPTER_SOURCE"
    )
    adapter_revision: str | None = setting(None, "branch, tag or commit of an adapter on the Hub")
    # by another name than the presets': an adapter says itself what its base is
    base: str = setting(
        "", "base of the adapter: Hub id, local folder or .gguf file; default the one that it names", env="BASE_MODEL"
    )
    revision: str | None = setting(None, "branch, tag or commit of the base; default the one that the adapter names")
    merged_dir: str = setting("", "merged model: a folder, or a model or dataset repository on the Hub")
    merged_revision: str | None = setting(None, "branch, tag or commit of a merged model on the Hub")
    merged_out_dir: Path | None = setting(None, "keep the merged or fetched model in this folder")
    output_dir: Path | None = setting(None, "folder of the export; default <source>-onnx", env="OUTPUT_DIR")
    dtype: list[str] = setting(["q4", "q8"], f"precision, repeatable: {', '.join(PRECISIONS)}", env="PHOQUE_ONNX_DTYPE")
    layout: Literal["auto", "text", "multimodal"] = setting("auto", "auto chooses by the checkpoint")
    engine: Literal["transformers", "optimum"] = setting("transformers", "optimum is for cross-checks")
    onnx_export_python: Path | None = setting(
        None, "interpreter that has optimum-onnx, for --engine optimum; default one that uv makes"
    )
    fuse: bool = setting(
        True,
        "fuse attention with its cache, and norms; --no-fuse is slower, and right where a GPU's fused kernel is not",
    )
    chats: str = setting(
        "seal", "conversations that q8 and q4 are fitted to and accuracy is measured on, as train reads"
    )
    chats_split: str = setting("train", "split of them on the Hub")
    largest_kl: float = setting(0.08, "4 bits turn to 8 where that is needed to stay below, in nats a token", ge=0)
    least_agreement: float = setting(0.91, "and to agree on so large a share of next tokens", ge=0, le=1)
    accuracy: bool = setting(True, "measure each precision against the checkpoint")
    verify_strict: bool = setting(True, "fail if the export does not verify; --no-verify-strict only warns")
    push_repo_id: str | None = setting(None, "Hub repository for the export; made private", pattern=REPO)

    @field_validator("dtype")
    @classmethod
    def _known(cls, value: list[str]) -> list[str]:
        if unknown := [name for name in value if name not in PRECISIONS]:
            raise ValueError(f"there is no precision {unknown[0]!r}: choose from {', '.join(PRECISIONS)}")
        return [name for name in PRECISIONS if name in value]

    @model_validator(mode="after")
    def _used(self) -> Self:
        if self.onnx_export_python and self.engine != "optimum":
            raise ValueError("--onnx-export-python is the interpreter of --engine optimum, which was not chosen")
        return self
