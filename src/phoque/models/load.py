"""Text-only loading of a base model in nf4, bf16 or fp32, checked tensor by tensor."""

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import torch

from phoque.errors import PhoqueError
from phoque.models.families import family_of
from phoque.models.source import Source

LARGEST_SANE = 1e3  # trained weights are below 100; raw FP8 codes taken for weights reach 448 in every matrix


def load_config(source: Source) -> Any:
    """The model's config. Raises PhoqueError (2) if transformers does not know the architecture."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(source.folder)
    except (ValueError, OSError) as error:
        raise PhoqueError(
            f"The config of {source.name} cannot be read.", str(error).splitlines()[0], "Check --base-model."
        ) from error
    family_of(config)
    return config


def load_tokenizer(source: Source) -> Any:
    """The model's tokenizer, with a chat template. Raises PhoqueError (2) if it has none."""
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(source.folder)
    if not tokenizer.chat_template:
        raise PhoqueError(
            f"{source.name} has no chat template.", "It is not a chat model.", "Use its instruction-tuned sibling."
        )
    return tokenizer


def device() -> torch.device:
    """The GPU if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def load_model(source: Source, quantization: str, attention: str = "sdpa") -> Any:
    """The base model, text-only, on the training device, frozen, in `nf4`, `bf16` or `none` (fp32).

    Raises PhoqueError (2) when a weight is missing or unreadable or has a magnitude that no trained weight has.
    """
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    dtype = torch.float32 if quantization == "none" else torch.bfloat16
    nf4 = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            source.folder,
            dtype=dtype,
            quantization_config=nf4 if quantization == "nf4" else None,
            attn_implementation=attention,
            device_map={"": device()},
            output_loading_info=True,
        )
    except (SafetensorError, OSError) as error:
        raise PhoqueError(
            f"The weights of {source.name} cannot be read.",
            str(error).splitlines()[0],
            "A file is damaged or cut short: delete it and fetch it again.",
        ) from error
    model, report = loaded
    _check(model, report, source)
    model.config.use_cache = False
    return model.requires_grad_(False)


def _check(model: Any, report: dict[str, Any], source: Source) -> None:
    missing = sorted(report["missing_keys"])
    unread = sorted(key for key in report["unexpected_keys"] if "scale" in key)
    if missing or unread or report["mismatched_keys"]:
        first = (missing or unread or sorted(map(str, report["mismatched_keys"])))[0]
        raise PhoqueError(
            f"The weights of {source.name} do not fit its architecture.",
            f"First tensor that is missing, left over or of another shape: {first}.",
            "The checkpoint is incomplete or quantised in a way phoque does not read.",
        )
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and not parameter.abs().max().item() < LARGEST_SANE:
            raise PhoqueError(
                f"The weights of {source.name} are not sane.",
                f"{name} holds values beyond {LARGEST_SANE:g} or NaN.",
                "The checkpoint is damaged, or its scales were not applied.",
            )


@contextmanager
def measuring(model: Any) -> Generator[None]:
    """Evaluation mode that leaves the model fit for training.

    bitsandbytes 0.50 on the CPU repacks an NF4 weight in place at the first forward pass in evaluation mode, and
    what it packs has no backward pass: those modules stay in training mode, which changes nothing else for them.
    """
    was_training = model.training
    model.eval()
    for module in model.modules():
        if type(module).__name__ == "Linear4bit":
            module.training = True
    try:
        yield
    finally:
        model.train(was_training)
