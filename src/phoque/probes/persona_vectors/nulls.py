"""How often a part of the evidence says yes where there is nothing: swapped labels, on this run's residual streams."""

from typing import Any

import numpy

from phoque.probes import stats
from phoque.probes.persona_vectors.evidence import swap_labels
from phoque.probes.persona_vectors.model import Residuals
from phoque.probes.verdicts import ALPHA

SWAPPED = ("persona", "neutral")


def count_false_alarms(extraction: Residuals, heldout: Residuals, layer: int, count: int, seed: int) -> dict[str, int]:
    """Swap persona and neutral on questions drawn by a coin, `count` times: {nulls, separable}.

    Each null extracts a vector anew, and tests whether held-out answers project further along it at the selected block:
    interval above 0 and p < 0.05. The verdict `separable` asks more than this part of it. Swapping exactly half of the
    questions would cancel an effect that all of them share, and could hardly raise an alarm.
    """
    alarms = 0
    for n in range(count):
        swapped = []
        for source, offset in ((extraction, 0), (heldout, count)):
            part = Residuals()
            part.by_condition = {
                c: {e: v[:, layer : layer + 1].copy() for e, v in source.by_condition[c].items()} for c in SWAPPED
            }
            coins = numpy.random.default_rng(seed + 1000 + n + offset).integers(0, 2, len(part.get("persona")))
            swap_labels(part, coins.astype(bool))
            swapped.append(part)
        vector = (swapped[0].get("persona") - swapped[0].get("neutral")).mean(0)[0]
        gaps: Any = (swapped[1].get("persona") - swapped[1].get("neutral"))[:, 0] @ vector
        p, _ = stats.sign_flip_test(gaps[:, None], seed)
        alarms += bool(p[0] < ALPHA and stats.mean_interval(gaps, seed)[0] > 0)
    return {"nulls": count, "separable": alarms}
