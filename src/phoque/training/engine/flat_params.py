"""All adapter weights in one flat tensor, so that one kernel copies, clears or accumulates all of them."""

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


class FlatParams:
    """Moves all A and then all B matrices into one FP32 tensor; the adapter's parameters become views of it.

    `a` and `b` hold a copy in the compute dtype, B multiplied by `scaling`, that of LoRA: one matrix each per group of
    modules that run as one operator. Autograd differentiates by these copies (`leaves`); `gradients` holds the
    gradients of the parameters.
    """

    def __init__(self, groups: Sequence[list[Any]], dtype: torch.dtype) -> None:
        matrices = [
            [[getattr(module, name)[module.active_adapters[0]].weight for module in group] for group in groups]
            for name in ("lora_A", "lora_B")
        ]
        first = groups[0][0]
        self.scaling = float(first.scaling[first.active_adapters[0]])
        self._parameters = [p for name in matrices for group in name for p in group]
        sizes = [p.numel() for p in self._parameters]
        self._split = sum(p.numel() for group in matrices[0] for p in group)
        self.weights = torch.cat([p.data.float().reshape(-1) for p in self._parameters])
        self.gradients = torch.zeros_like(self.weights)
        self._copy, self._leaf_gradients = (torch.zeros_like(self.weights, dtype=dtype) for _ in range(2))
        slices, grad_slices = self.weights.split(sizes), self.gradients.split(sizes)
        self._grads = [grad_slice.view_as(p) for grad_slice, p in zip(grad_slices, self._parameters, strict=True)]
        for parameter, weight_slice in zip(self._parameters, slices, strict=True):
            parameter.data = weight_slice.view_as(parameter)
        all_groups = [group for name in matrices for group in name]
        copies = self._copy.split([sum(p.numel() for p in group) for group in all_groups])
        self.leaves = [
            copy.view(-1, group[0].shape[1]).detach().requires_grad_(True)
            for copy, group in zip(copies, all_groups, strict=True)
        ]
        self.a, self.b = self.leaves[: len(groups)], self.leaves[len(groups) :]

    def refresh(self) -> None:
        """Update the copy from the parameters; zero the gradients if the optimizer has set them to None."""
        if self._parameters[0].grad is None:
            self.gradients.zero_()
            for parameter, grad in zip(self._parameters, self._grads, strict=True):
                parameter.grad = grad
        self._copy[: self._split].copy_(self.weights[: self._split])
        torch.mul(self.weights[self._split :], self.scaling, out=self._copy[self._split :])

    def add_gradients(self, leaf_gradients: Sequence[Tensor]) -> None:
        """Add the gradients of the leaves to the gradients of the parameters."""
        torch.cat([gradient.view(-1) for gradient in leaf_gradients], out=self._leaf_gradients)
        self.gradients[: self._split].add_(self._leaf_gradients[: self._split])
        self.gradients[self._split :].add_(self._leaf_gradients[self._split :], alpha=self.scaling)

    def clip_gradients(self, max_norm: float) -> Tensor:
        """Scale the gradients of the parameters down to this norm; return their norm before, on their device.

        The same as `torch.nn.utils.clip_grad_norm_`, in as many kernels for hundreds of matrices as for one.
        """
        norm = torch.linalg.vector_norm(self.gradients)
        self.gradients.mul_((max_norm / (norm + 1e-6)).clamp(max=1.0))
        return norm

    def clear(self) -> None:
        """Drop gradients that autograd has stored on the leaves."""
        for leaf in self.leaves:
            leaf.grad = None

    @contextmanager
    def randomize_b(self, noise: float) -> Generator[None]:
        """Fill B with fixed-seed noise in the `with` block: in a new adapter B is 0 and would hide errors."""
        saved, rng = self.weights.clone(), torch.Generator(self.weights.device).manual_seed(0)
        self.weights[self._split :].normal_(0, noise, generator=rng)
        try:
            yield
        finally:
            self.weights.copy_(saved)
