"""Conversations laid end to end in one row, so that no position is padding."""

from collections.abc import Sequence
from typing import Any

import torch

from phoque.data.chat import Encoded


def packed(conversations: Sequence[Encoded]) -> dict[str, Any]:
    """One batch of shape (1, T): ids, labels, positions that restart, and the borders that attention must respect.

    `cu_seq_lens` holds the n + 1 borders of n conversations, `max_length` the longest of them. There is no
    attention mask: next to position ids it would make transformers attend across conversations.
    """
    lengths = [len(c.ids) for c in conversations]
    borders = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    return {
        "input_ids": torch.tensor([[token for c in conversations for token in c.ids]]),
        "labels": torch.tensor([[label for c in conversations for label in c.labels]]),
        "position_ids": torch.cat([torch.arange(n) for n in lengths])[None],
        "cu_seq_lens_q": borders,
        "cu_seq_lens_k": borders,
        "max_length_q": max(lengths),
        "max_length_k": max(lengths),
    }
