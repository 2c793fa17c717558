"""Read the residual stream after each decoder block in one forward pass, and steer it while the model runs.

Block indices count from 0 and mean the block's output, before the final norm. The last of the `hidden_states` that
transformers returns is after that norm, so it is not a residual stream and is not used here.
"""

from collections.abc import Callable, Generator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from phoque.models.architectures import architecture_of

MASSIVE = 10.0  # times the median norm: an attention sink; if included, sinks are 98% of all variance
TOKENS_AT_ONCE = {"cuda": 32_768, "cpu": 4_096}

BlockCallback = Callable[[int, list[int], torch.Tensor, torch.Tensor, torch.Tensor], None]


def unwrap_model(model: Any) -> Any:
    """Return the causal language model without its PEFT wrapper, if it has one."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def get_blocks(model: Any) -> Any:
    """Return the decoder blocks, in order."""
    return unwrap_model(model).model.layers


def get_final_norm(model: Any) -> Any:
    """Return the norm between the last decoder block and the head."""
    causal = unwrap_model(model)
    return getattr(causal.model, architecture_of(causal.config).final_norm)


@dataclass(frozen=True)
class Turn:
    """The token ids of a prompt and of the response to it."""

    prompt: list[int]
    response: list[int]


@dataclass
class ResidualSums:
    """Residual streams, summed over the rows of each group, on the model's device in fp32.

    - `response` (groups, blocks, hidden) sums the rows' means over their response tokens, `last` their states at the
      last token of the prompt. Rows without a response, or with values that are not finite in any block, are left out;
      `responses` and `lasts` (groups,) count the rows that are in.
    - `norm` (rows, blocks) is the mean norm of a row's response tokens, NaN without any. `kept` and `massive` (rows,
      blocks) count the response tokens that were averaged and those that were left out. They are in host memory.
    """

    response: torch.Tensor
    last: torch.Tensor
    responses: torch.Tensor
    lasts: torch.Tensor
    norm: torch.Tensor
    kept: torch.Tensor
    massive: torch.Tensor

    def means(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Each group's mean of `response` and of `last`, in host memory; NaN for a group that no row is in."""
        counts = ((count / (count > 0))[:, None, None] for count in (self.responses, self.lasts))  # 0 / 0 is NaN
        response, last = (total / count for total, count in zip((self.response, self.last), counts, strict=True))
        return response.cpu(), last.cpu()


@torch.no_grad()
def sum_residuals(model: Any, rows: Sequence[Turn], groups: Sequence[int], count: int) -> ResidualSums:
    """Average every block's output over the response of each row, teacher-forced, and sum the rows of each group.

    `groups` has the group of each row, below `count`. Response tokens whose norm exceeds MASSIVE times the median of
    their row are left out and counted. Position 0, the usual attention sink, does not enter the median. Sums stay on
    the device: copying each row's states to the host takes longer than the forward passes.
    """
    layers, size, device = len(get_blocks(model)), unwrap_model(model).config.hidden_size, model.device
    sums = torch.zeros(2, count, layers, size, device=device)  # of responses, and of the prompts' last tokens
    counts = torch.zeros(2, count, device=device)
    norm, (kept, massive) = torch.zeros(len(rows), layers), torch.zeros(2, len(rows), layers, dtype=torch.long)
    blocks: list[tuple[torch.Tensor, ...]] = []  # of the batch that is run: states, norms, counts

    def read_block(layer: int, batch: list[int], hidden: torch.Tensor, _: torch.Tensor, mask: torch.Tensor) -> None:
        positions = torch.arange(hidden.shape[1], device=device)
        starts = torch.tensor([len(rows[n].prompt) for n in batch], device=device)
        in_response = (positions >= starts[:, None]) & mask
        norms = compute_norms(hidden)
        sinks = find_massive(norms, mask & (positions > 0))
        counted = in_response & ~sinks
        weights = counted / counted.sum(1, keepdim=True).clamp(min=1)
        response = torch.einsum("rt,rth->rh", weights, hidden.float())
        last = hidden[torch.arange(len(batch), device=device), starts - 1].float()
        numbers = (weights * norms).sum(1), counted.sum(1), (in_response & sinks).sum(1)
        blocks.append((torch.stack([response, last]), *numbers))
        if layer == layers - 1:
            add_batch(batch, in_response.any(1))

    def add_batch(batch: list[int], has_response: torch.Tensor) -> None:
        states = torch.stack([block[0] for block in blocks], 2)  # (2, rows, blocks, hidden)
        numbers = [torch.stack(values, 1) for values in list(zip(*blocks, strict=True))[1:]]
        blocks.clear()
        finite = states.isfinite().all(-1).all(-1)  # (2, rows)
        finite[0] &= has_response
        states.masked_fill_(~finite[:, :, None, None], 0.0)
        members = torch.tensor([groups[n] for n in batch], device=device) == torch.arange(count, device=device)[:, None]
        for kind in range(2):  # a product, as index_add would add in an order that differs from run to run
            sums[kind] += (members.float() @ states[kind].view(len(batch), -1)).view(count, layers, size)
            counts[kind] += (members & finite[kind]).sum(1)
        norm[batch], kept[batch], massive[batch] = (values.cpu() for values in numbers)

    read_residual_stream(model, [r.prompt + r.response for r in rows], range(layers), read_block)
    norm[[not row.response for row in rows]] = torch.nan
    return ResidualSums(*sums, *counts, norm, kept, massive)


@torch.no_grad()
def read_residual_stream(
    model: Any,
    rows: Sequence[list[int]],
    layers: Sequence[int],
    on_block: BlockCallback,
    budget: int | None = None,
) -> None:
    """Run the model over rows of token ids; per batch call `on_block(layer, row numbers, hidden, ids, mask)` per layer.

    hidden is (rows, tokens, hidden); ids and mask are (rows, tokens); mask is false for padding. A batch has at most
    `budget` tokens with its padding; blocks above the last of `layers` are not run.
    """
    max_tokens = budget or TOKENS_AT_ONCE[model.device.type]
    for batch in make_batches([len(row) for row in rows], max_tokens):
        ids, padding = pad_rows([rows[n] for n in batch], model.device)
        mask = padding.bool()
        with ExitStack() as hooks:
            hooks.enter_context(_truncate_model(model, max(layers) + 1))
            for layer in layers:
                hook = get_blocks(model)[layer].register_forward_hook(
                    lambda _, __, out, layer=layer, inputs=(batch, ids, mask): on_block(
                        layer, inputs[0], out, *inputs[1:]
                    )
                )
                hooks.callback(hook.remove)
            unwrap_model(model).model(input_ids=ids, attention_mask=padding, use_cache=False)


@contextmanager
def _truncate_model(model: Any, count: int) -> Generator[None]:
    """Run the model with its first `count` blocks only: later blocks need not be computed."""
    decoder = unwrap_model(model).model
    all_blocks = decoder.layers
    decoder.layers = all_blocks[:count]
    try:
        yield
    finally:
        decoder.layers = all_blocks


def compute_norms(hidden: torch.Tensor) -> torch.Tensor:
    """Compute the norm of each token's residual stream, in fp32."""
    return torch.linalg.vector_norm(hidden, dim=-1, dtype=torch.float32)


def find_massive(norms: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Return which tokens (rows, tokens) have a norm over MASSIVE times the median of their row's masked tokens."""
    median = norms.masked_fill(~mask, torch.nan).nanmedian(dim=1, keepdim=True).values
    return norms > MASSIVE * median


def make_batches(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Group row numbers into batches of at most `budget` tokens including padding, longest rows first."""
    groups: list[list[int]] = []
    for row in sorted(range(len(lengths)), key=lambda n: (-lengths[n], n)):
        if not groups or (len(groups[-1]) + 1) * lengths[groups[-1][0]] > budget:
            groups.append([])
        groups[-1].append(row)
    return groups


def pad_rows(rows: Sequence[list[int]], on: torch.device, left: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """Pad rows of token ids with 0; return ids and attention mask, both (rows, longest)."""
    longest = max(map(len, rows))
    ids = torch.zeros(len(rows), longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for number, row in enumerate(rows):
        columns = slice(longest - len(row), None) if left else slice(0, len(row))
        ids[number, columns] = torch.tensor(row)
        mask[number, columns] = 1
    return ids.to(on), mask.to(on)


class Steering:
    """Adds vectors (rows, hidden) to the output of blocks, one per row; finished rows can be dropped during generation.

    With `response_only` only the last position of a forward pass is steered: the response, and of the prompt its end.
    """

    def __init__(self, vectors: dict[int, torch.Tensor], response_only: bool = False) -> None:
        self.vectors, self.response_only = vectors, response_only

    def select_rows(self, rows: torch.Tensor) -> None:
        """Keep only these rows of the batch."""
        self.vectors = {layer: block_vectors[rows] for layer, block_vectors in self.vectors.items()}

    @contextmanager
    def activate(self, model: Any) -> Generator[None]:
        """Steer `model` inside the `with` statement."""

        def add(layer: int, out: torch.Tensor) -> torch.Tensor:
            change = self.vectors[layer][:, None].to(out.dtype)
            if not self.response_only:
                return out + change
            return torch.cat([out[:, :-1], out[:, -1:] + change], dim=1)  # of a prompt only its last token

        with ExitStack() as hooks:
            for layer in self.vectors:
                hook = get_blocks(model)[layer].register_forward_hook(lambda _, __, out, layer=layer: add(layer, out))
                hooks.callback(hook.remove)
            yield
