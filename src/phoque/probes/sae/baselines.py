"""What can be said without a dictionary: how far each block moved, along how many directions, towards which tokens."""

from collections.abc import Sequence
from typing import Any

import numpy
import torch

from phoque.inference.residual_stream import inner
from phoque.probes import stats
from phoque.probes.sae.residuals import Heard

Array = Any
SHOWN_PARTS = 5
SHOWN_TOKENS = 10
LOGITS_AT_ONCE = 1024


def layer_curve(base: Heard, other: Heard, seed: int) -> dict[str, Array]:
    """How far the mean residual stream moved, in mean norms, a block: {rel, low, high}, bootstrapped over rows."""
    gaps = (other.means - base.means).numpy()
    norms = base.norms.numpy()

    def moved(gap: Array, norm: Array) -> Array:
        return numpy.linalg.norm(gap.mean(0), axis=-1) / norm.mean(0)

    rows = stats.resampled(len(gaps), seed)[:200]
    low, high = stats.interval(numpy.stack([moved(gaps[own], norms[own]) for own in rows]))
    return {"rel": moved(gaps, norms), "low": low, "high": high}


def difference_parts(base: Heard, other: Heard, layer: int, on: torch.device) -> dict[str, Any]:
    """Principal components of the difference, token by token: shares of the uncentred and of the centred squares.

    A first uncentred part that is large beside the centred one is one constant offset.
    """
    kept = zip(base.states[layer], other.states[layer], base.fine, strict=True)
    gaps = torch.cat([(b[fine].float() - a[fine].float()) for a, b, fine in kept]).to(on)
    if len(gaps) < 2 or not bool(gaps.any()):
        return {"uncentred": [], "centred": [], "tokens": len(gaps)}
    shares = {}
    for name, rows in (("uncentred", gaps), ("centred", gaps - gaps.mean(0))):
        values = torch.linalg.eigvalsh((rows.T @ rows).double()).flip(0).clamp(min=0)
        shares[name] = (values / values.sum())[:SHOWN_PARTS].tolist()
    return shares | {"tokens": len(gaps)}


@torch.no_grad()
def token_scores(model: Any, directions: torch.Tensor) -> torch.Tensor:
    """The logit lens: what each direction (n, hidden) adds to the logits, up to a positive factor: (n, vocabulary)."""
    causal = inner(model)
    weight = causal.lm_head.weight
    through = directions.to(weight.device).float() * causal.model.norm.weight.float()
    return (through.to(weight.dtype) @ weight.T).float()


def lens(model: Any, tokenizer: Any, directions: torch.Tensor) -> list[dict[str, list[str]]]:
    """The tokens that each direction promotes most and least: {top, bottom}."""
    found = []
    for scores in token_scores(model, directions):
        order = scores.argsort(descending=True)
        top, bottom = order[:SHOWN_TOKENS].tolist(), order.flip(0)[:SHOWN_TOKENS].tolist()
        found.append({side: [tokenizer.decode([t]) for t in own] for side, own in (("top", top), ("bottom", bottom))})
    return found


@torch.no_grad()
def divergence(base: tuple[Any, Heard], other: tuple[Any, Heard]) -> list[float]:
    """Mean KL(base || other) of the next token, in nats, a row; a side is (model, what it held at its last block)."""
    (first, one), (second, two) = base, other
    last = max(one.states)
    found = []
    for a, b in zip(one.states[last], two.states[last], strict=True):
        total = 0.0
        for parts in zip(a.split(LOGITS_AT_ONCE), b.split(LOGITS_AT_ONCE), strict=True):
            p, q = (_log_shares(model, part) for model, part in zip((first, second), parts, strict=True))
            total += float((p.exp() * (p - q)).sum())
        found.append(total / len(a) if len(a) else float("nan"))
    return found


def _log_shares(model: Any, states: torch.Tensor) -> torch.Tensor:
    causal = inner(model)
    normed = causal.model.norm(states.to(causal.lm_head.weight.device))
    return causal.lm_head(normed.to(causal.lm_head.weight.dtype)).float().log_softmax(-1)


def lens_layers(blocks: int, chosen: Sequence[int]) -> list[int]:
    """The blocks whose mean difference is put through the lens: those that are compared, quarters, and the last."""
    return sorted({*chosen, blocks // 4, blocks // 2, 3 * blocks // 4, blocks - 1})
