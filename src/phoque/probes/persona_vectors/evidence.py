"""Persona vectors, and what held-out questions say for and against them, block by block.

A vector is the mean difference of residual streams between the persona's and the neutral system prompts over the
extraction questions (https://arxiv.org/abs/2507.21509). Its projections on those same questions prove nothing (their
mean is the vector's own norm), so everything here is measured on other questions, and beside controls: the same method
with a polite paraphrase for a persona, random directions as natural as activations are, and the persona's text after
the neutral prompt.
"""

from dataclasses import dataclass
from typing import Any

import numpy

from phoque.probes import stats
from phoque.probes.persona_vectors.model import EXTRACTIONS, Residuals

RANDOM = 200  # directions

Array = Any


@dataclass
class Vectors:
    """`raw[extraction]` and `placebo[extraction]` are (blocks, hidden); `norm` (blocks,) is the residual stream's."""

    raw: dict[str, Array]
    placebo: dict[str, Array]
    norm: Array
    directions: Array  # (RANDOM, blocks, hidden), unit, drawn as neutral activations vary

    def unit(self, extraction: str = "response_avg") -> Array:
        """The persona vectors at length 1."""
        return self.raw[extraction] / numpy.maximum(
            numpy.linalg.norm(self.raw[extraction], axis=-1, keepdims=True), 1e-12
        )


def vectors(extraction: Residuals, seed: int) -> Vectors:
    """The mean differences persona - neutral and placebo - neutral."""
    raw, placebo = (
        {e: (extraction.pair(c, e) - extraction.pair("neutral", e)).mean(0) for e in EXTRACTIONS}
        for c in ("persona", "placebo")
    )
    natural = stats.natural_directions(extraction.pair("neutral"), RANDOM, seed)
    return Vectors(raw, placebo, extraction.norm, natural)


def swapped(residuals: Residuals, seed: int) -> None:
    """Swap persona and neutral in half of the questions, so that nothing of the persona is left to be found."""
    for extraction in EXTRACTIONS:
        n = len(residuals.pair("neutral", extraction))
        chosen = numpy.random.default_rng(seed).permutation(n)[: n // 2]
        pairs = [("neutral", "persona")] + (
            [("text_neutral", "text_persona")] if "text_persona" in residuals.of else []
        )
        for a, b in pairs:
            first, second = residuals.of[a][extraction], residuals.of[b][extraction]
            first[chosen], second[chosen] = second[chosen].copy(), first[chosen].copy()


def evidence(found: Vectors, extraction: Residuals, heldout: Residuals, seed: int) -> list[dict[str, Any]]:
    """A row for each block and way of extraction; `heldout` also holds text_persona and text_neutral.

    Those are the persona's and the neutral answers, both read after the neutral prompts.
    """
    rows = []
    for way in EXTRACTIONS:
        unit = found.unit(way)
        scale = found.placebo[way]
        placebo_unit = scale / numpy.maximum(numpy.linalg.norm(scale, axis=-1, keepdims=True), 1e-12)
        onto = {c: _projected(heldout.pair(c, way), unit) for c in ("neutral", "persona", "placebo")}
        same = {c: _projected(heldout.pair(c, way), placebo_unit) for c in ("neutral", "placebo")}
        text = {c: _projected(heldout.pair(f"text_{c}", way), unit) for c in ("neutral", "persona")}
        gap = onto["persona"] - onto["neutral"]
        p, p_all = stats.sign_flip(gap, seed)
        low, high = stats.interval(stats.bootstrap(lambda x: x.mean(0), gap, seed=seed))
        auroc = stats.auroc(onto["persona"], onto["neutral"])
        a_low, a_high = stats.interval(stats.bootstrap(stats.auroc, onto["persona"], onto["neutral"], seed=seed))
        placebo = stats.auroc(same["placebo"], same["neutral"])
        lead = stats.bootstrap(_lead, onto["persona"], onto["neutral"], same["placebo"], same["neutral"], seed=seed)
        lead_low, lead_high = stats.interval(lead)
        transfer = stats.auroc(text["persona"], text["neutral"])
        t_low, t_high = stats.interval(stats.bootstrap(stats.auroc, text["persona"], text["neutral"], seed=seed))
        differences = extraction.pair("persona", way) - extraction.pair("neutral", way)
        halves = stats.split_half(differences, seed)
        random, random_d = _of_random(heldout, way, found.directions)
        d = stats.cohens_d(onto["persona"], onto["neutral"])
        size = numpy.linalg.norm(found.raw[way], axis=-1)
        for layer in range(len(unit)):
            rows.append(
                {
                    "layer": layer,
                    "split": "heldout",
                    "extraction": way,
                    "n": len(gap),
                    "vector_norm": size[layer],
                    "resid_norm": found.norm[layer],
                    "rel_norm": size[layer] / found.norm[layer],
                    "neutral_proj_mean": onto["neutral"][:, layer].mean(),
                    "persona_proj_mean": onto["persona"][:, layer].mean(),
                    "placebo_proj_mean": onto["placebo"][:, layer].mean(),
                    "delta_proj_mean": gap[:, layer].mean(),
                    "delta_ci_low": low[layer],
                    "delta_ci_high": high[layer],
                    "delta_proj_std": gap[:, layer].std(ddof=1),
                    "cohen_d": d[layer],
                    "auroc": auroc[layer],
                    "auroc_ci_low": a_low[layer],
                    "auroc_ci_high": a_high[layer],
                    "perm_p": p[layer],
                    "perm_p_all_layers": p_all[layer],
                    "placebo_auroc": placebo[layer],
                    "lead_over_placebo": auroc[layer] - placebo[layer],
                    "lead_ci_low": lead_low[layer],
                    "lead_ci_high": lead_high[layer],
                    "random_auroc_p95": random[layer],
                    "random_d_p95": random_d[layer],
                    "transfer_auroc": transfer[layer],
                    "transfer_ci_low": t_low[layer],
                    "transfer_ci_high": t_high[layer],
                    "split_half_cos": halves[layer],
                }
            )
    return [{k: v.item() if isinstance(v, numpy.generic) else v for k, v in row.items()} for row in rows]


def _projected(values: Array, unit: Array) -> Array:
    """(questions, blocks, hidden) onto (blocks, hidden) -> (questions, blocks)."""
    return numpy.einsum("nlh,lh->nl", values, unit)


def _lead(persona: Array, neutral: Array, placebo: Array, its_neutral: Array) -> Array:
    return stats.auroc(persona, neutral) - stats.auroc(placebo, its_neutral)


def _of_random(heldout: Residuals, way: str, directions: Array) -> tuple[Array, Array]:
    """The 95 % quantiles, a block, of random directions' AUROC and Cohen's d, either way round."""
    persona, neutral = (numpy.einsum("nlh,dlh->ndl", heldout.pair(c, way), directions) for c in ("persona", "neutral"))
    found, d = stats.auroc(persona, neutral), numpy.abs(stats.cohens_d(persona, neutral))
    return numpy.quantile(numpy.maximum(found, 1 - found), 0.95, axis=0), numpy.quantile(d, 0.95, axis=0)


def shift(found: Vectors, before: Array, after: Array, over: list[int], seed: int) -> tuple[dict[str, Array], Array]:
    """How a fine-tune moved, and how much of that is along the persona vector.

    `before` and `after` are (questions, blocks, hidden). Returns arrays of (blocks + 1,), and the bootstrap samples of
    the cosine, (samples, blocks + 1): the last entry is the mean over the blocks in `over`, which no one chose by what
    was found there. `share` is the projection in units of the residual norm, `cos` the cosine of the mean move with
    the vector, `random_p95` that of 95 % of natural random directions, `placebo` the polite paraphrase's.
    """
    moves, unit = after - before, found.unit()
    mean = moves.mean(0)

    def cosines(sample: Array) -> Array:
        return _with_mean(stats.cosine(sample.mean(0), unit), over)

    samples = stats.bootstrap(cosines, moves, seed=seed)
    low, high = stats.interval(samples)
    random = _with_mean(stats.cosine(mean, found.directions), over)
    projected = _with_mean(numpy.einsum("nlh,lh->nl", moves, unit) / found.norm, over)
    p_low, p_high = stats.interval(stats.bootstrap(lambda x: x.mean(0), projected, seed=seed))
    return {
        "share": projected.mean(0),
        "share_low": p_low,
        "share_high": p_high,
        "cos": cosines(moves),
        "cos_low": low,
        "cos_high": high,
        "random_p95": numpy.quantile(numpy.abs(random), 0.95, axis=0),
        "placebo": _with_mean(stats.cosine(mean, found.placebo["response_avg"]), over),
        "size": _with_mean(numpy.linalg.norm(mean, axis=-1) / found.norm, over),
    }, samples


def _with_mean(values: Array, over: list[int]) -> Array:
    """(..., blocks) with the mean over some of the blocks behind it."""
    return numpy.concatenate([values, values[..., over].mean(-1, keepdims=True)], axis=-1)
