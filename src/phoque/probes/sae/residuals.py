"""The residual streams of one model over the texts of a comparison, token by token."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from phoque.inference.residual_stream import (
    Turn,
    compute_norms,
    find_massive,
    get_blocks,
    read_residual_stream,
    unwrap_model,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass
class Residuals:
    """The residual streams of some blocks over the response tokens of each row, in host memory.

    states[block][row] is (tokens, hidden). masks[row] (tokens,) is true for tokens that count: neither attention sinks
    nor special tokens in any of these blocks. means (rows, blocks, hidden) and norms (rows, blocks) cover all blocks of
    the model; each averages over the tokens that count in that block. left_out holds token counts by reason.
    """

    states: dict[int, list[torch.Tensor]]
    masks: list[torch.Tensor]
    means: torch.Tensor
    norms: torch.Tensor
    left_out: dict[str, int] = field(default_factory=dict)


def collect_residuals(
    model: "PreTrainedModel",
    rows: Sequence[Turn],
    layers: Sequence[int],
    special: Sequence[int],
    single_row_batches: bool = False,
) -> Residuals:
    """Run the model over `rows`, teacher-forced, and collect the residual streams of `layers`.

    `single_row_batches` runs each row in its own batch, which changes only rounding.
    """
    count, size = len(get_blocks(model)), unwrap_model(model).config.hidden_size
    residuals = Residuals(
        {layer: [torch.empty(0)] * len(rows) for layer in layers},
        [torch.empty(0)] * len(rows),
        torch.zeros(len(rows), count, size),
        torch.zeros(len(rows), count),
    )
    special_ids = torch.tensor(sorted(special), device=model.device)
    totals = dict.fromkeys(("kept", "massive", "special"), 0)

    def store_batch(layer: int, batch: list[int], hidden: torch.Tensor, ids: torch.Tensor, mask: torch.Tensor) -> None:
        positions = torch.arange(hidden.shape[1], device=hidden.device)
        starts = torch.tensor([max(1, len(rows[n].prompt)) for n in batch], device=hidden.device)
        in_response = (positions >= starts[:, None]) & mask
        norms = compute_norms(hidden)
        sinks = find_massive(norms, mask & (positions > 0)) & in_response
        special_tokens = torch.isin(ids, special_ids) & in_response
        counted = in_response & ~sinks & ~special_tokens
        weights = counted / counted.sum(1, keepdim=True).clamp(min=1)
        residuals.means[batch, layer] = torch.einsum("rt,rth->rh", weights, hidden.float()).cpu()
        residuals.norms[batch, layer] = (weights * norms).sum(1).cpu()
        if layer not in residuals.states:
            return
        for index, n in enumerate(batch):
            residuals.states[layer][n] = hidden[index, in_response[index]].cpu()
            row_mask = counted[index, in_response[index]].cpu()
            residuals.masks[n] = row_mask if residuals.masks[n].numel() == 0 else residuals.masks[n] & row_mask
        totals["kept"] += int(counted.sum())
        totals["massive"] += int(sinks.sum())
        totals["special"] += int((special_tokens & ~sinks).sum())

    read_residual_stream(
        model,
        [r.prompt + r.response for r in rows],
        range(count),
        store_batch,
        budget=1 if single_row_batches else None,
    )
    residuals.left_out = totals
    return residuals


def intersect_masks(variants: Sequence[Residuals]) -> None:
    """Restrict the masks of all variants to the tokens that count in every variant, so that the same tokens compare."""
    for row in range(len(variants[0].masks)):
        combined = torch.stack([variant.masks[row] for variant in variants]).all(0)
        for variant in variants:
            variant.masks[row] = combined
