"""Cross-entropy on the labelled positions alone, straight from the hidden states: the full logits never exist."""

import functools
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import cross_entropy, pad

from phoque.data.chat_template import IGNORED
from phoque.data.packing import TILE
from phoque.training.engine.cuda_graphs import Row
from phoque.training.engine.engine import Engine

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
    def forward(
        ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, places: torch.Tensor, labels: torch.Tensor, judged: Judge
    ) -> Any:
        grads = torch.zeros_like(hidden)
        nll = hidden.new_zeros((), dtype=torch.float32)
        right = hidden.new_zeros((), dtype=torch.long)
        size = max(16, LOGITS_AT_ONCE // weight.shape[0])
        for at, wanted in zip(places.split(size), labels.split(size), strict=True):
            lost, guessed, slopes = judged(hidden[at] @ weight.T, wanted)
            nll += lost
            right += guessed
            grads.index_copy_(0, at, slopes @ weight)
        ctx.save_for_backward(grads)
        ctx.mark_non_differentiable(right)
        return nll, right

    @staticmethod
    def backward(ctx: Any, *upstream: torch.Tensor) -> tuple[torch.Tensor, None, None, None, None]:
        (grads,) = ctx.saved_tensors
        return grads * upstream[0].to(grads.dtype), None, None, None, None


def _judged(logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of logits (n, vocabulary): the summed loss, how many are right, and the loss's slope at each, in their dtype."""
    full = logits.float()
    known = (labels != IGNORED)[:, None]
    right = (full.argmax(-1) == labels).sum()
    if torch.compiler.is_compiling():  # two passes over the logits; a write at an index would take one more
        total = full.logsumexp(-1, keepdim=True)
        nll = torch.where(known, total - full.gather(-1, labels.clamp(min=0)[:, None]), 0).sum()
        slopes = (full - total).exp()
        at = torch.arange(full.shape[1], device=full.device) == labels[:, None]
        return nll, right, torch.where(known, torch.where(at, slopes - 1, slopes), 0).to(logits.dtype)
    nll = cross_entropy(full, labels, reduction="sum", ignore_index=IGNORED)
    slopes = full.softmax(-1)
    slopes[torch.arange(len(labels), device=labels.device), labels.clamp(min=0)] -= 1
    return nll, right, slopes.masked_fill_(~known, 0).to(logits.dtype)


def _filled_up(places: torch.Tensor, wanted: torch.Tensor, last: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Positions and labels up to a multiple of TILE, with the last position, which has no next token to learn.

    A GPU that meets a new shape waits while the kernels for it are loaded, and has nothing to do meanwhile.
    """
    more = (0, -len(places) % TILE)
    return pad(places, more, value=last), pad(wanted, more, value=IGNORED)


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
        places, wanted = loss_at, labels[0, loss_at + 1]
        if engine:
            places, wanted = _filled_up(places, wanted, hidden.shape[1] - 1)
        nll, right = _HeadLoss.apply(hidden[0].to(weight.dtype), weight, places, wanted, judged)
        return TokenLoss(nll, right, len(loss_at))

    model.forward = types.MethodType(forward, model)
