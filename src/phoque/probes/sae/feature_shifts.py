"""Find the features that shifted: a sign-flip test over paired prompts, compared with nulls and controls."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy
import torch

from phoque.probes import stats
from phoque.probes.sae.dictionary import ENCODE_CHUNK, Dictionary
from phoque.probes.sae.residuals import Residuals
from phoque.probes.sae.run_spread import FLIPS, estimate_floor, find_beyond_runs

Array = Any
MAX_Q = 0.05
NULL_MARGIN = 3.0  # a reported shift is this many times the feature's shift between equal weights
NULL_QUANTILE = 0.99


@dataclass
class FeatureActivations:
    """One variant's features: `mean` activation and `active`, the share of tokens with any, both (rows, features).

    Activations are in units of the residual stream: what a feature adds along its unit direction. `tokens` (rows,)
    counts the valid tokens, `explained_variance` is the share that the dictionary explains, and `l0` is the mean number
    of active features per token.
    """

    mean: Array
    active: Array
    tokens: Array
    explained_variance: float
    l0: float


def encode_residuals(
    dictionary: Dictionary, residuals: Residuals, layer: int, device: torch.device
) -> FeatureActivations:
    """Encode one variant's residuals with a dictionary; a row without a valid token has NaN means."""
    decoder_norms = dictionary.decoder.norm(dim=1)
    means, active_shares, counts = [], [], []
    error = variance = active_total = 0.0
    valid_rows = [states[valid] for states, valid in zip(residuals.states[layer], residuals.masks, strict=True)]
    center = torch.cat(valid_rows).float().mean(0).to(device)
    for row in valid_rows:
        mean, active_count = torch.zeros_like(decoder_norms), torch.zeros_like(decoder_norms)
        for part in row.split(ENCODE_CHUNK):
            x = part.to(device).float()
            z = dictionary.encode(x)
            error += float((x - dictionary.decode(z)).square().sum())
            variance += float((x - center).square().sum())
            active_total += float((z > 0).sum())
            mean += (z * decoder_norms).sum(0)
            active_count += (z > 0).sum(0)
        n = len(row) or float("nan")
        means.append((mean / n).cpu().numpy())
        active_shares.append((active_count / n).cpu().numpy())
        counts.append(len(row))
    tokens = numpy.array(counts)
    explained = 1 - error / variance if variance else float("nan")
    return FeatureActivations(
        numpy.stack(means), numpy.stack(active_shares), tokens, explained, active_total / max(1, tokens.sum())
    )


@dataclass(kw_only=True)
class FeatureShifts:
    """The shift of every feature, one array (features,) per column.

    Features that were not tested have NaN in p, q, p_max_t, d_z and the interval. `reported` marks the features whose
    shift is significant (q < 0.05), larger than between equal weights, and active on enough prompts. `specific` marks
    the reported features that differ from the control: with one control, from this one run of it; with several, by more
    than one further run of it would (`run_floor`).
    """

    base_mean: Array
    tuned_mean: Array
    delta: Array
    ci_low: Array
    ci_high: Array
    d_z: Array
    p: Array
    q: Array
    p_max_t: Array
    null_delta: Array
    null_floor: float
    active_prompts: Array
    base_freq: Array
    tuned_freq: Array
    tested: Array
    above_null: Array
    reported: Array
    specific: Array | None
    control_delta: Array | None
    run_floor: Array | None

    def rank_reported(self) -> Array:
        """List the reported features, the largest shift first."""
        reported = numpy.flatnonzero(self.reported)
        return reported[numpy.argsort(-numpy.abs(self.delta[reported]), kind="stable")]


def compare_features(
    base: FeatureActivations,
    tuned: FeatureActivations,
    nulls: Sequence[Array],
    *,
    controls: Sequence[FeatureActivations],
    min_active: int,
    seed: int,
) -> FeatureShifts:
    """Test which features differ between two variants that read the same tokens.

    Each of `nulls` (prompts, features) is the difference between the base model and itself in another precision or
    batching. A feature is tested if it is active on at least `min_active` prompts. Prompts without a valid token are
    dropped.
    """
    finite = numpy.isfinite(tuned.mean - base.mean).all(1)
    base, tuned = select_rows(base, finite), select_rows(tuned, finite)
    controls = [select_rows(control, finite) for control in controls]
    gaps = (tuned.mean - base.mean).astype(float)
    count = gaps.shape[1]
    active_prompts = ((base.mean > 0) | (tuned.mean > 0)).sum(0)
    tested = active_prompts >= min_active
    null_delta = numpy.max([numpy.abs(null_gaps[finite].mean(0)) for null_gaps in nulls], axis=0)
    null_floor = float(numpy.quantile(null_delta[tested], NULL_QUANTILE)) if tested.any() else 0.0
    p, q, p_max_t, ci_low, ci_high, d_z = (numpy.full(count, numpy.nan) for _ in range(6))
    delta = gaps.mean(0)
    if tested.any():
        tested_gaps = gaps[:, tested]
        p[tested], p_max_t[tested] = stats.sign_flip_test(tested_gaps, seed, FLIPS)
        q[tested] = stats.benjamini_hochberg(p[tested])
        ci_low[tested], ci_high[tested] = stats.column_intervals(tested_gaps, seed)
        d_z[tested] = tested_gaps.mean(0) / numpy.maximum(tested_gaps.std(0, ddof=1), 1e-12)
    above_null = numpy.abs(delta) > numpy.maximum(NULL_MARGIN * null_delta, null_floor)
    reported = tested & above_null & (numpy.nan_to_num(q, nan=1.0) < MAX_Q)
    specific = control_delta = run_floor = None
    if controls:
        control_mean = numpy.mean([control.mean for control in controls], axis=0)
        control_delta = (control_mean - base.mean).mean(0)
        floor = numpy.full(count, max(null_floor, 0.0))
        if len(controls) > 1:
            run_floor = estimate_floor([control.mean.mean(0) for control in controls])
            floor = numpy.maximum(floor, run_floor)
        specific = reported & find_beyond_runs(tuned.mean - control_mean, delta, floor, tested, seed, MAX_Q)
    return FeatureShifts(
        base_mean=base.mean.mean(0),
        tuned_mean=tuned.mean.mean(0),
        delta=delta,
        ci_low=ci_low,
        ci_high=ci_high,
        d_z=d_z,
        p=p,
        q=q,
        p_max_t=p_max_t,
        null_delta=null_delta,
        null_floor=null_floor,
        active_prompts=active_prompts,
        base_freq=base.active.mean(0),
        tuned_freq=tuned.active.mean(0),
        tested=tested,
        above_null=above_null,
        reported=reported,
        specific=specific,
        control_delta=control_delta,
        run_floor=run_floor,
    )


def count_null_reports(
    base: FeatureActivations, tuned: FeatureActivations, shifts: FeatureShifts, count: int, seed: int
) -> list[int]:
    """How many features are reported when a coin swaps the two variants of each prompt, `count` times.

    Nothing shifts then, so what is reported is a false alarm. The floors of equal weights are those of `shifts`.
    """
    gaps = (tuned.mean - base.mean).astype(float)
    gaps = gaps[numpy.isfinite(gaps).all(1)][:, shifts.tested]
    if not gaps.size:
        return [0] * count
    floor = numpy.maximum(NULL_MARGIN * shifts.null_delta[shifts.tested], shifts.null_floor)
    counts = []
    for n in range(count):
        signs = numpy.random.default_rng([seed, n]).choice((-1.0, 1.0), len(gaps))
        swapped = gaps * signs[:, None]
        p, _ = stats.sign_flip_test(swapped, seed, FLIPS)
        is_reported = (stats.benjamini_hochberg(p) < MAX_Q) & (numpy.abs(swapped.mean(0)) > floor)
        counts.append(int(is_reported.sum()))
    return counts


def select_rows(activations: FeatureActivations, rows: Array) -> FeatureActivations:
    """The activations on some of the rows."""
    return replace(
        activations, mean=activations.mean[rows], active=activations.active[rows], tokens=activations.tokens[rows]
    )


def swap_variants(
    base: FeatureActivations, tuned: FeatureActivations, seed: int
) -> tuple[FeatureActivations, FeatureActivations]:
    """Swap the two variants on half the prompts: a null comparison, which must report no feature."""
    rows = numpy.random.default_rng(seed).permutation(len(base.mean))[: len(base.mean) // 2]
    variants = []
    for source, partner in ((base, tuned), (tuned, base)):
        mean, active = source.mean.copy(), source.active.copy()
        mean[rows], active[rows] = partner.mean[rows], partner.active[rows]
        variants.append(FeatureActivations(mean, active, source.tokens, source.explained_variance, source.l0))
    return variants[0], variants[1]


def measure_latent_scaling(
    dictionary: Dictionary, base: Residuals, tuned: Residuals, *, layer: int, rises: Array, device: torch.device
) -> Array:
    """Measure how much of each feature is present in each model: (2, features), base and tuned; 1 is all, 0 is none.

    For each feature and model, this is the least-squares factor by which the feature explains what the other features
    leave of the residual stream. It is fitted with the activations of the model in which the feature is stronger:
    the tuned model where `rises` is true, else the base (latent scaling, Minder et al. 2025, crosscoders).
    """
    count = dictionary.features
    decoder_norms = dictionary.decoder.norm(dim=1)
    unit = dictionary.decoder / decoder_norms[:, None].clamp(min=1e-12)
    is_rising = torch.tensor(rises, device=device)
    numerator, denominator = torch.zeros(2, count, device=device), torch.zeros(count, device=device)
    for base_states, tuned_states, valid in zip(base.states[layer], tuned.states[layer], base.masks, strict=True):
        for parts in zip(base_states[valid].split(ENCODE_CHUNK), tuned_states[valid].split(ENCODE_CHUNK), strict=True):
            xs = [part.to(device).float() for part in parts]
            zs = [dictionary.encode(x) for x in xs]
            strength = torch.where(is_rising, zs[1], zs[0]) * decoder_norms
            denominator += strength.square().sum(0)
            for model, (x, z) in enumerate(zip(xs, zs, strict=True)):
                projection = (x - dictionary.decode(z)) @ unit.T + z * decoder_norms
                numerator[model] += (strength * projection).sum(0)
    return (numerator / denominator.clamp(min=1e-12)).cpu().numpy()
