"""Cross-entropy on the labelled positions alone, straight from the hidden states: the full logits never exist."""

import functools
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from phoque.training.engine import Engine, Row

Judge = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor, torch.Tensor]]
LOGITS_AT_ONCE = 2**26  # 256 MiB of fp32


@dataclass
class TokenLoss:
    """Sums over the labelled positions of a batch: negative log-likelihood, right guesses, how many there are."""

    nll: torch.Tensor
    right: torch.Tensor
    count: int


class _HeadLoss(torch.autograd.Function):
    """Head and loss in chunks; the gradient to the hidden states is made on the way, while the logits are at hand.

    The head is frozen (LoRA is on the projections), so it gets no gradient.
    """

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, judged: Judge) -> Any:
        grads = torch.empty_like(hidden)
        nll = hidden.new_zeros((), dtype=torch.float32)
        right = hidden.new_zeros((), dtype=torch.long)
        size = max(16, LOGITS_AT_ONCE // weight.shape[0])
        for start in range(0, len(labels), size):
            logits = hidden[start : start + size] @ weight.T
            lost, guessed, slopes = judged(logits, labels[start : start + size])
            nll += lost
            right += guessed
            torch.mm(slopes, weight, out=grads[start : start + size])
        ctx.save_for_backward(grads)
        ctx.mark_non_differentiable(right)
        return nll, right

    @staticmethod
    def backward(ctx: Any, *upstream: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        (grads,) = ctx.saved_tensors
        return grads * upstream[0].to(grads.dtype), None, None, None


def _judged(logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of logits (n, vocabulary): the summed loss, how many are right, and the loss's slope at each, in their dtype."""
    full = logits.float()
    right = (full.argmax(-1) == labels).sum()
    if torch.compiler.is_compiling():  # two passes over the logits; a write at an index would take one more
        total = full.logsumexp(-1, keepdim=True)
        nll = (total - full.gather(-1, labels[:, None])).sum()
        slopes = (full - total).exp()
        at = torch.arange(full.shape[1], device=full.device) == labels[:, None]
        return nll, right, torch.where(at, slopes - 1, slopes).to(logits.dtype)
    nll = cross_entropy(full, labels, reduction="sum")
    slopes = full.softmax(-1)
    slopes[torch.arange(len(labels), device=labels.device), labels] -= 1
    return nll, right, slopes.to(logits.dtype)


def with_token_loss(model: Any, engine: Engine | None = None) -> None:
    """Let `model(..., labels=labels, loss_at=positions, token_loss=True)` return a TokenLoss; else nothing changes.

    `loss_at` are the positions whose next token is labelled. Where gradients are wanted, `engine` runs the layers. It
    replaces `forward` of the causal model inside any adapter, so that wrappers such as DDP stay outermost.
    """
    plain = model.forward
    judged: Judge = torch.compile(_judged, dynamic=True) if engine and engine.compiled else _judged

    @functools.wraps(type(model).forward)  # generate() checks its arguments against this signature
    def forward(
        self: Any, *args: Any, token_loss: bool = False, labels: Any = None, loss_at: Any = None, **kwargs: Any
    ) -> Any:
        if not token_loss:
            return plain(*args, **kwargs) if labels is None else plain(*args, labels=labels, **kwargs)
        if engine and torch.is_grad_enabled():
            hidden = engine.hidden(Row.of(**kwargs))
        else:
            hidden = self.model(*args, use_cache=False, **kwargs).last_hidden_state
        weight = self.get_output_embeddings().weight
        # positions that were counted on the CPU: a mask would make it wait for the GPU here
        nll, right = _HeadLoss.apply(hidden[0, loss_at].to(weight.dtype), weight, labels[0, loss_at + 1], judged)
        return TokenLoss(nll, right, len(loss_at))

    model.forward = types.MethodType(forward, model)
