"""The residual stream after each decoder block: read for all blocks in one pass, and steered while the model runs.

Block indices count from 0 and mean the block's output, before the final norm: `hidden_states[-1]` of transformers has
been through that norm, so it is no residual stream, and nothing here uses it.
"""

from collections.abc import Callable, Generator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch

MASSIVE = 10.0  # times the median norm: an attention sink, 98 % of all variance if it is let in
TOKENS_AT_ONCE = {"cuda": 32_768, "cpu": 4_096}

Take = Callable[[int, list[int], torch.Tensor, torch.Tensor, torch.Tensor], None]


def inner(model: Any) -> Any:
    """The causal language model itself, whether or not adapters are attached to it."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def blocks(model: Any) -> Any:
    """The decoder blocks, in order."""
    return inner(model).model.layers


@dataclass(frozen=True)
class Turn:
    """A prompt's token ids and those of the response to it."""

    prompt: list[int]
    response: list[int]


@dataclass
class Means:
    """Residual streams: `response` is the mean over response tokens, `last` the last token of the prompt.

    Shapes (rows, blocks, hidden), fp32 on the host; `norm` (rows, blocks) is the mean norm of the response tokens,
    `kept` and `massive` (blocks) count the tokens that went in and those that were left out.
    """

    response: torch.Tensor
    last: torch.Tensor
    norm: torch.Tensor
    kept: torch.Tensor
    massive: torch.Tensor


@torch.no_grad()
def residual_means(model: Any, rows: Sequence[Turn]) -> Means:
    """Read every block's output for these rows, teacher-forced, in batches of about equal length.

    Response tokens whose norm is over MASSIVE times the median of their row are left out and counted; position 0, the
    usual sink, is never one of them.
    """
    layers, size = len(blocks(model)), inner(model).config.hidden_size
    empty = torch.zeros(len(rows), layers, size)
    found = Means(empty, empty.clone(), torch.zeros(len(rows), layers), *torch.zeros(2, layers, dtype=torch.long))

    def take(layer: int, batch: list[int], hidden: torch.Tensor, _: torch.Tensor, mask: torch.Tensor) -> None:
        place = torch.arange(hidden.shape[1], device=hidden.device)
        begins = torch.tensor([len(rows[n].prompt) for n in batch], device=hidden.device)
        spoken = (place >= begins[:, None]) & mask
        norms = norms_of(hidden)
        large = massive(norms, mask & (place > 0))
        kept = spoken & ~large
        share = kept / kept.sum(1, keepdim=True).clamp(min=1)
        found.response[batch, layer] = torch.einsum("rt,rth->rh", share, hidden.float()).cpu()
        found.last[batch, layer] = hidden[torch.arange(len(batch)), begins - 1].float().cpu()
        found.norm[batch, layer] = (share * norms).sum(1).cpu()
        found.kept[layer] += kept.sum().cpu()
        found.massive[layer] += (spoken & large).sum().cpu()

    read(model, [r.prompt + r.response for r in rows], range(layers), take)
    return found


@torch.no_grad()
def read(
    model: Any,
    rows: Sequence[list[int]],
    layers: Sequence[int],
    take: Take,
    budget: int | None = None,
) -> None:
    """Run the model over rows of token ids and call `take(layer, row numbers, hidden, ids, mask)` for each of `layers`.

    hidden is (rows, tokens, hidden), ids and mask are (rows, tokens); mask says what is no padding. Rows go in batches
    of at most `budget` tokens; blocks above the last of `layers` are not run.
    """
    at_once = budget or TOKENS_AT_ONCE[model.device.type]
    for batch in batches([len(row) for row in rows], at_once):
        ids, padding = padded([rows[n] for n in batch], model.device)
        mask = padding.bool()
        with ExitStack() as hooks:
            hooks.enter_context(_only(model, max(layers) + 1))
            for layer in layers:
                hook = blocks(model)[layer].register_forward_hook(
                    lambda _, __, out, layer=layer, own=(batch, ids, mask): take(layer, own[0], out, *own[1:])
                )
                hooks.callback(hook.remove)
            inner(model).model(input_ids=ids, attention_mask=padding, use_cache=False)


@contextmanager
def _only(model: Any, count: int) -> Generator[None]:
    """The model without its blocks from `count` on: what is not read need not be computed."""
    decoder = inner(model).model
    whole = decoder.layers
    decoder.layers = whole[:count]
    try:
        yield
    finally:
        decoder.layers = whole


def norms_of(hidden: torch.Tensor) -> torch.Tensor:
    """The norm of each token's residual stream, in fp32."""
    return torch.linalg.vector_norm(hidden, dim=-1, dtype=torch.float32)


def massive(norms: torch.Tensor, counted: torch.Tensor) -> torch.Tensor:
    """Which tokens of (rows, tokens) have a norm over MASSIVE times the median of what is counted in their row."""
    usual = norms.masked_fill(~counted, torch.nan).nanmedian(dim=1, keepdim=True).values
    return norms > MASSIVE * usual


def batches(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Row numbers in batches of at most `budget` tokens with their padding, longest first."""
    made: list[list[int]] = []
    for row in sorted(range(len(lengths)), key=lambda n: (-lengths[n], n)):
        if not made or (len(made[-1]) + 1) * lengths[made[-1][0]] > budget:
            made.append([])
        made[-1].append(row)
    return made


def padded(rows: Sequence[list[int]], on: torch.device, left: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of token ids and their mask, both (rows, longest)."""
    longest = max(map(len, rows))
    ids = torch.zeros(len(rows), longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for number, row in enumerate(rows):
        at = slice(longest - len(row), None) if left else slice(0, len(row))
        ids[number, at] = torch.tensor(row)
        mask[number, at] = 1
    return ids.to(on), mask.to(on)


class Steering:
    """What is added to the output of each block, a vector a row; rows that are done can be dropped on the way."""

    def __init__(self, added: dict[int, torch.Tensor], response_only: bool = False) -> None:
        self.added, self.response_only = added, response_only

    def keep(self, rows: torch.Tensor) -> None:
        """Go on with these rows alone."""
        self.added = {layer: vectors[rows] for layer, vectors in self.added.items()}

    @contextmanager
    def on(self, model: Any) -> Generator[None]:
        """Steer `model` while the block runs."""

        def add(layer: int, out: torch.Tensor) -> torch.Tensor:
            change = self.added[layer][:, None].to(out.dtype)
            if not self.response_only:
                return out + change
            return torch.cat([out[:, :-1], out[:, -1:] + change], dim=1)  # of a prompt only what begins the response

        with ExitStack() as hooks:
            for layer in self.added:
                hook = blocks(model)[layer].register_forward_hook(lambda _, __, out, layer=layer: add(layer, out))
                hooks.callback(hook.remove)
            yield
