"""The dose curve of an adapter, and what it does to unrelated text."""

import numpy
import torch

from phoque.inference.adapter_scale import scale_adapter
from phoque.inference.generate import Request, generate_replies


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


def test_doses_of_one_batch_are_those_of_batches_by_themselves(adapted):
    """A third of the rows ends at once, so the others go on in a smaller batch."""
    scales, prompts = (0.0, 0.5, 1.0, 1.5), [[40, 41, 42], [50, 51], [60, 61, 62, 63]]
    adapted.generation_config.eos_token_id = 51  # the model repeats the last token

    def answer(requests):
        found = generate_replies(adapted, requests, 6, temperature=1.0, top_p=1.0, watched=range(60, 80))
        assert [reply.finish_reason for reply in found[:3]] == ["length", "stop", "length"]
        return [reply.mass for reply in found]

    together = answer([Request(prompt, scale=scale) for scale in scales for prompt in prompts])
    alone = []
    for scale in scales:
        with scale_adapter(adapted, "tuned", scale):
            alone += answer([Request(prompt) for prompt in prompts])
    with adapted.disable_adapter():
        base = answer([Request(prompt) for prompt in prompts])
    for found, wanted in zip([*together, *together[:3]], [*alone, *base], strict=True):
        numpy.testing.assert_allclose(found, wanted, rtol=1e-4)
    assert abs(together[0][-1] / together[9][-1] - 1) > 1e-3  # no adapter, and 1.5 of it
