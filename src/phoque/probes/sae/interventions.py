"""Do the shifted features cause the change? Steer the base model along them, and ablate them in the tuned model.

The outcome is the log-likelihood of the tuned model's own answers, in nats per token. Steering must make them more
likely under the base model, and ablation less likely under the tuned model, both by more than for random features that
were tested but did not shift.
"""

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy
import torch

from phoque.inference.likelihood import mean_nll
from phoque.inference.residual_stream import Steering, Turn, get_blocks
from phoque.probes import stats
from phoque.probes.sae.dictionary import Dictionary
from phoque.probes.sae.feature_shifts import FeatureShifts
from phoque.probes.sae.model_variants import ModelVariants

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Array = Any
RANDOM_TRIALS = 8  # features, or groups of features, that did not shift and are tested for comparison


@dataclass(frozen=True, kw_only=True)
class InterventionTest:
    """One block's dictionary and feature shifts, and the tuned model's answers, whose likelihood is the outcome."""

    variants: ModelVariants
    dictionary: Dictionary
    layer: int
    shifts: FeatureShifts
    rows: Sequence[Turn]
    norm: float  # the mean norm of the residual stream at this block
    strength: float
    seed: int

    def run(self, features: Sequence[int]) -> dict[str, Any]:
        """Test each feature and all of them together: {features: one row per feature, all: one row}.

        Each row has {push, ablate}, both with gain, random and p. Only features that rise are ablated.
        """
        rng = numpy.random.default_rng(self.seed)
        unshifted = self._shuffle_unshifted(rng)
        if not features or len(unshifted) < 2 or not self.rows:
            return {"features": [], "all": None, "prompts": len(self.rows), "random": 0}
        with self.variants.activate("base") as model:
            base_nll = numpy.array(mean_nll(model, self.rows))
            push_gains = {f: base_nll - self._measure_steered_nll(model, [f]) for f in features}
            random_push_gains = [base_nll - self._measure_steered_nll(model, [f]) for f in unshifted[:RANDOM_TRIALS]]
            joint_push_gain = base_nll - self._measure_steered_nll(model, features)
            groups = [
                rng.choice(unshifted, min(len(features), len(unshifted)), replace=False) for _ in range(RANDOM_TRIALS)
            ]
            group_push_gains = [base_nll - self._measure_steered_nll(model, list(group)) for group in groups]
        with self.variants.activate("tuned") as model:
            tuned_nll = numpy.array(mean_nll(model, self.rows))
            rising = [f for f in features if self.shifts.delta[f] > 0]
            ablate_gains = {f: self._measure_ablated_nll(model, [f]) - tuned_nll for f in rising}
            random_ablate_gains = (
                [self._measure_ablated_nll(model, [f]) - tuned_nll for f in unshifted[:RANDOM_TRIALS]] if rising else []
            )
            joint_ablate_gain = self._measure_ablated_nll(model, rising) - tuned_nll if rising else None
            group_ablate_gains = (
                [self._measure_ablated_nll(model, list(group[: len(rising)])) - tuned_nll for group in groups]
                if rising
                else []
            )
        rows = [
            {
                "feature_id": int(f),
                "push": self._compare_with_random(push_gains[f], random_push_gains),
                "ablate": self._compare_with_random(ablate_gains[f], random_ablate_gains)
                if f in ablate_gains
                else None,
            }
            for f in features
        ]
        joint = {
            "push": self._compare_with_random(joint_push_gain, group_push_gains),
            "ablate": self._compare_with_random(joint_ablate_gain, group_ablate_gains)
            if joint_ablate_gain is not None
            else None,
        }
        return {"features": rows, "all": joint, "prompts": len(self.rows), "random": min(RANDOM_TRIALS, len(unshifted))}

    def _shuffle_unshifted(self, rng: Any) -> Array:
        """Shuffle the features that were tested but not reported: the random comparison."""
        unshifted = numpy.flatnonzero(self.shifts.tested & ~self.shifts.reported)
        return rng.permutation(unshifted)

    def _compare_with_random(self, gains: Array, random: Sequence[Array]) -> dict[str, Any]:
        result = stats.paired_contrast(gains, numpy.mean(random, axis=0), self.seed)
        random_means = [float(random_gains.mean()) for random_gains in random]
        return {
            "gain": float(gains.mean()),
            "random": float(numpy.mean(random_means)),
            "random_max": max(random_means),
            "diff": result["diff"],
            "ci95": result["ci95"],
            "p": result["p"],
            "holds": bool(result["p"] < 0.05 and result["diff"] > 0 and gains.mean() > max(*random_means, 0.0)),
        }

    def _measure_steered_nll(self, model: "PreTrainedModel", features: Sequence[int]) -> Array:
        """Measure the NLL of the tuned answers under the base model while it is steered along the features.

        The features are weighted by their shifts; the sum is scaled to `strength` times the residual norm.
        """
        indices = torch.tensor([int(f) for f in features])
        unit = torch.nn.functional.normalize(self.dictionary.decoder[indices.to(self.dictionary.decoder.device)], dim=1)
        shift = torch.tensor(self.shifts.delta[indices.numpy()], device=unit.device, dtype=unit.dtype)
        shift = torch.where(shift == 0, 1e-6, shift)
        direction = torch.nn.functional.normalize(shift @ unit, dim=0)
        steering = Steering({self.layer: (self.strength * self.norm * direction)[None].to(model.device)})
        with steering.activate(model):
            return numpy.array(mean_nll(model, self.rows))

    def _measure_ablated_nll(self, model: "PreTrainedModel", features: Sequence[int]) -> Array:
        with ablate_features(model, self.dictionary, self.layer, features):
            return numpy.array(mean_nll(model, self.rows))


@contextmanager
def ablate_features(
    model: "PreTrainedModel", dictionary: Dictionary, layer: int, features: Sequence[int]
) -> Generator[None]:
    """Subtract the contribution of these features from the residual stream, at every token but the first."""
    indices = torch.tensor([int(f) for f in features], device=dictionary.decoder.device)

    def ablate(_: Any, __: Any, out: torch.Tensor) -> torch.Tensor:
        flat = out.reshape(-1, out.shape[-1])
        contribution = dictionary.encode(flat)[:, indices] @ dictionary.decoder[indices]
        ablated_states = (flat.float() - contribution).to(out.dtype).reshape(out.shape)
        return torch.cat([out[:, :1], ablated_states[:, 1:]], dim=1)

    hook = get_blocks(model)[layer].register_forward_hook(ablate)
    try:
        yield
    finally:
        hook.remove()
