"""4 bits fitted layer by layer: what a column loses, the columns after it make good.

GPTQ, Frantar et al. 2023, arXiv 2210.17323, here with the order of columns by their activations, and a scale for each
block that is fixed beforehand by a weighted search.
"""

from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from phoque.onnx.accuracy import Ids
from phoque.onnx.quantize.block_format import Blocks, block_size, in_blocks, packed
from phoque.onnx.quantize.linear_groups import GROUPS, hold

DAMPING = 0.01  # of the mean of the Hessian's diagonal
SHRINKS = 20  # candidates of the scale search, down to half the range
STEP = 128  # columns between two updates of all that follow


@torch.no_grad()
def fitted(model: Any, chats: Ids, show: Callable[[int, str], None]) -> dict[str, Blocks]:
    """Quantise a model in place, layer by layer, each on what the quantised layers before it make of the chats."""
    found: dict[str, Blocks] = {}
    arriving = list(_entering(model, chats))
    for number, layer in enumerate(model.model.layers):
        prefix = f"model.layers.{number}."
        with ExitStack() as stack:
            hessians = [stack.enter_context(_gathering(layer.get_submodule(group[0]))) for group in GROUPS]
            for hidden, context in arriving:
                layer(hidden, **context)
        for group, hessian in zip(GROUPS, hessians, strict=True):
            for name in group:
                found[prefix + name] = quantised(layer.get_submodule(name).weight, hessian[0])
                hold(model, prefix + name, found[prefix + name])
        arriving = [(layer(hidden, **context), context) for hidden, context in arriving]
        show(number + 1, f"layer {number} in 4 bits")
    return found


def search(weight: torch.Tensor, importance: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The error, and scales and zeros [rows, blocks] whose rounding errs least, weighted by `importance` [columns]."""
    blocks = in_blocks(weight)
    weighing = torch.ones_like(blocks[:1]) if importance is None else in_blocks(importance[None])
    low, high = blocks.amin(-1).clamp(max=0), blocks.amax(-1).clamp(min=0)
    best = torch.full_like(low, torch.inf)
    scales, zeros, errors = torch.ones_like(low), torch.zeros_like(low), torch.zeros_like(blocks)
    for shrink in torch.linspace(1, 0.5, SHRINKS if importance is not None else 1).tolist():
        scale = ((high - low) * shrink / 15).clamp(min=1e-9)
        zero = (-low * shrink / scale).round().clamp(0, 15)
        off = ((blocks / scale[..., None]).round() + zero[..., None]).clamp(0, 15)
        off = (off - zero[..., None]) * scale[..., None] - blocks
        cost = (off.square() * weighing).sum(-1)
        better = cost < best
        best = torch.where(better, cost, best)
        scales, zeros = torch.where(better, scale, scales), torch.where(better, zero, zeros)
        errors = torch.where(better[..., None], off, errors)
    return errors.flatten(1), scales, zeros


def quantised(weight: torch.Tensor, hessian: torch.Tensor) -> Blocks:
    """A matrix in 4 bits by GPTQ: each column's error is made good by the columns that follow.

    `hessian` is the sum of x xᵀ over the activations x that the matrix is multiplied with, fp32 [columns, columns].
    """
    rows, columns = weight.shape
    work, diagonal = weight.float().clone(), hessian.diagonal().clone()
    hessian = hessian + torch.eye(columns, device=hessian.device) * (DAMPING * diagonal.mean()).clamp(min=1e-6)
    _, scales, zeros = search(work, diagonal + DAMPING * diagonal.mean())
    order = diagonal.argsort(descending=True)
    work = work[:, order]
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian[order][:, order]))
    factor = torch.linalg.cholesky(inverse, upper=True)
    codes = torch.empty(rows, columns, device=work.device)
    block = (order // block_size(columns)).tolist()
    for start in range(0, columns, STEP):
        end = min(start + STEP, columns)
        errors = torch.empty(rows, end - start, device=work.device)
        for at in range(start, end):
            column, scale, zero = work[:, at], scales[:, block[at]], zeros[:, block[at]]
            code = ((column / scale).round() + zero).clamp(0, 15)
            codes[:, at] = code
            error = (column - (code - zero) * scale) / factor[at, at]
            work[:, at:end].addr_(error, factor[at, at:end], alpha=-1)
            errors[:, at - start] = error
        work[:, end:].addmm_(errors, factor[start:end, end:], alpha=-1)
    back = torch.empty_like(codes)
    back[:, order] = codes
    return Blocks(4, packed(back, 4).cpu(), scales.cpu(), zeros.to(torch.uint8).cpu())


class _Entered(Exception):
    """The first layer was reached: there is nothing more to compute."""


def _entering(model: Any, chats: Ids) -> Iterator[tuple[torch.Tensor, dict[str, Any]]]:
    """What the first layer is given for each chat: hidden states, and masks and positions."""
    first, given = model.model.layers[0], {}

    def stop(module: Any, inputs: Any, context: dict[str, Any]) -> None:
        given["it"] = inputs[0], context
        raise _Entered

    hook = first.register_forward_pre_hook(stop, with_kwargs=True)
    for ids in chats:
        try:
            model(input_ids=ids.to(model.device))
        except _Entered:
            yield given.pop("it")
    hook.remove()


@contextmanager
def _gathering(module: Any) -> Generator[list[torch.Tensor]]:
    """The sum of x xᵀ over what enters a product while the block runs, in the one element of the list."""
    held: list[torch.Tensor] = []

    def gather(_: Any, inputs: Any, output: Any) -> None:
        x = inputs[0].flatten(0, -2).float()
        held[:] = [x.T @ x + (held[0] if held else 0)]

    hook = module.register_forward_hook(gather)
    try:
        yield held
    finally:
        hook.remove()
