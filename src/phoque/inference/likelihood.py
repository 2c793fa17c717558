"""The likelihood of given texts under a model: mean NLL of responses, and KL between two models' predictions."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from phoque.inference.residual_stream import TOKENS_AT_ONCE, Turn, make_batches, pad_rows, unwrap_model
from phoque.models.config import logits_scaling_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SCORED_AT_ONCE = 1024  # tokens whose logits over the whole vocabulary are in memory at a time


@torch.no_grad()
def mean_nll(model: "PreTrainedModel", rows: Sequence[Turn]) -> list[float]:
    """Mean NLL of each row's response after its prompt, teacher-forced, in nats per token; NaN if it is empty."""
    means = [float("nan")] * len(rows)
    for batch in make_batches([len(r.prompt) + len(r.response) for r in rows], TOKENS_AT_ONCE[model.device.type]):
        ids, mask = pad_rows([rows[n].prompt + rows[n].response for n in batch], model.device)
        hidden = unwrap_model(model).model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
        positions = torch.arange(ids.shape[1], device=ids.device)
        starts = torch.tensor([len(rows[n].prompt) for n in batch], device=ids.device)[:, None]
        in_response = (positions >= starts) & mask.bool()
        targets = ids[in_response]
        states = hidden[in_response.roll(-1, dims=1)]  # the state that predicts each response token
        losses = []
        for start in range(0, len(targets), SCORED_AT_ONCE):
            chunk = slice(start, start + SCORED_AT_ONCE)
            logits = compute_logits(model, states[chunk])
            losses.append(torch.nn.functional.cross_entropy(logits, targets[chunk], reduction="none"))
        if not losses:
            continue
        for n, row_losses in zip(batch, torch.cat(losses).split(in_response.sum(1).tolist()), strict=True):
            if len(row_losses):
                means[n] = row_losses.mean().item()
    return means


def compute_logits(model: "PreTrainedModel", states: torch.Tensor) -> torch.Tensor:
    """Compute the logits (..., vocabulary) in fp32 of hidden states after the final norm (..., hidden)."""
    causal = unwrap_model(model)
    return causal.lm_head(states).float() / logits_scaling_of(causal.config)


def sum_kl(expected: torch.Tensor, actual: torch.Tensor) -> float:
    """KL(expected || actual) in nats, summed over tokens; both are log-probabilities (tokens, vocabulary)."""
    return float((expected.exp() * (expected - actual)).sum())
