"""Learn what a fine-tune adds: an SAE of the differences between the two models, token by token.

The dictionary of the base model has no feature for what only the updated model has. The difference SAE is trained on
updated - base and, in equal shares, on each control - base. It is trained on half of the questions and measured on the
other half. https://arxiv.org/abs/2504.02922 compares SAEs of differences with crosscoders.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import numpy
import torch

from phoque.extras import install_command
from phoque.probes.sae.block_comparison import NULLS, ComparisonInputs, put_specific_first
from phoque.probes.sae.dictionary import DIFFERENCES, Dictionary
from phoque.probes.sae.feature_cards import TextSource, build_cards
from phoque.probes.sae.feature_shifts import (
    MAX_Q,
    FeatureActivations,
    FeatureShifts,
    compare_features,
    encode_residuals,
)
from phoque.probes.sae.replication import find_replicated
from phoque.probes.sae.residuals import Residuals
from phoque.probes.sae.run_spread import count_beyond_others
from phoque.probes.sae.training import Recipe, fit_to_rows
from phoque.settings.compare_sae import SaeSettings

ACTIVE = 2  # directions that are active per token, on average
STEPS, BATCH = 600, 1024
LEARNING_RATE = 3e-3
RANDOM_DIRECTIONS = 64  # whose nearest features show what cosine chance gives
SEEDS = 2  # dictionaries; the second shows which directions replicate
TEXTS = ("response", "own", "text")
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
        return f"sae-lens is not installed; {install_command('sae')}"
    questions = len(inputs.rows["response"])
    trained_on = numpy.arange(questions) % 2 == 0
    swapped = numpy.zeros(questions, bool)
    if s.shuffle_pairs:
        swapped[numpy.random.default_rng(s.seed).permutation(questions)[: questions // 2]] = True
    signs = numpy.where(swapped, -1.0, 1.0)
    rows, tokens = _gather_training_rows(inputs, layer, trained_on, signs, s)
    if tokens < FEW_TOKENS * s.difference_features:
        return (
            f"{tokens} tokens are too few for {s.difference_features} directions; ask more questions, raise "
            "--max-new-tokens or lower --difference-features"
        )
    if not bool(rows.any()):
        return "the models do not differ on any token"
    dictionaries = [fit_differences(rows, s.difference_features, s.seed + n, device) for n in range(SEEDS)]
    measured = [_measure(inputs, d, layer, s, device, ~trained_on, signs) for d in dictionaries]
    shifts, listed = measured[0].shifts, _list_reported(measured[0].shifts)
    dictionaries[0].config["metadata"] |= {
        "reads": DIFFERENCES,
        "hook_indexing": f"output of decoder block {layer}, counted from 0",
    }
    return LearnedDifference(
        dictionaries[0],
        {
            "n_questions": int((~trained_on).sum()),
            "n_tokens_trained": tokens,
            "n_directions": s.difference_features,
            "n_active": int(shifts.tested.sum()),
            "n_reported": len(listed),
            "n_specific": None if shifts.specific is None else int(shifts.specific[listed].sum()),
            "control_beyond_controls": measured[0].control_beyond_controls,
            "explained": measured[0].explained,
            "nearest_by_chance": _measure_chance(known, s.seed),
            "directions": _describe(inputs, dictionaries, measured, known, layer, s, device),
        },
    )


def fit_differences(rows: torch.Tensor, directions: int, seed: int, device: torch.device) -> Dictionary:
    """Train a difference SAE on rows (tokens, hidden)."""
    recipe = Recipe("batchtopk", directions, min(ACTIVE, directions), BATCH, 1, LEARNING_RATE, seed)
    return fit_to_rows(recipe, rows, STEPS, device)


def subtract(
    variant: Residuals, base: Residuals, layer: int, rows: Sequence[int], signs: Sequence[float] | None = None
) -> Residuals:
    """The differences variant - base at one block, of some rows, as residuals that a dictionary can read.

    `signs` has one factor for each row, -1 to swap the two models.
    """
    factors = signs if signs is not None else [1.0] * len(rows)
    states = [
        sign * (variant.states[layer][n].float() - base.states[layer][n].float())
        for n, sign in zip(rows, factors, strict=True)
    ]
    index = torch.tensor(list(rows), dtype=torch.long)
    return Residuals({layer: states}, [base.masks[n] for n in rows], variant.means[index], base.norms[index])


def _gather_training_rows(
    inputs: ComparisonInputs, layer: int, trained_on: Array, signs: Array, s: SaeSettings
) -> tuple[torch.Tensor, int]:
    """The differences of every token of the questions to train on, and of every second unrelated text; and the tokens.

    Each of these tokens has one row for the updated model and one for each control.

    With controls, their differences on the same texts have an equal share, and the updated model's own answers are left
    out: a dictionary that saw one run alone would have a direction for what is private to that run and none for what is
    private to a control, so every run would seem to differ from the others.
    """
    residuals = inputs.residuals
    variants = ["tuned", *(name for name in residuals if name.startswith("control"))]
    # of the controls after the first, the base model's answers alone are read
    kinds = [k for k in TEXTS if all(k in residuals[v] for v in variants) and (len(variants) == 1 or k != "own")]
    questions = {"response": range(len(trained_on)), "own": inputs.own_questions}
    coins = numpy.random.default_rng([s.seed, 1])
    parts = []
    for kind in kinds:
        if kind in questions:
            numbers = [n for n, question in enumerate(questions[kind]) if trained_on[question]]
            factors = [float(signs[questions[kind][n]]) for n in numbers]
        else:
            numbers = list(range(0, len(inputs.rows[kind]), 2))
            factors = coins.choice((-1.0, 1.0), len(numbers)).tolist() if s.shuffle_pairs else [1.0] * len(numbers)
        for variant in variants:
            swaps = factors if variant == "tuned" else None
            difference = subtract(residuals[variant][kind], residuals["base"][kind], layer, numbers, swaps)
            parts += [states[valid] for states, valid in zip(difference.states[layer], difference.masks, strict=True)]
    rows = torch.cat(parts)
    return rows, len(rows) // len(variants)


@dataclass(frozen=True)
class Measured:
    """One dictionary's directions on the tested questions; `control_mean` (directions,) is the controls' mean."""

    shifts: FeatureShifts
    control_mean: Array | None
    control_beyond_controls: list[int]  # directions of each control beyond the others; empty with fewer than three
    explained: dict[str, float | None]  # share of the differences' sum of squares, by model


def _measure(
    inputs: ComparisonInputs,
    dictionary: Dictionary,
    layer: int,
    s: SaeSettings,
    device: torch.device,
    tested_on: Array,
    signs: Array,
) -> Measured:
    """Test the directions on the base model's answers to the questions of `tested_on` (a mask).

    Of each question, the activations of updated - base are compared with those of base - updated. If the models did
    not differ, a swap of the two would change nothing, which is what the sign-flip test assumes.
    """
    base, numbers = inputs.residuals["base"]["response"], [int(n) for n in numpy.flatnonzero(tested_on)]
    tested_signs = signs[numbers]

    def read(name: str, factors: Array | None = None) -> FeatureActivations:
        difference = subtract(inputs.residuals[name]["response"], base, layer, numbers, factors)
        return encode_residuals(dictionary, difference, layer, device)

    controls = {name: read(name) for name in inputs.residuals if name.startswith("control")}
    backward = -numpy.ones(len(numbers))
    shifts = compare_features(
        read("tuned", -tested_signs),
        read("tuned", tested_signs),
        [read(name).mean - read(name, backward).mean for name in NULLS],
        controls=list(controls.values()),
        min_active=max(2, round(s.min_active * tested_on.mean())),
        seed=s.seed,
    )
    means = [control.mean[numpy.isfinite(control.mean).all(1)] for control in controls.values()]
    factors_by_name = {"tuned": tested_signs, **dict.fromkeys(controls)}
    return Measured(
        shifts,
        numpy.mean([mean.mean(0) for mean in means], axis=0) if means else None,
        count_beyond_others(means, shifts.tested, s.seed, MAX_Q),
        {
            name: explain_share(
                dictionary, subtract(inputs.residuals[name]["response"], base, layer, numbers, factors), layer, device
            )
            for name, factors in factors_by_name.items()
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
        for kind in TEXTS
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
            "mean": float(shifts.tuned_mean[n]),
            "delta": float(shifts.delta[n]),
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
    """The feature of `known` that lies nearest to each direction of `order`, either way, and its cosine.

    A cosine below 0 means that the updated model has less of the feature.
    """
    cosines = _compare_directions(learned.decoder[torch.tensor(order.copy())], known)
    if not len(order):
        return [], []
    indices = cosines.abs().argmax(1)
    return indices.tolist(), cosines.gather(1, indices[:, None])[:, 0].tolist()


def _measure_chance(known: Dictionary, seed: int) -> float:
    """The median cosine of random directions with the nearest feature of a dictionary."""
    random_numbers = torch.Generator().manual_seed(seed)
    directions = torch.randn(RANDOM_DIRECTIONS, known.decoder.shape[1], generator=random_numbers)
    return float(_compare_directions(directions, known).abs().amax(1).median())


def _compare_directions(directions: torch.Tensor, known: Dictionary) -> torch.Tensor:
    """The cosines of directions (n, hidden) with all features of a dictionary: (n, features)."""
    unit = torch.nn.functional.normalize(directions.to(known.decoder.device), dim=1)
    return unit @ torch.nn.functional.normalize(known.decoder, dim=1).T
