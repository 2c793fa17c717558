"""Answers, losses and residual streams by all processes of a command: each runs its share of the rows on its own GPU.

With one process, these are the functions of `phoque.inference`. Every process calls them with the same rows at the same
place, and gets the results of all rows.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy
import torch

from phoque.distributed.processes import current
from phoque.inference import generate, likelihood, residual_stream
from phoque.inference.generate import Reply, Request
from phoque.inference.residual_stream import ResidualSums, Turn

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def generate_replies(
    model: Any,
    requests: Sequence[Request],
    tokens: int,
    *,
    temperature: float = 1.0,
    top_p: float = 1.0,
    watched: Sequence[int] = (),
    response_only: bool = False,
    show: Callable[[int, str], None],
) -> list[Reply]:
    """Generate a reply of at most `tokens` tokens to each request; see `inference.generate`.

    `show(done, text)` reports progress, as if all processes were as far as this one.
    """
    processes = current()

    def run(numbers: list[int]) -> list[Reply]:
        return generate.generate_replies(
            model,
            [requests[n] for n in numbers],
            tokens,
            temperature=temperature,
            top_p=top_p,
            watched=watched,
            response_only=response_only,
            show=lambda done, text: show(min(done * processes.size, len(requests)), text),
        )

    return processes.share_work([len(request.prompt) for request in requests], run)


def mean_nll(model: "PreTrainedModel", rows: Sequence[Turn]) -> list[float]:
    """Mean NLL of each row's response after its prompt, in nats per token; NaN if it is empty."""
    return current().share_work(
        count_tokens(rows), lambda numbers: likelihood.mean_nll(model, [rows[n] for n in numbers])
    )


def sum_residuals(model: Any, rows: Sequence[Turn], groups: Sequence[int], count: int) -> ResidualSums:
    """Sum the residual streams of the rows of each group; see `inference.residual_stream`."""
    processes, sums = current(), []

    def run(numbers: list[int]) -> list[tuple[Any, Any, Any]]:
        own = residual_stream.sum_residuals(model, [rows[n] for n in numbers], [groups[n] for n in numbers], count)
        sums.append(own)
        return list(zip(own.norm.numpy(), own.kept.numpy(), own.massive.numpy(), strict=True))

    norm, kept, massive = zip(*processes.share_work(count_tokens(rows), run), strict=True)
    totals = [getattr(sums[0], name) for name in ("response", "last", "responses", "lasts")]
    for total in totals:
        processes.sum(total)
    of_rows = [torch.from_numpy(numpy.stack(values)) for values in (norm, kept, massive)]
    return ResidualSums(*totals, *of_rows)


def count_tokens(rows: Sequence[Turn]) -> list[int]:
    """The number of tokens of each row's prompt and response."""
    return [len(row.prompt) + len(row.response) for row in rows]
