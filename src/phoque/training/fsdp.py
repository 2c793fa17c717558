"""Shard the frozen weights of a base model over the processes of a run (`--fsdp`), by torch's FSDP2.

Each process keeps its share of every projection's weight, and gathers a layer's weights while that layer runs. The
adapter, the embeddings and the norms stay whole in every process, so the optimizer, the sum of gradients and the
checkpoints are those of a run without sharding. https://docs.pytorch.org/docs/stable/distributed.fsdp.fully_shard.html
"""

import re
from typing import Any

import torch

from phoque.errors import UsageError
from phoque.models.architectures import architecture_of
from phoque.settings.train import TrainSettings
from phoque.training.processes import Processes

NO_SAMPLES = "no samples are generated: with --fsdp, every token would gather all weights from all GPUs"


def check_sharded(s: TrainSettings, processes: int) -> None:
    """Raise UsageError for --fsdp with one process."""
    if s.fsdp and processes == 1:
        raise UsageError(
            what="--fsdp has nothing to share the base model with.",
            why="It shards the model over several processes, and this run has one.",
            fix="Add --gpus all, or leave out --fsdp.",
        )


def shard_base(model: Any, processes: Processes, device: torch.device) -> dict[str, float]:
    """Shard the projections of a model with an adapter, whose weights `load_model` left on the host, over processes.

    Returns {gb, gb_here}: the size of these weights, and of the share of this process.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    decoder = model.get_base_model().model
    sharded = _unwrap_projections(model, device)
    for parameter in model.parameters():  # peft creates an adapter where the weight is that it adapts
        if parameter not in sharded:
            parameter.data = parameter.data.to(device)
    whole = {parameter for parameter in model.parameters() if parameter not in sharded}
    mesh = init_device_mesh(device.type, (processes.size,))
    for layer in decoder.layers:
        fully_shard(layer, mesh=mesh, ignored_params=whole)
    fully_shard(decoder, mesh=mesh, ignored_params=whole)
    shares: list[Any] = [parameter for parameter in model.parameters() if hasattr(parameter, "to_local")]
    return {
        "gb": sum(share.numel() * share.element_size() for share in shares) / 1e9,
        "gb_here": sum(share.to_local().nbytes for share in shares) / 1e9,
    }


def _unwrap_projections(model: Any, device: torch.device) -> set[torch.nn.Parameter]:
    """The projections' weights as plain parameters. The constants of NF4 stay whole, on the device.

    Linear4bit takes them from its own attribute if the weight is a plain parameter.
    """
    targets, found = re.compile(architecture_of(model.get_base_model().config).lora_targets), set()
    for name, module in model.get_base_model().named_modules():
        if not targets.fullmatch(name):
            continue
        linear = getattr(module, "base_layer", module)
        if type(linear).__name__ == "Linear4bit":
            linear.quant_state = linear.weight.quant_state
            linear.quant_state.to(device)
            linear.weight = torch.nn.Parameter(linear.weight.data, requires_grad=False)
        found.add(linear.weight)
    return found
