"""What one model holds while it reads the texts of a comparison, token by token."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from phoque.inference.residual_stream import Turn, blocks, inner, massive, norms_of, read


@dataclass
class Heard:
    """The residual streams of some blocks over the spoken tokens of each row, on the host.

    states[block][row] is (tokens, hidden), fine[row] (tokens,) says which of them are no attention sinks and no special
    tokens. Over the fine ones of all blocks: means (rows, blocks, hidden) and norms (rows, blocks), for every block.
    """

    states: dict[int, list[torch.Tensor]]
    fine: list[torch.Tensor]
    means: torch.Tensor
    norms: torch.Tensor
    left_out: dict[str, int] = field(default_factory=dict)


def heard(
    model: Any, rows: Sequence[Turn], layers: Sequence[int], special: Sequence[int], alone: bool = False
) -> Heard:
    """Read `rows`, teacher-forced; `alone` gives each a batch of its own, which changes nothing but rounding."""
    count, size = len(blocks(model)), inner(model).config.hidden_size
    found = Heard(
        {layer: [torch.empty(0)] * len(rows) for layer in layers},
        [torch.empty(0)] * len(rows),
        torch.zeros(len(rows), count, size),
        torch.zeros(len(rows), count),
    )
    controls = torch.tensor(sorted(special), device=model.device)
    totals = dict.fromkeys(("kept", "massive", "special"), 0)

    def take(layer: int, batch: list[int], hidden: torch.Tensor, ids: torch.Tensor, mask: torch.Tensor) -> None:
        place = torch.arange(hidden.shape[1], device=hidden.device)
        begins = torch.tensor([max(1, len(rows[n].prompt)) for n in batch], device=hidden.device)
        spoken = (place >= begins[:, None]) & mask
        norms = norms_of(hidden)
        large = massive(norms, mask & (place > 0)) & spoken
        control = torch.isin(ids, controls) & spoken
        kept = spoken & ~large & ~control
        share = kept / kept.sum(1, keepdim=True).clamp(min=1)
        found.means[batch, layer] = torch.einsum("rt,rth->rh", share, hidden.float()).cpu()
        found.norms[batch, layer] = (share * norms).sum(1).cpu()
        if layer not in found.states:
            return
        for at, n in enumerate(batch):
            found.states[layer][n] = hidden[at, spoken[at]].cpu()
            own = kept[at, spoken[at]].cpu()
            found.fine[n] = own if found.fine[n].numel() == 0 else found.fine[n] & own
        totals["kept"] += int(kept.sum())
        totals["massive"] += int(large.sum())
        totals["special"] += int((control & ~large).sum())

    read(model, [r.prompt + r.response for r in rows], range(count), take, budget=1 if alone else None)
    found.left_out = totals
    return found


def agree(sides: Sequence[Heard]) -> None:
    """Leave out of every side what any of them leaves out: tokens are compared with themselves."""
    for row in range(len(sides[0].fine)):
        together = torch.stack([side.fine[row] for side in sides]).all(0)
        for side in sides:
            side.fine[row] = together
