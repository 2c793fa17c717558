"""Feature cards: the tokens that a feature promotes, and the contexts in which it is most active."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from phoque.inference.residual_stream import Turn
from phoque.probes.sae.baselines import list_lens_tokens
from phoque.probes.sae.dictionary import Dictionary
from phoque.probes.sae.residuals import Residuals

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

MAX_CONTEXTS = 6  # contexts on a card
TOKENS_BEFORE, TOKENS_AFTER = 24, 12  # tokens shown before and after the one with the highest activation


@dataclass(frozen=True)
class TextSource:
    """Texts of one set and the residuals of the model variant that read them: a card's contexts come from these."""

    variant: str
    kind: str
    rows: Sequence[Turn]
    residuals: Residuals


def build_cards(
    dictionary: Dictionary,
    features: Sequence[int],
    *,
    sources: Sequence[TextSource],
    layer: int,
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    device: torch.device,
) -> list[dict[str, Any]]:
    """Build one card per feature.

    Each is {top_logits, bottom_logits, max_activating: [{before, token, after, act, model, text}]}.
    """
    if not features:
        return []
    indices = torch.tensor(list(features), device=device)
    lens_tokens = list_lens_tokens(model, tokenizer, dictionary.decoder[indices])
    best: list[list[tuple[float, int, int, int]]] = [[] for _ in features]
    for source_index, source in enumerate(sources):
        for row, states in enumerate(source.residuals.states[layer]):
            if not len(states):
                continue
            z = dictionary.encode(states.to(device))[:, indices].cpu()
            z[~source.residuals.masks[row]] = 0
            values, offsets = z.max(0)  # one context per row: a second one would show the same text again
            for n, (value, offset) in enumerate(zip(values.tolist(), offsets.tolist(), strict=True)):
                if value > 0:
                    best[n].append((value, source_index, row, offset))
    card_rows = []
    for n, candidates in enumerate(best):
        contexts = [
            _build_context(tokenizer, sources[source_index], row, offset, value)
            for value, source_index, row, offset in sorted(candidates, reverse=True)[:MAX_CONTEXTS]
        ]
        card_rows.append(
            {"top_logits": lens_tokens[n]["top"], "bottom_logits": lens_tokens[n]["bottom"], "max_activating": contexts}
        )
    return card_rows


def _build_context(
    tokenizer: "PreTrainedTokenizerBase", source: TextSource, row: int, offset: int, value: float
) -> dict[str, Any]:
    turn = source.rows[row]
    ids = turn.prompt + turn.response
    position = max(1, len(turn.prompt)) + offset
    return {
        "before": tokenizer.decode(ids[max(0, position - TOKENS_BEFORE) : position]),
        "token": tokenizer.decode([ids[position]]),
        "after": tokenizer.decode(ids[position + 1 : position + 1 + TOKENS_AFTER]),
        "act": value,
        "model": source.variant,
        "text": source.kind,
    }
