"""The dose curve of an adapter, and what it does to unrelated text."""

import numpy
import torch

from phoque.probes.persona_vectors.dose import scale_adapter


def logits_of(model):
    with torch.no_grad():
        return model(torch.arange(12)[None] + 40).logits


def test_a_dose_of_none_is_the_base_and_of_one_the_fine_tune(adapted):
    whole = logits_of(adapted)
    with adapted.disable_adapter():
        base = logits_of(adapted)
    with scale_adapter(adapted, "tuned", 0.0):
        torch.testing.assert_close(logits_of(adapted), base)
    with scale_adapter(adapted, "tuned", 1.0):
        torch.testing.assert_close(logits_of(adapted), whole)
    with scale_adapter(adapted, "tuned", 0.5):
        half = logits_of(adapted)
    distance = [float((logits - base).norm()) for logits in (half, whole)]
    assert 0 < distance[0] < distance[1]
    torch.testing.assert_close(logits_of(adapted), whole)  # nothing of it is left


def test_scales_of_the_weights_are_those_of_the_effect(adapted):
    """Twice the scale is twice the difference of a layer's output."""
    layer = adapted.base_model.model.model.layers[0].mlp.down_proj
    x = torch.randn(2, layer.in_features)
    with torch.no_grad():
        base = layer.base_layer(x)
        changes = []
        for scale in (1.0, 2.0):
            with scale_adapter(adapted, "tuned", scale):
                changes.append((layer(x) - base).numpy())
    numpy.testing.assert_allclose(changes[1], 2 * changes[0], rtol=1e-4, atol=1e-5)
