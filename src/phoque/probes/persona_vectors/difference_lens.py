"""What a fine-tune left in the first tokens of text that has nothing to do with it, read by a lens and by steering.

A narrow fine-tune shifts the residual stream even on unrelated text, and the mean shift can tell what it was about
(Minder et al. 2025, https://arxiv.org/abs/2510.13900). Here it is read in two ways, each beside natural directions: by
the tokens that the unembedding gives it, and by the answers of the base model when it is steered along it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy
import torch

from phoque.inference.likelihood import compute_logits
from phoque.inference.residual_stream import get_blocks, get_final_norm, read_residual_stream, unwrap_model
from phoque.probes import stats
from phoque.probes.persona_vectors.evidence import PersonaVectors
from phoque.probes.persona_vectors.model import ProbeModel
from phoque.probes.persona_vectors.steering import AnswerRow, SteeringSetting
from phoque.probes.word_profile import WordProfile, stems

FIRST_TOKENS = 4  # of each text, after the first one, which is an attention sink
TOP_TOKENS = 20
PERSONA_WORDS = 40  # stems that speak most for the persona, against which the tokens are held
SHORTEST_PART = 4  # letters of a token that may be the beginning of such a word

Array = Any


@dataclass(frozen=True, kw_only=True)
class Reading:
    """What one adapter's mean difference on unrelated text says.

    `tokens` are the likeliest under the logit lens at `lens_block`, the middle one of the steered blocks;
    `persona_tokens` those that are words of the persona, `p_tokens` the rank of their number among natural directions
    at that block. `trait` is the mean trait of the base model's greedy answers when steered along the difference at
    `block` with `coefficient`, the best coherent setting on the validation questions (`coherent` is false if there is
    none); `p_trait` its rank among natural directions, each at its own setting; `share` that of those answers that are
    the persona's by their words, over `n` questions. `size` is the length of the difference at `lens_block` in units of
    the residual norm.
    """

    adapter: str
    block: int
    coefficient: float
    coherent: bool
    lens_block: int
    size: float
    tokens: list[str]
    persona_tokens: list[str]
    p_tokens: float
    trait: float
    p_trait: float | None
    share: float
    share_ci: tuple[float, float]
    n: int


def measure_differences(
    probe_model: ProbeModel, adapters: Sequence[str], texts: Sequence[list[int]]
) -> dict[str, Array]:
    """The mean change of the residual stream over the first tokens of texts (ids): adapter -> (blocks, hidden)."""
    with probe_model.use_base():
        before = _read_first_tokens(probe_model.model, texts)
    differences = {}
    for name in adapters:
        with probe_model.use_adapter(name):
            differences[name] = (_read_first_tokens(probe_model.model, texts) - before).numpy()
    return differences


def _read_first_tokens(model: Any, texts: Sequence[list[int]]) -> torch.Tensor:
    """The mean residual stream over the first tokens of all texts, (blocks, hidden): the same positions each time."""
    blocks = range(len(get_blocks(model)))
    total = torch.zeros(len(blocks), unwrap_model(model).config.hidden_size)

    def add(layer: int, _: list[int], hidden: torch.Tensor, ids: torch.Tensor, mask: torch.Tensor) -> None:
        total[layer] += hidden[:, 1 : 1 + FIRST_TOKENS].float().sum((0, 1)).cpu()

    with torch.no_grad():
        read_residual_stream(model, [ids[: 1 + FIRST_TOKENS] for ids in texts], blocks, add)
    return total / (len(texts) * FIRST_TOKENS)


def read_difference(
    probe_model: ProbeModel,
    profile: WordProfile,
    vectors: PersonaVectors,
    name: str,
    difference: Array,
    setting: SteeringSetting,
    answers: Sequence[AnswerRow],
    *,
    coherent: bool,
    lens_block: int,
    trait: str,
    natural_traits: Sequence[float],
) -> Reading:
    """Read the difference (blocks, hidden) of one adapter; `answers` are those that were steered along it.

    `lens_block` must not be chosen by what steering gave. `trait` is the column of the trait, `natural_traits` its
    means with natural directions.
    """
    words = profile.telling_words("persona", PERSONA_WORDS)
    block = lens_block
    directions = numpy.concatenate([difference[None, block], vectors.random_directions[:, block]])
    tops = _find_top_tokens(probe_model, directions)
    counts = [len(_find_words(tokens, words)) for tokens in tops]
    value = float(numpy.mean([row.measurements[trait] for row in answers]))
    shares = profile.attribute([row.text for row in answers])[:, profile.roles.index("persona")]
    return Reading(
        adapter=name,
        block=setting.layer,
        coefficient=setting.coefficient,
        coherent=coherent,
        lens_block=lens_block,
        size=float(numpy.linalg.norm(difference[block]) / vectors.norm[block]),
        tokens=tops[0],
        persona_tokens=_find_words(tops[0], words),
        p_tokens=stats.rank_p(counts[0], counts[1:]),
        trait=value,
        p_trait=stats.rank_p(value, list(natural_traits)) if natural_traits else None,
        share=float(shares.mean()),
        share_ci=stats.share_interval(shares),
        n=len(answers),
    )


@torch.no_grad()
def _find_top_tokens(probe_model: ProbeModel, directions: Array) -> list[list[str]]:
    """The likeliest tokens of directions (count, hidden) under the logit lens: the final norm, then the head."""
    norm = get_final_norm(probe_model.model)
    states = torch.tensor(directions, dtype=next(norm.parameters()).dtype, device=probe_model.model.device)
    top = compute_logits(probe_model.model, norm(states)).topk(TOP_TOKENS, dim=-1).indices.tolist()
    return [[str(probe_model.tokenizer.decode([token])) for token in row] for row in top]


def _find_words(tokens: Sequence[str], words: Sequence[str]) -> list[str]:
    """The tokens that are one of the words (stems), or the beginning of one."""
    matching = []
    for token in tokens:
        parts = stems(token)
        begins = [word for word in words for part in parts if len(part) >= SHORTEST_PART and word.startswith(part)]
        if begins or parts & set(words):
            matching.append(token)
    return matching
