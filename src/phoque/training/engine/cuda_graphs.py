"""Passes over rows of static shape, captured as CUDA graphs: thousands of kernels that Python launches at once."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Row:
    """What the layers are given: (1, T) ids and positions, and the borders of the segments."""

    ids: Tensor
    positions: Tensor
    borders: Tensor
    longest: int

    @classmethod
    def of(cls, input_ids: Tensor, position_ids: Tensor, cu_seq_lens_q: Tensor, max_length_q: int, **_: Any) -> "Row":
        """The row of a packed batch."""
        return cls(input_ids, position_ids, cu_seq_lens_q, max_length_q)

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """Ids, positions and borders."""
        return self.ids, self.positions, self.borders


Run = Callable[[Row], Tensor]
Back = Callable[[Tensor, Tensor], None]


@dataclass
class _Pair:
    """A forward and a backward pass as two CUDA graphs, with the tensors that they read and write."""

    row: Row
    out: Tensor
    grad: Tensor
    forward: Any
    backward: Any


class Graphs:
    """A pair of graphs for each length of a row, in one pool of memory."""

    def __init__(self) -> None:
        self._pairs: dict[int, _Pair] = {}
        self._current: _Pair | None = None
        self._pool: Any = None
        self._aside: Any = None  # one stream for all: cuBLAS keeps a workspace for each that it has seen

    def forward(self, row: Row, run: Run, back: Back, gradients: Tensor) -> Tensor:
        """What `run` makes of the row; `back`, given that and its gradient, adds to `gradients`.

        The first row of a length is what they are captured on, which leaves `gradients` as they are.
        """
        pair = self._pairs.get(row.ids.shape[1]) or self._captured(row, run, back, gradients)
        for ours, given in zip(pair.row.tensors, row.tensors, strict=True):
            ours.copy_(given)
        pair.forward.replay()
        self._current = pair
        return pair.out.detach()

    def backward(self, grad: Tensor) -> None:
        """Run the backward pass of the last forward pass."""
        pair = self._current
        assert pair, "no forward pass has been run"
        pair.grad.copy_(grad)
        pair.backward.replay()

    def clear(self) -> None:
        """Let go of all graphs and of their memory."""
        self._pairs.clear()
        self._pool = self._current = None

    def _captured(self, row: Row, run: Run, back: Back, gradients: Tensor) -> _Pair:
        kept = gradients.clone()
        row = Row(*(t.clone() for t in row.tensors), row.longest)
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        aside = self._aside = self._aside or torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(2):  # compiling, cuBLAS and autograd make things on their first runs that a graph must not
                out = run(row)
                back(out, torch.zeros_like(out))
                del out
        torch.cuda.current_stream().wait_stream(aside)
        forward, backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        with torch.cuda.graph(forward, pool=self._pool, capture_error_mode="thread_local"):
            out = run(row)
        grad = torch.zeros_like(out)
        with torch.cuda.graph(backward, pool=self._pool, capture_error_mode="thread_local"):
            back(out, grad)
        gradients.copy_(kept)
        pair = _Pair(row, out.detach(), grad, forward, backward)
        self._pairs[row.ids.shape[1]] = pair
        return pair
