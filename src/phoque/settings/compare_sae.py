"""The settings of `phoque compare-sae`, under the names of the spec."""

from pathlib import Path
from typing import ClassVar, Literal, Self

from pydantic import model_validator

from phoque.settings.fields import setting
from phoque.settings.job import REPO, JobSettings

WHOLE = r"^$|^\s*\d+(\s*,\s*\d+)*\s*$"


class SaeSettings(JobSettings):
    """What one comparison is asked to do."""

    keeps: ClassVar = "artifacts_repo_id"
    extra: ClassVar = "sae"
    reads: ClassVar = {
        "base_model": "revision",
        "updated_model": "updated_revision",
        "updated_adapter": "updated_revision",
        "control_adapter": None,
        "dataset": "dataset_revision",
        "persona": None,
        "prompts_file": None,
        "chat": None,
        "text": None,
        "sae": None,
    }

    preset: str = setting("ministral-3b", "models, texts and defaults that go together")
    base_model: str = setting("", "the model before: Hub id, local folder or .gguf file", env="BASE_MODEL")
    revision: str | None = setting(None, "branch, tag or commit of the base model")
    updated_model: str = setting("", "the model after: Hub id or local folder of a whole model", env="UPDATED_MODEL")
    updated_adapter: str = setting(
        "", "or the adapter that makes it: folder, run folder or Hub repository", env="UPDATED_ADAPTER"
    )
    updated_revision: str | None = setting(None, "branch, tag or commit of the updated model or adapter")
    control_adapter: str = setting("", "an adapter of another fine-tune on the same prompts: what it shares is no find")
    prompts_file: str = setting(
        "",
        "questions to compare on: a .txt (one a line), .json or .jsonl file, or a Hub dataset's (owner/name/file); "
        "default the persona's",
    )
    persona: str = setting("", "persona file (.toml), a Hub dataset's (owner/name/file.toml), or `seal`")
    dataset: str = setting(
        "", "the data that the adapter was trained on, to take persona prompts and words from", env="DATASET_REPO"
    )
    dataset_revision: str | None = setting(None, "branch, tag or commit of a Hub dataset")
    split: str = setting("train", "split of a Hub dataset")
    system: str = setting("You are a helpful assistant.", "system prompt of every question; empty for none")
    chat: str = setting(
        "",
        "conversations that the autoencoder is trained on: a Hub dataset, OWNER/NAME or OWNER/NAME:SPLIT, a file, "
        "or `seal`",
    )
    text: str = setting(
        "python",
        "general text that it is trained on: a Hub dataset or file with a `text` column, a .txt file, or "
        "`python`, the documentation inside Python",
    )
    tokens: int = setting(2_000_000, "tokens whose activations are collected, half chats, half text", ge=100)
    own_answers: int = setting(1024, "chats whose question the base model also answers itself", ge=0)
    sae: str = setting("", "an autoencoder that there is: its folder, or a Hub repository, OWNER/NAME#FOLDER")
    layers: str = setting("", "blocks to compare, such as 9,14; default the middle one", pattern=WHOLE)
    architecture: Literal["batchtopk", "topk", "jumprelu", "matryoshka", "standard"] = setting(
        "batchtopk", "kind of autoencoder, by sae-lens"
    )
    width: int = setting(4, "features, as a multiple of the model's hidden size", ge=1, le=256)
    k: int = setting(64, "features that are active at a token, about", ge=1)
    passes: int = setting(2, "how often it sees each activation", ge=1)
    sae_batch: int = setting(4096, "tokens a step of its training", ge=16)
    sae_learning_rate: float | None = setting(None, "default 3e-3 at 2,304 features, falling with their root", gt=0)
    seeds: int = setting(1, "autoencoders to train; the others say which features replicate", ge=1, le=8)
    quantization: Literal["nf4", "bf16", "none"] = setting("bf16", "how the models are held; none is fp32")
    scorer: list[str] = setting(
        ["contrast", "lexicon"], "what answers are scored with, see psm-probe; nll alone where there is no persona"
    )
    max_new_tokens: int = setting(80, "longest answer", ge=4)
    min_active: int = setting(4, "prompts on which a feature must be active to be tested", ge=2)
    cards: int = setting(8, "features that are shown with their tokens and contexts, and tested for causes", ge=0)
    causal_prompts: int = setting(24, "prompts that causes are tested on", ge=0)
    steering: float = setting(0.1, "how hard a feature is pushed in that test, in residual norms", gt=0)
    shuffle_pairs: bool = setting(
        False, "swap base and updated on half the prompts: a null run, which must report nothing"
    )
    seed: int = setting(0, "seed of the autoencoder, the bootstrap and the permutations", ge=0)
    output_dir: Path = setting(
        Path("runs/sae"), "the folder in which each run makes its own, sae_<time>", env="OUTPUT_DIR"
    )
    report_json: Path | None = setting(None, "also write the JSON report here")
    report_md: Path | None = setting(None, "also write the Markdown report here")
    artifacts_repo_id: str | None = setting(
        None, "Hub repository for the run folder; made private", env="ARTIFACTS_REPO_ID", pattern=REPO
    )
    artifacts_repo_type: Literal["dataset", "model"] = setting("dataset", "its type", env="ARTIFACTS_REPO_TYPE")
    artifacts_path_in_repo: str = setting(
        "sae-runs", "folder in it, under which each run has its own", env="ARTIFACTS_PATH_IN_REPO"
    )
    fail_on_artifacts_upload_error: bool = setting(
        False, "exit with 1 if the upload fails, and not only warn", env="FAIL_ON_ARTIFACTS_UPLOAD_ERROR"
    )

    @model_validator(mode="after")
    def _one_after(self) -> Self:
        if bool(self.updated_model) == bool(self.updated_adapter):
            found = "both" if self.updated_model else "neither"
            raise ValueError(f"--updated-model or --updated-adapter says what is compared; {found} is given")
        if self.sae and self.seeds > 1:
            raise ValueError("--seeds trains several autoencoders; --sae names one that there is")
        return self

    def blocks(self, count: int) -> list[int]:
        """The blocks to compare in a model of `count` blocks."""
        if self.layers:
            return sorted({int(part) for part in self.layers.split(",")})
        return [count // 2]

    def learning_rate(self, features: int) -> float:
        """Of the autoencoder: Adam's steps are shared by as many features as there are."""
        return self.sae_learning_rate or 3e-3 * (2304 / features) ** 0.5
