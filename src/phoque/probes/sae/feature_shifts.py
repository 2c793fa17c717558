"""Which features shifted: paired over prompts, tested by flipping signs, held against nulls and a control."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy
import torch

from phoque.probes import stats
from phoque.probes.sae.dictionary import AT_ONCE, Dictionary
from phoque.probes.sae.residuals import Heard

Array = Any
FLIPS = 2**16 - 1  # so that one feature among three thousand can be found
LARGEST_Q = 0.05
ABOVE_OWN_NULL = 3.0  # times a feature's own shift between equal weights
NULL_QUANTILE = 0.99


@dataclass
class Coded:
    """Features over the rows of one side: `mean` activation and `active` share of tokens, both (rows, features).

    Activations are in units of the residual stream: what a feature adds along its unit direction. `explained` is the
    variance that the dictionary explains, `size` the mean number of active features a token.
    """

    mean: Array
    active: Array
    tokens: Array
    explained: float
    size: float


def coded(dictionary: Dictionary, heard: Heard, layer: int, on: torch.device) -> Coded:
    """Read one side through a dictionary; rows without a fine token have NaN means."""
    sizes = dictionary.decoder.norm(dim=1)
    means, actives, counts = [], [], []
    wrong = total = active = 0.0
    kept = [states[fine] for states, fine in zip(heard.states[layer], heard.fine, strict=True)]
    centre = torch.cat(kept).float().mean(0).to(on)
    for own in kept:
        mean, share = torch.zeros_like(sizes), torch.zeros_like(sizes)
        for part in own.split(AT_ONCE):
            x = part.to(on).float()
            z = dictionary.encode(x)
            wrong += float((x - dictionary.decode(z)).square().sum())
            total += float((x - centre).square().sum())
            active += float((z > 0).sum())
            mean += (z * sizes).sum(0)
            share += (z > 0).sum(0)
        n = len(own) or float("nan")
        means.append((mean / n).cpu().numpy())
        actives.append((share / n).cpu().numpy())
        counts.append(len(own))
    tokens = numpy.array(counts)
    explained = 1 - wrong / total if total else float("nan")
    return Coded(numpy.stack(means), numpy.stack(actives), tokens, explained, active / max(1, tokens.sum()))


@dataclass
class Shifts:
    """One row a feature, (features,) each; what was not tested has NaN in p, q and what follows from them.

    `reported` are the features whose shift is significant (q < 0.05), larger than what equal weights show, and active
    on enough prompts; `specific` those of them that the control does not share.
    """

    base: Array
    tuned: Array
    delta: Array
    low: Array
    high: Array
    d_z: Array
    p: Array
    q: Array
    p_max: Array
    null: Array
    floor: float
    active_prompts: Array
    base_active: Array
    tuned_active: Array
    tested: Array
    above_null: Array
    reported: Array
    specific: Array | None
    control: Array | None

    def order(self) -> Array:
        """Reported features, the largest shift first."""
        found = numpy.flatnonzero(self.reported)
        return found[numpy.argsort(-numpy.abs(self.delta[found]), kind="stable")]


def shifts(base: Coded, tuned: Coded, nulls: Sequence[Array], control: Coded | None, least: int, seed: int) -> Shifts:
    """Compare two sides over the same tokens.

    `nulls` (prompts, features) are how far the base in other numbers is from the base; a feature is tested if it is
    active on `least` prompts. Prompts of which no token is left are no observations.
    """
    whole = numpy.isfinite(tuned.mean - base.mean).all(1)
    base, tuned = _rows(base, whole), _rows(tuned, whole)
    control = _rows(control, whole) if control else None
    gaps = (tuned.mean - base.mean).astype(float)
    count = gaps.shape[1]
    active = ((base.mean > 0) | (tuned.mean > 0)).sum(0)
    tested = active >= least
    null = numpy.max([numpy.abs(one[whole].mean(0)) for one in nulls], axis=0)
    floor = float(numpy.quantile(null[tested], NULL_QUANTILE)) if tested.any() else 0.0
    p, q, p_max, low, high, d_z = (numpy.full(count, numpy.nan) for _ in range(6))
    delta = gaps.mean(0)
    if tested.any():
        own = gaps[:, tested]
        p[tested], p_max[tested] = stats.sign_flip(own, seed, FLIPS)
        q[tested] = stats.benjamini_hochberg(p[tested])
        low[tested], high[tested] = stats.column_intervals(own, seed)
        d_z[tested] = own.mean(0) / numpy.maximum(own.std(0, ddof=1), 1e-12)
    above = numpy.abs(delta) > numpy.maximum(ABOVE_OWN_NULL * null, floor)
    reported = tested & above & (numpy.nan_to_num(q, nan=1.0) < LARGEST_Q)
    specific = shared = None
    if control is not None:
        shared = (control.mean - base.mean).mean(0)
        specific = reported & _beyond(tuned.mean - control.mean, delta, max(floor, 0.0), tested, seed)
    return Shifts(
        base.mean.mean(0),
        tuned.mean.mean(0),
        delta,
        low,
        high,
        d_z,
        p,
        q,
        p_max,
        null,
        floor,
        active,
        base.active.mean(0),
        tuned.active.mean(0),
        tested,
        above,
        reported,
        specific,
        shared,
    )


def _rows(one: Coded, kept: Array) -> Coded:
    return replace(one, mean=one.mean[kept], active=one.active[kept], tokens=one.tokens[kept])


def _beyond(gaps: Array, delta: Array, floor: float, tested: Array, seed: int) -> Array:
    """Which features shift further than in the control, in the same direction, by more than the floor."""
    found = numpy.zeros(gaps.shape[1], bool)
    if not tested.any():
        return found
    p, _ = stats.sign_flip(gaps[:, tested].astype(float), seed, FLIPS)
    further = gaps.mean(0) * numpy.sign(delta) > floor
    found[tested] = stats.benjamini_hochberg(p) < LARGEST_Q
    return found & further


def swapped(base: Coded, tuned: Coded, seed: int) -> tuple[Coded, Coded]:
    """The two sides with the labels of half the prompts exchanged: a null in which nothing may be found."""
    rows = numpy.random.default_rng(seed).permutation(len(base.mean))[: len(base.mean) // 2]
    sides = []
    for one, other in ((base, tuned), (tuned, base)):
        mean, active = one.mean.copy(), one.active.copy()
        mean[rows], active[rows] = other.mean[rows], other.active[rows]
        sides.append(Coded(mean, active, one.tokens, one.explained, one.size))
    return sides[0], sides[1]


def latent_scaling(
    dictionary: Dictionary, base: Heard, tuned: Heard, layer: int, rises: Array, on: torch.device
) -> Array:
    """How much of each feature is in either model: (2, features), base and tuned; 1 is all of it, 0 nothing.

    The least-squares factor on the feature's direction that explains what the other features leave of each model's
    residual stream, where the feature is active in the model that has more of it (Minder et al. 2025, crosscoders).
    """
    count = dictionary.features
    sizes = dictionary.decoder.norm(dim=1)
    unit = dictionary.decoder / sizes[:, None].clamp(min=1e-12)
    rising = torch.tensor(rises, device=on)
    above, below = torch.zeros(2, count, device=on), torch.zeros(count, device=on)
    for one, other, fine in zip(base.states[layer], tuned.states[layer], base.fine, strict=True):
        for parts in zip(one[fine].split(AT_ONCE), other[fine].split(AT_ONCE), strict=True):
            xs = [part.to(on).float() for part in parts]
            zs = [dictionary.encode(x) for x in xs]
            where = torch.where(rising, zs[1], zs[0]) * sizes
            below += where.square().sum(0)
            for side, (x, z) in enumerate(zip(xs, zs, strict=True)):
                left = (x - dictionary.decode(z)) @ unit.T + z * sizes
                above[side] += (where * left).sum(0)
    return (above / below.clamp(min=1e-12)).cpu().numpy()


def twins(one: Dictionary, other: Dictionary, features: Array, on: torch.device) -> tuple[Array, Array]:
    """For features of `one`, the feature of `other` whose direction is nearest, and their cosine."""
    if not len(features):
        return numpy.zeros(0, int), numpy.zeros(0)
    unit = [torch.nn.functional.normalize(d.decoder.to(on), dim=1) for d in (one, other)]
    cosines = unit[0][torch.tensor(features, device=on)] @ unit[1].T
    best = cosines.max(1)
    return best.indices.cpu().numpy(), best.values.cpu().numpy()
