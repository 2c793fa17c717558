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
    MAX_Q,
    FeatureActivations,
    FeatureShifts,
    compare_features,
    count_null_reports,
    encode_residuals,
    measure_latent_scaling,
    select_rows,
    swap_variants,
)
from phoque.probes.sae.interventions import InterventionTest, match_unshifted
from phoque.probes.sae.judge import judge_block
from phoque.probes.sae.model_variants import ModelVariants
from phoque.probes.sae.replication import Replication, find_replicated
from phoque.probes.sae.residuals import Residuals
from phoque.probes.sae.run_spread import count_beyond_others
from phoque.probes.sae.untrained import make_untrained
from phoque.settings.compare_sae import SaeSettings

Array = Any
NULLS = ("dtype", "packing")
TESTED_SETS = ("response",)  # the set of texts that shifts are tested on
MATCHED_FEATURES = 500  # reported features that one like them is looked for


@dataclass
class ComparisonInputs:
    """The texts by set, and every variant's residuals over them: residuals[variant][set]."""

    variants: ModelVariants
    rows: dict[str, list[Turn]]
    residuals: dict[str, dict[str, Residuals]]
    tokenizer: Any
    own_questions: list[int]  # the question of each row of `own`


@dataclass
class BlockResult:
    """The results at one decoder block: `summary` goes into the report, `table` has one row for every feature."""

    layer: int
    summary: dict[str, Any]
    table: dict[str, Array]
    prompt_shift: Array
    prompt_null: Array
    warnings: list[str] = field(default_factory=list)
    difference: Dictionary | None = None  # the difference SAE


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
    shifts, activations, nulls = _encode_and_test(inputs, dictionaries[0], layer, s, device)
    untrained = _make_untrained(inputs, dictionaries[0], layer, quality[0]["l0"], s.seed)
    untrained_shifts, untrained_activations, untrained_nulls = _encode_and_test(
        inputs, untrained, layer, s, device, TESTED_SETS
    )
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
    # the questions that select what is tried are not those that it is tried on
    selecting = numpy.arange(len(activations["base"]["response"].mean)) % 2 == 0
    half = _compare(activations, nulls, s, selecting)
    shown = [int(f) for f in put_specific_first(half.rank_reported(), half.specific)[: s.cards]]
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
    untrained_half = _compare(untrained_activations, untrained_nulls, s, selecting)
    interventions = _run_interventions(
        inputs, dictionaries[0], half, (untrained, untrained_half), layer=layer, shown=shown, selecting=selecting, s=s
    )
    of_seeds = [_encode_and_test(inputs, d, layer, s, device, TESTED_SETS)[0] for d in dictionaries[1:]]
    replication = find_replicated(dictionaries, [shifts, *of_seeds], device)
    table = _build_table(shifts, betas, activations, replication)
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
    overall = _summarize_overall(shifts, activations, replication)
    overall["untrained"] = _count(untrained_shifts)
    means = [sets["response"].mean for name, sets in activations.items() if name.startswith("control")]
    overall["control_beyond_controls"] = count_beyond_others(means, shifts.tested, s.seed, MAX_Q)
    overall["control_runs"] = len(means)
    base, tuned = (activations[name]["response"] for name in ("base", "tuned"))
    overall["null_reports"] = count_null_reports(base, tuned, shifts, s.nulls, s.seed)
    block.summary = {
        "overall": overall,
        "verdicts": {
            name: verdict.to_json()
            for name, verdict in judge_block(
                overall, interventions["all"], quality[0], interventions["prompts"]
            ).items()
        },
        "nulls": [_summarize_null(name, shifts, null_gaps) for name, null_gaps in nulls.items()],
        "quality": quality,
        "causes": interventions,
        "features": features,
    }
    return block


def put_specific_first(order: Array, specific: Array | None) -> Array:
    """The same features, those first that differ from the control."""
    if specific is None:
        return order
    return numpy.concatenate([order[specific[order]], order[~specific[order]]])


def _make_untrained(inputs: ComparisonInputs, like: Dictionary, layer: int, l0: float, seed: int) -> Dictionary:
    residuals = inputs.residuals["base"]["response"]
    states = torch.cat([states[valid] for states, valid in zip(residuals.states[layer], residuals.masks, strict=True)])
    return make_untrained(like, states, max(1, round(l0)), seed)


def _count(shifts: FeatureShifts) -> dict[str, int]:
    specific = int(shifts.specific.sum()) if shifts.specific is not None else None
    counts = {"n_tested": int(shifts.tested.sum()), "n_reported": int(shifts.reported.sum())}
    return counts if specific is None else counts | {"n_specific": specific}


def _encode_and_test(
    inputs: ComparisonInputs,
    dictionary: Dictionary,
    layer: int,
    s: SaeSettings,
    device: torch.device,
    kinds: Sequence[str] = (),
) -> tuple[FeatureShifts, dict[str, dict[str, FeatureActivations]], dict[str, Array]]:
    """Encode every variant and text set (or those of `kinds`) with one dictionary, and test the shifts.

    The test is on the base model's answers.

    Returns the shifts, the activations[variant][set], and the nulls: for each, a (prompts, features) difference between
    the base model and itself in another precision or batching, which --shuffle-pairs does not affect.
    """
    activations = {
        variant: {
            kind: encode_residuals(dictionary, residuals, layer, device)
            for kind, residuals in sets.items()
            if not kinds or kind in kinds
        }
        for variant, sets in inputs.residuals.items()
    }
    base, tuned = activations["base"]["response"], activations["tuned"]["response"]
    nulls = {name: activations[name]["response"].mean - base.mean for name in NULLS}
    if s.shuffle_pairs:
        base, tuned = swap_variants(base, tuned, s.seed)
        activations["base"]["response"], activations["tuned"]["response"] = base, tuned
    return _compare(activations, nulls, s), activations, nulls


def _compare(
    activations: dict[str, dict[str, FeatureActivations]],
    nulls: dict[str, Array],
    s: SaeSettings,
    questions: Array | None = None,
) -> FeatureShifts:
    """Test the shifts on all questions, or on some of them (a mask)."""
    rows = numpy.ones(len(activations["base"]["response"].mean), bool) if questions is None else questions
    base, tuned = (select_rows(activations[name]["response"], rows) for name in ("base", "tuned"))
    controls = [select_rows(sets["response"], rows) for name, sets in activations.items() if name.startswith("control")]
    min_active = max(2, round(s.min_active * rows.mean()))
    return compare_features(
        base, tuned, [gaps[rows] for gaps in nulls.values()], controls=controls, min_active=min_active, seed=s.seed
    )


def _list_text_sources(inputs: ComparisonInputs) -> list[TextSource]:
    pairs = [("base", kind) for kind in inputs.residuals["base"]] + [("tuned", "own"), ("tuned", "response")]
    return [TextSource(variant, kind, inputs.rows[kind], inputs.residuals[variant][kind]) for variant, kind in pairs]


def _run_interventions(
    inputs: ComparisonInputs,
    dictionary: Dictionary,
    shifts: FeatureShifts,
    untrained: tuple[Dictionary, FeatureShifts],
    *,
    layer: int,
    shown: list[int],
    selecting: Array,
    s: SaeSettings,
) -> dict[str, Any]:
    trying = [n for n, question in enumerate(inputs.own_questions) if not selecting[question]][: s.causal_prompts]
    base, tuned = (inputs.residuals[name]["response"] for name in ("base", "tuned"))
    order = put_specific_first(untrained[1].rank_reported(), untrained[1].specific)[: len(shown)]
    unit = torch.nn.functional.normalize(untrained[0].decoder, dim=1)
    delta = torch.tensor(untrained[1].delta[order], dtype=unit.dtype, device=unit.device)
    return InterventionTest(
        variants=inputs.variants,
        dictionary=dictionary,
        layer=layer,
        shifts=shifts,
        rows=[inputs.rows["own"][n] for n in trying],
        norm=float(base.norms[:, layer].mean()),
        strength=s.steering,
        matched=s.matched_features,
        seed=s.seed,
        yardsticks={
            "mean_difference": (tuned.means[:, layer] - base.means[:, layer])[torch.tensor(selecting)].float().mean(0),
            "untrained": delta @ unit[torch.tensor(order.copy(), device=unit.device)],
        },
    ).run(shown)


def _build_table(
    shifts: FeatureShifts,
    betas: Array,
    activations: dict[str, dict[str, FeatureActivations]],
    replication: Replication | None,
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
    if shifts.run_floor is not None:
        columns["run_floor"] = shifts.run_floor
    if replication is not None:
        columns |= {"matched": replication.matched, "replicated": replication.replicated}
    for kind in ("own", "text"):
        for variant in ("base", "tuned"):
            columns[f"{kind}_{variant}_mean"] = numpy.nanmean(activations[variant][kind].mean, axis=0)
    return columns


def _build_feature_row(table: dict[str, Array], feature: int) -> dict[str, Any]:
    row = {name: values[feature].item() for name, values in table.items()}
    low, high = row.pop("ci_low"), row.pop("ci_high")
    return row | {"direction": "up" if row["delta"] > 0 else "down", "ci95": [low, high]}


def _summarize_overall(
    shifts: FeatureShifts, activations: dict[str, dict[str, FeatureActivations]], replication: Replication | None
) -> dict[str, Any]:
    mean = float(numpy.abs(shifts.delta[shifts.tested]).mean()) if shifts.tested.any() else 0.0
    null = float(shifts.null_delta[shifts.tested].mean()) if shifts.tested.any() else 0.0
    overall = {
        "n_features": len(shifts.delta),
        "n_questions": len(activations["base"]["response"].mean),
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
    if replication is not None:
        count, unreported = int(shifts.reported.sum()), shifts.tested & ~shifts.reported
        overall["n_replicated"] = int(replication.replicated.sum())
        overall["replicated_share"] = overall["n_replicated"] / count if count else None
        overall["n_matched"] = int((replication.matched & shifts.reported).sum())
        overall["n_unreported"] = int(unreported.sum())
        overall["n_unreported_matched"] = int((replication.matched & unreported).sum())
        compared = numpy.flatnonzero(shifts.reported)
        compared = compared[:: max(1, len(compared) // MATCHED_FEATURES)].tolist()  # evenly, for the time it takes
        alike = match_unshifted(shifts, compared, len(compared))
        overall["n_alike"], overall["n_alike_matched"] = len(alike), int(replication.matched[alike].sum())
        if shifts.specific is not None:
            overall["n_specific_replicated"] = int((replication.replicated & shifts.specific).sum())
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
