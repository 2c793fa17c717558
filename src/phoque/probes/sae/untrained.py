"""A dictionary that was never trained, run beside the trained one: what would any set of directions report?

Random dictionaries match trained ones in many evaluations (https://arxiv.org/abs/2602.14111), and a fine-tune moves
nearly every direction. Only what the trained dictionary reports beyond this one is evidence about its features.
"""

from dataclasses import replace

import torch

from phoque.probes.sae.dictionary import Dictionary

MIXED = 64  # activations that are mixed into one direction


def make_untrained(like: Dictionary, states: torch.Tensor, k: int, seed: int) -> Dictionary:
    """A dictionary of the same shape whose directions are random mixtures of activations; k are active per token.

    `states` (tokens, hidden) are residual streams. The encoder is the transposed decoder.
    """
    generator = torch.Generator().manual_seed(seed)
    center = states.float().mean(0)
    count = min(MIXED, len(states))
    rows = torch.stack(
        [
            states[torch.randint(len(states), (count,), generator=generator)].float().mean(0)
            for _ in range(like.features)
        ]
    )
    signs = torch.randint(0, 2, (like.features, 1), generator=generator) * 2 - 1
    directions = torch.nn.functional.normalize((rows - center) * signs, dim=1).to(like.decoder.device)
    return replace(
        like,
        encoder=directions.T.contiguous(),
        encoder_bias=torch.zeros_like(like.encoder_bias),
        decoder=directions,
        bias=center.to(like.decoder.device),
        threshold=torch.zeros_like(like.threshold),
        k=max(1, min(k, like.features)),
        centered=True,
        config={"architecture": "topk", "k": k},
    )
