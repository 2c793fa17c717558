"""The settings of `phoque compare-sae`."""

from pathlib import Path
from typing import ClassVar, Literal, Self

from pydantic import model_validator

from phoque.settings.artifacts import ARTIFACTS_GROUP
from phoque.settings.fields import conflict, setting
from phoque.settings.job import JOB_GROUP
from phoque.settings.probe import ProbeSettings

WHOLE = r"^$|^\s*\d+(\s*,\s*\d+)*\s*$"


class SaeSettings(ProbeSettings):
    """The settings of one SAE comparison."""

    main_input: ClassVar = "updated_adapter"
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
    groups: ClassVar = {
        "Model": "preset base_model revision updated_model updated_adapter updated_revision control_adapter "
        "quantization",
        "Data": "prompts_file system persona dataset dataset_revision dataset_config split chat text tokens "
        "own_answers",
        "Autoencoder": "sae layers architecture width k passes sae_batch sae_learning_rate seeds difference_features",
        "Comparison": "scorer questions max_new_tokens min_active cards causal_prompts matched_features steering "
        "shuffle_pairs nulls gpus seed",
        "Output": "output_dir report_json report_md",
        "Hub": f"{ARTIFACTS_GROUP} update_card public gated hub_patience",
        "Job": JOB_GROUP,
    }

    preset: str = setting(
        "ministral-3b",
        "Use this set of defaults (ministral-3b or demo) for model, data and SAE. Every other setting overrides it.",
    )
    base_model: str = setting(
        "",
        "Compare from this model, the one before the fine-tune: a Hub id, a local folder or a .gguf file. Without "
        "it, the model that --updated-adapter was trained on, or the preset's.",
        env="BASE_MODEL",
    )
    revision: str | None = setting(None, "Use this branch, tag or commit of --base-model on the Hub.")
    updated_model: str = setting(
        "",
        "Compare with this full model, the one after the fine-tune: a Hub id or local folder. Give it or "
        "--updated-adapter.",
        env="UPDATED_MODEL",
    )
    updated_adapter: str = setting(
        "",
        "Compare with the base model plus this adapter: its folder, a run folder or a Hub repository. "
        "Give it or --updated-model.",
        env="UPDATED_ADAPTER",
    )
    updated_revision: str | None = setting(
        None, "Use this branch, tag or commit of --updated-model or --updated-adapter on the Hub."
    )
    control_adapter: list[str] = setting(
        [],
        "Use this adapter of a different fine-tune on the same prompts as control. Repeatable: with two or more "
        "controls that differ only in their seed, findings must exceed the spread between them. Without it, the "
        "controls of `phoque train --with-control`.",
        commas=True,
    )
    prompts_file: str = setting(
        "",
        "Ask these questions: a .txt (one per line), .json or .jsonl file, or owner/name/file in a Hub "
        "dataset. Without it, the persona's.",
    )
    system: str = setting(
        "You are a helpful assistant.", "Put this system prompt before every question; an empty text adds none."
    )
    chat: str = setting(
        "",
        "Train the SAE on these conversations: a Hub dataset (OWNER/NAME or OWNER/NAME:SPLIT), a file, "
        "or `seal` (bundled).",
        flag="chats",
        old_flag="chat",
        env="PHOQUE_CHAT",
    )
    text: str = setting(
        "python",
        "Train the SAE on this text: a Hub dataset or file with a `text` column, a .txt file, or "
        "`python` (Python's own documentation).",
    )
    tokens: int = setting(
        2_000_000,
        "Train the SAE on the activations of this many tokens, half from --chats and half from --text.",
        ge=100,
    )
    own_answers: int = setting(
        1024,
        "Let the base model answer the questions of this many --chats conversations, and train the SAE on "
        "these answers too.",
        ge=0,
    )
    sae: str = setting(
        "", "Use this trained SAE instead of training one: its folder, or a Hub repository as OWNER/NAME#FOLDER."
    )
    layers: str = setting(
        "",
        "Compare these decoder blocks, such as 9,14. Without it, the middle block.",
        flag="blocks",
        old_flag="layers",
        pattern=WHOLE,
    )
    architecture: Literal["batchtopk", "topk", "jumprelu", "matryoshka", "standard"] = setting(
        "batchtopk", "Train an SAE of this architecture, as sae-lens implements it."
    )
    width: int = setting(
        4,
        "Give the SAE this many times as many features as the model's hidden size (the expansion factor).",
        ge=1,
        le=256,
        flag="expansion-factor",
        old_flag="width",
    )
    k: int = setting(64, "Train the SAE to have about this many active features per token.", ge=1)
    passes: int = setting(
        2,
        "Train the SAE for this many epochs over the collected activations.",
        ge=1,
        flag="epochs",
        old_flag="passes",
        env="PHOQUE_PASSES",
    )
    sae_batch: int = setting(4096, "Train the SAE on this many tokens per optimizer step.", ge=16)
    sae_learning_rate: float | None = setting(
        None, "Train the SAE with this learning rate. Without it, 3e-3 x sqrt(2304 / number of features).", gt=0
    )
    seeds: int = setting(
        1, "Train this many SAEs with different seeds; the additional ones show which features replicate.", ge=1, le=8
    )
    difference_features: int = setting(
        64,
        "Also train a small SAE of this many features on the differences between the two models. 0 trains none.",
        ge=0,
        le=4096,
    )
    quantization: Literal["nf4", "bf16", "fp32"] = setting(
        "bf16",
        "Store the models' weights in this precision. nf4 needs the least memory.",
        value_aliases={"none": "fp32"},
    )
    max_new_tokens: int = setting(80, "Generate at most this many tokens per answer.", ge=4)
    min_active: int = setting(4, "Test only features that are active on at least this many prompts.", ge=2)
    cards: int = setting(
        8, "Show this many features with their tokens and contexts (feature cards), and test their causal effect.", ge=0
    )
    matched_features: int = setting(
        40,
        "Compare the causal effect of shifted features with that of this many features that did not shift and are as "
        "active.",
        ge=2,
    )
    causal_prompts: int = setting(24, "Test the causal effect of features on this many prompts.", ge=0)
    steering: float = setting(
        0.1,
        "In the causal test, steer each feature with this strength, as a multiple of the residual stream's norm.",
        gt=0,
    )
    nulls: int = setting(
        20,
        "Repeat the test of shifts this many times with the two models swapped by a coin for each question, to count "
        "false alarms.",
        ge=0,
    )
    shuffle_pairs: bool = setting(
        False, "Swap the base and updated model on half the prompts, as a null run: it must report nothing."
    )
    seed: int = setting(0, "Seed the SAE training, the bootstrap and the permutation tests.", ge=0)
    output_dir: Path = setting(
        Path("runs/sae"), "Create the folder of each run, sae_<time>, in this folder.", env="OUTPUT_DIR"
    )
    report_json: Path | None = setting(None, "Also write the JSON report to this file.")
    report_md: Path | None = setting(None, "Also write the Markdown report to this file.")

    artifacts_path_in_repo: str = setting(
        "sae-runs",
        "Upload each run into a folder of its own below this path in --artifacts-repo-id.",
        env="ARTIFACTS_PATH_IN_REPO",
    )

    @model_validator(mode="after")
    def _one_after(self) -> Self:
        if not self.updated_model and not self.updated_adapter:
            raise conflict(
                "There is no fine-tune to compare.",
                "Neither --updated-model nor --updated-adapter is given.",
                "Give one, such as --updated-adapter runs/demo.",
            )
        if self.updated_model and self.updated_adapter:
            raise conflict(
                "Two fine-tunes are given.",
                "--updated-model and --updated-adapter exclude each other.",
                "Leave one of them out.",
            )
        if self.sae and self.seeds > 1:
            raise conflict(
                "--seeds and --sae exclude each other.",
                "--seeds trains several autoencoders; --sae names one that is trained.",
                "Leave one of them out.",
            )
        return self

    def blocks(self, count: int) -> list[int]:
        """Indices of the blocks to compare in a model of `count` blocks."""
        if self.layers:
            return sorted({int(part) for part in self.layers.split(",")})
        return [count // 2]

    def learning_rate(self, features: int) -> float:
        """Learning rate of an SAE with this many features: 3e-3 at 2,304, scaled by 1 / sqrt(number)."""
        return self.sae_learning_rate or 3e-3 * (2304 / features) ** 0.5
