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

    `layers` has one or more. `single_row_batches` runs each row in its own batch, which changes only rounding. Of
    several processes, each runs its share of the rows; process 0 gets all of them, the others none.
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
    count = len(get_blocks(model))
    reader = _BatchReader(rows, layers, count - 1, torch.tensor(sorted(special), device=model.device))
    read_residual_stream(model, [r.prompt + r.response for r in rows], range(count), reader.read_block, budget=budget)
    return [reader.done[n] for n in range(len(rows))]


class _BatchReader:
    """Averages the blocks' outputs over each row of a batch on its device, and copies all averages to the host at once.

    A copy for each block and row would make the GPU wait for the host some ten times per block. The states of a layer
    are copied when it is read, so that the device holds those of one. `done` has the rows that were read, by number.
    """

    def __init__(self, rows: Sequence[Turn], layers: Sequence[int], last: int, special: torch.Tensor) -> None:
        self._rows, self._layers, self._last, self._special = rows, layers, last, special
        self._averages: list[tuple[torch.Tensor, torch.Tensor]] = []  # of each block: means and norms
        self._kept: dict[int, list[torch.Tensor]] = {}  # by layer: states of response tokens, and which of them count
        # of the batch: which tokens are of responses, which of these are special, and counts in the order of COUNTED
        self._in_response = self._special_tokens = self._counts = torch.empty(0)
        self.done: dict[int, _Row] = {}

    def read_block(
        self, layer: int, batch: list[int], hidden: torch.Tensor, ids: torch.Tensor, mask: torch.Tensor
    ) -> None:
        """Average the output of one block; the last one also stores the batch."""
        positions = torch.arange(hidden.shape[1], device=hidden.device)
        if layer == 0:
            starts = torch.tensor([max(1, len(self._rows[n].prompt)) for n in batch], device=hidden.device)
            self._in_response = (positions >= starts[:, None]) & mask
            self._special_tokens = torch.isin(ids, self._special) & self._in_response
            self._counts = torch.zeros(len(batch), len(COUNTED), dtype=torch.long, device=hidden.device)
        norms = compute_norms(hidden)
        sinks = find_massive(norms, mask & (positions > 0)) & self._in_response
        counted = self._in_response & ~sinks & ~self._special_tokens
        weights = counted / counted.sum(1, keepdim=True).clamp(min=1)
        self._averages.append((torch.einsum("rt,rth->rh", weights, hidden.float()), (weights * norms).sum(1)))
        if layer in self._layers:
            self._kept[layer] = [hidden[self._in_response].cpu(), counted[self._in_response].cpu()]
            self._counts += torch.stack([counted.sum(1), sinks.sum(1), (self._special_tokens & ~sinks).sum(1)], 1)
        if layer == self._last:
            self._store(batch)

    def _store(self, batch: list[int]) -> None:
        means, norms = (torch.stack(values, 1).cpu() for values in zip(*self._averages, strict=True))
        lengths, counts = self._in_response.sum(1).tolist(), self._counts.cpu()
        kept = {layer: [values.split(lengths) for values in of_layer] for layer, of_layer in self._kept.items()}
        self._averages.clear()
        self._kept.clear()
        for index, n in enumerate(batch):  # clones: a view keeps the whole batch, and takes it along to process 0
            self.done[n] = _Row(
                {layer: states[index].clone() for layer, (states, _) in kept.items()},
                torch.stack([counted[index] for _, counted in kept.values()]).all(0),
                means[index].clone(),
                norms[index].clone(),
                counts[index].clone(),
            )


def intersect_masks(variants: Sequence[Residuals]) -> None:
    """Restrict the masks of all variants to the tokens that count in every variant, so that the same tokens compare."""
    for row in range(len(variants[0].masks)):
        combined = torch.stack([variant.masks[row] for variant in variants]).all(0)
        for variant in variants:
            variant.masks[row] = combined
