"""Is the dictionary fit to be read with? Judged reloaded, on texts that it was not trained on, without sink tokens."""

from typing import Any

import torch

from phoque.probes.sae.activation_store import Shards
from phoque.probes.sae.dictionary import AT_ONCE, Dictionary
from phoque.probes.sae.residuals import Heard

LEAST_EXPLAINED, MOST_DEAD = 0.5, 0.5
DENSE = 0.1  # of the tokens
FIRED_ON = 262_144  # training tokens, at most, on which a feature may fire to count as alive


@torch.no_grad()
def fired_on(dictionary: Dictionary, shards: Shards, layer: int, on: torch.device) -> tuple[torch.Tensor, int]:
    """How often each feature fires on training tokens, at most FIRED_ON of them, and on how many that was."""
    fired, looked = torch.zeros(dictionary.features, device=on), 0
    for file in shards.files():
        if looked >= FIRED_ON:
            break
        own = shards.tensor(file, layer)[: FIRED_ON - looked]
        looked += len(own)
        for part in own.split(AT_ONCE):
            fired += (dictionary.encode(part.to(on)) > 0).sum(0)
    return fired.cpu(), looked


def judged(
    dictionary: Dictionary,
    sets: dict[str, Heard],
    layer: int,
    trained_on: tuple[torch.Tensor, int],
    k: int | None,
    on: torch.device,
) -> dict[str, Any]:
    """Explained variance by set of texts, features a token, dead and dense shares, cosine, and a verdict with reasons.

    `trained_on` is what `fired_on` gave, zeros for a dictionary that was made elsewhere; `k` is how many features a
    token were asked for, None where that is not known.
    """
    fired = torch.zeros(dictionary.features, device=on)
    by_set: dict[str, float] = {}
    tokens = size = cosine = 0.0
    for name, heard in sets.items():
        kept = torch.cat([s[fine] for s, fine in zip(heard.states[layer], heard.fine, strict=True)])
        centre = kept.float().mean(0).to(on)
        wrong = total = 0.0
        for part in kept.split(AT_ONCE):
            x = part.to(on).float()
            z = dictionary.encode(x)
            made = dictionary.decode(z)
            wrong += float((x - made).square().sum())
            total += float((x - centre).square().sum())
            cosine += float(torch.nn.functional.cosine_similarity(x, made).sum())
            size += float((z > 0).sum())
            fired += (z > 0).sum(0)
            tokens += len(x)
        by_set[name] = 1 - wrong / total if total else float("nan")
    dense = float((fired / max(1, tokens) > DENSE).float().mean())
    before, looked = trained_on
    fired += before.to(on)
    found = {
        "ev": by_set["chat"],
        "ev_by_set": by_set,
        "l0": size / max(1, tokens),
        "dead_fraction": float((fired == 0).float().mean()),
        "dense_fraction": dense,
        "cos": cosine / max(1, tokens),
        "tokens": int(tokens),
        "dead_over_tokens": looked + int(tokens),
    }
    reasons = _faults(found, k, of_ours=looked > 0)
    return found | {"verdict": "poor" if reasons else "good", "reasons": reasons}


def _faults(found: dict[str, Any], k: int | None, of_ours: bool) -> list[str]:
    """What is wrong with it; features of another's that stay silent here may well fire on what it was made for."""
    said = []
    for kind, what in (("chat", "held-out chats"), ("response", "the answers that are compared")):
        if (share := found["ev_by_set"].get(kind, 1.0)) < LEAST_EXPLAINED:
            said.append(f"it explains {share:.0%} of the variance of {what}, less than {LEAST_EXPLAINED:.0%}")
    if k is not None and not k / 2 <= found["l0"] <= 2 * k:
        said.append(f"{found['l0']:.0f} features are active at a token, where {k} were asked for")
    if of_ours and found["dead_fraction"] > MOST_DEAD:
        said.append(f"{found['dead_fraction']:.0%} of its features never fired")
    return said
