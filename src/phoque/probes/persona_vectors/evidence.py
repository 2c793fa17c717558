"""Extract persona vectors and test them on held-out questions, block by block.

A persona vector is the mean difference of residual streams between the persona's and the neutral system prompts over
the extraction questions (https://arxiv.org/abs/2507.21509). Projections of those same questions are no evidence: their
mean difference is the vector's norm by construction. Everything here is therefore measured on held-out questions and
compared with controls: the vectors of other roles and of a placebo (the same method with another character, or a polite
paraphrase, in place of the persona), random directions with the covariance of the activations, and the persona's text
after the neutral prompt.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy

from phoque.probes import stats
from phoque.probes.persona_vectors.model import EXTRACTIONS, Residuals

N_RANDOM = 200  # random control directions

Array = Any


@dataclass
class PersonaVectors:
    """Persona vectors `raw[extraction]` and placebo vectors `placebo[extraction]`, both (blocks, hidden).

    `roles` has the vectors of other roles over response tokens, (blocks, hidden) each. `norm` (blocks,) is the mean
    norm of the residual stream over response tokens.
    """

    raw: dict[str, Array]
    placebo: dict[str, Array]
    norm: Array
    random_directions: Array  # (N_RANDOM, blocks, hidden), unit length, covariance of neutral activations
    roles: dict[str, Array]

    def unit_vectors(self, extraction: str = "response_avg") -> Array:
        """The persona vectors scaled to length 1, (blocks, hidden)."""
        return stats.normalize(self.raw[extraction])


def extract_vectors(extraction: Residuals, roles: Sequence[str], seed: int) -> PersonaVectors:
    """Compute the mean differences persona, placebo and role - neutral, and draw the random directions."""
    raw, placebo = (
        {e: (extraction.get(c, e) - extraction.get("neutral", e)).mean(0) for e in EXTRACTIONS}
        for c in ("persona", "placebo")
    )
    natural = stats.draw_natural_directions(extraction.get("neutral"), N_RANDOM, seed)
    neutral = extraction.get("neutral")  # a role may have answered fewer of the questions
    by_role = {role: (extraction.get(role) - neutral[: len(extraction.get(role))]).mean(0) for role in roles}
    return PersonaVectors(raw, placebo, extraction.norm, natural, by_role)


def draw_half(questions: int, seed: int) -> Array:
    """The indices of a random half of the questions: to swap their labels leaves no persona signal."""
    return numpy.random.default_rng(seed).permutation(questions)[: questions // 2]


def swap_labels(residuals: Residuals, questions: Array) -> None:
    """Swap persona and neutral for these questions (indices or a mask), in place."""
    for a, b in (("neutral", "persona"), ("text_neutral", "text_persona")):
        for extraction, first in residuals.by_condition.get(a, {}).items():
            second = residuals.by_condition[b][extraction]
            first[questions], second[questions] = second[questions].copy(), first[questions].copy()


def measure_evidence(
    vectors: PersonaVectors, extraction_residuals: Residuals, heldout: Residuals, seed: int
) -> list[dict[str, Any]]:
    """Measure the vectors on the held-out questions; return a row for each block and extraction.

    `heldout` also has the conditions text_persona and text_neutral: the persona's and the neutral answers, both read
    after the neutral prompts.
    """
    rows = []
    for extraction in EXTRACTIONS:
        unit = vectors.unit_vectors(extraction)
        placebo_unit = stats.normalize(vectors.placebo[extraction])
        projection = {c: _project(heldout.get(c, extraction), unit) for c in ("neutral", "persona", "placebo")}
        placebo_projection = {c: _project(heldout.get(c, extraction), placebo_unit) for c in ("neutral", "placebo")}
        text_projection = {c: _project(heldout.get(f"text_{c}", extraction), unit) for c in ("neutral", "persona")}
        paired_gap = projection["persona"] - projection["neutral"]
        p, p_all = stats.sign_flip_test(paired_gap, seed)
        low, high = stats.column_intervals(paired_gap, seed)
        auroc = stats.auroc(projection["persona"], projection["neutral"])
        a_low, a_high = stats.percentile_interval(
            stats.bootstrap(stats.auroc, projection["persona"], projection["neutral"], seed=seed)
        )
        placebo_auroc = stats.auroc(placebo_projection["placebo"], placebo_projection["neutral"])
        transfer = stats.auroc(text_projection["persona"], text_projection["neutral"])
        text_gap = text_projection["persona"] - text_projection["neutral"]
        text_low, text_high = stats.column_intervals(text_gap, seed)
        differences = extraction_residuals.get("persona", extraction) - extraction_residuals.get("neutral", extraction)
        reliability = stats.split_half_cosine(differences, seed)
        random_auroc, random_d = _random_quantiles(heldout, extraction, vectors.random_directions)
        d = stats.cohens_d(projection["persona"], projection["neutral"])
        vector_norm = numpy.linalg.norm(vectors.raw[extraction], axis=-1)
        for layer in range(len(unit)):
            rows.append(
                {
                    "layer": layer,
                    "split": "heldout",
                    "extraction": extraction,
                    "n": len(paired_gap),
                    "vector_norm": vector_norm[layer],
                    "resid_norm": vectors.norm[layer],
                    "rel_norm": vector_norm[layer] / vectors.norm[layer],
                    "neutral_proj_mean": projection["neutral"][:, layer].mean(),
                    "persona_proj_mean": projection["persona"][:, layer].mean(),
                    "placebo_proj_mean": projection["placebo"][:, layer].mean(),
                    "delta_proj_mean": paired_gap[:, layer].mean(),
                    "delta_ci_low": low[layer],
                    "delta_ci_high": high[layer],
                    "delta_proj_std": paired_gap[:, layer].std(ddof=1),
                    "cohen_d": d[layer],
                    "auroc": auroc[layer],
                    "auroc_ci_low": a_low[layer],
                    "auroc_ci_high": a_high[layer],
                    "perm_p": p[layer],
                    "perm_p_all_layers": p_all[layer],
                    "placebo_auroc": placebo_auroc[layer],
                    "random_auroc_p95": random_auroc[layer],
                    "random_d_p95": random_d[layer],
                    "transfer_auroc": transfer[layer],
                    "transfer_gap_mean": text_gap[:, layer].mean(),
                    "transfer_gap_ci_low": text_low[layer],
                    "transfer_gap_ci_high": text_high[layer],
                    "split_half_cos": reliability[layer],
                }
            )
    return [{k: v.item() if isinstance(v, numpy.generic) else v for k, v in row.items()} for row in rows]


def _project(values: Array, unit: Array) -> Array:
    """Project (questions, blocks, hidden) onto unit vectors (blocks, hidden) -> (questions, blocks)."""
    return numpy.einsum("nlh,lh->nl", values, unit)


def _random_quantiles(heldout: Residuals, extraction: str, directions: Array) -> tuple[Array, Array]:
    """95 % quantiles, per block, of random directions' max(AUROC, 1 - AUROC) and |Cohen's d|."""
    persona, neutral = (
        (heldout.get(c, extraction).transpose(1, 0, 2) @ directions.transpose(1, 2, 0)).transpose(1, 2, 0)
        for c in ("persona", "neutral")
    )  # (questions, directions, blocks)
    areas, d = stats.auroc(persona, neutral), numpy.abs(stats.cohens_d(persona, neutral))
    return numpy.quantile(numpy.maximum(areas, 1 - areas), 0.95, axis=0), numpy.quantile(d, 0.95, axis=0)


@dataclass
class Shift:
    """How a fine-tune shifts the residual stream, and how much of the shift is along the persona vector.

    The arrays of `columns` are (blocks + 1,); the last entry is the mean over the steered blocks, which are not
    selected by their results. `share` is the projection in units of the residual norm, `cos` the cosine of the mean
    shift with the persona vector, `random_p95` the 95 % quantile of |cosine| with random directions, `placebo` the
    cosine with the placebo vector, `size` the length of the mean shift in units of the residual norm.
    """

    columns: dict[str, Array]
    gaps: Array  # (questions, blocks, hidden): after - before


def measure_shift(
    vectors: PersonaVectors, before: Array, after: Array, steered_blocks: Sequence[int], seed: int
) -> Shift:
    """Measure a fine-tune's shift from `before` to `after`, both (questions, blocks, hidden)."""
    gaps, unit = after - before, vectors.unit_vectors()
    mean_gap = gaps.mean(0)

    cosine = stats.MeanCosine(gaps, unit)
    low, high = stats.bca_interval(lambda weights: _append_mean(cosine(weights), steered_blocks), len(gaps), seed)
    random_cosines = _append_mean(stats.cosine(mean_gap, vectors.random_directions), steered_blocks)
    projections = _append_mean(numpy.einsum("nlh,lh->nl", gaps, unit) / vectors.norm, steered_blocks)
    p_low, p_high = stats.column_intervals(projections, seed)
    columns = {
        "share": projections.mean(0),
        "share_low": p_low,
        "share_high": p_high,
        "cos": _append_mean(stats.cosine(mean_gap, unit), steered_blocks),
        "cos_low": low,
        "cos_high": high,
        "random_p95": numpy.quantile(numpy.abs(random_cosines), 0.95, axis=0),
        "placebo": _append_mean(stats.cosine(mean_gap, vectors.placebo["response_avg"]), steered_blocks),
        "size": _append_mean(numpy.linalg.norm(mean_gap, axis=-1) / vectors.norm, steered_blocks),
    }
    return Shift(columns, gaps)


def _append_mean(values: Array, over_blocks: Sequence[int]) -> Array:
    """Append the mean over some of the blocks: (..., blocks) -> (..., blocks + 1)."""
    return numpy.concatenate([values, values[..., list(over_blocks)].mean(-1, keepdims=True)], axis=-1)
