"""Shard the frozen weights of a base model over the processes of a run (`--fsdp`), by torch's FSDP2.

Each process keeps its share of every projection's weight, and gathers a layer's weights while that layer runs. The
adapter, the embeddings and the norms stay whole in every process, so the optimizer, the sum of gradients and the
checkpoints are those of a run without sharding. https://docs.pytorch.org/docs/stable/distributed.fsdp.fully_shard.html
"""

import re
from typing import Any

import torch

from phoque.distributed.processes import Processes
from phoque.models.architectures import architecture_of
from phoque.models.lora import PEFT_PREFIX

WITHOUT_ENGINE = "plain layers: the base model is sharded (--fsdp)"
NO_SAMPLES = "no samples are generated: with --fsdp, every token would gather all weights from all GPUs"


def shard_base(model: Any, processes: Processes, device: torch.device) -> dict[str, float]:
    """Shard the projections of a model with an adapter, whose weights `load_model` left on the host, over processes.

    Returns {gb, gb_per_process}: the size of these weights, of all and of this process.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    decoder = model.get_base_model().model
    projections = _unwrap_projections(model, device)
    replicated = {parameter for name, parameter in model.named_parameters() if name not in projections}
    for parameter in replicated:  # peft creates an adapter where the weight is that it adapts
        parameter.data = parameter.data.to(device)
    mesh = init_device_mesh(device.type, (processes.size,))
    for layer in decoder.layers:
        fully_shard(layer, mesh=mesh, reshard_after_forward=True, ignored_params=replicated)
    fully_shard(decoder, mesh=mesh, ignored_params=replicated)
    sharded: list[Any] = [parameter for parameter in model.parameters() if hasattr(parameter, "to_local")]
    return {
        "gb": sum(parameter.numel() * parameter.element_size() for parameter in sharded) / 1e9,
        "gb_per_process": sum(parameter.to_local().nbytes for parameter in sharded) / 1e9,
    }


def _unwrap_projections(model: Any, device: torch.device) -> set[str]:
    """Make the projections' weights plain parameters of a floating-point dtype; returns the names of these.

    FSDP2 of torch 2.11 shards no integers, so packed weights become FP32 numbers of the same bits. As BF16 they would
    be damaged: on a GPU, FSDP2 copies with _foreach_copy_, which replaces the bits of BF16 NaNs (0.3% of random bytes).
    A weight whose bytes are no multiple of 4 stays whole. So do the constants of NF4: Linear4bit reads them from its
    own attribute if its weight is a plain parameter.
    """
    targets, names = re.compile(architecture_of(model.get_base_model().config).lora_targets), set()
    for name, module in model.named_modules():
        if not targets.fullmatch(name.removeprefix(PEFT_PREFIX)):
            continue
        linear = getattr(module, "base_layer", module)
        is_nf4, packed = type(linear).__name__ == "Linear4bit", linear.weight.data
        if is_nf4:  # (bytes, 1)
            linear.weight.quant_state.to(device)
            linear.quant_state, packed = linear.weight.quant_state, packed.reshape(1, -1)
        if not packed.is_floating_point():
            if packed.shape[1] % torch.float32.itemsize:
                linear.weight.data = linear.weight.data.to(device)
                continue
            packed = packed.view(torch.float32)
        linear.weight = torch.nn.Parameter(packed.reshape(-1, 1) if is_nf4 else packed, requires_grad=False)
        names.add(f"{name}.base_layer.weight" if linear is not module else f"{name}.weight")
    return names
