"""One block's comparison, from what both models held to plain numbers fit for JSON."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy
import torch

from phoque.inference.residual_stream import Turn
from phoque.probes.sae.dictionary import Dictionary
from phoque.probes.sae.feature_cards import Passage, cards
from phoque.probes.sae.feature_shifts import Coded, Shifts, coded, latent_scaling, shifts, swapped, twins
from phoque.probes.sae.interventions import Trial
from phoque.probes.sae.model_variants import ModelVariants
from phoque.probes.sae.residuals import Heard
from phoque.settings.compare_sae import SaeSettings

Array = Any
NULLS = ("dtype", "packing")
TWIN = 0.7  # the cosine from which two features of two dictionaries are one


@dataclass
class Audit:
    """Texts by set, and what every side held over them: heard[side][set]."""

    sides: ModelVariants
    rows: dict[str, list[Turn]]
    heard: dict[str, dict[str, Heard]]
    tokenizer: Any


@dataclass
class Block:
    """What one block showed: `summary` goes into the report, `table` is a row a feature, for all of them."""

    layer: int
    summary: dict[str, Any]
    table: dict[str, Array]
    prompt_shift: Array
    prompt_null: Array
    warnings: list[str] = field(default_factory=list)


def measured(
    audit: Audit,
    dictionaries: Sequence[Dictionary],
    layer: int,
    quality: list[dict[str, Any]],
    s: SaeSettings,
    on: torch.device,
    say: Any,
) -> Block:
    """Compare both models at one block through its dictionaries, the first of which is reported."""
    found = [_through(audit, d, layer, s, on) for d in dictionaries]
    own, sides, equal = found[0]
    order = own.order()
    say(f"block {layer}: {len(order)} of {int(own.tested.sum())} features shifted; looking at them")
    betas = latent_scaling(
        dictionaries[0], *(audit.heard[side]["response"] for side in ("base", "tuned")), layer, own.delta > 0, on
    )
    if own.specific is None:
        leading = order
    else:  # what the control shares is no find: it comes after
        leading = numpy.concatenate([order[own.specific[order]], order[~own.specific[order]]])
    shown = [int(f) for f in leading[: s.cards]]
    with audit.sides.on("base") as model:
        about = cards(dictionaries[0], shown, _passages(audit), layer, model, audit.tokenizer, on)
    causes = _causes(audit, dictionaries[0], own, layer, shown, s)
    replicated = _replicated(dictionaries, [one for one, *_ in found], order, on)
    table = _table(own, betas, sides, replicated)
    features = [_feature(table, f) for f in order]
    by_cause = {row["feature_id"]: row for row in causes["features"]}
    for row in features:
        if row["feature_id"] in shown:
            row |= about[shown.index(row["feature_id"])] | {"cause": by_cause.get(row["feature_id"])}
    features.sort(key=lambda row: shown.index(row["feature_id"]) if row["feature_id"] in shown else len(shown))
    gaps, null = _prompt_shifts(sides, equal)
    block = Block(layer, {}, table, gaps, null)
    block.summary = {
        "overall": _overall(own, sides, replicated),
        "nulls": [_null(name, own, gap) for name, gap in equal.items()],
        "quality": quality,
        "causes": causes,
        "features": features,
    }
    return block


def _through(
    audit: Audit, dictionary: Dictionary, layer: int, s: SaeSettings, on: torch.device
) -> tuple[Shifts, dict[str, dict[str, Coded]], dict[str, Array]]:
    """The shifts on the base's answers, every side of every set through one dictionary, and what equal weights show.

    That is (prompts, features) a null: how far the base in other numbers is from the base, whatever is swapped.
    """
    sides = {
        side: {kind: coded(dictionary, held, layer, on) for kind, held in sets.items()}
        for side, sets in audit.heard.items()
    }
    one, other = sides["base"]["response"], sides["tuned"]["response"]
    equal = {name: sides[name]["response"].mean - one.mean for name in NULLS}
    if s.shuffle_pairs:
        one, other = swapped(one, other, s.seed)
        sides["base"]["response"], sides["tuned"]["response"] = one, other
    control = sides["control"]["response"] if "control" in sides else None
    return shifts(one, other, [*equal.values()], control, s.min_active, s.seed), sides, equal


def _passages(audit: Audit) -> list[Passage]:
    wanted = [("base", kind) for kind in audit.heard["base"]] + [("tuned", "own"), ("tuned", "response")]
    return [Passage(side, kind, audit.rows[kind], audit.heard[side][kind]) for side, kind in wanted]


def _causes(
    audit: Audit, dictionary: Dictionary, own: Shifts, layer: int, shown: list[int], s: SaeSettings
) -> dict[str, Any]:
    rows = audit.rows["own"][: s.causal_prompts]
    norm = float(audit.heard["base"]["response"].norms[:, layer].mean())
    return Trial(audit.sides, dictionary, layer, own, rows, norm, s.steering, s.seed).run(shown)


def _replicated(
    dictionaries: Sequence[Dictionary], found: Sequence[Shifts], order: Array, on: torch.device
) -> Array | None:
    """For every reported feature whether each other dictionary has it, and reports it, too: (features, seeds - 1)."""
    if len(dictionaries) == 1:
        return None
    made = numpy.zeros((dictionaries[0].features, len(dictionaries) - 1), bool)
    for n, (other, theirs) in enumerate(zip(dictionaries[1:], found[1:], strict=True)):
        twin, cosine = twins(dictionaries[0], other, order, on)
        same = numpy.sign(theirs.delta[twin]) == numpy.sign(found[0].delta[order])
        made[order, n] = (cosine >= TWIN) & theirs.reported[twin] & same
    return made


def _table(own: Shifts, betas: Array, sides: dict[str, dict[str, Coded]], replicated: Array | None) -> dict[str, Array]:
    columns = {
        "feature_id": numpy.arange(len(own.delta)),
        "base_mean": own.base,
        "tuned_mean": own.tuned,
        "delta": own.delta,
        "ci_low": own.low,
        "ci_high": own.high,
        "d_z": own.d_z,
        "p_perm": own.p,
        "q_bh": own.q,
        "p_maxT": own.p_max,
        "null_delta": own.null,
        "above_null": own.above_null,
        "active_prompts": own.active_prompts,
        "base_freq": own.base_active,
        "tuned_freq": own.tuned_active,
        "beta_base": betas[0],
        "beta_tuned": betas[1],
        "tested": own.tested,
        "reported": own.reported,
    }
    if own.specific is not None:
        columns |= {"control_delta": own.control, "specific_vs_control": own.specific}
    if replicated is not None:
        columns["replicated"] = replicated.all(1)
    for kind in ("own", "text"):
        for side in ("base", "tuned"):
            columns[f"{kind}_{side}_mean"] = numpy.nanmean(sides[side][kind].mean, axis=0)
    return columns


def _feature(table: dict[str, Array], feature: int) -> dict[str, Any]:
    row = {name: values[feature].item() for name, values in table.items()}
    low, high = row.pop("ci_low"), row.pop("ci_high")
    return row | {"direction": "up" if row["delta"] > 0 else "down", "ci95": [low, high]}


def _overall(own: Shifts, sides: dict[str, dict[str, Coded]], replicated: Array | None) -> dict[str, Any]:
    mean = float(numpy.abs(own.delta[own.tested]).mean()) if own.tested.any() else 0.0
    null = float(own.null[own.tested].mean()) if own.tested.any() else 0.0
    found = {
        "n_features": len(own.delta),
        "n_tested": int(own.tested.sum()),
        "n_significant": int((numpy.nan_to_num(own.q, nan=1.0) < 0.05).sum()),
        "n_reported": int(own.reported.sum()),
        "n_up": int((own.reported & (own.delta > 0)).sum()),
        "mean_abs_feature_shift": mean,
        "null_mean_abs_feature_shift": null,
        "ratio_to_null": mean / null if null else None,
        "null_floor": own.floor,
        "ev": {side: {kind: one.explained for kind, one in sets.items()} for side, sets in sides.items()},
        "ev_base": sides["base"]["response"].explained,
        "ev_tuned": sides["tuned"]["response"].explained,
    }
    if own.specific is not None:
        found |= {"n_specific": int(own.specific.sum()), "ev_control": sides["control"]["response"].explained}
    if replicated is not None:
        count = int(own.reported.sum())
        found["n_replicated"] = int(replicated.all(1).sum())
        found["replicated_share"] = found["n_replicated"] / count if count else None
    return found


def _null(name: str, own: Shifts, gap: Array) -> dict[str, Any]:
    gaps = numpy.abs(numpy.nanmean(gap, axis=0))[own.tested]
    gaps = gaps if len(gaps) else numpy.zeros(1)
    return {
        "name": name,
        "mean_abs": float(gaps.mean()),
        "max_abs": float(gaps.max()),
        "q99": float(numpy.quantile(gaps, 0.99)),
    }


def _prompt_shifts(sides: dict[str, dict[str, Coded]], equal: dict[str, Array]) -> tuple[Array, Array]:
    """A number a prompt: how much all features together shift; and the same of the nulls, (nulls, prompts)."""
    gap = sides["tuned"]["response"].mean - sides["base"]["response"].mean
    return numpy.abs(gap).sum(1), numpy.stack([numpy.abs(null).sum(1) for null in equal.values()])
