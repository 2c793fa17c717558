"""Measure the quality of a dictionary: as reloaded from disk, on held-out texts, without attention sinks."""

from typing import Any

import torch

from phoque.probes.sae.activation_store import ActivationStore
from phoque.probes.sae.dictionary import ENCODE_CHUNK, Dictionary
from phoque.probes.sae.residuals import Residuals

MIN_EXPLAINED, MAX_DEAD = 0.5, 0.5
DENSE_FREQUENCY = 0.1  # a feature that fires on a larger share of tokens is dense
MAX_FIRING_TOKENS = 262_144  # training tokens, at most, that firings are counted on


@torch.no_grad()
def count_firings(
    dictionary: Dictionary, shards: ActivationStore, layer: int, on: torch.device
) -> tuple[torch.Tensor, int]:
    """Count the firings of each feature (features,) on at most MAX_FIRING_TOKENS training tokens; and those tokens."""
    fired, tokens = torch.zeros(dictionary.features, device=on), 0
    for file in shards.files():
        if tokens >= MAX_FIRING_TOKENS:
            break
        activations = shards.tensor(file, layer)[: MAX_FIRING_TOKENS - tokens]
        tokens += len(activations)
        for batch in activations.split(ENCODE_CHUNK):
            fired += (dictionary.encode(batch.to(on)) > 0).sum(0)
    return fired.cpu(), tokens


def measure_quality(
    dictionary: Dictionary,
    sets: dict[str, Residuals],
    layer: int,
    *,
    trained_on: tuple[torch.Tensor, int],
    k: int | None,
    on: torch.device,
) -> dict[str, Any]:
    """Measure explained variance per set of texts, L0, dead and dense fractions, cosine; and a verdict with reasons.

    `trained_on` is the result of `count_firings`, zeros for a dictionary that phoque did not train. `k` is the
    intended number of active features per token, None if unknown.
    """
    firings = torch.zeros(dictionary.features, device=on)
    by_set: dict[str, float] = {}
    tokens = active_count = cosine = 0.0
    for name, residuals in sets.items():
        activations = torch.cat([s[mask] for s, mask in zip(residuals.states[layer], residuals.masks, strict=True)])
        mean_activation = activations.float().mean(0).to(on)
        squared_error = squared_total = 0.0
        for batch in activations.split(ENCODE_CHUNK):
            x = batch.to(on).float()
            z = dictionary.encode(x)
            reconstruction = dictionary.decode(z)
            squared_error += float((x - reconstruction).square().sum())
            squared_total += float((x - mean_activation).square().sum())
            cosine += float(torch.nn.functional.cosine_similarity(x, reconstruction).sum())
            active_count += float((z > 0).sum())
            firings += (z > 0).sum(0)
            tokens += len(x)
        by_set[name] = 1 - squared_error / squared_total if squared_total else float("nan")
    dense = float((firings / max(1, tokens) > DENSE_FREQUENCY).float().mean())
    training_firings, training_tokens = trained_on
    firings += training_firings.to(on)
    quality = {
        "ev": by_set["chat"],
        "ev_by_set": by_set,
        "l0": active_count / max(1, tokens),
        "dead_fraction": float((firings == 0).float().mean()),
        "dense_fraction": dense,
        "cos": cosine / max(1, tokens),
        "tokens": int(tokens),
        "dead_over_tokens": training_tokens + int(tokens),
    }
    reasons = _find_faults(quality, k, trained_here=training_tokens > 0)
    return quality | {"verdict": "poor" if reasons else "good", "reasons": reasons}


def _find_faults(quality: dict[str, Any], k: int | None, trained_here: bool) -> list[str]:
    """The reasons to call a dictionary poor.

    Dead features count only in a dictionary that phoque trained: those of another may fire on its own training data.
    """
    reasons = []
    for kind, what in (("chat", "held-out chats"), ("response", "the compared answers")):
        if (share := quality["ev_by_set"].get(kind, 1.0)) < MIN_EXPLAINED:
            reasons.append(f"it explains {share:.0%} of the variance of {what}, less than {MIN_EXPLAINED:.0%}")
    if k is not None and not k / 2 <= quality["l0"] <= 2 * k:
        reasons.append(f"{quality['l0']:.0f} features are active per token; the intended number is {k}")
    if trained_here and quality["dead_fraction"] > MAX_DEAD:
        reasons.append(f"{quality['dead_fraction']:.0%} of its features never fired")
    return reasons
