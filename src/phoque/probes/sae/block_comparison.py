"""Compare the models at one decoder block: from their residuals to plain numbers for the JSON report."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy
import torch

from phoque.inference.residual_stream import Turn
from phoque.probes.sae.dictionary import Dictionary
from phoque.probes.sae.feature_cards import TextSource, build_cards
from phoque.probes.sae.feature_shifts import (
    FeatureActivations,
    FeatureShifts,
    compare_features,
    encode_residuals,
    match_features,
    measure_latent_scaling,
    swap_variants,
)
from phoque.probes.sae.interventions import InterventionTest
from phoque.probes.sae.model_variants import ModelVariants
from phoque.probes.sae.residuals import Residuals
from phoque.settings.compare_sae import SaeSettings

Array = Any
NULLS = ("dtype", "packing")
REPLICATION_COSINE = 0.7  # minimum cosine at which features of two dictionaries count as the same feature


@dataclass
class ComparisonInputs:
    """The texts by set, and every variant's residuals over them: residuals[variant][set]."""

    variants: ModelVariants
    rows: dict[str, list[Turn]]
    residuals: dict[str, dict[str, Residuals]]
    tokenizer: Any


@dataclass
class BlockResult:
    """The results at one decoder block: `summary` goes into the report, `table` has one row for every feature."""

    layer: int
    summary: dict[str, Any]
    table: dict[str, Array]
    prompt_shift: Array
    prompt_null: Array
    warnings: list[str] = field(default_factory=list)


def compare_block(
    inputs: ComparisonInputs,
    dictionaries: Sequence[Dictionary],
    layer: int,
    *,
    quality: list[dict[str, Any]],
    s: SaeSettings,
    device: torch.device,
    say: Any,
) -> BlockResult:
    """Compare both models at one block through its dictionaries, one per seed.

    The first dictionary is reported; the others only show which of its features replicate.
    """
    results = [_encode_and_test(inputs, d, layer, s, device) for d in dictionaries]
    shifts, activations, nulls = results[0]
    order = shifts.rank_reported()
    say(f"block {layer}: {len(order)} of {int(shifts.tested.sum())} features shifted; testing what they cause")
    betas = measure_latent_scaling(
        dictionaries[0],
        inputs.residuals["base"]["response"],
        inputs.residuals["tuned"]["response"],
        layer=layer,
        rises=shifts.delta > 0,
        device=device,
    )
    if shifts.specific is None:
        ranked = order
    else:  # features that the control shifts too come last
        ranked = numpy.concatenate([order[shifts.specific[order]], order[~shifts.specific[order]]])
    shown = [int(f) for f in ranked[: s.cards]]
    with inputs.variants.activate("base") as model:
        shown_cards = build_cards(
            dictionaries[0],
            shown,
            sources=_list_text_sources(inputs),
            layer=layer,
            model=model,
            tokenizer=inputs.tokenizer,
            device=device,
        )
    interventions = _run_interventions(inputs, dictionaries[0], shifts, layer=layer, shown=shown, s=s)
    replicated = _find_replicated(dictionaries, [seed_shifts for seed_shifts, *_ in results], order, device)
    table = _build_table(shifts, betas, activations, replicated)
    features = [_build_feature_row(table, f) for f in order]
    interventions_by_feature = {row["feature_id"]: row for row in interventions["features"]}
    for row in features:
        if row["feature_id"] in shown:
            row |= shown_cards[shown.index(row["feature_id"])] | {
                "cause": interventions_by_feature.get(row["feature_id"])
            }
    features.sort(key=lambda row: shown.index(row["feature_id"]) if row["feature_id"] in shown else len(shown))
    prompt_gaps, prompt_nulls = _sum_prompt_shifts(activations, nulls)
    block = BlockResult(layer, {}, table, prompt_gaps, prompt_nulls)
    block.summary = {
        "overall": _summarize_overall(shifts, activations, replicated),
        "nulls": [_summarize_null(name, shifts, null_gaps) for name, null_gaps in nulls.items()],
        "quality": quality,
        "causes": interventions,
        "features": features,
    }
    return block


def _encode_and_test(
    inputs: ComparisonInputs, dictionary: Dictionary, layer: int, s: SaeSettings, device: torch.device
) -> tuple[FeatureShifts, dict[str, dict[str, FeatureActivations]], dict[str, Array]]:
    """Encode every variant and text set with one dictionary, and test the shifts on the base model's answers.

    Returns the shifts, the activations[variant][set], and the nulls: for each, a (prompts, features) difference between
    the base model and itself in another precision or batching, which --shuffle-pairs does not affect.
    """
    activations = {
        variant: {kind: encode_residuals(dictionary, residuals, layer, device) for kind, residuals in sets.items()}
        for variant, sets in inputs.residuals.items()
    }
    base, tuned = activations["base"]["response"], activations["tuned"]["response"]
    nulls = {name: activations[name]["response"].mean - base.mean for name in NULLS}
    if s.shuffle_pairs:
        base, tuned = swap_variants(base, tuned, s.seed)
        activations["base"]["response"], activations["tuned"]["response"] = base, tuned
    control = activations["control"]["response"] if "control" in activations else None
    return (
        compare_features(base, tuned, [*nulls.values()], control=control, min_active=s.min_active, seed=s.seed),
        activations,
        nulls,
    )


def _list_text_sources(inputs: ComparisonInputs) -> list[TextSource]:
    pairs = [("base", kind) for kind in inputs.residuals["base"]] + [("tuned", "own"), ("tuned", "response")]
    return [TextSource(variant, kind, inputs.rows[kind], inputs.residuals[variant][kind]) for variant, kind in pairs]


def _run_interventions(
    inputs: ComparisonInputs,
    dictionary: Dictionary,
    shifts: FeatureShifts,
    *,
    layer: int,
    shown: list[int],
    s: SaeSettings,
) -> dict[str, Any]:
    rows = inputs.rows["own"][: s.causal_prompts]
    norm = float(inputs.residuals["base"]["response"].norms[:, layer].mean())
    return InterventionTest(
        variants=inputs.variants,
        dictionary=dictionary,
        layer=layer,
        shifts=shifts,
        rows=rows,
        norm=norm,
        strength=s.steering,
        seed=s.seed,
    ).run(shown)


def _find_replicated(
    dictionaries: Sequence[Dictionary], shifts_by_seed: Sequence[FeatureShifts], order: Array, device: torch.device
) -> Array | None:
    """Find the reported features that the other dictionaries contain and report too: a mask (features, seeds - 1).

    A feature replicates if its nearest feature has a cosine of at least REPLICATION_COSINE, is reported, and shifts in
    the same direction. None if there is only one dictionary.
    """
    if len(dictionaries) == 1:
        return None
    replicated = numpy.zeros((dictionaries[0].features, len(dictionaries) - 1), bool)
    for n, (other_dictionary, other_shifts) in enumerate(zip(dictionaries[1:], shifts_by_seed[1:], strict=True)):
        nearest, cosine = match_features(dictionaries[0], other_dictionary, order, device)
        same_sign = numpy.sign(other_shifts.delta[nearest]) == numpy.sign(shifts_by_seed[0].delta[order])
        replicated[order, n] = (cosine >= REPLICATION_COSINE) & other_shifts.reported[nearest] & same_sign
    return replicated


def _build_table(
    shifts: FeatureShifts, betas: Array, activations: dict[str, dict[str, FeatureActivations]], replicated: Array | None
) -> dict[str, Array]:
    columns = {
        "feature_id": numpy.arange(len(shifts.delta)),
        "base_mean": shifts.base_mean,
        "tuned_mean": shifts.tuned_mean,
        "delta": shifts.delta,
        "ci_low": shifts.ci_low,
        "ci_high": shifts.ci_high,
        "d_z": shifts.d_z,
        "p_perm": shifts.p,
        "q_bh": shifts.q,
        "p_maxT": shifts.p_max_t,
        "null_delta": shifts.null_delta,
        "above_null": shifts.above_null,
        "active_prompts": shifts.active_prompts,
        "base_freq": shifts.base_freq,
        "tuned_freq": shifts.tuned_freq,
        "beta_base": betas[0],
        "beta_tuned": betas[1],
        "tested": shifts.tested,
        "reported": shifts.reported,
    }
    if shifts.specific is not None:
        columns |= {"control_delta": shifts.control_delta, "specific_vs_control": shifts.specific}
    if replicated is not None:
        columns["replicated"] = replicated.all(1)
    for kind in ("own", "text"):
        for variant in ("base", "tuned"):
            columns[f"{kind}_{variant}_mean"] = numpy.nanmean(activations[variant][kind].mean, axis=0)
    return columns


def _build_feature_row(table: dict[str, Array], feature: int) -> dict[str, Any]:
    row = {name: values[feature].item() for name, values in table.items()}
    low, high = row.pop("ci_low"), row.pop("ci_high")
    return row | {"direction": "up" if row["delta"] > 0 else "down", "ci95": [low, high]}


def _summarize_overall(
    shifts: FeatureShifts, activations: dict[str, dict[str, FeatureActivations]], replicated: Array | None
) -> dict[str, Any]:
    mean = float(numpy.abs(shifts.delta[shifts.tested]).mean()) if shifts.tested.any() else 0.0
    null = float(shifts.null_delta[shifts.tested].mean()) if shifts.tested.any() else 0.0
    overall = {
        "n_features": len(shifts.delta),
        "n_tested": int(shifts.tested.sum()),
        "n_significant": int((numpy.nan_to_num(shifts.q, nan=1.0) < 0.05).sum()),
        "n_reported": int(shifts.reported.sum()),
        "n_up": int((shifts.reported & (shifts.delta > 0)).sum()),
        "mean_abs_feature_shift": mean,
        "null_mean_abs_feature_shift": null,
        "ratio_to_null": mean / null if null else None,
        "null_floor": shifts.null_floor,
        "ev": {
            variant: {kind: coded.explained_variance for kind, coded in sets.items()}
            for variant, sets in activations.items()
        },
        "ev_base": activations["base"]["response"].explained_variance,
        "ev_tuned": activations["tuned"]["response"].explained_variance,
    }
    if shifts.specific is not None:
        overall |= {
            "n_specific": int(shifts.specific.sum()),
            "ev_control": activations["control"]["response"].explained_variance,
        }
    if replicated is not None:
        count = int(shifts.reported.sum())
        overall["n_replicated"] = int(replicated.all(1).sum())
        overall["replicated_share"] = overall["n_replicated"] / count if count else None
    return overall


def _summarize_null(name: str, shifts: FeatureShifts, null_gaps: Array) -> dict[str, Any]:
    sizes = numpy.abs(numpy.nanmean(null_gaps, axis=0))[shifts.tested]
    sizes = sizes if len(sizes) else numpy.zeros(1)
    return {
        "name": name,
        "mean_abs": float(sizes.mean()),
        "max_abs": float(sizes.max()),
        "q99": float(numpy.quantile(sizes, 0.99)),
    }


def _sum_prompt_shifts(
    activations: dict[str, dict[str, FeatureActivations]], nulls: dict[str, Array]
) -> tuple[Array, Array]:
    """Sum the absolute shifts of all features for each prompt: (prompts,), and for the nulls (nulls, prompts)."""
    gaps = activations["tuned"]["response"].mean - activations["base"]["response"].mean
    return numpy.abs(gaps).sum(1), numpy.stack([numpy.abs(null).sum(1) for null in nulls.values()])
