"""Activations made even: the same model, whose channels round better."""

import pytest
import torch

from phoque.models.checkpoint_reader import CheckpointReader
from phoque.models.load import load_model
from phoque.models.source import Source
from phoque.onnx.component import Weights
from phoque.onnx.quantize.block_format import round_to_nearest
from phoque.onnx.quantize.linear_groups import linear_groups_of, replace_weight
from phoque.onnx.quantize.mixed_precision import _compute_log_probs, _measure_accuracy, _round_activations
from phoque.onnx.quantize.smoothquant import _measure_channel_rms, smooth_activations


@pytest.fixture
def model_with_outliers(any_model):
    """A model with a few channels that drown the others, as trained ones have."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(any_model)
    for name, parameter in model.named_parameters():
        if name.endswith("layernorm.weight") or name.endswith("v_proj.weight") or name.endswith("up_proj.weight"):
            parameter.data[5::16] *= 30
    model.save_pretrained(any_model)
    return Source("loud", any_model, "1", "here")


def chats(count=12):
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(3, 250, (1, 30), generator=generator) for _ in range(count)]


@pytest.mark.thorough
def test_an_even_model_says_the_same_and_rounds_better(model_with_outliers):
    def opened():
        return load_model(model_with_outliers, "fp32", on=torch.device("cpu"))

    model, whole = opened(), Weights(CheckpointReader(model_with_outliers))
    before = [_compute_log_probs(model, ids) for ids in chats()]
    names = [group[0] for group in linear_groups_of(model)]
    uneven = _measure_channel_rms(model, names, chats())
    even = smooth_activations(whole, model, chats(6))
    kl, agreement = _measure_accuracy(model, chats(), before)
    assert kl < 1e-5 and agreement == 1.0
    changed = [name for name, held in model.named_parameters() if not torch.equal(held, opened().get_parameter(name))]
    assert any("norm" in name for name in changed) and not any("embed" in name or "q_norm" in name for name in changed)
    for name, held in model.named_parameters():
        assert torch.equal(even.read(name), held)
    spread = lambda sizes: sum((size.amax() / size.median()).item() for size in sizes.values())
    assert spread(_measure_channel_rms(model, names, chats())) < 0.3 * spread(uneven)

    def cost(weights, model):
        for name in (name for group in linear_groups_of(model) for name in group):
            replace_weight(model, name, round_to_nearest(weights.read(f"{name}.weight")))
        with _round_activations(model):
            return _measure_accuracy(model, chats(), before)[0]

    assert cost(even, model) < 0.7 * cost(whole, opened())
