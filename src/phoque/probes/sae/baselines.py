"""Measures that need no dictionary: how far each block moved, along how many directions, and towards which tokens."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy
import torch

from phoque.inference.likelihood import compute_logits, sum_kl
from phoque.inference.residual_stream import get_final_norm, unwrap_model
from phoque.probes import stats
from phoque.probes.sae.residuals import Residuals

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Array = Any
PCA_COMPONENTS = 5
LENS_TOKENS = 10
LOGITS_CHUNK = 1024  # tokens whose logits over the whole vocabulary are in memory at a time


def measure_layer_shifts(base: Residuals, variant: Residuals, seed: int) -> dict[str, Array]:
    """Measure how far the mean residual stream moved at each block, as a fraction of the mean residual norm.

    Returns {rel, low, high}, each (blocks,); low and high bound the 95 % interval of 200 bootstrap samples of rows.
    """
    gaps = (variant.means - base.means).numpy()
    norms = base.norms.numpy()

    def relative_shift(gap: Array, norm: Array) -> Array:
        return numpy.linalg.norm(gap.mean(0), axis=-1) / norm.mean(0)

    rows = stats.draw_resamples(len(gaps), seed)[:200]
    low, high = stats.percentile_interval(numpy.stack([relative_shift(gaps[sample], norms[sample]) for sample in rows]))
    return {"rel": relative_shift(gaps, norms), "low": low, "high": high}


def run_difference_pca(base: Residuals, variant: Residuals, layer: int, device: torch.device) -> dict[str, Any]:
    """Run a PCA of the per-token differences; each component's share of the sum of squares, uncentered and centered.

    If the first uncentered share is much larger than the first centered one, the difference is mostly one offset.
    """
    pairs = zip(base.states[layer], variant.states[layer], base.masks, strict=True)
    gaps = torch.cat([(b[valid].float() - a[valid].float()) for a, b, valid in pairs]).to(device)
    if len(gaps) < 2 or not bool(gaps.any()):
        return {"uncentred": [], "centred": [], "tokens": len(gaps)}
    shares = {}
    for name, rows in (("uncentred", gaps), ("centred", gaps - gaps.mean(0))):
        values = torch.linalg.eigvalsh((rows.T @ rows).double()).flip(0).clamp(min=0)
        shares[name] = (values / values.sum())[:PCA_COMPONENTS].tolist()
    return shares | {"tokens": len(gaps)}


@torch.no_grad()
def compute_lens_logits(model: "PreTrainedModel", directions: torch.Tensor) -> torch.Tensor:
    """Apply the logit lens: map directions (n, hidden) to logits (n, vocabulary), up to a positive factor."""
    causal = unwrap_model(model)
    weight = causal.lm_head.weight
    hidden = torch.ones(directions.shape[1], device=weight.device)
    gain = get_final_norm(model)(hidden).float()  # the RMS of ones is 1, so what is left is the norm's factor
    scaled = directions.to(weight.device).float() * gain
    return (scaled.to(weight.dtype) @ weight.T).float()


def list_lens_tokens(
    model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", directions: torch.Tensor
) -> list[dict[str, list[str]]]:
    """List the tokens that each direction promotes most and least: {top, bottom}, LENS_TOKENS of each."""
    token_lists = []
    for scores in compute_lens_logits(model, directions):
        order = scores.argsort(descending=True)
        top, bottom = order[:LENS_TOKENS].tolist(), order.flip(0)[:LENS_TOKENS].tolist()
        token_lists.append(
            {end: [str(tokenizer.decode([t])) for t in ids] for end, ids in (("top", top), ("bottom", bottom))}
        )
    return token_lists


@torch.no_grad()
def compute_kl(base: tuple[Any, Residuals], variant: tuple[Any, Residuals]) -> list[float]:
    """Compute the mean KL(base || variant) of the next token for each row, in nats per token; NaN for an empty row.

    Each argument is (model, its residuals, which include the last block).
    """
    (base_model, base_residuals), (variant_model, variant_residuals) = base, variant
    last_block = max(base_residuals.states)
    kl_per_row = []
    for a, b in zip(base_residuals.states[last_block], variant_residuals.states[last_block], strict=True):
        total = 0.0
        for parts in zip(a.split(LOGITS_CHUNK), b.split(LOGITS_CHUNK), strict=True):
            p, q = (_log_probs(model, part) for model, part in zip((base_model, variant_model), parts, strict=True))
            total += sum_kl(p, q)
        kl_per_row.append(total / len(a) if len(a) else float("nan"))
    return kl_per_row


def _log_probs(model: "PreTrainedModel", states: torch.Tensor) -> torch.Tensor:
    causal = unwrap_model(model)
    normed = get_final_norm(model)(states.to(causal.lm_head.weight.device))
    return compute_logits(model, normed.to(causal.lm_head.weight.dtype)).log_softmax(-1)


def choose_lens_layers(blocks: int, compared: Sequence[int]) -> list[int]:
    """Choose the blocks for the logit lens: the compared blocks, those at each quarter of the depth, and the last."""
    return sorted({*compared, blocks // 4, blocks // 2, 3 * blocks // 4, blocks - 1})
