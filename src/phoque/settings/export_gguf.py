"""The settings of `phoque export-gguf`."""

from pathlib import Path
from typing import ClassVar, Self

from pydantic import field_validator, model_validator

from phoque.settings.export import ModelExportSettings
from phoque.settings.fields import conflict, setting
from phoque.settings.job import JOB_GROUP

GGUF_DTYPES = ("f32", "f16", "bf16", "q8_0", "q6_k", "q5_k_m", "q4_k_m")
LORA_DTYPES = ("f32", "f16", "bf16")


class GgufSettings(ModelExportSettings):
    """The settings of one export to GGUF."""

    extra: ClassVar = "gguf"
    groups: ClassVar = {
        "Model": "preset adapter_source adapter_revision base revision merged_dir merged_revision merged_out_dir",
        "Data": "chats chats_split chats_config",
        "Export": "dtype lora importance accuracy verify_strict install",
        "Output": "output_dir system",
        "Hub": "push_repo_id public gated hub_patience",
        "Job": JOB_GROUP,
    }

    output_dir: Path | None = setting(
        None, "Write the files to this folder. Without it, <model name>-gguf in the current folder.", env="OUTPUT_DIR"
    )
    dtype: list[str] = setting(
        ["q8_0", "q4_k_m"],
        f"Export this precision: {', '.join(GGUF_DTYPES)}. Separate several with commas.",
        env="PHOQUE_GGUF_DTYPE",
        commas=True,
    )
    lora: bool = setting(
        False,
        "Export the adapter alone, as a LoRA file for the unchanged base model: f32, f16 or bf16, by default f16.",
    )
    importance: bool = setting(
        True,
        "Weight quantization errors by the mean square of each layer's inputs on --chats (llama.cpp's importance "
        "matrix). --no-importance needs no conversations.",
    )
    system: str | None = setting(
        None,
        "Put this system message into the Modelfile for Ollama. Without it, the most common one of the training data.",
    )
    install: bool = setting(False, "Install llama.cpp into phoque's cache without asking (35 MB, from npm).")

    @field_validator("dtype")
    @classmethod
    def _known(cls, value: list[str]) -> list[str]:
        lowered = [name.lower() for name in value]  # llama.cpp writes Q4_K_M
        if unknown := [name for name in lowered if name not in GGUF_DTYPES]:
            raise ValueError(f"There is no precision {unknown[0]!r}, only {', '.join(GGUF_DTYPES)}.")
        return [name for name in GGUF_DTYPES if name in lowered]

    @model_validator(mode="after")
    def _an_adapter_alone(self) -> Self:
        if self.lora and not self.adapter_source:
            raise conflict(
                "--lora is given without an adapter.",
                "It exports an adapter alone, and --adapter-source names none.",
                "Add --adapter-source, such as --adapter-source runs/demo.",
            )
        if self.lora and "dtype" in self.model_fields_set and (bad := set(self.dtype) - set(LORA_DTYPES)):
            raise conflict(
                f"--lora cannot export {sorted(bad)[0]}.",
                "llama.cpp quantizes models, not adapters.",
                f"Use --dtype with {', '.join(LORA_DTYPES)}.",
            )
        return self

    @property
    def folder(self) -> Path:
        """The output folder: --output-dir, or <model name>-gguf."""
        return self.output_dir or Path(f"{self.source_name}-gguf")

    @property
    def dtypes(self) -> list[str]:
        """The precisions to export; of an adapter alone f16, unless others are given."""
        return ["f16"] if self.lora and "dtype" not in self.model_fields_set else self.dtype
