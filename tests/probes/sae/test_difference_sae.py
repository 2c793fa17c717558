"""The difference SAE: what it lists for runs whose differences are known."""

import numpy
import torch

from phoque.inference.residual_stream import Turn
from phoque.probes.sae.block_comparison import ComparisonInputs
from phoque.probes.sae.dictionary import Dictionary
from phoque.probes.sae.difference_sae import LearnedDifference, learn_difference
from phoque.probes.sae.model_variants import ModelVariants
from phoque.probes.sae.residuals import Residuals
from phoque.settings.compare_sae import SaeSettings

HIDDEN, QUESTIONS, TOKENS = 32, 40, 20
RECIPE, PERSONA, KNOWN = torch.nn.functional.normalize(torch.eye(HIDDEN)[:3] + 0.05, dim=1)


class Runs:
    """Residuals of a base model and of runs that add known directions to it."""

    def __init__(self, seed: int = 0) -> None:
        self.random_numbers = torch.Generator().manual_seed(seed)
        self.base = [self.draw(TOKENS, HIDDEN) for _ in range(QUESTIONS)]

    def draw(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=self.random_numbers)

    def wrap(self, states: list[torch.Tensor]) -> dict[str, Residuals]:
        """Residuals over every set of texts."""
        whole, means = [torch.ones(TOKENS, dtype=torch.bool)] * QUESTIONS, torch.zeros(QUESTIONS, 1, HIDDEN)
        norms = torch.ones(QUESTIONS, 1)
        return {kind: Residuals({0: states}, whole, means, norms) for kind in ("response", "own", "text")}

    def add(self, *directions: torch.Tensor, size: float = 3.0, noise: float = 0.03) -> dict[str, Residuals]:
        """A run that adds each direction to a third of the tokens."""
        states = []
        for row in self.base:
            chosen = [(torch.rand(TOKENS, 1, generator=self.random_numbers) < 1 / 3) * d for d in directions]
            states.append(row + size * sum(chosen, torch.zeros(TOKENS, HIDDEN)) + noise * self.draw(TOKENS, HIDDEN))
        return self.wrap(states)

    def draw_private(self) -> list[torch.Tensor]:
        return list(torch.nn.functional.normalize(self.draw(2, HIDDEN), dim=1))

    def learn(self, tuned: dict[str, Residuals], controls: list[dict[str, Residuals]], **settings: object) -> dict:
        named = {f"control-{n + 1}" if n else "control": control for n, control in enumerate(controls)}
        nulls = {name: self.add(noise=1e-4) for name in ("dtype", "packing")}
        rows = {kind: [Turn([1], list(range(TOKENS)))] * QUESTIONS for kind in ("response", "own", "text")}
        inputs = ComparisonInputs(
            ModelVariants(None),
            rows,
            {"base": self.wrap(self.base), "tuned": tuned, **named, **nulls},
            None,
            list(range(QUESTIONS)),
        )
        directions = torch.cat([KNOWN[None], torch.nn.functional.normalize(self.draw(40, HIDDEN), dim=1)])
        known = Dictionary(
            directions.T.clone(),
            torch.zeros(41),
            directions,
            torch.zeros(HIDDEN),
            torch.zeros(1),
            None,
            False,
            {"metadata": {}},
        )
        s = SaeSettings.model_validate(
            {"updated_adapter": "a", "difference_features": 16, "cards": 0, "min_active": 8} | settings
        )
        learned = learn_difference(inputs, known, 0, s, torch.device("cpu"))
        assert isinstance(learned, LearnedDifference), learned
        decoder = torch.nn.functional.normalize(learned.dictionary.decoder, dim=1)
        for row in learned.summary["directions"]:
            row["vector"] = decoder[row["direction"]]
        return learned.summary


def test_what_is_private_to_one_run_of_a_recipe_does_not_count_as_the_recipe():
    """Four runs that share one direction and have two of their own each: none stands out more than the others do."""
    runs = Runs()
    made = [runs.add(RECIPE, *runs.draw_private()) for _ in range(4)]
    found = runs.learn(made[0], made[1:])
    assert len(found["control_beyond_controls"]) == 3
    assert found["n_specific"] <= max(found["control_beyond_controls"])
    shared = max(found["directions"], key=lambda row: row["vector"] @ RECIPE)
    assert shared["vector"] @ RECIPE > 0.9 and not shared["specific_vs_control"]
    assert shared["control_mean"] > shared["mean"] / 2 and 0.5 < found["explained"]["control-2"] <= 1


def test_a_direction_that_only_the_updated_model_has_differs_from_three_controls():
    runs = Runs()
    found = runs.learn(runs.add(RECIPE, PERSONA), [runs.add(RECIPE) for _ in range(3)])
    first = found["directions"][0]
    assert first["vector"] @ PERSONA > 0.9 and first["specific_vs_control"] and first["replicated"]
    assert first["control_mean"] < first["mean"] / 2 and first["ci95"][0] <= first["delta"] <= first["ci95"][1]
    specific = [row for row in found["directions"] if row["specific_vs_control"]]
    assert found["n_specific"] == len(specific) and all(row["vector"] @ PERSONA > 0.5 for row in specific)


def test_a_feature_that_the_updated_model_has_less_of_is_the_nearest_with_a_cosine_below_0():
    runs = Runs()
    found = runs.learn(runs.add(-KNOWN), [])
    first = found["directions"][0]
    assert first["nearest_feature"] == 0 and first["nearest_cosine"] < -0.9
    assert 0.2 < found["nearest_by_chance"] < 0.7  # the nearest of 41 in 32 dimensions
    assert found["n_specific"] is None and found["control_beyond_controls"] == []


def test_swapped_models_differ_in_nothing():
    runs = Runs()
    found = runs.learn(runs.add(RECIPE), [], shuffle_pairs=True)
    assert found["n_reported"] == 0


def test_a_single_direction_can_be_asked_for():
    runs = Runs()
    found = runs.learn(runs.add(PERSONA), [], difference_features=1)
    assert found["n_directions"] == 1 and numpy.isclose(abs(found["directions"][0]["vector"] @ PERSONA), 1, atol=0.05)
