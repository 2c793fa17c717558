"""The settings of `phoque train`, under the names of the spec."""

from pathlib import Path
from typing import ClassVar, Literal, Self

from pydantic import model_validator

from phoque.settings.fields import setting
from phoque.settings.job import REPO, JobSettings


class TrainSettings(JobSettings):
    """What one training run is asked to do."""

    keeps: ClassVar = "hub_model_id"
    resumable: ClassVar = True
    reads: ClassVar = {"base_model": "revision", "dataset": "dataset_revision"}

    preset: str = setting("ministral-3b", "base model, prompts and defaults that go together")
    base_model: str = setting("", "Hub id, local folder or .gguf file of the chat model", env="BASE_MODEL")
    revision: str | None = setting(None, "branch, tag or commit of the base model; pinned to a commit in run.json")
    dataset: str = setting(
        "", "Hub dataset, .jsonl, .json or .parquet file, a folder of them, or `seal`", env="DATASET_REPO"
    )
    dataset_revision: str | None = setting(None, "branch, tag or commit of a Hub dataset")
    split: str = setting("train", "split of a Hub dataset")
    output_dir: Path | None = setting(None, "the run folder; default runs/<name>", env="OUTPUT_DIR")
    max_steps: int = setting(1000, "optimizer steps", env="MAX_STEPS", ge=1)
    batch_size: int = setting(16, "conversations an optimizer step, see --packing", ge=1)
    micro_batch: int | None = setting(None, "conversations a forward pass; default all of a step", ge=1)
    packing: Literal["budget", "exact"] = setting(
        "budget", "a step is as many tokens as --batch-size conversations take on average, or exactly so many of them"
    )
    max_length: int = setting(2048, "longest conversation in tokens; longer rows are left out and counted", ge=8)
    learning_rate: float = setting(2e-4, "peak learning rate of the cosine schedule", gt=0)
    warmup_ratio: float = setting(0.03, "share of the steps in which the learning rate rises", ge=0, lt=1)
    weight_decay: float = setting(0.0, "AdamW's weight decay on the adapter", ge=0)
    max_grad_norm: float = setting(1.0, "gradients are clipped to this norm", gt=0)
    lora_rank: int = setting(16, "rank of the adapter", ge=1)
    lora_alpha: int = setting(64, "the adapter's output is scaled by alpha / rank", ge=1)
    lora_dropout: float = setting(0.0, "dropout before the adapter", ge=0, lt=1)
    quantization: Literal["nf4", "fp8", "bf16", "none"] = setting(
        "nf4", "how the base weights are held; fp8 needs a GPU with FP8 units, none is fp32"
    )
    engine_mode: Literal["auto", "eager", "compile", "graph"] = setting(
        "auto", "how the layers run: plain, compiled, compiled and captured as CUDA graphs, or what pays for this run"
    )
    gradient_checkpointing: bool = setting(
        False, "recompute the activations of all layers: less memory, slower; without it, of as many as must be"
    )
    default_system: str = setting(
        "", "system message of rows that have none; `template` leaves it to the chat template"
    )
    held_out_rows: int = setting(64, "rows kept from training to measure on; at most a tenth of them", ge=0)
    max_bad_rows: float = setting(0.05, "share of bad rows above which a run stops", ge=0, le=1)
    seed: int = setting(0, "seed of the data order, the adapter and dropout", ge=0)
    save_steps: int = setting(100, "steps between checkpoints", ge=1)
    keep_checkpoints: int = setting(2, "checkpoints kept in the run folder", ge=1)
    log_every: int = setting(10, "steps between logged lines", ge=1)
    sample_every: int = setting(100, "steps between generated samples; 0 for none", ge=0)
    sample_tokens: int = setting(96, "longest sample in tokens", ge=1)
    norms_every: int = setting(50, "steps between measurements of the adapter's weight norms", ge=1)
    prompts: list[str] = setting([], "prompts for the samples; repeat the flag for more", flag="prompt")
    hub_model_id: str | None = setting(
        None, "Hub repository for checkpoints and the adapter; made private", env="HUB_MODEL_ID", pattern=REPO
    )
    export_merged: bool = setting(
        False, "also merge the final adapter into its base, and push that", env="EXPORT_MERGED_MODEL"
    )
    merged_hub_model_id: str | None = setting(
        None, "Hub repository for merged models; default <hub model id>-merged", env="MERGED_HUB_MODEL_ID", pattern=REPO
    )
    export_on_save: bool = setting(
        False, "merge and push at each checkpoint too: expensive", env="EXPORT_INFERENCE_ON_SAVE"
    )
    fresh_start: bool = setting(
        False, "delete all checkpoints, here and on the Hub, and begin at step 0", env="FORCE_FRESH_START"
    )
    yes: bool = setting(False, "do not ask before a fresh start deletes checkpoints")
    allow_change: list[str] = setting([], "go on although this part of the run has changed; repeat the flag for more")
    wandb_project: str = setting("phoque", "W&B project", env="WANDB_PROJECT")
    wandb_log_model: Literal["false", "end", "checkpoint"] = setting(
        "false", "log the adapter as a W&B model artifact at the end or at each checkpoint", env="WANDB_LOG_MODEL"
    )
    wandb_mode: Literal["online", "offline", "disabled"] | None = setting(
        None, "W&B mode; offline needs no key", env="WANDB_MODE"
    )

    @model_validator(mode="after")
    def _whole_micro_batches(self) -> Self:
        if self.micro_batch and self.batch_size % self.micro_batch:
            raise ValueError(f"--batch-size {self.batch_size} is not a multiple of --micro-batch {self.micro_batch}")
        return self

    @model_validator(mode="after")
    def _something_to_export(self) -> Self:
        if self.export_on_save and not (self.export_merged and self.merged_repo):
            raise ValueError("--export-on-save needs --export-merged, and --hub-model-id or --merged-hub-model-id")
        return self

    @property
    def merged_repo(self) -> str | None:
        """Where merged models go: their own repository, named after the run's if it has no name."""
        return self.merged_hub_model_id or (f"{self.hub_model_id}-merged" if self.hub_model_id else None)

    @property
    def folder(self) -> Path:
        """The run folder: --output-dir, or runs/<preset or dataset name>."""
        name = self.preset if self.preset == "demo" else Path(self.dataset).stem or self.preset
        return self.output_dir or Path("runs") / name

    @property
    def accumulation(self) -> int:
        """Forward passes an optimizer step."""
        return self.batch_size // (self.micro_batch or self.batch_size)
