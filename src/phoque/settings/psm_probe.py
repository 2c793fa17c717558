"""The settings of `phoque psm-probe`."""

from pathlib import Path
from typing import ClassVar, Literal, Self

from pydantic import model_validator

from phoque.settings.artifacts import ARTIFACTS_GROUP
from phoque.settings.fields import conflict, setting
from phoque.settings.job import JOB_GROUP
from phoque.settings.probe import ProbeSettings

NUMBERS = r"^\s*\d+(\.\d+)?(\s*,\s*\d+(\.\d+)?)*\s*$"


class PsmSettings(ProbeSettings):
    """The settings of one persona vector probe."""

    main_input: ClassVar = "adapter_source"
    reads: ClassVar = {
        "model_source": "revision",
        "adapter_source": "adapter_revision",
        "control_adapter": None,
        "dataset": "dataset_revision",
        "persona": None,
        "roles": None,
    }
    groups: ClassVar = {
        "Model": "preset model_source revision adapter_source adapter_revision control_adapter merge_adapter "
        "quantization",
        "Data": "persona dataset dataset_revision dataset_config split",
        "Probe": "scorer roles role_questions questions extraction_tokens sweep_layers sweep_blocks coefficients "
        "sweep_questions sweep_tokens directions doses positions coherence_limit max_new_tokens samples temperature "
        "top_p gpus seed nulls shuffle_labels",
        "Output": "output_dir",
        "Hub": f"{ARTIFACTS_GROUP} update_card public gated hub_patience",
        "Job": JOB_GROUP,
    }

    preset: str = setting(
        "ministral-3b",
        "Use this set of defaults (ministral-3b or demo) for model, persona and lengths. Every other "
        "setting overrides it.",
    )
    model_source: str = setting(
        "",
        "Probe this chat model: a Hub id, a local folder or a .gguf file. Without it, the model that "
        "--adapter-source was trained on, or the preset's.",
        env="MODEL_SOURCE",
    )
    revision: str | None = setting(None, "Use this branch, tag or commit of --model-source on the Hub.")
    adapter_source: str = setting(
        "",
        "Probe this fine-tune of the model: the folder of its LoRA adapter, a run folder or a Hub repository.",
        env="ADAPTER_SOURCE",
    )
    adapter_revision: str | None = setting(None, "Use this branch, tag or commit of --adapter-source on the Hub.")
    merge_adapter: bool = setting(
        False,
        "Merge the adapter into the weights while the probe runs. It needs --quantization bf16 or fp32.",
        env="MERGE_ADAPTER",
    )
    control_adapter: list[str] = setting(
        [],
        "Compare --adapter-source with this adapter of a different fine-tune on the same prompts. Repeatable: with "
        "two or more controls that differ only in their seed, the fine-tune must differ by more than they do. "
        "Without it, the controls of `phoque train --with-control`.",
        commas=True,
    )
    output_dir: Path = setting(
        Path("runs/psm"), "Create the folder of each run, psm_<time>, in this folder.", env="OUTPUT_DIR"
    )
    quantization: Literal["nf4", "bf16", "fp32"] = setting(
        "bf16",
        "Store the model's weights in this precision. nf4 needs the least memory.",
        value_aliases={"none": "fp32"},
    )
    scorer: list[str] = setting(
        ["words", "contrast", "lexicon"],
        "Score answers with words, contrast, lexicon, logprob, nll, profanity, hf:MODEL#LABEL, openai:URL#MODEL or "
        "command:COMMAND. Repeatable; the first is the trait that steering must raise.",
    )
    roles: str = setting(
        "bundled",
        "Rank the persona among these roles: the bundled ones, those of a .toml file, or none. With fewer than 19, "
        "adopts, tuned_moves_along_vector, follows and specific are not asked.",
    )
    role_questions: int = setting(24, "Answer at most this many questions of each list as each role.", ge=2)
    extraction_tokens: int = setting(
        40, "Generate at most this many tokens per answer for the persona vectors and the evidence.", ge=4
    )
    sweep_layers: str = setting(
        "",
        "Steer these decoder blocks, such as 9,13,17. Without it, --sweep-blocks from 30% to 80% of the model's depth.",
        flag="steer-blocks",
        old_flag="sweep-layers",
        pattern=f"^$|{NUMBERS}",
    )
    sweep_blocks: int = setting(5, "Steer this many blocks if --steer-blocks names none.", ge=1)
    coefficients: str = setting(
        "0.1,0.15,0.2,0.3,0.4",
        "Steer with these strengths, such as 0.1,0.2, as multiples of the residual stream's norm.",
        pattern=NUMBERS,
    )
    sweep_questions: int = setting(8, "Answer at most this many validation questions per setting in the sweep.", ge=1)
    directions: int = setting(
        39,
        "Rank the persona vector among this many natural directions, each at its own best setting. With fewer than 19, "
        "the verdict causal is not asked.",
        ge=0,
        le=199,
    )
    doses: str = setting(
        "0,0.25,0.5,0.75,1,1.25,1.5",
        "Measure the fine-tune at these multiples of its adapter's strength; 0 is the base model. An empty text turns "
        "this off.",
        pattern=f"^$|{NUMBERS}",
    )
    sweep_tokens: int = setting(40, "Generate at most this many tokens per answer in the steering sweep.", ge=4)
    max_new_tokens: int = setting(120, "Generate at most this many tokens per answer to a test prompt.", ge=4)
    samples: int = setting(
        4, "Sample this many answers per test prompt and condition, in addition to the greedy answer.", ge=0, le=199
    )
    temperature: float = setting(
        0.8, "Draw the sampled answers with this temperature; higher values make them more varied.", gt=0
    )
    top_p: float = setting(
        0.9,
        "Draw the sampled answers from the most likely tokens that together have this probability (nucleus sampling).",
        gt=0,
        le=1,
    )
    positions: Literal["all", "response"] = setting(
        "all", "Steer at all tokens of the conversation, or only at those of the response."
    )
    coherence_limit: float = setting(
        2.0,
        "Reject steered answers as incoherent if the base model's loss on them exceeds the neutral "
        "answers' by more than this (nats per token).",
        gt=0,
    )
    seed: int = setting(0, "Seed the sampling, the bootstrap and the permutation tests.", ge=0)
    nulls: int = setting(50, "Repeat the evidence this many times with swapped labels, to count false alarms.", ge=0)
    shuffle_labels: bool = setting(
        False, "Swap the labels of half the pairs, as a null run: separable, specific and causal must then be no."
    )

    @model_validator(mode="after")
    def _something_to_merge(self) -> Self:
        if self.merge_adapter and not self.adapter_source:
            raise conflict(
                "--merge-adapter is given without an adapter.",
                "--adapter-source names none.",
                "Add --adapter-source, such as --adapter-source runs/demo.",
            )
        if self.merge_adapter and self.quantization == "nf4":
            raise conflict(
                "--merge-adapter and --quantization nf4 exclude each other.",
                "Merging into NF4 weights rounds the adapter away.",
                "Use --quantization bf16 or fp32.",
            )
        if self.control_adapter and not self.adapter_source:
            raise conflict(
                "--control-adapter is given without --adapter-source.",
                "A control is compared with the adapter of a persona.",
                "Add --adapter-source, such as --adapter-source runs/demo.",
            )
        return self

    @property
    def strengths(self) -> list[float]:
        """The coefficients as numbers."""
        return [float(part) for part in self.coefficients.split(",")]

    @property
    def dose_scales(self) -> list[float]:
        """The multiples of the adapter's strength as numbers."""
        return [float(part) for part in self.doses.split(",") if part.strip()]

    def steered_blocks(self, count: int) -> list[int]:
        """Indices of the blocks to steer in a model of `count` blocks: --steer-blocks, or some from 30% to 80%."""
        if self.sweep_layers:
            return sorted({int(float(part)) for part in self.sweep_layers.split(",")})
        if self.sweep_blocks == 1:
            return [round(0.55 * (count - 1))]
        step = 0.5 / (self.sweep_blocks - 1)
        return sorted({round((0.3 + n * step) * (count - 1)) for n in range(self.sweep_blocks)})
