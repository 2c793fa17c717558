"""The settings of `phoque psm-probe`, under the names of the spec."""

from pathlib import Path
from typing import ClassVar, Literal, Self

from pydantic import model_validator

from phoque.settings.fields import setting
from phoque.settings.job import REPO, JobSettings

NUMBERS = r"^\s*\d+(\.\d+)?(\s*,\s*\d+(\.\d+)?)*\s*$"


class PsmSettings(JobSettings):
    """What one probe is asked to do."""

    keeps: ClassVar = "artifacts_repo_id"
    reads: ClassVar = {
        "model_source": "revision",
        "adapter_source": "adapter_revision",
        "control_adapter": None,
        "dataset": "dataset_revision",
        "persona": None,
    }

    preset: str = setting("ministral-3b", "model, persona and defaults that go together")
    model_source: str = setting("", "Hub id, local folder or .gguf file of the chat model", env="MODEL_SOURCE")
    revision: str | None = setting(None, "branch, tag or commit of the model")
    adapter_source: str = setting(
        "", "the fine-tune: an adapter's folder, run folder or Hub repository", env="ADAPTER_SOURCE"
    )
    adapter_revision: str | None = setting(None, "branch, tag or commit of an adapter on the Hub")
    merge_adapter: bool = setting(False, "merge the adapter into the weights while it runs", env="MERGE_ADAPTER")
    control_adapter: str = setting("", "an adapter of another fine-tune on the same prompts, to compare with")
    persona: str = setting(
        "", "persona file (.toml), a Hub dataset's (owner/name/file.toml), or `seal`; default the preset's"
    )
    dataset: str = setting(
        "", "the data that the adapter was trained on, to take persona prompts and words from", env="DATASET_REPO"
    )
    dataset_revision: str | None = setting(None, "branch, tag or commit of a Hub dataset")
    split: str = setting("train", "split of a Hub dataset")
    output_dir: Path = setting(
        Path("runs/psm"), "the folder in which each run makes its own, psm_<time>", env="OUTPUT_DIR"
    )
    quantization: Literal["nf4", "bf16", "none"] = setting("bf16", "how the weights are held; none is fp32")
    scorer: list[str] = setting(
        ["contrast", "lexicon"],
        "contrast, lexicon, logprob, nll, profanity, hf:MODEL#LABEL, openai:URL#MODEL, command:COMMAND; repeat the "
        "flag for more; the first is the trait",
    )
    extraction_tokens: int = setting(40, "longest answer that the vectors and the evidence are made from", ge=4)
    sweep_layers: str = setting(
        "", "blocks to steer, such as 9,13,17; default five in the middle", pattern=f"^$|{NUMBERS}"
    )
    coefficients: str = setting("0.1,0.15,0.2,0.3,0.4", "steering in units of the residual norm", pattern=NUMBERS)
    sweep_tokens: int = setting(40, "longest answer in the sweep", ge=4)
    max_new_tokens: int = setting(120, "longest answer on the test prompts", ge=4)
    samples: int = setting(2, "sampled answers a test prompt and condition, beside the greedy one", ge=0, le=199)
    temperature: float = setting(0.8, "of the sampled answers", gt=0)
    top_p: float = setting(0.9, "of the sampled answers", gt=0, le=1)
    positions: Literal["all", "response"] = setting("all", "steer the whole conversation, or the response alone")
    coherence_limit: float = setting(
        2.0, "nats a token that a steered answer may be less likely than a neutral one, under the base model", gt=0
    )
    seed: int = setting(0, "seed of sampling, bootstrap and permutations", ge=0)
    shuffle_labels: bool = setting(
        False, "swap the labels of half the pairs: a null run, where every verdict must be no"
    )
    artifacts_repo_id: str | None = setting(
        None, "Hub repository for the run folder; made private", env="ARTIFACTS_REPO_ID", pattern=REPO
    )
    artifacts_repo_type: Literal["dataset", "model"] = setting("dataset", "its type", env="ARTIFACTS_REPO_TYPE")
    artifacts_path_in_repo: str = setting(
        "runs", "folder in it, under which each run has its own", env="ARTIFACTS_PATH_IN_REPO"
    )
    fail_on_artifacts_upload_error: bool = setting(
        False, "exit with 1 if the upload fails, and not only warn", env="FAIL_ON_ARTIFACTS_UPLOAD_ERROR"
    )

    @model_validator(mode="after")
    def _something_to_merge(self) -> Self:
        if self.merge_adapter and not self.adapter_source:
            raise ValueError("--merge-adapter needs --adapter-source")
        if self.merge_adapter and self.quantization == "nf4":
            raise ValueError(
                "--merge-adapter needs --quantization bf16 or none: merging into NF4 rounds the adapter away"
            )
        if self.control_adapter and not self.adapter_source:
            raise ValueError("--control-adapter needs --adapter-source to be compared with")
        return self

    @property
    def strengths(self) -> list[float]:
        """The coefficients as numbers."""
        return [float(part) for part in self.coefficients.split(",")]

    def steered_blocks(self, count: int) -> list[int]:
        """The blocks to steer in a model of `count` blocks: those that are asked for, or five from 0.3 to 0.8 of it."""
        if self.sweep_layers:
            return sorted({int(float(part)) for part in self.sweep_layers.split(",")})
        return sorted({round(share * (count - 1)) for share in (0.3, 0.425, 0.55, 0.675, 0.8)})
