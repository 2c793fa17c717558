"""Do the shifted features carry the change? The base is pushed along them, and they are taken out of the tuned model.

The measure is how likely the tuned model's own answers are, in nats a token: pushing must make them likelier to the
base, taking out must make them less likely to the tuned model, both by more than other features of the same kind do.
"""

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy
import torch

from phoque.inference.likelihood import mean_nll
from phoque.inference.residual_stream import Steering, Turn, blocks
from phoque.probes import stats
from phoque.probes.sae.dictionary import Dictionary
from phoque.probes.sae.feature_shifts import Shifts
from phoque.probes.sae.model_variants import ModelVariants

Array = Any
RANDOM = 8  # features, or groups of them, that are tried for comparison


@dataclass(frozen=True)
class Trial:
    """One block's dictionary, the shifts in it, and the answers of the tuned model that everything is measured on."""

    sides: ModelVariants
    dictionary: Dictionary
    layer: int
    found: Shifts
    rows: Sequence[Turn]
    norm: float  # the mean norm of the residual stream there
    strength: float
    seed: int

    def run(self, features: Sequence[int]) -> dict[str, Any]:
        """{features: a row for each, all: of those together}; every row {push, ablate} with gain, random, p."""
        chance = numpy.random.default_rng(self.seed)
        others = self._others(chance)
        if not features or len(others) < 2 or not self.rows:
            return {"features": [], "all": None, "prompts": len(self.rows), "random": 0}
        with self.sides.on("base") as model:
            before = numpy.array(mean_nll(model, self.rows))
            pushed = {f: before - self._nll_pushed(model, [f]) for f in features}
            random = [before - self._nll_pushed(model, [f]) for f in others[:RANDOM]]
            together = before - self._nll_pushed(model, features)
            groups = [chance.choice(others, min(len(features), len(others)), replace=False) for _ in range(RANDOM)]
            grouped = [before - self._nll_pushed(model, list(own)) for own in groups]
        with self.sides.on("tuned") as model:
            after = numpy.array(mean_nll(model, self.rows))
            rising = [f for f in features if self.found.delta[f] > 0]
            cut = {f: self._nll_without(model, [f]) - after for f in rising}
            cut_random = [self._nll_without(model, [f]) - after for f in others[:RANDOM]] if rising else []
            cut_all = self._nll_without(model, rising) - after if rising else None
            cut_groups = (
                [self._nll_without(model, list(own[: len(rising)])) - after for own in groups] if rising else []
            )
        rows = [
            {
                "feature_id": int(f),
                "push": self._judged(pushed[f], random),
                "ablate": self._judged(cut[f], cut_random) if f in cut else None,
            }
            for f in features
        ]
        whole = {
            "push": self._judged(together, grouped),
            "ablate": self._judged(cut_all, cut_groups) if cut_all is not None else None,
        }
        return {"features": rows, "all": whole, "prompts": len(self.rows), "random": min(RANDOM, len(others))}

    def _others(self, chance: Any) -> Array:
        """Features that are as good as any but did not shift: what chance would have picked."""
        own = numpy.flatnonzero(self.found.tested & ~self.found.reported)
        return chance.permutation(own)

    def _judged(self, gains: Array, random: Sequence[Array]) -> dict[str, Any]:
        made = stats.contrast(gains, numpy.mean(random, axis=0), self.seed)
        level = [float(one.mean()) for one in random]
        return {
            "gain": float(gains.mean()),
            "random": float(numpy.mean(level)),
            "random_max": max(level),
            "diff": made["diff"],
            "ci95": made["ci95"],
            "p": made["p"],
            "holds": bool(made["p"] < 0.05 and made["diff"] > 0 and gains.mean() > max(*level, 0.0)),
        }

    def _nll_pushed(self, model: Any, features: Sequence[int]) -> Array:
        """Of the tuned answers under the base that is pushed along the features, each by its own share of the shift."""
        own = torch.tensor([int(f) for f in features])
        unit = torch.nn.functional.normalize(self.dictionary.decoder[own.to(self.dictionary.decoder.device)], dim=1)
        shift = torch.tensor(self.found.delta[own.numpy()], device=unit.device, dtype=unit.dtype)
        shift = torch.where(shift == 0, 1e-6, shift)
        direction = torch.nn.functional.normalize(shift @ unit, dim=0)
        steering = Steering({self.layer: (self.strength * self.norm * direction)[None].to(model.device)})
        with steering.on(model):
            return numpy.array(mean_nll(model, self.rows))

    def _nll_without(self, model: Any, features: Sequence[int]) -> Array:
        with ablated(model, self.dictionary, self.layer, features):
            return numpy.array(mean_nll(model, self.rows))


@contextmanager
def ablated(model: Any, dictionary: Dictionary, layer: int, features: Sequence[int]) -> Generator[None]:
    """Take what these features say out of the residual stream, at every token but the first."""
    own = torch.tensor([int(f) for f in features], device=dictionary.decoder.device)

    def cut(_: Any, __: Any, out: torch.Tensor) -> torch.Tensor:
        flat = out.reshape(-1, out.shape[-1])
        said = dictionary.encode(flat)[:, own] @ dictionary.decoder[own]
        changed = (flat.float() - said).to(out.dtype).reshape(out.shape)
        return torch.cat([out[:, :1], changed[:, 1:]], dim=1)

    hook = blocks(model)[layer].register_forward_hook(cut)
    try:
        yield
    finally:
        hook.remove()
