"""The statistics of the probes. The unit is always a prompt: tokens and paraphrases of one prompt are no replicates.

Every function is deterministic in its seed. Arrays are numpy; (n,) or (n, layers) where a second axis is allowed.
"""

from collections.abc import Callable
from typing import Any

import numpy

BOOTSTRAPS = 2000
FLIPS = 4096  # sign flips: all of them up to twelve prompts, else so many drawn
TESTED_AT_ONCE = 128  # columns whose statistic is held for every flip

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


def signs(n: int, seed: int, flips: int = FLIPS) -> Array:
    """Rows of +1 and -1, (flips, n): every combination where there are at most `flips`, else so many drawn."""
    if 2**n <= flips:
        return 1 - 2 * ((numpy.arange(2**n)[:, None] >> numpy.arange(n)) & 1)
    return numpy.random.default_rng(seed).choice([-1, 1], (flips, n))


def sign_flip(differences: Array, seed: int = 0, flips: int = FLIPS) -> tuple[Array, Array]:
    """Two-sided p of paired differences (n, columns), alone and for the largest over all columns (max-T).

    The statistic is the mean over its standard error, so that columns of unlike scale compare. No p is below
    1 / (flips + 1): ask for as many as the columns that are to be corrected for.
    """
    n, columns = differences.shape
    exact = 2**n <= flips  # the observed signs are then among the flips
    drawn = signs(n, seed, flips).astype(float)
    square = (differences**2).mean(0)

    def statistic(mean: Array, part: slice) -> Array:
        own = square[part]
        return numpy.abs(mean) / numpy.sqrt(numpy.maximum(own - mean**2, 1e-12 * own + 1e-30))

    largest, alone, seen = numpy.zeros(len(drawn)), numpy.zeros(columns), numpy.zeros(columns)
    for start in range(0, columns, TESTED_AT_ONCE):
        part = slice(start, start + TESTED_AT_ONCE)
        t = statistic(drawn @ differences[:, part] / n, part)
        seen[part] = statistic(differences[:, part].mean(0), part) * (1 - 1e-9)
        alone[part] = (t >= seen[part]).sum(0)
        largest = numpy.maximum(largest, t.max(1))
    above = len(drawn) - numpy.searchsorted(numpy.sort(largest), seen)
    count = len(drawn) + (not exact)
    return (alone + (not exact)) / count, (above + (not exact)) / count


def benjamini_hochberg(p: Array) -> Array:
    """The q of each p of (n,): the share of false finds among all that are at least as small (BH, 1995)."""
    order = numpy.argsort(p)
    scaled = p[order] * len(p) / numpy.arange(1, len(p) + 1)
    q = numpy.empty(len(p))
    q[order] = numpy.minimum(numpy.minimum.accumulate(scaled[::-1])[::-1], 1.0)
    return q


def column_intervals(values: Array, seed: int = 0) -> tuple[Array, Array]:
    """Bootstrap intervals of the means of (n, columns), rows resampled together."""
    n, columns = values.shape
    shares = numpy.stack([numpy.bincount(rows, minlength=n) for rows in resampled(n, seed)]) / n
    low, high = numpy.empty(columns), numpy.empty(columns)
    for start in range(0, columns, TESTED_AT_ONCE):
        part = slice(start, start + TESTED_AT_ONCE)
        low[part], high[part] = interval(shares @ values[:, part])
    return low, high


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
