"""Statistics of the probes. One prompt is one observation: its tokens and paraphrases are not replicates.

Every function is deterministic given its seed. Arrays are numpy, (n,) or (n, layers) where a second axis is allowed.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy

BOOTSTRAPS = 2000
FLIPS = 4096  # sign flips: all 2**n of them for up to 12 prompts, otherwise this many random ones
Z_95 = 1.959964  # the normal distribution's 97.5 % quantile
Z_ONE_SIDED_95 = 1.644854  # its 95 % quantile
MIN_SIZE = 1e-15  # root mean square of differences below which they are rounding, and count for less
COLUMNS_PER_CHUNK, FLIPS_PER_CHUNK = 128, 1024  # bound the memory of the (flips, columns) statistics

Array = Any  # numpy.ndarray; its type parameters would add nothing here


def auroc(high: Array, low: Array) -> Array:
    """The probability that a value of `high` exceeds one of `low`, ties counting 1/2. Reduces axis 0."""
    gap = numpy.sign(high[:, None] - low[None])
    return (gap.mean((0, 1)) + 1) / 2


def cohens_d(high: Array, low: Array) -> Array:
    """The difference of the means divided by the pooled standard deviation. Reduces axis 0."""
    pooled = numpy.sqrt((high.var(0, ddof=1) + low.var(0, ddof=1)) / 2)
    return (high.mean(0) - low.mean(0)) / numpy.maximum(pooled, 1e-12)


def draw_resamples(n: int, seed: int) -> Array:
    """Draw the row indices of BOOTSTRAPS resamples with replacement, (BOOTSTRAPS, n)."""
    return numpy.random.default_rng(seed).integers(0, n, (BOOTSTRAPS, n))


def percentile_interval(samples: Array) -> tuple[Array, Array]:
    """The low and high ends of the central 95 % of bootstrap samples. Reduces axis 0."""
    low, high = numpy.quantile(samples, [0.025, 0.975], axis=0)
    return low, high


def bootstrap(statistic: Callable[..., Array], *paired: Array, seed: int = 0) -> Array:
    """Compute the statistic on each resample of the prompts; all arrays are resampled with the same rows."""
    return numpy.stack([statistic(*(a[rows] for a in paired)) for rows in draw_resamples(len(paired[0]), seed)])


def predict_spread(runs: Array) -> float:
    """How far one further run of a recipe lies above the mean of these `runs` (n,) at most, 19 times in 20.

    The upper end of the one-sided prediction interval with Student's t; 0 for a single run, which has no spread.
    """
    from scipy.stats import t

    count = len(runs)
    return 0.0 if count < 2 else float(t.ppf(0.95, count - 1) * numpy.std(runs, ddof=1) * numpy.sqrt(1 + 1 / count))


def bound_share(count: int, n: int, other_count: int, other_n: int) -> float:
    """The share that `count` of `n` must exceed to be more than `other_count` of `other_n`, 19 times in 20.

    It is the other share plus the one-sided 95 % limit of the difference of two samples with one share, the pooled one.
    """
    total = n + other_n
    pooled = (count + other_count) / max(total, 1)
    error = numpy.sqrt(pooled * (1 - pooled) * (1 / max(n, 1) + 1 / max(other_n, 1)))
    return float(other_count / max(other_n, 1) + Z_ONE_SIDED_95 * error)


def share_interval(outcomes: Array) -> tuple[float, float]:
    """The 95 % interval of a share, of `outcomes` (n,) from 0 to 1, one per question (Wilson 1927).

    A bootstrap gives an interval without width where all outcomes are equal, and one that is too short near 0 and 1.
    """
    n, share = len(outcomes), float(numpy.mean(outcomes))
    center = (share + Z_95**2 / (2 * n)) / (1 + Z_95**2 / n)
    half = Z_95 / (1 + Z_95**2 / n) * numpy.sqrt(share * (1 - share) / n + Z_95**2 / (4 * n**2))
    return max(0.0, float(center - half)), min(1.0, float(center + half))


def mean_interval(values: Array, seed: int = 0) -> tuple[float, float]:
    """The 95 % studentized bootstrap interval of the mean of `values` (n,); see `column_intervals`."""
    low, high = column_intervals(values[:, None], seed)
    return float(low[0]), float(high[0])


def bca_interval(statistic: Callable[[Array], Array], n: int, seed: int = 0) -> tuple[Array, Array]:
    """The bias-corrected and accelerated 95 % bootstrap interval of a statistic of `n` prompts (Efron 1987).

    `statistic` maps the prompts' weights in many resamples (resamples, n), whose rows sum to 1, to (resamples, ...). A
    mean is then a matrix product and the length of a mean vector a quadratic form, so that no residual stream is
    resampled. The acceleration is from the jackknife.
    """
    from scipy.stats import norm

    resampled = numpy.stack([numpy.bincount(rows, minlength=n) for rows in draw_resamples(n, seed)]) / n
    samples = numpy.sort(statistic(resampled), axis=0)
    observed = statistic(numpy.full((1, n), 1 / n))[0]
    tied = numpy.isclose(samples, observed, rtol=1e-12, atol=0)  # weights round sums of equal values differently
    below = ((samples < observed) & ~tied).mean(0) + tied.mean(0) / 2
    bias = norm.ppf(numpy.clip(below, 0.5 / BOOTSTRAPS, 1 - 0.5 / BOOTSTRAPS))
    left_out = statistic((1 - numpy.eye(n)) / (n - 1))
    gaps = left_out.mean(0) - left_out
    acceleration = (gaps**3).sum(0) / numpy.maximum(6 * (gaps**2).sum(0) ** 1.5, 1e-30)
    ends = []
    for z in (-Z_95, Z_95):
        share = norm.cdf(bias + (bias + z) / (1 - acceleration * (bias + z)))
        index = numpy.clip((share * BOOTSTRAPS).astype(int), 0, BOOTSTRAPS - 1)
        ends.append(numpy.take_along_axis(samples, numpy.asarray(index)[None], axis=0)[0])
    return ends[0], ends[1]


class MeanCosine:
    """The cosine of the weighted mean of `vectors` (n, blocks, hidden) with unit vectors (blocks, hidden)."""

    def __init__(self, vectors: Array, unit: Array) -> None:
        by_block = vectors.transpose(1, 0, 2).astype(float)
        self._along = numpy.einsum("bnh,bh->nb", by_block, unit)
        self._gram = by_block @ by_block.transpose(0, 2, 1)  # (blocks, n, n)

    def __call__(self, weights: Array) -> Array:
        """Weights (resamples, n) -> (resamples, blocks)."""
        squares = numpy.einsum("rbn,rn->rb", (weights @ self._gram).transpose(1, 0, 2), weights)
        return weights @ self._along / numpy.sqrt(numpy.maximum(squares, 1e-24))


def rank_p(value: float, others: Array) -> float:
    """The p-value of a value that would be one of `others` under the null: its rank from the top, ties against it."""
    others = numpy.asarray(others)
    return float((1 + (others >= value).sum()) / (1 + len(others)))


def holm(p: Array) -> Array:
    """Holm's (1979) adjusted p-values of `p` (n,): rejecting those below 0.05 errs in any of them with p < 0.05."""
    order = numpy.argsort(p)
    steps = numpy.maximum.accumulate(numpy.asarray(p)[order] * numpy.arange(len(p), 0, -1))
    adjusted = numpy.empty(len(p))
    adjusted[order] = numpy.minimum(steps, 1)
    return adjusted


def draw_signs(n: int, seed: int, flips: int = FLIPS) -> Array:
    """Rows of +1 and -1, (rows, n): all 2**n combinations if at most `flips`, otherwise `flips` random rows."""
    if 2**n <= flips:
        return 1 - 2 * ((numpy.arange(2**n)[:, None] >> numpy.arange(n)) & 1)
    return numpy.random.default_rng(seed).choice([-1, 1], (flips, n))


def sign_flip_test(differences: Array, seed: int = 0, flips: int = FLIPS) -> tuple[Array, Array]:
    """Two-sided p-values of paired differences (n, columns): per column, and corrected over all columns (max-T).

    The statistic is the mean divided by its standard error, so that columns of different scale are comparable. Its
    ranks are those of |mean| / root mean square, of which it is an increasing function, and which is computed instead:
    flips change the mean alone. No p-value is below 1 / (flips + 1): use at least as many flips as there are columns to
    correct for.
    """
    differences = differences.astype(numpy.float64)  # in float32 the observed signs would not equal themselves
    n, columns = differences.shape
    exact = 2**n <= flips  # all sign patterns are used, the observed one among them
    signs = _keep_signs(n, seed, flips)
    scaled = differences / (n * numpy.maximum(numpy.sqrt((differences**2).mean(0)), MIN_SIZE))
    # sums of the same differences in another order differ by rounding, also those that cancel to 0
    observed = numpy.abs(scaled.sum(0)) * (1 - 1e-9) - 1e-12
    largest, exceed = numpy.zeros(len(signs)), numpy.zeros(columns)
    for start in range(0, columns, COLUMNS_PER_CHUNK):
        part = slice(start, start + COLUMNS_PER_CHUNK)
        for first in range(0, len(signs), FLIPS_PER_CHUNK):  # so small that the chunk stays in the cache
            rows = slice(first, first + FLIPS_PER_CHUNK)
            statistic = signs[rows].astype(float) @ scaled[:, part]
            numpy.abs(statistic, out=statistic)
            exceed[part] += (statistic >= observed[part]).sum(0)
            numpy.maximum(largest[rows], statistic.max(1), out=largest[rows])
    exceed_largest = len(signs) - numpy.searchsorted(numpy.sort(largest), observed)
    total = len(signs) + (not exact)
    return (exceed + (not exact)) / total, (exceed_largest + (not exact)) / total


@lru_cache(maxsize=2)
def _keep_signs(n: int, seed: int, flips: int) -> Array:
    """The rows of `draw_signs` in one byte each: tests of many features take the same ones."""
    signs = draw_signs(n, seed, flips).astype(numpy.int8)
    signs.setflags(write=False)
    return signs


def benjamini_hochberg(p: Array) -> Array:
    """Benjamini-Hochberg (1995) q-values of `p` (n,): the false discovery rate if each p up to this one is rejected."""
    from scipy.stats import false_discovery_control

    return false_discovery_control(p, method="bh")


def column_intervals(values: Array, seed: int = 0) -> tuple[Array, Array]:
    """95 % studentized bootstrap intervals of the column means of `values` (n, columns); rows are resampled together.

    Each resample's mean is measured in its own standard errors (bootstrap-t, Efron 1981), so that the ends hold for the
    two dozen questions of a probe, also if the values are skewed: percentile intervals are too short there.
    """
    values = numpy.asarray(values, float)
    n, columns = values.shape
    low, high = values.mean(0), values.mean(0)
    if n < 2:
        return low, high
    weights = numpy.stack([numpy.bincount(rows, minlength=n) for rows in draw_resamples(n, seed)]) / n
    for start in range(0, columns, COLUMNS_PER_CHUNK):
        part = slice(start, start + COLUMNS_PER_CHUNK)
        center = values[:, part] - values[:, part].mean(0)
        means = weights @ center
        deviations = numpy.sqrt(numpy.maximum(weights @ center**2 - means**2, 0))
        spread = center.std(0)
        t = means / numpy.maximum(deviations, 0.1 * spread + 1e-300)  # a resample of equal rows has no spread
        t_low, t_high = numpy.quantile(t, [0.025, 0.975], axis=0)
        # the standard errors of the resamples and of the sample lack the same factor (n - 1), so it cancels
        low[part] -= t_high * spread
        high[part] -= t_low * spread
    return low, high


def paired_contrast(first: Array, second: Array, seed: int = 0) -> dict[str, Any]:
    """The mean of first - second, paired by prompt, with its interval and sign-flip p-value: {diff, ci95, p, n}."""
    differences = first - second
    p, _ = sign_flip_test(differences[:, None], seed)
    return {
        "diff": float(differences.mean()),
        "ci95": list(mean_interval(differences, seed)),
        "p": float(p[0]),
        "n": len(differences),
    }


def cosine(a: Array, b: Array) -> Array:
    """Cosine similarity over the last axis."""
    norms = numpy.linalg.norm(a, axis=-1) * numpy.linalg.norm(b, axis=-1)
    return (a * b).sum(-1) / numpy.maximum(norms, 1e-12)


def normalize(vectors: Array) -> Array:
    """Scale vectors (..., hidden) to length 1; a zero vector stays zero."""
    return vectors / numpy.maximum(numpy.linalg.norm(vectors, axis=-1, keepdims=True), 1e-12)


def split_half_cosine(differences: Array, seed: int = 0, n_splits: int = 50) -> Array:
    """Mean cosine between the mean differences of two random halves of the prompts, over `n_splits` random splits.

    `differences` is (n, layers, hidden), the result (layers,).
    """
    rng, n = numpy.random.default_rng(seed), len(differences)
    cosines = []
    for _ in range(n_splits):
        order = rng.permutation(n)
        cosines.append(cosine(differences[order[: n // 2]].mean(0), differences[order[n // 2 :]].mean(0)))
    return numpy.mean(cosines, axis=0)


def draw_natural_directions(rows: Array, count: int, seed: int = 0) -> Array:
    """Random unit directions with the covariance of `rows` (n, layers, hidden) -> (count, layers, hidden).

    Isotropic random directions are too weak a control, because activations vary along few of their dimensions.
    """
    centered = rows - rows.mean(0)
    weights = numpy.random.default_rng(seed).standard_normal((count, len(rows)))
    directions = numpy.einsum("cn,nlh->clh", weights, centered)
    return normalize(directions)


def spearman(a: Array, b: Array) -> float:
    """Spearman's rank correlation, ties at their mean rank; NaN if either array is constant."""
    from scipy.stats import spearmanr

    if numpy.ptp(a) == 0 or numpy.ptp(b) == 0:
        return float("nan")
    return float(spearmanr(a, b).statistic)
