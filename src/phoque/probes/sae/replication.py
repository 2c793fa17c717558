"""Which features recur in the dictionaries of other seeds, matched one-to-one, and shift alike there."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy
import torch

from phoque.probes.sae.dictionary import Dictionary
from phoque.probes.sae.feature_shifts import FeatureShifts

REPLICATION_COSINE = 0.7  # minimum cosine at which features of two dictionaries count as the same feature

Array = Any


@dataclass(frozen=True)
class Replication:
    """Which features have a partner in every other dictionary, and of which of them that partner shifts alike."""

    matched: Array
    replicated: Array


def find_replicated(
    dictionaries: Sequence[Dictionary], shifts_by_seed: Sequence[FeatureShifts], device: torch.device
) -> Replication | None:
    """Match all tested features one-to-one with those of the other dictionaries.

    A feature is matched at a cosine of REPLICATION_COSINE, and replicates if its partner is reported too and shifts in
    the same direction. None if there is only one dictionary.
    """
    if len(dictionaries) == 1:
        return None
    first = shifts_by_seed[0]
    features = numpy.flatnonzero(first.tested)
    matched = numpy.zeros(dictionaries[0].features, bool)
    matched[features] = True
    replicated = first.reported.copy()
    for other_dictionary, other_shifts in zip(dictionaries[1:], shifts_by_seed[1:], strict=True):
        partners, _ = match_features(dictionaries[0], other_dictionary, features, device, REPLICATION_COSINE)
        has_partner = partners >= 0
        same_sign = numpy.sign(other_shifts.delta[partners]) == numpy.sign(first.delta[features])
        matched[features] &= has_partner
        replicated[features] &= has_partner & other_shifts.reported[partners] & same_sign
    return Replication(matched, replicated)


def match_features(
    source: Dictionary, target: Dictionary, features: Array, device: torch.device, least: float
) -> tuple[Array, Array]:
    """Match features of `source` one-to-one with those of `target` whose directions have a cosine of `least` or more.

    Returns (indices, cosines); the index of a feature without a partner is -1. Pairs are made from the highest cosine
    down, which gives the optimal assignment wherever no two features compete for one partner.
    """
    indices, cosines = numpy.full(len(features), -1), numpy.zeros(len(features))
    if not len(features):
        return indices, cosines
    unit = [torch.nn.functional.normalize(d.decoder.to(device), dim=1) for d in (source, target)]
    similarity = unit[0][torch.tensor(features, device=device)] @ unit[1].T
    rows, columns = (similarity >= least).nonzero(as_tuple=True)
    values = similarity[rows, columns]
    taken: set[int] = set()
    for place in values.argsort(descending=True, stable=True).tolist():
        row, column = int(rows[place]), int(columns[place])
        if indices[row] < 0 and column not in taken:
            indices[row], cosines[row] = column, float(values[place])
            taken.add(column)
    return indices, cosines
