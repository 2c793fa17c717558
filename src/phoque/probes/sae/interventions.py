"""Do the shifted features cause the change? Steer the base model along them, and ablate them in the tuned model.

The outcome is the log-likelihood of the tuned model's own answers, in nats per token, to questions that did not select
the features. Steering must make them more likely under the base model, and ablation less likely under the tuned model,
both by more than for features that are as active and did not shift. Beside it stand the mean-difference vector, which
beats SAE features in steering (AxBench, https://arxiv.org/abs/2501.17148), and directions that were never trained.
"""

from collections.abc import Generator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import cycle, islice
from typing import TYPE_CHECKING, Any

import numpy
import torch

from phoque.distributed.processes import current
from phoque.inference.likelihood import mean_nll
from phoque.inference.residual_stream import Steering, Turn, get_blocks
from phoque.probes import stats
from phoque.probes.sae.dictionary import Dictionary
from phoque.probes.sae.feature_shifts import FeatureShifts
from phoque.probes.sae.model_variants import ModelVariants

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Array = Any
GROUP_SHARE = 2  # one group of matched features is tried for each so many matched features
MAX_P = 0.05
RANK_QUANTILE = 0.95  # an effect must exceed those of this share of matched features


@dataclass(frozen=True, kw_only=True)
class Interventions:
    """What is done at one block, each by itself: directions that the base model is steered along, and resets.

    A direction (hidden,) is scaled to `length`; `resets` has lists of features of the tuned model that are reset to
    `base_mean` (features,).
    """

    layer: int
    rows: Sequence[Turn]
    length: float
    directions: list[torch.Tensor]
    resets: list[list[int]]
    base_mean: Array

    def steer(self, model: "PreTrainedModel", numbers: Sequence[int]) -> list[Array]:
        """The NLL of the rows, (rows,), steered along each of these directions; 0 stands for none, 1 for the first."""
        losses = []
        for number in numbers:
            vectors = {}
            if number:
                unit = torch.nn.functional.normalize(self.directions[number - 1].float(), dim=0)
                vectors[self.layer] = (self.length * unit)[None].to(model.device)
            with Steering(vectors).activate(model):
                losses.append(numpy.array(mean_nll(model, self.rows, share_prompts=False)))
        return losses

    def reset(self, model: "PreTrainedModel", dictionary: Dictionary, numbers: Sequence[int]) -> list[Array]:
        """The NLL of the rows, (rows,), with each of these lists of features reset; 0 stands for none."""
        losses = []
        for number in numbers:
            features = self.resets[number - 1] if number else []
            with reset_features(model, dictionary, self.layer, features, self.base_mean) if features else nullcontext():
                losses.append(numpy.array(mean_nll(model, self.rows, share_prompts=False)))
        return losses


@dataclass(frozen=True)
class Outcomes:
    """The NLL of every row, (rows,) each: of both models as they are, and under each intervention."""

    base: Array
    steered: list[Array]
    tuned: Array
    reset: list[Array]


def measure_interventions(
    planned: Interventions | None, variants: ModelVariants, dictionary: Dictionary
) -> Outcomes | None:
    """Measure what process 0 has planned, each process its share of it; None if it has planned nothing."""
    processes = current()
    plan = processes.broadcast_from_main(lambda: planned)
    if plan is None:
        return None
    with variants.activate("base") as model:
        base, *steered = processes.share_work([1] * (1 + len(plan.directions)), partial(plan.steer, model))
    with variants.activate("tuned") as model:
        tuned, *resets = processes.share_work([1] * (1 + len(plan.resets)), partial(plan.reset, model, dictionary))
    return Outcomes(base, steered, tuned, resets)


@dataclass(frozen=True, kw_only=True)
class InterventionTest:
    """One block's dictionary and feature shifts, and the tuned model's answers, whose likelihood is the outcome.

    `shifts` are those on the questions that selected the features; `rows` are answers to other questions. `yardsticks`
    are directions (hidden,) to steer along for comparison: the mean difference, and the sum of an untrained
    dictionary's features.
    """

    variants: ModelVariants
    dictionary: Dictionary
    layer: int
    shifts: FeatureShifts
    rows: Sequence[Turn]
    norm: float  # the mean norm of the residual stream at this block
    strength: float
    matched: int
    seed: int
    yardsticks: dict[str, torch.Tensor]

    def run(self, features: Sequence[int]) -> dict[str, Any]:
        """Test each feature and all of them together: {features: one row per feature, all: one row}.

        Each row has {push, ablate}, both with the gain, the share of the gap between the models, and those of matched
        features. p is corrected for the number of features (Holm). Only features that rise are ablated.
        """
        pool = match_unshifted(self.shifts, features, self.matched)
        if not features or len(pool) < 2 or not self.rows:
            measure_interventions(None, self.variants, self.dictionary)
            return {"features": [], "all": None, "prompts": len(self.rows), "random": 0}
        rng = numpy.random.default_rng(self.seed)
        rising = [f for f in features if self.shifts.delta[f] > 0]
        groups = [
            rng.choice(pool, min(len(features), len(pool)), replace=False)
            for _ in range(max(2, len(pool) // GROUP_SHARE))
        ]
        steered = [[f] for f in (*features, *pool)] + [list(features), *map(list, groups)]
        reset = [[f] for f in (*rising, *pool)] + [rising, *(list(group[: len(rising)]) for group in groups)]
        outcomes = measure_interventions(
            Interventions(
                layer=self.layer,
                rows=self.rows,
                length=self.strength * self.norm,
                directions=[d.cpu() for d in (*map(self._direction, steered), *self.yardsticks.values())],
                resets=reset if rising else [],
                base_mean=self.shifts.base_mean,
            ),
            self.variants,
            self.dictionary,
        )
        assert outcomes is not None
        gains = iter(outcomes.base - nll for nll in outcomes.steered)
        losses = iter(nll - outcomes.tuned for nll in outcomes.reset)
        pushed, ablated = dict(zip(features, gains, strict=False)), dict(zip(rising, losses, strict=False))
        matched_pushed, matched_ablated = list(islice(gains, len(pool))), list(islice(losses, len(pool)))
        joint_pushed, joint_ablated = next(gains), next(losses, None)
        groups_pushed, groups_ablated = list(islice(gains, len(groups))), list(losses)
        yardsticks = dict(zip(self.yardsticks, gains, strict=True))
        gap = float((outcomes.base - outcomes.tuned).mean())
        by_kind = {
            "push": self._compare_all(pushed, matched_pushed, gap),
            "ablate": self._compare_all(ablated, matched_ablated, gap),
        }
        joint = {
            "push": self._compare(joint_pushed, groups_pushed, gap),
            "ablate": None if joint_ablated is None else self._compare(joint_ablated, groups_ablated, gap),
            "gap": gap,
            "strength": float(find_strength(self.shifts)[list(features)].mean()),
            "random_strength": float(find_strength(self.shifts)[pool].mean()),
            "group_size": min(len(features), len(pool)),
            "groups": len(groups),
            **{f"{name}_share": _share(float(gains.mean()), gap) for name, gains in yardsticks.items()},
        }
        rows = [{"feature_id": int(f), **{kind: tested.get(f) for kind, tested in by_kind.items()}} for f in features]
        return {"features": rows, "all": joint, "prompts": len(self.rows), "random": len(pool)}

    def _compare_all(self, gains: dict[int, Array], matched: Sequence[Array], gap: float) -> dict[int, dict[str, Any]]:
        """Each feature's comparison, with p corrected for their number."""
        comparisons = {f: self._compare(values, matched, gap) for f, values in gains.items()}
        adjusted = stats.holm(numpy.array([row["p"] for row in comparisons.values()])) if comparisons else []
        for row, p in zip(comparisons.values(), adjusted, strict=True):
            row["p"], row["holds"] = float(p), bool(row["holds"] and p < MAX_P)
        return comparisons

    def _compare(self, gains: Array, matched: Sequence[Array], gap: float) -> dict[str, Any]:
        result = stats.paired_contrast(gains, numpy.mean(matched, axis=0), self.seed)
        means = [float(values.mean()) for values in matched]
        limit = max(float(numpy.quantile(means, RANK_QUANTILE)), 0.0)
        gain = float(gains.mean())
        return {
            "gain": gain,
            "gap_share": _share(gain, gap),
            "random": float(numpy.mean(means)),
            "random_share": _share(float(numpy.mean(means)), gap),
            "random_max": max(means),
            "random_max_share": _share(max(means), gap),
            "diff": result["diff"],
            "ci95": result["ci95"],
            "p": result["p"],
            "holds": bool(result["p"] < MAX_P and result["diff"] > 0 and gain > limit),
        }

    def _direction(self, features: Sequence[int]) -> torch.Tensor:
        """The sum of the features' unit directions, weighted by their shifts."""
        indices = torch.tensor([int(f) for f in features])
        unit = torch.nn.functional.normalize(self.dictionary.decoder[indices.to(self.dictionary.decoder.device)], dim=1)
        shift = torch.tensor(self.shifts.delta[indices.numpy()], device=unit.device, dtype=unit.dtype)
        return torch.where(shift == 0, 1e-6, shift) @ unit


def match_unshifted(shifts: FeatureShifts, features: Sequence[int], most: int) -> Array:
    """At most `most` tested features that did not shift, the nearest to the given ones in how often and how strongly
    they are active; the given ones take turns.
    """
    unshifted = numpy.flatnonzero(shifts.tested & ~shifts.reported)
    if not len(unshifted) or not len(features):
        return unshifted[:0]
    size = numpy.log(numpy.stack([find_frequency(shifts), find_strength(shifts)], axis=1) + 1e-6)
    size /= numpy.maximum(size[shifts.tested].std(0), 1e-9)
    nearest = [
        iter(unshifted[numpy.argsort(numpy.linalg.norm(size[unshifted] - size[f], axis=1), kind="stable")])
        for f in features
    ]
    pool: dict[int, None] = {}
    for candidates in cycle(nearest):
        if len(pool) == min(most, len(unshifted)):
            break
        pool[next(int(f) for f in candidates if int(f) not in pool)] = None
    return numpy.array([*pool])


def find_frequency(shifts: FeatureShifts) -> Array:
    """The share of tokens at which each feature is active, in the model where that is larger."""
    return numpy.maximum(shifts.base_freq, shifts.tuned_freq)


def find_strength(shifts: FeatureShifts) -> Array:
    """The mean activation of each feature, in the model where that is larger."""
    return numpy.maximum(shifts.base_mean, shifts.tuned_mean)


def _share(gain: float, gap: float) -> float:
    """A gain as a share of the gap between the models; 0 if the tuned model does not make its answers likelier."""
    return gain / gap if gap > 0 else 0.0


@contextmanager
def reset_features(
    model: "PreTrainedModel", dictionary: Dictionary, layer: int, features: Sequence[int], base_mean: Array
) -> Generator[None]:
    """Reset these features to the base model's mean activation, at every token but the first.

    `base_mean` (features,) is in units of the residual stream. Removal would take from the tuned model what the base
    model has as well.
    """
    device = dictionary.decoder.device
    indices = torch.tensor([int(f) for f in features], device=device)
    directions = dictionary.decoder[indices]
    kept = torch.tensor(base_mean[indices.cpu().numpy()], device=device, dtype=directions.dtype)
    kept = kept / directions.norm(dim=1).clamp(min=1e-12)

    def reset(_: Any, __: Any, out: torch.Tensor) -> torch.Tensor:
        flat = out.reshape(-1, out.shape[-1])
        contribution = (dictionary.encode(flat)[:, indices] - kept) @ directions
        changed = (flat.float() - contribution).to(out.dtype).reshape(out.shape)
        return torch.cat([out[:, :1], changed[:, 1:]], dim=1)

    hook = get_blocks(model)[layer].register_forward_hook(reset)
    try:
        yield
    finally:
        hook.remove()
