"""The settings of `phoque export-onnx`."""

from pathlib import Path
from typing import ClassVar, Literal, Self

from pydantic import field_validator, model_validator

from phoque.settings.export import ModelExportSettings
from phoque.settings.fields import conflict, setting
from phoque.settings.job import JOB_GROUP

PRECISIONS = ("fp32", "fp16", "q8", "q4", "q4f16", "int8")


class ExportSettings(ModelExportSettings):
    """The settings of one ONNX export."""

    extra: ClassVar = "onnx"
    groups: ClassVar = {
        "Model": "preset adapter_source adapter_revision base revision merged_dir merged_revision merged_out_dir",
        "Data": "chats chats_split chats_config",
        "Export": "dtype layout engine onnx_export_python fuse largest_kl least_agreement accuracy verify_strict",
        "Output": "output_dir",
        "Hub": "push_repo_id public gated hub_patience",
        "Job": JOB_GROUP,
    }

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
        "Export the text model alone (text) or with its vision encoder (multimodal). auto decides by the model.",
    )
    engine: Literal["auto", "transformers", "optimum"] = setting(
        "auto",
        "Export with phoque's own exporter (transformers) or with optimum-onnx, to cross-check the result. auto is "
        "transformers, or optimum if --onnx-export-python is given and optimum-onnx can do the export.",
    )
    onnx_export_python: Path | None = setting(
        None,
        "Run optimum-onnx with this Python interpreter, which has it installed. Without it, uv makes an environment.",
    )
    fuse: bool = setting(
        True,
        "Fuse attention with its key-value cache, and fuse norms. --no-fuse is slower; use it if a GPU's "
        "fused kernels give wrong results.",
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

    @property
    def folder(self) -> Path:
        """The output folder: --output-dir, or <model name>-onnx."""
        return self.output_dir or Path(f"{self.source_name}-onnx")

    @field_validator("dtype")
    @classmethod
    def _known(cls, value: list[str]) -> list[str]:
        if unknown := [name for name in value if name not in PRECISIONS]:
            raise ValueError(f"There is no precision {unknown[0]!r}, only {', '.join(PRECISIONS)}.")
        return [name for name in PRECISIONS if name in value]

    @model_validator(mode="after")
    def _used(self) -> Self:
        if self.onnx_export_python and self.engine == "transformers":
            raise conflict(
                "--onnx-export-python and --engine transformers exclude each other.",
                "The interpreter is for optimum-onnx, which this engine does not use.",
                "Leave one of them out.",
            )
        return self
