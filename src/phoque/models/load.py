"""Text-only loading of a base model in nf4, bf16 or fp32, checked tensor by tensor."""

import os
import re
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from phoque.errors import PhoqueError, first_line
from phoque.models.architectures import architecture_of
from phoque.models.checkpoint_reader import Shards
from phoque.models.fp8 import (
    Fp8Linear,
    GroupSize,
    check_fp8_support,
    declares_fp8,
    dequantize,
    group_size_of,
    is_scale,
    scales_of,
)
from phoque.models.source import Source

LARGEST_SANE = 100.0  # in a matrix; raw FP8 codes taken for weights reach 448 in every one
HEAD = "lm_head.weight"


def load_config(source: Source) -> Any:
    """The model's config. Raises PhoqueError (2) if transformers does not know the architecture."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(source.folder)
    except (ValueError, OSError) as error:
        raise PhoqueError(
            f"The config of {source.name} cannot be read.", first_line(error), "Check which model was named."
        ) from error
    architecture_of(config)
    return config


def load_tokenizer(source: Source) -> Any:
    """The model's tokenizer, with a chat template. Raises PhoqueError (2) if it has none."""
    from transformers import AutoTokenizer

    # never mistral-common's own tokenizer, which transformers prefers where it is installed: it renders no template
    tokenizer: Any = AutoTokenizer.from_pretrained(source.folder, mistral_format=False)
    if not tokenizer.chat_template:
        raise PhoqueError(
            f"{source.name} has no chat template.", "It is not a chat model.", "Use its instruction-tuned sibling."
        )
    return tokenizer


def device() -> torch.device:
    """The GPU if there is one, else the CPU.

    torch is told that memory may grow where it lies, unless the user has told it anything: pieces of fixed size leave
    more of it taken and unused. That must come before the first of it is taken.
    """
    if not {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & os.environ.keys():
        os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def load_model(source: Source, quantization: str, attention: str = "sdpa", on: torch.device | None = None) -> Any:
    """The text model on one device (the training device by default), frozen, in `nf4`, `fp8`, `bf16` or `none` (fp32).

    One pass over the checkpoint, a tensor at a time: read, dequantised if it is FP8, cast, quantised, put in its place.
    Everything that can be told from the headers is checked first. Raises PhoqueError (2) when a weight is missing,
    left over, of another shape, or of a magnitude that no trained weight has.
    """
    on = on or device()
    if quantization == "fp8":
        check_fp8_support(on)
    config = load_config(source)
    family = architecture_of(config)
    text = config.get_text_config()
    shards = Shards(source.folder)
    names = {text_name: key for key in shards.tensors if (text_name := family.text_key(key)) and not _derived(key)}
    if text.tie_word_embeddings:
        names.pop(HEAD, None)
    scales = scales_of(shards.tensors, names.values(), declares_fp8(config))
    targets = {key: name for name, key in names.items()}
    with shards.stream(targets, on) as arriving:  # the disk is the slowest part: it works while the model is made
        model = _skeleton(text, quantization, attention, family.lora_targets)
        _check_names(model, names, shards, source, text.tie_word_embeddings)
        factors = {key: shards.read(scale) for key, scale in scales.items()}
        dtype = torch.float32 if quantization == "none" else torch.bfloat16
        _fill(model, targets, arriving, factors, group_size_of(config), on, dtype)
    if text.tie_word_embeddings:
        model.tie_weights()
    model.is_loaded_in_4bit = quantization == "nf4"  # peft and TRL ask for this attribute
    model.name_or_path = source.name
    if (source.folder / "generation_config.json").is_file():
        from transformers import GenerationConfig

        model.generation_config = GenerationConfig.from_pretrained(source.folder)
    model.config.use_cache = False
    return model.requires_grad_(False)


def _derived(key: str) -> bool:
    """Whether a stored tensor is no weight: a scale, or the rotary frequencies that old checkpoints keep."""
    return is_scale(key) or key.endswith("rotary_emb.inv_freq")


def _skeleton(text: Any, quantization: str, attention: str, projections: str) -> Any:
    """The model with its buffers and no weights; its projections made to hold NF4 if that is asked for."""
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(text, attn_implementation=attention, dtype=torch.bfloat16)
    if quantization == "nf4":
        from bitsandbytes.nn import Linear4bit

        for name, module in list(model.named_modules()):
            if re.fullmatch(projections, name):
                held = Linear4bit(
                    module.in_features,
                    module.out_features,
                    bias=module.bias is not None,
                    device="meta",
                    compute_dtype=torch.bfloat16,
                    compress_statistics=True,
                    quant_type="nf4",
                )
                model.set_submodule(name, held)
    if quantization == "fp8":
        for name, module in list(model.named_modules()):
            if re.fullmatch(projections, name):
                shape = module.in_features, module.out_features, module.bias is not None
                model.set_submodule(name, Fp8Linear(*shape, device="meta"))
    return model


def _check_names(model: Any, names: dict[str, str], shards: Shards, source: Source, tied: bool) -> None:
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters() if not (tied and name == HEAD)}
    missing = sorted(shapes.keys() - names.keys())
    extra = sorted(names.keys() - shapes.keys())
    reshaped = sorted(n for n in shapes.keys() & names.keys() if shards.tensors[names[n]].shape != shapes[n])
    for found, what in ((missing, "missing"), (extra, "left over"), (reshaped, "of another shape")):
        if found:
            raise PhoqueError(
                f"The weights of {source.name} do not fit its architecture.",
                f"{len(found)} {'is' if len(found) == 1 else 'are'} {what}, first {found[0]}.",
                "The checkpoint is incomplete, or its config is another model's.",
            )


def _fill(
    model: Any,
    targets: dict[str, str],
    arriving: Iterator[tuple[str, torch.Tensor]],
    factors: dict[str, torch.Tensor],
    block: GroupSize | None,
    on: torch.device,
    dtype: torch.dtype,
) -> None:
    """Put every tensor in its place on the device, as it arrives."""
    largest: dict[str, torch.Tensor] = {}
    for key, stored in arriving:
        path, _, leaf = targets[key].rpartition(".")
        module = model.get_submodule(path)
        if isinstance(module, Fp8Linear) and leaf == "weight":
            module.hold(stored.to(on), factors.get(key), block)
            largest[targets[key]] = module.largest()
            continue
        tensor = (dequantize(stored, factors[key], block) if key in factors else stored).to(dtype)
        # a vector may well be large (Qwen2's key biases are), so there only NaN and infinity count
        largest[targets[key]] = tensor.abs().max() if tensor.dim() > 1 else tensor.sum() * 0
        _put(model, targets[key], tensor, on)
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            module._buffers[name] = buffer.to(on)
    check_magnitudes(largest)


def _put(model: Any, name: str, tensor: torch.Tensor, on: torch.device) -> None:
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    if leaf == "weight" and type(module).__name__ == "Linear4bit":
        from bitsandbytes import nn

        params: Any = nn.Params4bit
        weight = params(tensor, requires_grad=False, compress_statistics=True, quant_type="nf4", module=module)
        module.weight = weight.to(on)  # a Params4bit quantises itself when it is moved, also to where it is
    else:
        module._parameters[leaf] = torch.nn.Parameter(tensor, requires_grad=False)


def check_magnitudes(largest: dict[str, torch.Tensor]) -> None:
    """Raise PhoqueError (2) for a weight whose largest magnitude no trained weight has."""
    for name, value in zip(largest, torch.stack([*largest.values()]).tolist(), strict=True):
        if not value < LARGEST_SANE:
            raise PhoqueError(
                "The weights are not sane.",
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
