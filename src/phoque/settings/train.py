"""The settings of `phoque train`."""

import shlex
from pathlib import Path
from typing import ClassVar, Literal, Self

from pydantic import field_validator, model_validator

from phoque.settings.fields import COUNT, conflict, setting
from phoque.settings.job import JOB_GROUP, REPO, PublishedSettings

THEN_EXTRAS = {"export-onnx": "onnx", "export-gguf": "gguf", "compare-sae": "sae"}  # command -> what it needs


class TrainSettings(PublishedSettings):
    """The settings of one training run."""

    keeps: ClassVar = "hub_model_id"
    resumable: ClassVar = True
    required: ClassVar = ("dataset",)
    main_input: ClassVar = "dataset"
    groups: ClassVar = {
        "Model": "preset base_model revision quantization lora_rank lora_alpha lora_dropout target_modules rslora",
        "Data": "dataset dataset_revision dataset_config split eval_split held_out_rows max_bad_rows "
        "default_system greeting max_length packing",
        "Training": "max_steps epochs batch_size micro_batch learning_rate lr_scheduler warmup_ratio weight_decay "
        "max_grad_norm eval_steps keep_best early_stop engine_mode gradient_checkpointing deterministic gpus fsdp seed "
        "with_control control_seeds allow_change fresh_start yes",
        "Output": "output_dir save_steps keep_checkpoints log_every sample_every sample_tokens prompts norms_every "
        "then export_merged export_on_save report_to wandb_project wandb_log_model wandb_mode",
        "Hub": "hub_model_id run_dir merged_hub_model_id squash_history public gated hub_patience",
        "Job": f"{JOB_GROUP} send_token",
    }
    reads: ClassVar = {"base_model": "revision", "dataset": "dataset_revision"}

    preset: str = setting(
        "ministral-3b",
        "Use this set of defaults (ministral-3b or demo) for model, data and training. Every other "
        "setting overrides it.",
    )
    base_model: str = setting(
        "", "Fine-tune this chat model: a Hub id, a local folder or a .gguf file.", env="BASE_MODEL"
    )
    revision: str | None = setting(
        None, "Use this branch, tag or commit of --base-model on the Hub. run.json records the commit."
    )
    dataset: str = setting(
        "",
        "Train on these conversations: a Hub dataset; a .jsonl, .ndjson, .json, .csv, .tsv, .parquet or .arrow file, "
        "also compressed (.gz, .zst, .bz2); a folder of such files; or `seal` (bundled).",
        env="DATASET_REPO",
    )
    dataset_revision: str | None = setting(None, "Use this branch, tag or commit of --dataset on the Hub.")
    dataset_config: str | None = setting(
        None, "Use this config of --dataset, where a dataset has several; if it does not exist, the error lists them."
    )
    split: str = setting(
        "train",
        "Train on this split of --dataset. In a folder, as on the Hub, files whose names contain `test` or "
        "`validation` are splits of their own.",
    )
    eval_split: str | None = setting(
        None, "Measure the held-out loss on this split of --dataset instead of on rows that are kept out of training."
    )
    output_dir: Path | None = setting(
        None,
        "Write checkpoints, metrics, samples, the report and the adapter to this run folder. Without it, "
        "runs/<preset or dataset name>.",
        env="OUTPUT_DIR",
    )
    max_steps: int = setting(1000, "Train for this many optimizer steps.", env="MAX_STEPS", ge=1)
    epochs: float | None = setting(
        None,
        "Train for this many epochs (passes over the training rows). With --max-steps, training ends at whichever "
        "comes first.",
        env="NUM_TRAIN_EPOCHS",
        gt=0,
    )
    batch_size: int = setting(
        16, "Train on this many conversations per optimizer step: on average or exactly, depending on --packing.", ge=1
    )
    micro_batch: int | None = setting(
        None,
        "Process this many conversations per forward pass. It must divide --batch-size. Lower it if the "
        "GPU runs out of memory.",
        ge=1,
    )
    packing: Literal["budget", "exact"] = setting(
        "budget",
        "Fill each step with --batch-size x the mean conversation length in tokens (budget), or with "
        "exactly --batch-size conversations (exact).",
    )
    max_length: int = setting(
        2048, "Leave out and count conversations with more tokens than this. A higher limit needs more memory.", ge=8
    )
    learning_rate: float = setting(2e-4, "Set the peak learning rate.", gt=0)
    lr_scheduler: Literal["cosine", "linear", "constant"] = setting(
        "cosine",
        "After the warm-up, lower the learning rate to zero along a cosine or a straight line, or keep it constant.",
        flag="lr-scheduler",
        old_flag="lr-scheduler-type",
        value_aliases={"constant_with_warmup": "constant"},
    )
    warmup_ratio: float = setting(
        0.03, "Raise the learning rate to its peak over this fraction of the optimizer steps.", ge=0, lt=1
    )
    weight_decay: float = setting(0.0, "Set AdamW's weight decay for the adapter weights.", ge=0)
    max_grad_norm: float = setting(1.0, "Clip gradients to this norm.", gt=0)
    lora_rank: int = setting(
        16, "Set the rank of the LoRA adapter. A higher rank can learn more and needs more memory.", ge=1
    )
    lora_alpha: int = setting(64, "Set LoRA's alpha: the adapter's output is scaled by alpha / rank.", ge=1)
    lora_dropout: float = setting(
        0.0, "Apply dropout with this probability to the adapter's input during training.", ge=0, lt=1
    )
    target_modules: str = setting(
        "all-linear",
        "Adapt these linear layers of every block: all-linear, attention, mlp, names with commas between them "
        "(q_proj,v_proj), or a regular expression that matches whole module names.",
    )
    rslora: bool = setting(
        False, "Scale the adapter's output by alpha / sqrt(rank) instead of alpha / rank (rank-stabilized LoRA)."
    )
    quantization: Literal["nf4", "fp8", "bf16", "fp32"] = setting(
        "nf4",
        "Store the frozen base weights in this precision. nf4 needs the least memory, fp8 a GPU with FP8 units.",
        value_aliases={"none": "fp32"},
    )
    engine_mode: Literal["auto", "eager", "compile", "graph"] = setting(
        "auto",
        "Run the layers as plain PyTorch (eager), compiled, or compiled with CUDA graphs (graph). auto "
        "picks what pays off for this run.",
    )
    deterministic: bool = setting(
        True,
        "Use kernels whose sums have a fixed order: the same command on the same kind of GPU gives the same adapter, "
        "bit for bit, also after a resume. --no-deterministic is slightly faster.",
    )
    gradient_checkpointing: bool = setting(
        False,
        "Recompute the activations of all decoder blocks in the backward pass: slower, less memory. Without it, blocks "
        "are recomputed only where memory requires it.",
    )
    default_system: str = setting(
        "",
        "Give conversations without a system message this one, empty by default. `template` leaves it to the "
        "chat template.",
    )
    greeting: Literal["context", "train"] = setting(
        "context", "Treat an assistant turn before the first question as context, or train on it."
    )
    held_out_rows: int = setting(
        64,
        "Keep this many rows out of training to measure the held-out loss on, but at most a tenth of the dataset.",
        ge=0,
    )
    eval_steps: int | None = setting(
        None,
        "Measure the held-out loss every this many optimizer steps, and at the end. Without it, every --save-steps.",
        ge=1,
    )
    keep_best: bool = setting(
        False,
        "Keep the adapter of the step with the lowest held-out loss. Otherwise the adapter is that of the last step.",
    )
    early_stop: int | None = setting(
        None, "End the run when this many measurements in a row gave no lower held-out loss.", ge=1
    )
    gpus: str | None = setting(
        None,
        "Train on this many GPUs of this machine, or on `all`: each takes its share of every step. A Job on a flavor "
        "with several uses all of them.",
        pattern=COUNT,
    )
    fsdp: bool = setting(
        False,
        "Shard the base model over the GPUs of --gpus or of a launcher, for a model that one GPU does not hold. Layers "
        "run as plain PyTorch, and no samples are generated.",
    )
    max_bad_rows: float = setting(
        0.05, "Stop the run if a larger share of the rows than this (0 to 1) cannot be used.", ge=0, le=1
    )
    seed: int = setting(0, "Seed the data order, the adapter's initial weights and dropout.", ge=0)
    save_steps: int = setting(100, "Save a checkpoint every this many optimizer steps.", ge=1)
    keep_checkpoints: int = setting(
        2, "Keep this many of the newest checkpoints, in the run folder and on the Hub.", ge=1
    )
    log_every: int = setting(10, "Log the metrics once per this many optimizer steps.", ge=1)
    sample_every: int = setting(100, "Generate samples once per this many optimizer steps; 0 turns samples off.", ge=0)
    sample_tokens: int = setting(96, "Generate at most this many tokens per sample.", ge=1)
    norms_every: int = setting(
        50, "Measure the norms of the adapter's weights once per this many optimizer steps.", ge=1
    )
    prompts: list[str] = setting(
        [], "Generate a sample for this prompt. Repeat the flag for more prompts.", flag="prompt"
    )
    then: list[str] = setting(
        [],
        "Afterwards run this command on the adapter: merge, export-onnx, export-gguf, psm-probe or compare-sae, with "
        "its options in the same argument. Repeat the flag for more commands.",
    )
    with_control: bool = setting(
        False,
        "After training, also train a control adapter for the probes: the same prompts and settings, with the base "
        "model's own answers in place of the dataset's.",
    )
    control_seeds: int = setting(
        1,
        "Train this many controls, each with a seed of its own. A finding counts only if it is larger than the "
        "differences between controls.",
        ge=1,
        le=9,
    )
    hub_model_id: str | None = setting(
        None,
        "Push checkpoints and the adapter to this Hub repository (owner/name). It is created private "
        "unless --public is given.",
        env="HUB_MODEL_ID",
        pattern=REPO,
    )
    run_dir: str | None = setting(
        None,
        "Keep checkpoints and the adapter in this folder instead of a Hub repository: another disk, or a mounted "
        "bucket. If --output-dir has no checkpoint, the run resumes from this folder. With --on, a bucket: "
        "hf://buckets/OWNER/NAME/FOLDER.",
    )
    send_token: bool = setting(
        True,
        "Give the Job the Hub token. --no-token keeps it here: base model and data must be public, or on this machine, "
        "and --run-dir keeps the run.",
        flag="token",
    )
    export_merged: bool = setting(
        False,
        "Also merge the final adapter into the base model, and push the merged model if a Hub repository is set.",
        env="EXPORT_MERGED_MODEL",
    )
    merged_hub_model_id: str | None = setting(
        None,
        "Push merged models to this Hub repository (owner/name). Without it, the name of --hub-model-id "
        "with -merged appended.",
        env="MERGED_HUB_MODEL_ID",
        pattern=REPO,
    )
    export_on_save: bool = setting(
        False,
        "Also merge and push the model at each checkpoint, which takes time and bandwidth. It needs --export-merged.",
        env="EXPORT_INFERENCE_ON_SAVE",
    )
    squash_history: bool = setting(
        False,
        "At the end of the run, replace the history of --hub-model-id by one commit, so that deleted checkpoints take "
        "no storage. Older commits are gone for good.",
    )
    fresh_start: bool = setting(
        False, "Delete all checkpoints in the run folder and on the Hub, and start at step 0.", env="FORCE_FRESH_START"
    )
    yes: bool = setting(
        False,
        "Delete the checkpoints of --fresh-start without asking. Outside of a Job, each call with both flags deletes "
        "them again.",
    )
    allow_change: list[str] = setting(
        [],
        "Resume although this setting of the run, such as learning_rate, has changed. Separate several with commas.",
        commas=True,
    )
    report_to: list[str] = setting(
        ["wandb"],
        "Report the run to wandb (if a key is set), trackio, or none. Separate several with commas.",
        commas=True,
    )
    wandb_project: str = setting(
        "phoque", "Report the run to this project of Weights & Biases or Trackio.", env="WANDB_PROJECT"
    )
    wandb_log_model: Literal["false", "end", "checkpoint"] = setting(
        "false",
        "Log the adapter as a Weights & Biases model artifact at the end, at each checkpoint, or never (false).",
        env="WANDB_LOG_MODEL",
        value_aliases={"true": "end", "1": "end", "0": "false"},
    )
    wandb_mode: Literal["online", "offline", "disabled"] | None = setting(
        None,
        "Log to Weights & Biases online, to disk (offline, needs no API key) or not at all (disabled).",
        env="WANDB_MODE",
        value_aliases={"run": "online", "dryrun": "offline", "shared": "online"},
    )

    @model_validator(mode="after")
    def _whole_micro_batches(self) -> Self:
        if self.micro_batch and self.batch_size % self.micro_batch:
            divisors = [n for n in range(1, self.batch_size) if self.batch_size % n == 0 and n < self.micro_batch]
            raise conflict(
                f"--batch-size {self.batch_size} is not a multiple of --micro-batch {self.micro_batch}.",
                "Each step is split into forward passes of --micro-batch conversations.",
                f"Use a --micro-batch that divides {self.batch_size}, such as {divisors[-1] if divisors else 1}.",
            )
        return self

    @model_validator(mode="after")
    def _one_store(self) -> Self:
        if self.run_dir and self.hub_model_id:
            raise conflict(
                "--run-dir and --hub-model-id (HUB_MODEL_ID) exclude each other.",
                "A run is kept in one place.",
                "Leave one of them out.",
            )
        if self.run_dir and self.public:
            raise conflict(
                "--public and --run-dir exclude each other.",
                "phoque sets who can read a repository, not who can read a folder.",
                "Leave out --public.",
            )
        if self.run_dir and self.on and self.export_merged and not self.merged_hub_model_id:
            raise conflict(
                "There is no repository for the merged model.",
                "The Job's disk is deleted when it ends, and --run-dir keeps checkpoints only.",
                "Add --merged-hub-model-id owner/name, or leave out --export-merged.",
            )
        if self.run_dir and self.squash_history:
            raise conflict(
                "--squash-history and --run-dir exclude each other.",
                "A folder keeps no history.",
                "Leave out --squash-history.",
            )
        return self

    @model_validator(mode="after")
    def _no_use_of_the_token(self) -> Self:
        if self.send_token:
            return self
        if not (self.on and self.run_dir):
            raise conflict(
                "--no-token is given without --on and --run-dir.",
                "Only a Job whose run is kept in a bucket needs no token.",
                "Add both, or leave out --no-token.",
            )
        if self.then or self.merged_hub_model_id:
            raise conflict(
                "--no-token excludes --then and --merged-hub-model-id.",
                "They write to the Hub, which needs a token.",
                "Leave out --no-token, or the other flags.",
            )
        return self

    @model_validator(mode="after")
    def _something_to_export(self) -> Self:
        if self.export_on_save and not (self.export_merged and self.merged_repo):
            raise conflict(
                "--export-on-save has nothing to push, or nowhere to push it.",
                "It needs --export-merged, and --hub-model-id or --merged-hub-model-id.",
                "Add them, or leave out --export-on-save.",
            )
        return self

    @model_validator(mode="after")
    def _a_control_to_seed(self) -> Self:
        if self.control_seeds > 1 and not self.with_control:
            raise conflict(
                "--control-seeds is given without --with-control.",
                "It is the number of controls to train.",
                "Add --with-control.",
            )
        return self

    @model_validator(mode="after")
    def _what_needs_the_whole_base(self) -> Self:
        if self.fsdp and self.engine_mode not in ("auto", "eager"):
            raise conflict(
                f"--fsdp and --engine-mode {self.engine_mode} exclude each other.",
                "A sharded base runs as plain PyTorch layers.",
                "Leave out --engine-mode.",
            )
        if self.fsdp and (self.with_control or self.export_merged):
            flag = "--with-control" if self.with_control else "--export-merged"
            raise conflict(
                f"--fsdp and {flag} exclude each other.",
                f"{flag} needs the whole base model on one GPU.",
                "Leave one of them out.",
            )
        return self

    @field_validator("allow_change")
    @classmethod
    def _as_field_names(cls, names: list[str]) -> list[str]:
        return [name.removeprefix("--").replace("-", "_") for name in names]

    @field_validator("then")
    @classmethod
    def _no_empty_command(cls, commands: list[str]) -> list[str]:
        if not all(text.strip() for text in commands):
            raise ValueError("A command of --then is empty.")
        return commands

    @field_validator("report_to")
    @classmethod
    def _known_services(cls, names: list[str]) -> list[str]:
        if unknown := [name for name in names if name not in ("wandb", "trackio", "none")]:
            raise ValueError(f"{unknown[0]!r} is not one of wandb, trackio and none.")
        if "none" in names and len(names) > 1:
            raise ValueError("none excludes the others.")
        return names

    @model_validator(mode="after")
    def _a_loss_to_compare(self) -> Self:
        flag = "--keep-best" if self.keep_best else "--early-stop"
        if (self.keep_best or self.early_stop) and not (self.held_out_rows or self.eval_split):
            raise conflict(
                f"{flag} has no held-out loss to compare.",
                "No rows are held out.",
                "Raise --held-out-rows, or give an --eval-split.",
            )
        return self

    @property
    def used_secrets(self) -> tuple[str, ...]:
        """The Hub's token unless --no-token is given, and W&B's key if the run is reported there."""
        uses_wandb = "wandb" in self.report_to and self.wandb_mode != "disabled"
        return (("hf_token",) if self.send_token else ()) + (("wandb_api_key",) if uses_wandb else ())

    @property
    def needed_extra(self) -> str:
        """The optional dependency groups of Trackio, if the run is reported there, and of the commands of --then."""
        extras = {"trackio"} if "trackio" in self.report_to else set()
        extras |= {THEN_EXTRAS[name] for text in self.then if (name := text.split()[0]) in THEN_EXTRAS}
        return ",".join(sorted(extras))

    @property
    def merged_repo(self) -> str | None:
        """Hub repository of merged models: --merged-hub-model-id, or <--hub-model-id>-merged, or None."""
        return self.merged_hub_model_id or (f"{self.hub_model_id}-merged" if self.hub_model_id else None)

    @property
    def folder(self) -> Path:
        """The run folder: --output-dir, or runs/<dataset's name>; of the demo's own data runs/demo."""
        is_demo = self.preset == "demo" and self.dataset in ("", "seal")
        name = self.preset if is_demo else Path(self.dataset).stem or self.preset
        return self.output_dir or Path("runs") / name

    @property
    def other_places(self) -> str:
        """The flags for a run beside this one: another folder, and another store if it has one."""
        places = {"--output-dir": self.folder, "--hub-model-id": self.hub_model_id, "--run-dir": self.run_dir}
        return " ".join(f"{flag} {shlex.quote(f'{place}-2')}" for flag, place in places.items() if place)

    @property
    def measured_every(self) -> int:
        """Optimizer steps between two measurements of the held-out loss: --eval-steps, or --save-steps."""
        return self.eval_steps or self.save_steps

    @property
    def accumulation(self) -> int:
        """Forward passes per optimizer step."""
        return self.batch_size // (self.micro_batch or self.batch_size)
