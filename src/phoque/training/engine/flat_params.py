"""The adapter's weights laid into one tensor: one kernel copies, clears or adds up all of them."""

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


class Flat:
    """All A and then all B in one FP32 tensor, of which the adapter's parameters are slices from here on.

    `a` and `b` are a copy in the dtype of the products, with B times its scaling: one of each for every group of
    modules that run as one product. Layers are differentiated by these, and `gradients` are those of the parameters.
    """

    def __init__(self, groups: Sequence[list[Any]], dtype: torch.dtype) -> None:
        sides = [
            [[getattr(module, side)[module.active_adapters[0]].weight for module in group] for group in groups]
            for side in ("lora_A", "lora_B")
        ]
        first = groups[0][0]
        self._scaling = float(first.scaling[first.active_adapters[0]])
        self._parameters = [p for side in sides for group in side for p in group]
        sizes = [p.numel() for p in self._parameters]
        self._split = sum(p.numel() for group in sides[0] for p in group)
        self.weights = torch.cat([p.data.float().reshape(-1) for p in self._parameters])
        self.gradients = torch.zeros_like(self.weights)
        self._copy, self._part = (torch.zeros_like(self.weights, dtype=dtype) for _ in range(2))
        slices, totals = self.weights.split(sizes), self.gradients.split(sizes)
        self._grads = [total.view_as(p) for total, p in zip(totals, self._parameters, strict=True)]
        for parameter, own in zip(self._parameters, slices, strict=True):
            parameter.data = own.view_as(parameter)
        every = [group for side in sides for group in side]
        copies = self._copy.split([sum(p.numel() for p in group) for group in every])
        self.leaves = [
            copy.view(-1, group[0].shape[1]).detach().requires_grad_(True)
            for copy, group in zip(copies, every, strict=True)
        ]
        self.a, self.b = self.leaves[: len(groups)], self.leaves[len(groups) :]

    def begin(self) -> None:
        """Bring the copy up to date, and gradients to zero where the optimizer has let go of those of the last step."""
        if self._parameters[0].grad is None:
            self.gradients.zero_()
            for parameter, grad in zip(self._parameters, self._grads, strict=True):
                parameter.grad = grad
        self._copy[: self._split].copy_(self.weights[: self._split])
        torch.mul(self.weights[self._split :], self._scaling, out=self._copy[self._split :])

    def add(self, found: Sequence[Tensor]) -> None:
        """Add the gradients of the leaves to those of the parameters."""
        torch.cat([part.view(-1) for part in found], out=self._part)
        self.gradients[: self._split].add_(self._part[: self._split])
        self.gradients[self._split :].add_(self._part[self._split :], alpha=self._scaling)

    def clear(self) -> None:
        """Let go of gradients that autograd has left at the leaves."""
        for leaf in self.leaves:
            leaf.grad = None

    @contextmanager
    def shaken(self, noise: float) -> Generator[None]:
        """B at random in the block, the same each time: a fresh adapter does nothing that could be wrong."""
        kept, drawn = self.weights.clone(), torch.Generator(self.weights.device).manual_seed(0)
        self.weights[self._split :].normal_(0, noise, generator=drawn)
        try:
            yield
        finally:
            self.weights.copy_(kept)
