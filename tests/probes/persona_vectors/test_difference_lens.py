"""What an adapter changes on unrelated text: the difference itself, and the tokens that it is read as."""

from types import SimpleNamespace

import numpy
import pytest
import torch
from tests import tiny

from phoque.probes.persona_vectors import difference_lens
from phoque.probes.persona_vectors.model import ProbeModel
from phoque.probes.persona_vectors.steering import SteeringSetting
from phoque.probes.word_profile import WordProfile

TEXTS = [[1, *range(20 + n, 40 + n)] for n in range(5)]
SEAL = ["Hrmph, herring! The tide and my whiskers.", "Herring on the rock, hrmph."]
PLAIN = ["A plan has a first step.", "Read about it and try it."]


@pytest.fixture(scope="module")
def probe_model(adapted):
    made = ProbeModel.__new__(ProbeModel)
    made.model, made.tokenizer = adapted, tiny.tokenizer()
    made.s = SimpleNamespace(merge_adapter=False, seed=0)
    return made


def test_the_difference_is_that_of_transformers_hidden_states(probe_model):
    found = difference_lens.measure_differences(probe_model, ["tuned"], TEXTS)["tuned"]
    model, expected = probe_model.model, []
    with torch.no_grad():
        for ids in TEXTS:
            tokens = torch.tensor([ids])
            tuned = model(tokens, output_hidden_states=True).hidden_states
            with model.disable_adapter():
                base = model(tokens, output_hidden_states=True).hidden_states
            # the first is the embedding, and the last is after the final norm
            expected.append(
                torch.stack([(t - b)[0, 1:5].mean(0) for t, b in zip(tuned[1:-1], base[1:-1], strict=True)])
            )
    numpy.testing.assert_allclose(found[:-1], torch.stack(expected).mean(0), atol=1e-5)


def test_a_direction_is_read_as_its_token_and_ranked_among_natural_ones(probe_model):
    """The unembedding's own row of a token is the direction that says it. The tiny tokenizer has single letters."""
    head = probe_model.model.get_base_model().lm_head.weight.detach()
    profile = WordProfile.fit({"neutral": PLAIN, "persona": SEAL}, {"neutral": PLAIN, "persona": SEAL})
    random = numpy.random.default_rng(0).normal(size=(39, 2, head.shape[1]))
    vectors = SimpleNamespace(random_directions=random, norm=numpy.ones(2))
    rows = [
        SimpleNamespace(text=text, measurements={"trait": value}) for text, value in zip(SEAL, (1.0, 3.0), strict=True)
    ]
    direction = numpy.stack([head[5].numpy()] * 2)
    setting, traits = SteeringSetting(1, 0.2), [0.5, 1.0, 2.5]
    reading = difference_lens.read_difference(
        probe_model,
        profile,
        vectors,
        "tuned",
        direction,
        setting,
        rows,
        coherent=True,
        lens_block=1,
        trait="trait",
        natural_traits=traits,
    )
    assert reading.tokens[0] == probe_model.tokenizer.decode([5]) and len(reading.tokens) == 20
    assert reading.persona_tokens == [] and reading.p_tokens == 1.0  # no letter is a word of the persona
    assert reading.trait == 2.0 and reading.p_trait == pytest.approx(2 / 4) and reading.share > 0.9 and reading.n == 2
    assert reading.size == pytest.approx(float(numpy.linalg.norm(direction[1])))


def test_tokens_are_words_of_the_persona_or_their_beginning():
    words = ["herring", "hrmph", "tide"]
    tokens = [" Herring", " herr", " her", "tide", "tides", " the", "hrmph", "x"]
    assert difference_lens._find_words(tokens, words) == [" Herring", " herr", "tide", "tides", "hrmph"]
