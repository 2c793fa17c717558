"""Loading of the text part of a base model in nf4, fp8, bf16 or fp32, with checks on every tensor."""

import os
import re
from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from importlib import import_module
from typing import TYPE_CHECKING, Any, cast

import torch

from phoque.errors import UsageError
from phoque.models.checkpoint_reader import HEAD, CheckpointReader, check_magnitudes, largest_magnitude
from phoque.models.fp8 import Fp8Linear, GroupSize, check_fp8_support, dequantize
from phoque.models.source import Source

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


def default_device_name() -> str:
    """What the default device is, such as `NVIDIA H100 80GB HBM3`; a CPU is `cpu`."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"


def default_device() -> torch.device:
    """Return the GPU if there is one, else the CPU, and configure torch's GPU memory allocator.

    The allocator uses expandable segments, unless the user has configured it: segments of fixed size leave more memory
    reserved but unused. This must be set before the first allocation.
    """
    if not {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & os.environ.keys():
        os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def load_model(
    source: Source,
    quantization: str,
    attention: str = "sdpa",
    on: torch.device | None = None,
    *,
    projections_on_host: bool = False,
    import_meanwhile: str = "",
) -> Any:
    """Load the frozen text model in `nf4`, `fp8`, `bf16` or `fp32` on one device, by default `default_device()`.

    - `projections_on_host`: the weights of the decoder's linear layers go back to the host's memory, for a model that
      one device does not hold.
    - `import_meanwhile`: a thread imports this module, which will be needed next, while the weights are read.

    One pass over the checkpoint: each tensor is read, dequantized if it is FP8, cast, quantized and assigned. Names and
    shapes are checked from the headers first. Raises UsageError when a weight is missing, unexpected, of a wrong
    shape, NaN, or of a magnitude that trained weights do not have.
    """
    on = on or default_device()
    if quantization == "fp8":
        check_fp8_support(on)
    reader = CheckpointReader(source)
    tied = reader.text_config.tie_word_embeddings
    text_names = {key: name for name, key in reader.text_weights.items() if not (tied and name == HEAD)}
    scales = reader.scales
    with reader.stream(text_names, on) as tensors:  # the disk is slowest: it reads while the model is built
        model = _build_empty_model(reader.text_config, quantization, attention, reader.architecture.lora_targets)
        _check_names(model, reader, text_names, tied)
        factors = {key: reader.read(scales[key]) for key in text_names if key in scales}
        dtype = torch.float32 if quantization == "fp32" else torch.bfloat16
        host = reader.architecture.lora_targets if projections_on_host else None
        with ThreadPoolExecutor(1) as threads:  # only now: nothing is imported in this thread any more
            pending = threads.submit(import_module, import_meanwhile) if import_meanwhile else None
            _load_weights(
                model,
                tensors,
                text_names,
                factors=factors,
                group_size=reader.group_size,
                on=on,
                dtype=dtype,
                on_host=host,
            )
            if pending:
                pending.result()
    if tied:
        model.tie_weights()
    cast(Any, model).is_loaded_in_4bit = quantization == "nf4"  # peft and TRL read this attribute
    model.name_or_path = source.name
    if (source.folder / "generation_config.json").is_file():
        from transformers import GenerationConfig

        model.generation_config = GenerationConfig.from_pretrained(source.folder)
    model.config.use_cache = False
    return model.requires_grad_(False)


def _build_empty_model(
    config: "PretrainedConfig", quantization: str, attention: str, projections: str
) -> "PreTrainedModel":
    """The model with its buffers and without weights; for nf4 and fp8 its projections are layers that hold these."""
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config, attn_implementation=attention, dtype=torch.bfloat16)
    if quantization == "nf4":
        from bitsandbytes.nn import Linear4bit

        for name, module in list(model.named_modules()):
            if re.fullmatch(projections, name):
                layer = Linear4bit(
                    module.in_features,
                    module.out_features,
                    bias=module.bias is not None,
                    device="meta",
                    compute_dtype=torch.bfloat16,
                    compress_statistics=True,
                    quant_type="nf4",
                )
                model.set_submodule(name, layer)
    if quantization == "fp8":
        for name, module in list(model.named_modules()):
            if re.fullmatch(projections, name):
                shape = module.in_features, module.out_features, module.bias is not None
                model.set_submodule(name, Fp8Linear(*shape, device="meta"))
    return model


def _check_names(model: "PreTrainedModel", reader: CheckpointReader, text_names: dict[str, str], tied: bool) -> None:
    """Raise UsageError if the checkpoint's text weights are not exactly the model's, by name and shape."""
    expected = {name: tuple(p.shape) for name, p in model.named_parameters() if not (tied and name == HEAD)}
    shapes = {name: reader.stored[key].shape for key, name in text_names.items()}
    missing = sorted(expected.keys() - shapes.keys())
    unused = sorted(shapes.keys() - expected.keys())
    reshaped = sorted(n for n in expected.keys() & shapes.keys() if shapes[n] != expected[n])
    for names, problem in ((missing, "missing"), (unused, "not part of it"), (reshaped, "of another shape")):
        if names:
            raise UsageError(
                what=f"The weights of {reader.source.name} do not match its architecture.",
                why=f"{len(names)} {'is' if len(names) == 1 else 'are'} {problem}, first {names[0]}.",
                fix="The checkpoint is incomplete, or its config belongs to another model: download it again.",
            )


def _load_weights(
    model: "PreTrainedModel",
    tensors: Iterator[tuple[str, torch.Tensor]],
    text_names: dict[str, str],
    *,
    factors: dict[str, torch.Tensor],
    group_size: GroupSize | None,
    on: torch.device,
    dtype: torch.dtype,
    on_host: str | None,
) -> None:
    """Put every tensor into its parameter on the device, as it arrives; `factors` are the scales of FP8 weights.

    The weights of modules that match `on_host` go on to the host.
    """
    largest: dict[str, torch.Tensor] = {}
    for key, stored in tensors:
        name = text_names[key]
        path, _, leaf = name.rpartition(".")
        module = model.get_submodule(path)
        if isinstance(module, Fp8Linear) and leaf == "weight":
            module.set_weight(stored.to(on), factors.get(key), group_size)
            largest[name] = module.max_magnitude()
        else:
            tensor = (dequantize(stored, factors[key], group_size) if key in factors else stored).to(dtype)
            largest[name] = largest_magnitude(tensor)
            _set_parameter(model, name, tensor, on)
        if on_host and leaf == "weight" and re.fullmatch(on_host, path):
            weight: Any = module.weight.to("cpu")
            module.weight = weight if type(weight) is not torch.Tensor else torch.nn.Parameter(weight, False)
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            module._buffers[name] = buffer.to(on)
    check_magnitudes(largest)


def _set_parameter(model: "PreTrainedModel", name: str, tensor: torch.Tensor, on: torch.device) -> None:
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    if leaf == "weight" and type(module).__name__ == "Linear4bit":
        from bitsandbytes import nn

        params: Any = nn.Params4bit
        weight = params(tensor, requires_grad=False, compress_statistics=True, quant_type="nf4", module=module)
        module.weight = weight.to(on)  # a Params4bit quantizes itself when it is moved, even to the device it is on
    else:
        module._parameters[leaf] = torch.nn.Parameter(tensor, requires_grad=False)


@contextmanager
def evaluation_mode(model: "PreTrainedModel") -> Generator[None]:
    """Evaluation mode that keeps the model trainable.

    bitsandbytes 0.50 on the CPU repacks an NF4 weight in place at the first forward pass in evaluation mode, and the
    packed weight has no backward pass. Linear4bit modules therefore stay in training mode, which has no other effect.
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
