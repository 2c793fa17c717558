"""How far two runs of one recipe differ, feature by feature: the floor that a fine-tune's shift has to exceed.

A fine-tune is one draw. With the same data and another seed, a third of the features that a test over questions calls
different are different (docs/guides/sae.md). So the unit is the run: several control runs give each feature's spread,
and the tuned run must differ from their mean by more than one further run of the control's recipe would.
"""

from collections.abc import Sequence
from typing import Any

import numpy

from phoque.probes import stats

LEVEL = 0.01  # share of features that a further control run may place beyond the floor
PRIOR_RUNS = 4.0  # degrees of freedom of the spread of features of like activation
NEIGHBORS = 101  # features of like activation whose median spread is the prior
FLIPS = 2**16 - 1

Array = Any


def estimate_floor(controls: Sequence[Array]) -> Array:
    """The difference between a run and the mean of these controls that one run in a hundred exceeds, (features,).

    `controls` are mean activations (features,) of two or more runs. Variances are shrunk towards those of features with
    a similar activation (Smyth 2004), because two or three runs tell little about one feature; the floor is then a
    prediction interval with Student's t.
    """
    from scipy.ndimage import median_filter
    from scipy.stats import chi2, t

    means = numpy.stack(controls)
    count, free = len(means), len(means) - 1
    variance = means.var(0, ddof=1)
    order = numpy.argsort(means.mean(0), kind="stable")
    median = median_filter(variance[order], max(1, min(NEIGHBORS, len(order))), mode="nearest")
    prior = numpy.empty_like(variance)
    prior[order] = median / (chi2.ppf(0.5, free) / free)  # the median of a variance is below its mean
    shrunk = (PRIOR_RUNS * prior + free * variance) / (PRIOR_RUNS + free)
    return t.ppf(1 - LEVEL / 2, PRIOR_RUNS + free) * numpy.sqrt(shrunk * (1 + 1 / count))


def find_beyond_runs(gaps: Array, delta: Array, floor: Array, tested: Array, seed: int, max_q: float) -> Array:
    """Find the features whose difference from the controls exceeds the floor, in the direction of their shift.

    `gaps` (prompts, features) are the tuned run minus the mean of the controls. The test is of the difference
    beyond the floor, not of a difference that is then compared with it (TREAT, McCarthy and Smyth 2009).
    """
    beyond = numpy.zeros(gaps.shape[1], bool)
    if not tested.any():
        return beyond
    excess = gaps[:, tested] * numpy.sign(delta[tested]) - floor[tested]
    p, _ = stats.sign_flip_test(excess.astype(float), seed, FLIPS)
    beyond[tested] = (stats.benjamini_hochberg(p) < max_q) & (excess.mean(0) > 0)
    return beyond


def count_beyond_others(runs: Sequence[Array], tested: Array, seed: int, max_q: float) -> list[int]:
    """How many features each control run has beyond the others' spread; empty with fewer than three runs.

    `runs` are the activations (prompts, features) of each.
    """
    if len(runs) < 3:
        return []
    counts = []
    for n, run in enumerate(runs):
        others = [*runs[:n], *runs[n + 1 :]]
        gaps = run - numpy.mean(others, axis=0)
        floor = estimate_floor([other.mean(0) for other in others])
        counts.append(int(find_beyond_runs(gaps, gaps.mean(0), floor, tested, seed, max_q).sum()))
    return counts
