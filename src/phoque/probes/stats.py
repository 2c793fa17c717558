"""The statistics of the probes. The unit is always a prompt: tokens and paraphrases of one prompt are no replicates.

Every function is deterministic in its seed. Arrays are numpy; (n,) or (n, layers) where a second axis is allowed.
"""

from collections.abc import Callable
from typing import Any

import numpy

BOOTSTRAPS = 2000
FLIPS = 4096  # sign flips: all of them up to twelve prompts, else so many drawn

Array = Any  # numpy.ndarray; its generic form says nothing more here


def auroc(high: Array, low: Array) -> Array:
    """The chance that one of `high` is above one of `low`, ties counting half; over axis 0."""
    gap = numpy.sign(high[:, None] - low[None])
    return (gap.mean((0, 1)) + 1) / 2


def cohens_d(high: Array, low: Array) -> Array:
    """The difference of the means in pooled standard deviations; over axis 0."""
    pooled = numpy.sqrt((high.var(0, ddof=1) + low.var(0, ddof=1)) / 2)
    return (high.mean(0) - low.mean(0)) / numpy.maximum(pooled, 1e-12)


def resampled(n: int, seed: int) -> Array:
    """Row numbers of BOOTSTRAPS samples with replacement, (BOOTSTRAPS, n)."""
    return numpy.random.default_rng(seed).integers(0, n, (BOOTSTRAPS, n))


def interval(samples: Array) -> tuple[Array, Array]:
    """The middle 95 % of bootstrap samples, over axis 0."""
    low, high = numpy.quantile(samples, [0.025, 0.975], axis=0)
    return low, high


def bootstrap(statistic: Callable[..., Array], *paired: Array, seed: int = 0) -> Array:
    """The statistic of each resample of prompts; the arrays are resampled together."""
    return numpy.stack([statistic(*(a[rows] for a in paired)) for rows in resampled(len(paired[0]), seed)])


def mean_interval(values: Array, seed: int = 0) -> tuple[float, float]:
    """A bootstrap interval of the mean of (n,)."""
    low, high = interval(values[resampled(len(values), seed)].mean(1))
    return float(low), float(high)


def signs(n: int, seed: int) -> Array:
    """Rows of +1 and -1, (flips, n): every combination where there are at most FLIPS, else so many drawn."""
    if 2**n <= FLIPS:
        return 1 - 2 * ((numpy.arange(2**n)[:, None] >> numpy.arange(n)) & 1)
    return numpy.random.default_rng(seed).choice([-1, 1], (FLIPS, n))


def sign_flip(differences: Array, seed: int = 0) -> tuple[Array, Array]:
    """Two-sided p of paired differences (n, layers), alone and for the largest over all layers (max-T).

    The statistic is the mean over its standard error, so that layers of unlike scale compare.
    """
    n = len(differences)
    flips = signs(n, seed)
    mean = numpy.einsum("fn,nl->fl", flips, differences) / n
    square = (differences**2).mean(0)
    t = numpy.abs(mean) / numpy.sqrt(numpy.maximum(square - mean**2, 1e-12 * square + 1e-30))
    seen = numpy.abs(differences.mean(0)) / numpy.sqrt(
        numpy.maximum(square - differences.mean(0) ** 2, 1e-12 * square + 1e-30)
    )
    exact = 2**n <= FLIPS  # the observed signs are then among the flips
    count = len(flips) if exact else len(flips) + 1
    alone = ((t >= seen * (1 - 1e-9)).sum(0) + (not exact)) / count
    largest = ((t.max(1)[:, None] >= seen * (1 - 1e-9)).sum(0) + (not exact)) / count
    return alone, largest


def contrast(first: Array, second: Array, seed: int = 0) -> dict[str, Any]:
    """first - second, paired by prompt: {diff, ci95, p, n}."""
    gaps = first - second
    p, _ = sign_flip(gaps[:, None], seed)
    return {"diff": float(gaps.mean()), "ci95": list(mean_interval(gaps, seed)), "p": float(p[0]), "n": len(gaps)}


def cosine(a: Array, b: Array) -> Array:
    """Cosine over the last axis."""
    size = numpy.linalg.norm(a, axis=-1) * numpy.linalg.norm(b, axis=-1)
    return (a * b).sum(-1) / numpy.maximum(size, 1e-12)


def split_half(differences: Array, seed: int = 0, times: int = 50) -> Array:
    """Mean cosine between the mean differences of random halves; differences (n, layers, hidden) -> (layers,)."""
    chance, n = numpy.random.default_rng(seed), len(differences)
    found = []
    for _ in range(times):
        order = chance.permutation(n)
        found.append(cosine(differences[order[: n // 2]].mean(0), differences[order[n // 2 :]].mean(0)))
    return numpy.mean(found, axis=0)


def natural_directions(rows: Array, count: int, seed: int = 0) -> Array:
    """Random unit directions with the covariance of `rows` (n, layers, hidden) -> (count, layers, hidden).

    A direction drawn evenly over the sphere is too weak a control: activations live in few of their dimensions.
    """
    centred = rows - rows.mean(0)
    weights = numpy.random.default_rng(seed).standard_normal((count, len(rows)))
    made = numpy.einsum("cn,nlh->clh", weights, centred)
    return made / numpy.maximum(numpy.linalg.norm(made, axis=-1, keepdims=True), 1e-12)


def spearman(a: Array, b: Array) -> float:
    """Rank correlation, ties at their mean rank; NaN if either is constant."""
    return float(_pearson(_ranks(a), _ranks(b)))


def _ranks(values: Array) -> Array:
    _, place, counts = numpy.unique(values, return_inverse=True, return_counts=True)
    return (numpy.cumsum(counts) - (counts - 1) / 2)[place]


def _pearson(a: Array, b: Array) -> float:
    if a.std() == 0 or b.std() == 0:
        return float("nan")
    return float(((a - a.mean()) * (b - b.mean())).mean() / (a.std() * b.std()))
