"""The estimate of a run's memory, fitted to a GPU that has some free."""

from types import SimpleNamespace

import pytest

from phoque.settings.train import TrainSettings
from phoque.training import memory
from phoque.training.memory import MemoryEstimate, fit_to_gpu

COUNTS = {"base": 3_000_000_000, "embedding": 400_000_000, "projections": 2_600_000_000, "adapter": 33_000_000}


def estimate(layers: int = 26, per_layer: float = 0.4) -> MemoryEstimate:
    return MemoryEstimate(
        weights=2.0,
        adapter_and_optimizer=0.5,
        activations=(layers - 1) * per_layer + 1.0,
        logits=0.5,
        weight_cache=0.0,
        libraries=0.0,
        per_layer=per_layer,
        layers=layers,
        recomputed_layers=0,
    )


@pytest.fixture
def free(monkeypatch):
    """A GPU with so many GB free, as far as the estimate asks."""

    def set_free(gb: float) -> None:
        monkeypatch.setattr(memory, "torch", SimpleNamespace(cuda=SimpleNamespace(is_available=lambda: True)))
        monkeypatch.setattr(memory, "measure_free_memory", lambda: gb * 1e9 / memory.USABLE_SHARE)

    return set_free


@pytest.mark.parametrize(
    ("gb", "recomputed", "total", "says"),
    [
        (80.0, 0, 19.2, "weight cache 5.2"),
        (14.0, 0, 14.0, ""),
        (10.0, 10, 10.0, "10 of 26 decoder blocks recomputed"),
        (3.0, 26, 4.0, "more than the 3.0 GB that a run may use"),
    ],
)
def test_layers_are_recomputed_until_the_run_fits(free, gb, recomputed, total, says):
    free(gb)
    found = fit_to_gpu(estimate(), TrainSettings(quantization="nf4"), COUNTS)
    assert found.recomputed_layers == recomputed
    assert found.on_device == pytest.approx(total)
    assert says in found.describe()
    assert ("may use" in found.describe()) == (found.on_device > gb + 1e-9)


def test_a_model_of_one_layer_that_does_not_fit_is_estimated_too(free):
    free(1.0)
    assert (
        "more than the 1.0 GB" in fit_to_gpu(estimate(layers=1), TrainSettings(quantization="nf4"), COUNTS).describe()
    )


def test_a_gpu_without_room_for_cuda_itself_has_nothing_free(free, monkeypatch):
    def fail() -> int:
        raise RuntimeError("CUDA error: out of memory")

    free(0.0)
    monkeypatch.setattr(memory, "measure_free_memory", fail)
    assert "more than the 0.0 GB" in fit_to_gpu(estimate(), TrainSettings(quantization="nf4"), COUNTS).describe()
