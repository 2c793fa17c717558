"""Forward and backward passes over rows of static shape as CUDA graphs: thousands of kernels in one launch."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class PackedRow:
    """Input of the decoder layers: (1, T) ids and positions, and the cumulative lengths of the segments."""

    ids: Tensor
    positions: Tensor
    cu_seq_lens: Tensor
    longest: int

    @classmethod
    def from_batch(
        cls, input_ids: Tensor, position_ids: Tensor, cu_seq_lens_q: Tensor, max_length_q: int, **_: Any
    ) -> "PackedRow":
        """Take the row from a packed batch."""
        return cls(input_ids, position_ids, cu_seq_lens_q, max_length_q)

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """Ids, positions and cumulative segment lengths."""
        return self.ids, self.positions, self.cu_seq_lens


RunForward = Callable[[PackedRow], Tensor]
RunBackward = Callable[[Tensor, Tensor], None]


@dataclass
class _GraphPair:
    """A forward and a backward pass as two CUDA graphs, with their static input and output tensors."""

    row: PackedRow
    out: Tensor
    grad: Tensor
    forward: Any
    backward: Any


class CudaGraphs:
    """One pair of graphs per row length; all share one memory pool."""

    def __init__(self) -> None:
        self._pairs: dict[int, _GraphPair] = {}
        self._current: _GraphPair | None = None
        self._pool: Any = None
        self._stream: Any = None  # shared by all captures: cuBLAS keeps a workspace per stream
        self._uncaptured: Tensor | None = None  # the output of the last capture's first run

    def forward(self, row: PackedRow, run_forward: RunForward, run_backward: RunBackward, gradients: Tensor) -> Tensor:
        """Run the forward pass of `run_forward` on the row; return its output.

        `run_backward(output, grad)` must add to `gradients`. The first row of each length is used to capture both
        graphs; the capture leaves `gradients` unchanged.
        """
        self._uncaptured = None
        pair = self._pairs.get(row.ids.shape[1]) or self._capture(row, run_forward, run_backward, gradients)
        for buffer, value in zip(pair.row.tensors, row.tensors, strict=True):
            buffer.copy_(value)
        pair.forward.replay()
        self._current = pair
        return pair.out.detach()

    def backward(self, grad: Tensor) -> None:
        """Run the backward pass that belongs to the last forward pass; `grad` is the gradient of its output."""
        pair = self._current
        assert pair, "no forward pass has been run"
        pair.grad.copy_(grad)
        pair.backward.replay()

    def take_uncaptured_output(self) -> Tensor:
        """Return what the last row gave without graphs, if it was captured; kept until the next row."""
        out, self._uncaptured = self._uncaptured, None
        assert out is not None, "nothing has been captured"
        return out

    def clear(self) -> None:
        """Delete all graphs and free their memory."""
        self._pairs.clear()
        self._pool = self._current = self._uncaptured = None

    def _capture(
        self, row: PackedRow, run_forward: RunForward, run_backward: RunBackward, gradients: Tensor
    ) -> _GraphPair:
        saved_gradients = gradients.clone()
        row = PackedRow(*(t.clone() for t in row.tensors), row.longest)
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        side_stream = self._stream = self._stream or torch.cuda.Stream()
        side_stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side_stream):  # the first run compiles and allocates, which a capture must not do
            out = run_forward(row)
            self._uncaptured = out.detach().clone()
            run_backward(out, torch.zeros_like(out))
            del out
        torch.cuda.current_stream().wait_stream(side_stream)
        forward, backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        with torch.cuda.graph(forward, pool=self._pool, capture_error_mode="thread_local"):
            out = run_forward(row)
        grad = torch.zeros_like(out)
        with torch.cuda.graph(backward, pool=self._pool, capture_error_mode="thread_local"):
            run_backward(out, grad)
        gradients.copy_(saved_gradients)
        pair = _GraphPair(row, out.detach(), grad, forward, backward)
        self._pairs[row.ids.shape[1]] = pair
        return pair
