"""Extract persona vectors and test them on held-out questions, block by block.

A persona vector is the mean difference of residual streams between the persona's and the neutral system prompts over
the extraction questions (https://arxiv.org/abs/2507.21509). Projections of those same questions are no evidence: their
mean difference is the vector's norm by construction. Everything here is therefore measured on held-out questions and
compared with controls: a placebo vector (the same method with a polite paraphrase in place of the persona), random
directions with the covariance of the activations, and the persona's text after the neutral prompt.
"""

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

    `norm` (blocks,) is the mean norm of the residual stream over response tokens.
    """

    raw: dict[str, Array]
    placebo: dict[str, Array]
    norm: Array
    random_directions: Array  # (N_RANDOM, blocks, hidden), unit length, covariance of neutral activations

    def unit_vectors(self, extraction: str = "response_avg") -> Array:
        """The persona vectors scaled to length 1, (blocks, hidden)."""
        return self.raw[extraction] / numpy.maximum(
            numpy.linalg.norm(self.raw[extraction], axis=-1, keepdims=True), 1e-12
        )


def extract_vectors(extraction: Residuals, seed: int) -> PersonaVectors:
    """Compute the mean differences persona - neutral and placebo - neutral, and draw the random directions."""
    raw, placebo = (
        {e: (extraction.get(c, e) - extraction.get("neutral", e)).mean(0) for e in EXTRACTIONS}
        for c in ("persona", "placebo")
    )
    natural = stats.draw_natural_directions(extraction.get("neutral"), N_RANDOM, seed)
    return PersonaVectors(raw, placebo, extraction.norm, natural)


def swap_labels(residuals: Residuals, seed: int) -> None:
    """Swap persona and neutral for a random half of the questions, in place, so that no persona signal is left."""
    for extraction in EXTRACTIONS:
        n = len(residuals.get("neutral", extraction))
        half = numpy.random.default_rng(seed).permutation(n)[: n // 2]
        pairs = [("neutral", "persona")] + (
            [("text_neutral", "text_persona")] if "text_persona" in residuals.by_condition else []
        )
        for a, b in pairs:
            first, second = residuals.by_condition[a][extraction], residuals.by_condition[b][extraction]
            first[half], second[half] = second[half].copy(), first[half].copy()


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
        placebo_raw = vectors.placebo[extraction]
        placebo_unit = placebo_raw / numpy.maximum(numpy.linalg.norm(placebo_raw, axis=-1, keepdims=True), 1e-12)
        projection = {c: _project(heldout.get(c, extraction), unit) for c in ("neutral", "persona", "placebo")}
        placebo_projection = {c: _project(heldout.get(c, extraction), placebo_unit) for c in ("neutral", "placebo")}
        text_projection = {c: _project(heldout.get(f"text_{c}", extraction), unit) for c in ("neutral", "persona")}
        paired_gap = projection["persona"] - projection["neutral"]
        p, p_all = stats.sign_flip_test(paired_gap, seed)
        low, high = stats.percentile_interval(stats.bootstrap(lambda x: x.mean(0), paired_gap, seed=seed))
        auroc = stats.auroc(projection["persona"], projection["neutral"])
        a_low, a_high = stats.percentile_interval(
            stats.bootstrap(stats.auroc, projection["persona"], projection["neutral"], seed=seed)
        )
        placebo_auroc = stats.auroc(placebo_projection["placebo"], placebo_projection["neutral"])
        lead = stats.bootstrap(
            _auroc_lead,
            projection["persona"],
            projection["neutral"],
            placebo_projection["placebo"],
            placebo_projection["neutral"],
            seed=seed,
        )
        lead_low, lead_high = stats.percentile_interval(lead)
        transfer = stats.auroc(text_projection["persona"], text_projection["neutral"])
        t_low, t_high = stats.percentile_interval(
            stats.bootstrap(stats.auroc, text_projection["persona"], text_projection["neutral"], seed=seed)
        )
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
                    "lead_over_placebo": auroc[layer] - placebo_auroc[layer],
                    "lead_ci_low": lead_low[layer],
                    "lead_ci_high": lead_high[layer],
                    "random_auroc_p95": random_auroc[layer],
                    "random_d_p95": random_d[layer],
                    "transfer_auroc": transfer[layer],
                    "transfer_ci_low": t_low[layer],
                    "transfer_ci_high": t_high[layer],
                    "split_half_cos": reliability[layer],
                }
            )
    return [{k: v.item() if isinstance(v, numpy.generic) else v for k, v in row.items()} for row in rows]


def _project(values: Array, unit: Array) -> Array:
    """Project (questions, blocks, hidden) onto unit vectors (blocks, hidden) -> (questions, blocks)."""
    return numpy.einsum("nlh,lh->nl", values, unit)


def _auroc_lead(persona: Array, neutral: Array, placebo: Array, placebo_neutral: Array) -> Array:
    return stats.auroc(persona, neutral) - stats.auroc(placebo, placebo_neutral)


def _random_quantiles(heldout: Residuals, extraction: str, directions: Array) -> tuple[Array, Array]:
    """95 % quantiles, per block, of random directions' max(AUROC, 1 - AUROC) and |Cohen's d|."""
    persona, neutral = (
        numpy.einsum("nlh,dlh->ndl", heldout.get(c, extraction), directions) for c in ("persona", "neutral")
    )
    areas, d = stats.auroc(persona, neutral), numpy.abs(stats.cohens_d(persona, neutral))
    return numpy.quantile(numpy.maximum(areas, 1 - areas), 0.95, axis=0), numpy.quantile(d, 0.95, axis=0)


def measure_shift(
    vectors: PersonaVectors, before: Array, after: Array, steered_blocks: list[int], seed: int
) -> tuple[dict[str, Array], Array]:
    """Measure how a fine-tune shifts the residual stream, and how much of the shift is along the persona vector.

    `before` and `after` are (questions, blocks, hidden). Returns arrays of (blocks + 1,), and the bootstrap samples of
    the cosine, (samples, blocks + 1). The last entry is the mean over `steered_blocks`, which are not selected by their
    results. `share` is the projection in units of the residual norm, `cos` the cosine of the mean shift with the
    persona vector, `random_p95` the 95 % quantile of |cosine| with random directions, `placebo` the cosine with the
    placebo vector, `size` the length of the mean shift in units of the residual norm.
    """
    shifts, unit = after - before, vectors.unit_vectors()
    mean_shift = shifts.mean(0)

    def cosines(sample: Array) -> Array:
        return _append_mean(stats.cosine(sample.mean(0), unit), steered_blocks)

    samples = stats.bootstrap(cosines, shifts, seed=seed)
    low, high = stats.percentile_interval(samples)
    random_cosines = _append_mean(stats.cosine(mean_shift, vectors.random_directions), steered_blocks)
    projections = _append_mean(numpy.einsum("nlh,lh->nl", shifts, unit) / vectors.norm, steered_blocks)
    p_low, p_high = stats.percentile_interval(stats.bootstrap(lambda x: x.mean(0), projections, seed=seed))
    return {
        "share": projections.mean(0),
        "share_low": p_low,
        "share_high": p_high,
        "cos": cosines(shifts),
        "cos_low": low,
        "cos_high": high,
        "random_p95": numpy.quantile(numpy.abs(random_cosines), 0.95, axis=0),
        "placebo": _append_mean(stats.cosine(mean_shift, vectors.placebo["response_avg"]), steered_blocks),
        "size": _append_mean(numpy.linalg.norm(mean_shift, axis=-1) / vectors.norm, steered_blocks),
    }, samples


def _append_mean(values: Array, over_blocks: list[int]) -> Array:
    """Append the mean over some of the blocks: (..., blocks) -> (..., blocks + 1)."""
    return numpy.concatenate([values, values[..., over_blocks].mean(-1, keepdims=True)], axis=-1)
