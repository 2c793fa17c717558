"""Learn what a fine-tune adds: a dictionary of the differences between the two models, token by token.

The dictionary of the base model has no feature for what only the updated model has. This one is trained on updated
minus base, on half of the questions, and measured on the other half, beside the controls' differences read with the
same dictionary (SAEs on activation differences: https://arxiv.org/abs/2504.02922 compares them with crosscoders).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import numpy
import torch

from phoque.probes.sae.block_comparison import NULLS, ComparisonInputs, put_specific_first
from phoque.probes.sae.dictionary import Dictionary
from phoque.probes.sae.feature_cards import TextSource, build_cards
from phoque.probes.sae.feature_shifts import FeatureActivations, FeatureShifts, compare_features, encode_residuals
from phoque.probes.sae.replication import find_replicated
from phoque.probes.sae.residuals import Residuals
from phoque.probes.sae.training import Recipe, fit_to_rows
from phoque.settings.compare_sae import SaeSettings

ACTIVE = 2  # directions that are active per token, on average
STEPS, BATCH = 600, 1024
LEARNING_RATE = 3e-3
SEEDS = 2  # dictionaries; the second shows which directions replicate
TRAINED_ON = ("response", "own", "text")
FEW_TOKENS = 8  # tokens per direction that are needed to learn it

Array = Any


@dataclass(frozen=True)
class LearnedDifference:
    """The dictionary, its directions' activations as rows for the report, and the numbers above them."""

    dictionary: Dictionary
    summary: dict[str, Any]


def learn_difference(
    inputs: ComparisonInputs, known: Dictionary, layer: int, s: SaeSettings, device: torch.device
) -> LearnedDifference | str:
    """Train dictionaries on the differences at one block and measure their directions; or say why that is not done.

    `known` is the dictionary of the base model, whose nearest feature is given for each direction.
    """
    if s.difference_features == 0:
        return "--difference-features is 0"
    if find_spec("sae_lens") is None:
        return "sae-lens is not installed; pip install 'phoque[sae]'"
    questions = len(inputs.rows["response"])
    trained_on = numpy.arange(questions) % 2 == 0
    swapped = numpy.zeros(questions, bool)
    if s.shuffle_pairs:
        swapped[numpy.random.default_rng(s.seed).permutation(questions)[: questions // 2]] = True
    rows = _gather_training_rows(inputs, layer, trained_on, swapped)
    if len(rows) < FEW_TOKENS * s.difference_features:
        return (
            f"{len(rows)} tokens are too few for {s.difference_features} directions; ask more questions, raise "
            "--max-new-tokens or lower --difference-features"
        )
    if not bool(rows.any()):
        return "the models do not differ on any token"
    recipes = [
        Recipe("batchtopk", s.difference_features, ACTIVE, BATCH, 1, LEARNING_RATE, s.seed + n) for n in range(SEEDS)
    ]
    dictionaries = [fit_to_rows(recipe, rows, STEPS, device) for recipe in recipes]
    measured = [_measure(inputs, d, layer, s, device, ~trained_on, swapped) for d in dictionaries]
    shifts, listed = measured[0].shifts, _list_reported(measured[0].shifts)
    return LearnedDifference(
        dictionaries[0],
        {
            "n_questions": int((~trained_on).sum()),
            "n_tokens_trained": len(rows),
            "n_directions": s.difference_features,
            "n_active": int(shifts.tested.sum()),
            "n_reported": len(listed),
            "n_specific": None if shifts.specific is None else int(shifts.specific[listed].sum()),
            "explained": measured[0].explained,
            "directions": _describe(inputs, dictionaries, measured, known, layer, s, device),
        },
    )


def subtract(variant: Residuals, base: Residuals, layer: int, rows: Sequence[int], sign: float = 1.0) -> Residuals:
    """The differences variant - base at one block, of some rows, as residuals that a dictionary can read."""
    states = [sign * (variant.states[layer][n].float() - base.states[layer][n].float()) for n in rows]
    index = torch.tensor(list(rows), dtype=torch.long)
    return Residuals({layer: states}, [base.masks[n] for n in rows], variant.means[index], base.norms[index])


def _gather_training_rows(inputs: ComparisonInputs, layer: int, trained_on: Array, swapped: Array) -> torch.Tensor:
    """The differences of every token of the questions to train on, and of every second unrelated text."""
    base, tuned = inputs.residuals["base"], inputs.residuals["tuned"]
    questions = {"response": range(len(trained_on)), "own": inputs.own_questions}
    parts = []
    for kind in TRAINED_ON:
        if kind in questions:
            used = [(n, q) for n, q in enumerate(questions[kind]) if trained_on[q]]
            signs = [-1.0 if swapped[q] else 1.0 for _, q in used]
            numbers = [n for n, _ in used]
        else:
            numbers = list(range(0, len(inputs.rows[kind]), 2))
            signs = [1.0] * len(numbers)
        difference = subtract(tuned[kind], base[kind], layer, numbers)
        parts += [
            sign * states[valid]
            for sign, states, valid in zip(signs, difference.states[layer], difference.masks, strict=True)
        ]
    return torch.cat(parts)


@dataclass(frozen=True)
class Measured:
    """One dictionary's directions on the tested questions; `control_mean` (directions,) is the controls' mean."""

    shifts: FeatureShifts
    control_mean: Array | None
    explained: dict[str, float | None]  # share of the differences' sum of squares, by model


def _measure(
    inputs: ComparisonInputs,
    dictionary: Dictionary,
    layer: int,
    s: SaeSettings,
    device: torch.device,
    tested_on: Array,
    swapped: Array,
) -> Measured:
    """Test the directions on the base model's answers to the questions of `tested_on` (a mask).

    Of each question, the activations of updated - base are compared with those of base - updated. If the models did
    not differ, a swap of the two would change nothing, which is what the sign-flip test assumes.
    """
    base, numbers = inputs.residuals["base"]["response"], [int(n) for n in numpy.flatnonzero(tested_on)]

    def read(name: str, sign: float = 1.0) -> FeatureActivations:
        difference = subtract(inputs.residuals[name]["response"], base, layer, numbers, sign)
        return encode_residuals(dictionary, difference, layer, device)

    forward, backward = read("tuned"), read("tuned", -1.0)
    flipped = swapped[numbers]
    for a, b in ((forward.mean, backward.mean), (forward.active, backward.active)):
        a[flipped], b[flipped] = b[flipped].copy(), a[flipped].copy()
    controls = {name: read(name) for name in inputs.residuals if name.startswith("control")}
    shifts = compare_features(
        backward,
        forward,
        [read(name).mean - read(name, -1.0).mean for name in NULLS],
        controls=list(controls.values()),
        min_active=max(2, round(s.min_active * tested_on.mean())),
        seed=s.seed,
    )
    return Measured(
        shifts,
        numpy.mean([numpy.nanmean(control.mean, axis=0) for control in controls.values()], axis=0)
        if controls
        else None,
        {
            name: explain_share(
                dictionary, subtract(inputs.residuals[name]["response"], base, layer, numbers), layer, device
            )
            for name in ("tuned", *controls)
        },
    )


def explain_share(dictionary: Dictionary, difference: Residuals, layer: int, device: torch.device) -> float | None:
    """What share of the sum of squares of the differences the dictionary explains; None if there is no difference."""
    total = left = 0.0
    for states, valid in zip(difference.states[layer], difference.masks, strict=True):
        x = states[valid].to(device)
        total += float(x.square().sum())
        left += float((x - dictionary.decode(dictionary.encode(x))).square().sum())
    return 1 - left / total if total else None


def _describe(
    inputs: ComparisonInputs,
    dictionaries: Sequence[Dictionary],
    measured: Sequence[Measured],
    known: Dictionary,
    layer: int,
    s: SaeSettings,
    device: torch.device,
) -> list[dict[str, Any]]:
    """One row per reported direction: those first that differ from the control, then the strongest."""
    shifts, control_mean = measured[0].shifts, measured[0].control_mean
    order = _list_reported(shifts)
    replication = find_replicated(dictionaries, [m.shifts for m in measured], device)
    base, tuned = inputs.residuals["base"], inputs.residuals["tuned"]
    sources = [
        TextSource(
            "tuned", kind, inputs.rows[kind], subtract(tuned[kind], base[kind], layer, range(len(inputs.rows[kind])))
        )
        for kind in TRAINED_ON
    ]
    with inputs.variants.activate("base") as model:
        cards = build_cards(
            dictionaries[0],
            [int(n) for n in order[: s.cards]],
            sources=sources,
            layer=layer,
            model=model,
            tokenizer=inputs.tokenizer,
            device=device,
        )
    nearest, cosines = _find_nearest(dictionaries[0], known, order)
    rows = []
    for place, n in enumerate(order):
        row = {
            "direction": int(n),
            "mean": float(shifts.delta[n]),
            "ci95": [float(shifts.ci_low[n]), float(shifts.ci_high[n])],
            "q_bh": float(shifts.q[n]),
            "share_of_tokens": float(shifts.tuned_freq[n]),
            "active_prompts": int(shifts.active_prompts[n]),
            "replicated": bool(replication.replicated[n]) if replication else None,
            "nearest_feature": nearest[place],
            "nearest_cosine": cosines[place],
        }
        if shifts.specific is not None and control_mean is not None:
            row |= {"control_mean": float(control_mean[n]), "specific_vs_control": bool(shifts.specific[n])}
        rows.append(row | (cards[place] if place < len(cards) else {}))
    return rows


def _list_reported(shifts: FeatureShifts) -> Array:
    """The reported directions: those first that differ from the control, then the strongest.

    A direction that is more active on base - updated is left out: it was learned from few tokens of the other sign.
    """
    order = shifts.rank_reported()
    return put_specific_first(order[shifts.delta[order] > 0], shifts.specific)


def _find_nearest(learned: Dictionary, known: Dictionary, order: Array) -> tuple[list[int], list[float]]:
    """The feature of `known` whose direction is nearest to each direction of `order`, and its cosine."""
    directions = torch.nn.functional.normalize(learned.decoder[torch.tensor(order.copy())], dim=1)
    cosines = directions @ torch.nn.functional.normalize(known.decoder.to(directions.device), dim=1).T
    values, indices = cosines.max(1) if len(order) else (torch.empty(0), torch.empty(0))
    return [int(n) for n in indices], values.tolist()
