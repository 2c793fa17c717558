"""What a feature is about: the tokens that it promotes, and where it was most active."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from phoque.inference.residual_stream import Turn
from phoque.probes.sae.baselines import lens
from phoque.probes.sae.dictionary import Dictionary
from phoque.probes.sae.residuals import Heard

CONTEXTS = 6
BEFORE, AFTER = 24, 12  # tokens around the one that is marked


@dataclass(frozen=True)
class Passage:
    """Texts that one side has read: where contexts are taken from."""

    side: str
    kind: str
    rows: Sequence[Turn]
    heard: Heard


def cards(
    dictionary: Dictionary,
    features: Sequence[int],
    passages: Sequence[Passage],
    layer: int,
    model: Any,
    tokenizer: Any,
    on: torch.device,
) -> list[dict[str, Any]]:
    """For each feature {top_logits, bottom_logits, max_activating: [{before, token, after, act, model, text}]}."""
    if not features:
        return []
    chosen = torch.tensor(list(features), device=on)
    words = lens(model, tokenizer, dictionary.decoder[chosen])
    best: list[list[tuple[float, int, int, int]]] = [[] for _ in features]
    for at, passage in enumerate(passages):
        for row, states in enumerate(passage.heard.states[layer]):
            if not len(states):
                continue
            z = dictionary.encode(states.to(on))[:, chosen].cpu()
            z[~passage.heard.fine[row]] = 0
            values, places = z.max(0)  # one context a row: a second would be the same text again
            for n, (value, place) in enumerate(zip(values.tolist(), places.tolist(), strict=True)):
                if value > 0:
                    best[n].append((value, at, row, place))
    found = []
    for n, own in enumerate(best):
        contexts = [
            _context(tokenizer, passages[at], row, place, value)
            for value, at, row, place in sorted(own, reverse=True)[:CONTEXTS]
        ]
        found.append({"top_logits": words[n]["top"], "bottom_logits": words[n]["bottom"], "max_activating": contexts})
    return found


def _context(tokenizer: Any, passage: Passage, row: int, place: int, value: float) -> dict[str, Any]:
    spoken = passage.rows[row]
    ids = spoken.prompt + spoken.response
    at = max(1, len(spoken.prompt)) + place
    return {
        "before": tokenizer.decode(ids[max(0, at - BEFORE) : at]),
        "token": tokenizer.decode([ids[at]]),
        "after": tokenizer.decode(ids[at + 1 : at + 1 + AFTER]),
        "act": value,
        "model": passage.side,
        "text": passage.kind,
    }
