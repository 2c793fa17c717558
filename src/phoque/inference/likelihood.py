"""How likely a model finds what was said: mean negative log-likelihood a token."""

from collections.abc import Sequence
from typing import Any

import torch

from phoque.inference.residual_stream import TOKENS_AT_ONCE, Turn, batches, inner, padded

SCORED_AT_ONCE = 1024  # tokens whose logits over the whole vocabulary are held at a time


@torch.no_grad()
def mean_nll(model: Any, rows: Sequence[Turn]) -> list[float]:
    """Nats a response token, each row after its own prompt, teacher-forced; NaN for an empty response."""
    found = [float("nan")] * len(rows)
    for batch in batches([len(r.prompt) + len(r.response) for r in rows], TOKENS_AT_ONCE[model.device.type]):
        ids, mask = padded([rows[n].prompt + rows[n].response for n in batch], model.device)
        hidden = inner(model).model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
        place = torch.arange(ids.shape[1], device=ids.device)
        begins = torch.tensor([len(rows[n].prompt) for n in batch], device=ids.device)[:, None]
        spoken = (place >= begins) & mask.bool()
        wanted = ids[spoken]
        states = hidden[spoken.roll(-1, dims=1)]  # the state before each spoken token
        losses = []
        for start in range(0, len(wanted), SCORED_AT_ONCE):
            part = slice(start, start + SCORED_AT_ONCE)
            logits = inner(model).lm_head(states[part]).float()
            losses.append(torch.nn.functional.cross_entropy(logits, wanted[part], reduction="none"))
        if not losses:
            continue
        for n, own in zip(batch, torch.cat(losses).split(spoken.sum(1).tolist()), strict=True):
            if len(own):
                found[n] = own.mean().item()
    return found
