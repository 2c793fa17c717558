"""Statistics of the probes. One prompt is one observation: its tokens and paraphrases are not replicates.

Every function is deterministic given its seed. Arrays are numpy, (n,) or (n, layers) where a second axis is allowed.
"""

from collections.abc import Callable
from typing import Any

import numpy

BOOTSTRAPS = 2000
FLIPS = 4096  # sign flips: all 2**n of them for up to 12 prompts, otherwise this many random ones
COLUMNS_PER_CHUNK = 128  # columns per chunk; bounds the memory of the (flips, columns) statistics

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


def mean_interval(values: Array, seed: int = 0) -> tuple[float, float]:
    """The 95 % bootstrap interval of the mean of `values` (n,)."""
    low, high = percentile_interval(values[draw_resamples(len(values), seed)].mean(1))
    return float(low), float(high)


def draw_signs(n: int, seed: int, flips: int = FLIPS) -> Array:
    """Rows of +1 and -1, (rows, n): all 2**n combinations if at most `flips`, otherwise `flips` random rows."""
    if 2**n <= flips:
        return 1 - 2 * ((numpy.arange(2**n)[:, None] >> numpy.arange(n)) & 1)
    return numpy.random.default_rng(seed).choice([-1, 1], (flips, n))


def sign_flip_test(differences: Array, seed: int = 0, flips: int = FLIPS) -> tuple[Array, Array]:
    """Two-sided p-values of paired differences (n, columns): per column, and corrected over all columns (max-T).

    The statistic is the mean divided by its standard error, so that columns of different scale are comparable. No
    p-value is below 1 / (flips + 1): use at least as many flips as there are columns to correct for.
    """
    n, columns = differences.shape
    exact = 2**n <= flips  # all sign patterns are used, the observed one among them
    sign_rows = draw_signs(n, seed, flips).astype(float)
    mean_squares = (differences**2).mean(0)

    def statistic(mean: Array, part: slice) -> Array:
        mean_square = mean_squares[part]
        return numpy.abs(mean) / numpy.sqrt(numpy.maximum(mean_square - mean**2, 1e-12 * mean_square + 1e-30))

    max_t, exceed, observed = numpy.zeros(len(sign_rows)), numpy.zeros(columns), numpy.zeros(columns)
    for start in range(0, columns, COLUMNS_PER_CHUNK):
        part = slice(start, start + COLUMNS_PER_CHUNK)
        t = statistic(sign_rows @ differences[:, part] / n, part)
        observed[part] = statistic(differences[:, part].mean(0), part) * (1 - 1e-9)
        exceed[part] = (t >= observed[part]).sum(0)
        max_t = numpy.maximum(max_t, t.max(1))
    exceed_max = len(sign_rows) - numpy.searchsorted(numpy.sort(max_t), observed)
    total = len(sign_rows) + (not exact)
    return (exceed + (not exact)) / total, (exceed_max + (not exact)) / total


def benjamini_hochberg(p: Array) -> Array:
    """Benjamini-Hochberg (1995) q-values of `p` (n,): the false discovery rate if each p up to this one is rejected."""
    from scipy.stats import false_discovery_control

    return false_discovery_control(p, method="bh")


def column_intervals(values: Array, seed: int = 0) -> tuple[Array, Array]:
    """95 % bootstrap intervals of the column means of `values` (n, columns); the rows are resampled together."""
    n, columns = values.shape
    weights = numpy.stack([numpy.bincount(rows, minlength=n) for rows in draw_resamples(n, seed)]) / n
    low, high = numpy.empty(columns), numpy.empty(columns)
    for start in range(0, columns, COLUMNS_PER_CHUNK):
        part = slice(start, start + COLUMNS_PER_CHUNK)
        low[part], high[part] = percentile_interval(weights @ values[:, part])
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
    return directions / numpy.maximum(numpy.linalg.norm(directions, axis=-1, keepdims=True), 1e-12)


def spearman(a: Array, b: Array) -> float:
    """Spearman's rank correlation, ties at their mean rank; NaN if either array is constant."""
    from scipy.stats import spearmanr

    if numpy.ptp(a) == 0 or numpy.ptp(b) == 0:
        return float("nan")
    return float(spearmanr(a, b).statistic)
