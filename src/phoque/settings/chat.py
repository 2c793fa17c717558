"""The settings of `phoque chat`."""

from pathlib import Path
from typing import Any, ClassVar, Literal, Self

from pydantic import model_validator

from phoque.files import expand_user
from phoque.settings.artifacts import ARTIFACTS_GROUP, ArtifactsSettings
from phoque.settings.fields import conflict, setting
from phoque.settings.job import JOB_GROUP, REPO


class ChatSettings(ArtifactsSettings):
    """The settings of one conversation, or of one list of prompts."""

    reads: ClassVar = {"model": "revision", "base_model": None, "prompts_file": None}
    main_input: ClassVar = "prompts"
    extra: ClassVar = "onnx"
    groups: ClassVar = {
        "Model": "model revision base_model quantization dtype compare install",
        "Prompts": "system prompts prompts_file answers_file",
        "Sampling": "max_new_tokens temperature top_p repetition_penalty seed",
        "Chat page": "serve port",
        "Hub": f"{ARTIFACTS_GROUP} public gated hub_patience",
        "Job": JOB_GROUP,
    }

    model: str = setting(
        "",
        "Talk to this: a run folder, an adapter, a checkpoint, a merged or base model, a .gguf file, the folder of an "
        "export (ONNX or GGUF), or a Hub repository of any of these.",
        env="PHOQUE_CHAT_MODEL",
        flag="model",
        positional=True,
    )
    revision: str | None = setting(None, "Use this branch, tag or commit of the model on the Hub.")
    base_model: str = setting(
        "", "Use this base model for an adapter. Without it, the one that its config names.", env="BASE_MODEL"
    )
    quantization: Literal["auto", "nf4", "bf16", "fp32"] = setting(
        "auto", "Load the weights of a checkpoint in this precision. auto is bf16 on a GPU and fp32 without one."
    )
    dtype: str = setting(
        "",
        "Use this precision of an export, such as q4_k_m or int8. Without it, the one that is fastest on a CPU.",
        env="PHOQUE_CHAT_DTYPE",
    )
    compare: bool = setting(
        False, "For an adapter, answer with the base model too, and with the adapter's control if there is one."
    )
    install: bool = setting(False, "Install llama.cpp for a GGUF file into phoque's cache without asking.")
    system: str | None = setting(
        None,
        "Begin the conversation with this system message. Without it, with the one that most of the adapter's training "
        "data had.",
    )
    prompts: list[str] = setting(
        [], "Answer this prompt and exit. Repeat the flag for more prompts.", flag="prompt", env="PHOQUE_CHAT_PROMPT"
    )
    prompts_file: Path | None = setting(
        None,
        "Answer each prompt of this file and exit: one per line, or .jsonl with `prompt` or `messages`.",
        env="PHOQUE_CHAT_PROMPTS_FILE",
    )
    answers_file: Path | None = setting(
        None, "Also write the answers to this .jsonl file, one line per prompt.", env="PHOQUE_CHAT_ANSWERS_FILE"
    )
    artifacts_repo_id: str | None = setting(
        None,
        "Upload the answers to this Hub repository (owner/name). It is created private unless --public is given.",
        env="PHOQUE_CHAT_ARTIFACTS_REPO_ID",  # not that of the probes: chat uploads nothing unasked
        pattern=REPO,
    )
    max_new_tokens: int = setting(256, "Generate at most this many tokens per answer.", ge=1)
    temperature: float = setting(
        0.7, "Divide the logits by this before a token is drawn; 0 always takes the likeliest.", ge=0
    )
    top_p: float = setting(
        0.9, "Draw from the likeliest tokens whose probabilities add up to this.", gt=0, le=1, env="PHOQUE_CHAT_TOP_P"
    )
    repetition_penalty: float = setting(
        1.1,
        "Divide the positive logits of tokens that the answer already has by this, and multiply the negative ones; 1 "
        "turns it off.",
        ge=1,
    )
    seed: int = setting(0, "Seed the draws: the same prompts then get the same answers.", ge=0)
    serve: bool = setting(False, "Open the model in a chat page on this machine, instead of the terminal.")
    port: int = setting(8018, "Serve the chat page on this port; 0 picks a free one.", ge=0, le=65535)

    @property
    def sampling(self) -> dict[str, Any]:
        """How tokens are drawn, as the chat page has it too: {tokens, temperature, top_p, penalty, seed}."""
        return {
            "tokens": self.max_new_tokens,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "penalty": self.repetition_penalty,
            "seed": self.seed,
        }

    @model_validator(mode="after")
    def _answers_to_keep(self) -> Self:
        if self.on and not (self.prompts or self.prompts_file):
            raise conflict(
                "--on is given without a question.",
                "A Job cannot hold a conversation.",
                "Add --prompt or --prompts-file.",
            )
        is_gguf = self.model.endswith(".gguf") or any(expand_user(self.model).glob("*.gguf"))
        if self.on and is_gguf:
            raise conflict(
                "A Job cannot run a GGUF file.",
                "It has no Node for llama.cpp.",
                "Name a checkpoint, an adapter or an ONNX export, or leave out --on.",
            )
        return self

    @model_validator(mode="after")
    def _one_way_to_ask(self) -> Self:
        if self.serve and (self.prompts or self.prompts_file):
            raise conflict(
                "--serve and --prompt exclude each other.",
                "--serve opens a page to ask in; --prompt and --prompts-file are answered without one.",
                "Leave one of them out.",
            )
        return self
