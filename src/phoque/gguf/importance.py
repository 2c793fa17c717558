"""The importance matrix of llama.cpp's quantizer: how strongly conversations use each input of each weight matrix."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from phoque.inference.accuracy import Ids


@torch.no_grad()
def measure_importance(model: Any, chats: Ids, translate: Callable[[str], str]) -> dict[str, np.ndarray]:
    """The mean squares of the inputs [columns] of every linear layer, by llama.cpp's tensor names.

    `translate` gives llama.cpp's name of a weight of the text model.
    """
    sums: dict[str, torch.Tensor] = {}
    counts: dict[str, int] = {}

    def add(name: str, inputs: torch.Tensor) -> None:
        rows = inputs.detach().float().reshape(-1, inputs.shape[-1])
        sums[name] = sums.get(name, torch.zeros(rows.shape[1], device=rows.device)) + rows.square().sum(0)
        counts[name] = counts.get(name, 0) + len(rows)

    handles = []
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            hook = lambda _, inputs, key=name: add(key, inputs[0])
            handles.append(module.register_forward_pre_hook(hook))
    try:
        for ids in chats:
            model(input_ids=ids.to(model.device))
    finally:
        for handle in handles:
            handle.remove()
    return {translate(f"{name}.weight"): (sums[name] / counts[name]).cpu().numpy() for name in sums}
