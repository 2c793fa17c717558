"""GPTQ (Frantar et al. 2023, arXiv 2210.17323): quantize to 4 bits column by column, compensating each column's error.

Columns are quantized in descending order of their mean squared activation. The scale of each group is chosen before
that, by a search that weights errors by the activations.
"""

from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch

from phoque.inference.accuracy import Ids
from phoque.onnx.quantize.block_format import QuantizedMatrix, choose_group_size, pack_codes, split_groups
from phoque.onnx.quantize.linear_groups import linear_groups, replace_weight

if TYPE_CHECKING:
    from transformers import PreTrainedModel

DAMPING = 0.01  # added to the Hessian's diagonal, as a share of the mean of that diagonal
SCALE_CANDIDATES = 20  # number of ranges that the scale search tries, from the full range to half of it
COLUMN_BATCH = 128  # columns that are quantized between two updates of all later columns


@torch.no_grad()
def quantize_model(
    model: "PreTrainedModel", chats: Ids, show: Callable[[int, str], None]
) -> dict[str, QuantizedMatrix]:
    """Quantize the linear layers of a model to 4 bits in place; return them by name.

    Each decoder layer is calibrated on the outputs of the quantized layers before it for `chats`, which are token ids
    [1, length].
    """
    matrices: dict[str, QuantizedMatrix] = {}
    layer_inputs = list(_capture_layer_inputs(model, chats))
    for number, layer in enumerate(model.model.layers):
        prefix = f"model.layers.{number}."
        with ExitStack() as stack:
            hessians = [
                stack.enter_context(_accumulate_hessian(layer.get_submodule(group[0])))
                for group in linear_groups(model)
            ]
            for hidden, kwargs in layer_inputs:
                layer(hidden, **kwargs)
        for group, hessian in zip(linear_groups(model), hessians, strict=True):
            for name in group:
                matrices[prefix + name] = quantize_matrix(layer.get_submodule(name).weight, hessian[0])
                replace_weight(model, prefix + name, matrices[prefix + name])
        layer_inputs = [(layer(hidden, **kwargs), kwargs) for hidden, kwargs in layer_inputs]
        show(number + 1, f"layer {number} quantized to 4 bits")
    return matrices


def search_scales(
    weight: torch.Tensor, importance: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Find the 4-bit scales and zero points with the least squared error, weighted by `importance` [columns].

    Returns (errors [rows, columns], scales [rows, groups], zeros [rows, groups]). Without `importance` only the full
    range of each group is tried.
    """
    groups = split_groups(weight)
    column_weights = torch.ones_like(groups[:1]) if importance is None else split_groups(importance[None])
    low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
    best = torch.full_like(low, torch.inf)
    scales, zeros, errors = torch.ones_like(low), torch.zeros_like(low), torch.zeros_like(groups)
    for shrink in torch.linspace(1, 0.5, SCALE_CANDIDATES if importance is not None else 1).tolist():
        scale = ((high - low) * shrink / 15).clamp(min=1e-9)
        zero = (-low * shrink / scale).round().clamp(0, 15)
        error = ((groups / scale[..., None]).round() + zero[..., None]).clamp(0, 15)
        error = (error - zero[..., None]) * scale[..., None] - groups
        cost = (error.square() * column_weights).sum(-1)
        is_better = cost < best
        best = torch.where(is_better, cost, best)
        scales, zeros = torch.where(is_better, scale, scales), torch.where(is_better, zero, zeros)
        errors = torch.where(is_better[..., None], error, errors)
    return errors.flatten(1), scales, zeros


def quantize_matrix(weight: torch.Tensor, hessian: torch.Tensor) -> QuantizedMatrix:
    """Quantize a matrix [rows, columns] to 4 bits with GPTQ: later columns compensate the error of each column.

    `hessian` is the sum of x xᵀ over the input activations x of the linear layer, fp32 [columns, columns].
    """
    rows, columns = weight.shape
    work, diagonal = weight.float().clone(), hessian.diagonal().clone()
    hessian = hessian + torch.eye(columns, device=hessian.device) * (DAMPING * diagonal.mean()).clamp(min=1e-6)
    _, scales, zeros = search_scales(work, diagonal + DAMPING * diagonal.mean())
    order = diagonal.argsort(descending=True)
    work = work[:, order]
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian[order][:, order]))
    factor = torch.linalg.cholesky(inverse, upper=True)
    codes = torch.empty(rows, columns, device=work.device)
    group_of_column = (order // choose_group_size(columns)).tolist()
    for start in range(0, columns, COLUMN_BATCH):
        end = min(start + COLUMN_BATCH, columns)
        errors = torch.empty(rows, end - start, device=work.device)
        for index in range(start, end):
            column, scale, zero = work[:, index], scales[:, group_of_column[index]], zeros[:, group_of_column[index]]
            code = ((column / scale).round() + zero).clamp(0, 15)
            codes[:, index] = code
            error = (column - (code - zero) * scale) / factor[index, index]
            work[:, index:end].addr_(error, factor[index, index:end], alpha=-1)
            errors[:, index - start] = error
        work[:, end:].addmm_(errors, factor[start:end, end:], alpha=-1)
    reordered_codes = torch.empty_like(codes)
    reordered_codes[:, order] = codes
    return QuantizedMatrix(4, pack_codes(reordered_codes, 4).cpu(), scales.cpu(), zeros.to(torch.uint8).cpu())


class _StopForward(Exception):
    """Stops the forward pass of the model once the inputs of its first layer are captured."""


def _capture_layer_inputs(model: "PreTrainedModel", chats: Ids) -> Iterator[tuple[torch.Tensor, dict[str, Any]]]:
    """Yield the inputs of the first layer per conversation: hidden states, and keyword arguments such as the mask."""
    first_layer, captured = model.model.layers[0], {}

    def capture(module: Any, inputs: Any, kwargs: dict[str, Any]) -> None:
        captured["inputs"] = inputs[0], kwargs
        raise _StopForward

    hook = first_layer.register_forward_pre_hook(capture, with_kwargs=True)
    for ids in chats:
        try:
            model(input_ids=ids.to(model.device))
        except _StopForward:
            yield captured.pop("inputs")
    hook.remove()


@contextmanager
def _accumulate_hessian(module: Any) -> Generator[list[torch.Tensor]]:
    """Sum x xᵀ over the inputs x of a linear layer inside the `with`; the list yielded gets the sum as its element."""
    total: list[torch.Tensor] = []

    def accumulate(_: Any, inputs: Any, output: Any) -> None:
        x = inputs[0].flatten(0, -2).float()
        total[:] = [x.T @ x + (total[0] if total else 0)]

    hook = module.register_forward_hook(accumulate)
    try:
        yield total
    finally:
        hook.remove()
