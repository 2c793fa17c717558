"""Cross-entropy at the labeled positions, computed in chunks from the hidden states: full logits are never stored."""

import functools
import types
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.functional import cross_entropy, pad

from phoque.data.chat_template import IGNORE_INDEX
from phoque.data.packing import TILE
from phoque.models.architectures import architecture_of
from phoque.models.config import logits_scaling_of
from phoque.training.engine.cuda_graphs import PackedRow
from phoque.training.engine.engine import Engine

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LossFunction = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor, torch.Tensor]]
LOGITS_AT_ONCE = 2**26  # 256 MiB of fp32


@dataclass
class TokenLoss:
    """Sums over the labeled positions of a batch: negative log-likelihood (nats), correct predictions, count."""

    nll: torch.Tensor
    correct: torch.Tensor
    count: int


class _HeadLoss(torch.autograd.Function):
    """LM head and loss in chunks; the forward pass also computes the gradient of the hidden states from each chunk.

    The head is frozen (LoRA is on the projections), so it gets no gradient.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        positions: torch.Tensor,
        labels: torch.Tensor,
        loss_fn: LossFunction,
    ) -> Any:
        grads = torch.zeros_like(hidden)
        nll = hidden.new_zeros((), dtype=torch.float32)
        correct = hidden.new_zeros((), dtype=torch.long)
        size = max(16, LOGITS_AT_ONCE // weight.shape[0])
        for index, targets in zip(positions.split(size), labels.split(size), strict=True):
            chunk_nll, chunk_correct, grad_logits = loss_fn(hidden[index] @ weight.T, targets)
            nll += chunk_nll
            correct += chunk_correct
            grads.index_copy_(0, index, grad_logits @ weight)
        ctx.save_for_backward(grads)
        ctx.mark_non_differentiable(correct)
        return nll, correct

    @staticmethod
    def backward(ctx: Any, *upstream: torch.Tensor) -> tuple[torch.Tensor, None, None, None, None]:
        (grads,) = ctx.saved_tensors
        return grads * upstream[0].to(grads.dtype), None, None, None, None


def _token_losses(logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """For logits (n, vocabulary) return the summed loss, the number correct, and the gradient in the logits' dtype."""
    logits_fp32 = logits.float()
    is_labeled = (labels != IGNORE_INDEX)[:, None]
    correct = (logits_fp32.argmax(-1) == labels).sum()
    if torch.compiler.is_compiling():  # two passes over the logits; an indexed write would take a third
        log_z = logits_fp32.logsumexp(-1, keepdim=True)
        nll = torch.where(is_labeled, log_z - logits_fp32.gather(-1, labels.clamp(min=0)[:, None]), 0).sum()
        grad = (logits_fp32 - log_z).exp()
        is_target = torch.arange(logits_fp32.shape[1], device=logits_fp32.device) == labels[:, None]
        return nll, correct, torch.where(is_labeled, torch.where(is_target, grad - 1, grad), 0).to(logits.dtype)
    nll = cross_entropy(logits_fp32, labels, reduction="sum", ignore_index=IGNORE_INDEX)
    grad = logits_fp32.softmax(-1)
    grad[torch.arange(len(labels), device=labels.device), labels.clamp(min=0)] -= 1
    return nll, correct, grad.masked_fill_(~is_labeled, 0).to(logits.dtype)


def _pad_to_tile(positions: torch.Tensor, targets: torch.Tensor, last: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Pad positions and labels to a multiple of TILE; the padding points to position `last` and has no label.

    Every new shape makes the GPU wait while its kernels are loaded; padding keeps the number of shapes small.
    """
    padding = (0, -len(positions) % TILE)
    return pad(positions, padding, value=last), pad(targets, padding, value=IGNORE_INDEX)


def _run_row(decoder: Any, **row: Any) -> torch.Tensor:
    """Return the hidden states (1, T, d) of a packed row."""
    return decoder(use_cache=False, **row).last_hidden_state


def _run_each_conversation(
    decoder: Any, input_ids: torch.Tensor, cu_seq_lens_q: torch.Tensor, **_: Any
) -> torch.Tensor:
    """Return the hidden states (1, T, d) of a packed row whose conversations run one at a time, each from position 0.

    A recurrent layer would carry its state from one conversation to the next.
    """
    bounds = cu_seq_lens_q.unique().tolist()  # rows of static shape have empty conversations
    parts = [_run_row(decoder, input_ids=input_ids[:, start:end]) for start, end in pairwise(bounds)]
    return torch.cat(parts, dim=1)


def add_token_loss(model: "PreTrainedModel", engine: Engine | None = None) -> None:
    """Let `model(..., labels=labels, loss_at=positions, token_loss=True)` return a TokenLoss; else as before.

    `loss_at` holds the positions whose next token is labeled. While gradients are enabled, `engine` runs the layers.
    `model` is the causal model inside any adapter: its `forward` is replaced, so wrappers such as DDP stay outermost.
    """
    original_forward = model.forward
    is_recurrent = architecture_of(model.config).is_recurrent
    run_layers = functools.partial(_run_each_conversation if is_recurrent else _run_row, model.model)
    loss_fn: LossFunction = torch.compile(_token_losses, dynamic=True) if engine and engine.compiled else _token_losses

    @functools.wraps(type(model).forward)  # generate() checks its arguments against this signature
    def forward(
        self: Any, *args: Any, token_loss: bool = False, labels: Any = None, loss_at: Any = None, **kwargs: Any
    ) -> Any:
        if not token_loss:
            return (
                original_forward(*args, **kwargs)
                if labels is None
                else original_forward(*args, labels=labels, **kwargs)
            )
        if engine and torch.is_grad_enabled():
            hidden = engine.compute_hidden(PackedRow.from_batch(**kwargs))
        else:
            hidden = run_layers(**kwargs)
        weight = self.get_output_embeddings().weight
        # positions come from the CPU: selecting by a mask would wait for the GPU here
        positions, targets = loss_at, labels[0, loss_at + 1]
        if engine:
            positions, targets = _pad_to_tile(positions, targets, hidden.shape[1] - 1)
        states = hidden[0]
        if (scaling := logits_scaling_of(self.config)) != 1.0:
            states = states / scaling
        nll, correct = _HeadLoss.apply(states.to(weight.dtype), weight, positions, targets, loss_fn)
        return TokenLoss(nll, correct, len(loss_at))

    model.forward = types.MethodType(forward, model)
