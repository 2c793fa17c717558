"""Rank the persona among other roles: their answers on one axis, their words, and the fine-tune's shift."""

from collections.abc import Sequence
from typing import Any

import numpy

from phoque.probes import stats
from phoque.probes.persona_vectors.evidence import PersonaVectors
from phoque.probes.persona_vectors.model import Residuals
from phoque.probes.verdicts import Ranking

RELEVANT = 0.1  # share of its own projection by which the persona must lead the next role
RIDGE = 0.1  # share of the mean variance that is added to each direction of a covariance before it is inverted

Array = Any


def rank_gaps(gaps: dict[str, Array], seed: int) -> Ranking:
    """Rank `persona` by its mean among the other entries of `gaps`, which have one value per question each."""
    others = {name: float(values.mean()) for name, values in gaps.items() if name != "persona"}
    runner_up = max(others, key=lambda name: others[name])
    lead = stats.mean_interval(gaps["persona"] - gaps[runner_up], seed)
    value = float(gaps["persona"].mean())
    return Ranking(value, others, lead, least_lead=RELEVANT * max(value, 0.0), exchangeable=False)


def rank_projections(
    vectors: PersonaVectors, extraction: Residuals, heldout: Residuals, layer: int, seed: int
) -> Ranking:
    """Rank the persona's held-out answers among those of other roles and the placebo, on one axis at one block.

    The axis is the persona vector, whitened with the covariance of answers within a condition, as of Fisher's linear
    discriminant: along the vector itself, any role that moves the answers far outranks the persona. Values are mean
    projections minus the neutral answers', in standard deviations of held-out answers of one condition; the lead is
    paired by question. If a placebo or a role moves the answers as far along the axis, the vector is that of a prompt
    and not of the persona.
    """
    vector = vectors.raw["response_avg"][layer]
    whitened = _apply_inverse_covariance(_center_conditions(extraction, layer), vector[None])[0]
    count = min(len(heldout.get(name)) for name in ("persona", *vectors.roles))
    names = ("neutral", "persona", "placebo", *vectors.roles)
    projections = {name: heldout.get(name)[:count, layer] @ whitened for name in names}
    deviation = numpy.sqrt(numpy.mean([rows.var(ddof=1) for rows in projections.values()]))
    neutral = projections.pop("neutral")
    return rank_gaps({name: (rows - neutral) / max(deviation, 1e-30) for name, rows in projections.items()}, seed)


def rank_cosines(
    vectors: PersonaVectors, gaps: Array, extraction: Residuals, blocks: Sequence[int], seed: int
) -> Ranking:
    """Rank the cosine of a fine-tune's mean shift with the persona vector among those with other roles' vectors.

    `gaps` (questions, blocks, hidden) is the shift. Cosines are taken after whitening with the covariance of answers
    within a condition, averaged over `blocks`: without it, the few dimensions in which all answers vary decide. All
    vectors are made from the same questions, so that none is less noisy for having more of them.
    """
    count = min(len(extraction.get(name)) for name in ("persona", *vectors.roles))
    neutral = extraction.get("neutral")[:count]
    roles = {name: (extraction.get(name)[:count] - neutral).mean(0) for name in ("persona", "placebo", *vectors.roles)}
    parts = []
    for block in blocks:
        rows = _center_conditions(extraction, block)
        directions = numpy.stack([vector[block] for vector in roles.values()])
        whitened = _apply_inverse_covariance(rows, numpy.concatenate([directions, gaps[:, block]]))
        white_directions, white_gaps = whitened[: len(roles)], whitened[len(roles) :]
        lengths = numpy.sqrt((white_directions * directions).sum(1))
        parts.append((gaps[:, block] @ white_directions.T / lengths, gaps[:, block] @ white_gaps.T))

    def cosines(weights: Array) -> Array:
        by_block = [
            weights @ along / numpy.sqrt(numpy.maximum(((weights @ gram) * weights).sum(1, keepdims=True), 1e-30))
            for along, gram in parts
        ]
        return numpy.mean(by_block, axis=0)

    observed = dict(zip(roles, cosines(numpy.full((1, len(gaps)), 1 / len(gaps)))[0].tolist(), strict=True))
    others = {name: value for name, value in observed.items() if name != "persona"}
    place = list(roles).index(max(others, key=lambda name: others[name]))
    low, high = stats.bca_interval(lambda weights: cosines(weights)[:, 0] - cosines(weights)[:, place], len(gaps), seed)
    return Ranking(observed["persona"], others, (float(low), float(high)))


def _center_conditions(extraction: Residuals, block: int) -> Array:
    """The answers of all conditions at one block, each minus the mean of its condition: (answers, hidden)."""
    answers = [values["response_avg"][:, block] for values in extraction.by_condition.values()]
    return numpy.concatenate([rows - rows.mean(0) for rows in answers])


def _apply_inverse_covariance(rows: Array, vectors: Array) -> Array:
    """Multiply vectors (count, hidden) by the inverse of the covariance of rows (n, hidden) plus a ridge.

    By the Woodbury identity, so that the matrix to solve with is (n, n) and not (hidden, hidden).
    """
    n, hidden = rows.shape
    ridge = RIDGE * float((rows**2).sum()) / n / hidden + 1e-30
    inner = rows @ rows.T + n * ridge * numpy.eye(n)
    return (vectors - numpy.linalg.solve(inner, rows @ vectors.T).T @ rows) / ridge
