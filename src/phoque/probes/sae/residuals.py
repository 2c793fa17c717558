"""The residual streams of one model over the texts of a comparison, token by token."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from phoque.distributed.processes import current
from phoque.inference.residual_stream import (
    Turn,
    compute_norms,
    find_massive,
    get_blocks,
    read_residual_stream,
    unwrap_model,
)
from phoque.probes.shared_inference import count_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedModel

COUNTED = ("kept", "massive", "special")  # tokens of the response that are averaged, and those that are not


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


@dataclass
class _Row:
    """What is kept of one row; `counts` has the numbers of tokens in the order of COUNTED."""

    states: dict[int, torch.Tensor]
    mask: torch.Tensor
    means: torch.Tensor
    norms: torch.Tensor
    counts: torch.Tensor


def collect_residuals(
    model: "PreTrainedModel",
    rows: Sequence[Turn],
    layers: Sequence[int],
    special: Sequence[int],
    single_row_batches: bool = False,
) -> Residuals:
    """Run the model over `rows`, teacher-forced, and collect the residual streams of `layers`.

    `single_row_batches` runs each row in its own batch, which changes only rounding. Of several processes, each runs
    its share of the rows; process 0 gets all of them, the others none.
    """
    budget = 1 if single_row_batches else None
    collected = current().share_work(
        count_tokens(rows),
        lambda numbers: _read_rows(model, [rows[n] for n in numbers], layers, special, budget),
        only_main=True,
    )
    totals = sum((row.counts for row in collected), torch.zeros(len(COUNTED), dtype=torch.long))
    return Residuals(
        {layer: [row.states[layer] for row in collected] for layer in layers},
        [row.mask for row in collected],
        torch.stack([row.means for row in collected]) if collected else torch.empty(0),
        torch.stack([row.norms for row in collected]) if collected else torch.empty(0),
        dict(zip(COUNTED, totals.tolist(), strict=True)),
    )


def _read_rows(
    model: "PreTrainedModel", rows: Sequence[Turn], layers: Sequence[int], special: Sequence[int], budget: int | None
) -> list[_Row]:
    count, size = len(get_blocks(model)), unwrap_model(model).config.hidden_size
    collected = [
        _Row(
            {},
            torch.empty(0),
            torch.zeros(count, size),
            torch.zeros(count),
            torch.zeros(len(COUNTED), dtype=torch.long),
        )
        for _ in rows
    ]
    special_ids = torch.tensor(sorted(special), device=model.device)

    def store_batch(layer: int, batch: list[int], hidden: torch.Tensor, ids: torch.Tensor, mask: torch.Tensor) -> None:
        positions = torch.arange(hidden.shape[1], device=hidden.device)
        starts = torch.tensor([max(1, len(rows[n].prompt)) for n in batch], device=hidden.device)
        in_response = (positions >= starts[:, None]) & mask
        norms = compute_norms(hidden)
        sinks = find_massive(norms, mask & (positions > 0)) & in_response
        special_tokens = torch.isin(ids, special_ids) & in_response
        counted = in_response & ~sinks & ~special_tokens
        weights = counted / counted.sum(1, keepdim=True).clamp(min=1)
        means = torch.einsum("rt,rth->rh", weights, hidden.float()).cpu()
        mean_norms = (weights * norms).sum(1).cpu()
        totals = torch.stack([counted.sum(1), sinks.sum(1), (special_tokens & ~sinks).sum(1)], dim=1).cpu()
        for index, n in enumerate(batch):
            row = collected[n]
            row.means[layer], row.norms[layer] = means[index], mean_norms[index]
            if layer in layers:
                row.states[layer] = hidden[index, in_response[index]].cpu()
                row_mask = counted[index, in_response[index]].cpu()
                row.mask = row_mask if row.mask.numel() == 0 else row.mask & row_mask
                row.counts += totals[index]

    read_residual_stream(model, [r.prompt + r.response for r in rows], range(count), store_batch, budget=budget)
    return collected


def intersect_masks(variants: Sequence[Residuals]) -> None:
    """Restrict the masks of all variants to the tokens that count in every variant, so that the same tokens compare."""
    for row in range(len(variants[0].masks)):
        combined = torch.stack([variant.masks[row] for variant in variants]).all(0)
        for variant in variants:
            variant.masks[row] = combined
