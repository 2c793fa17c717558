"""The next token of every row, again and again, with all that a step reads in one place: on a GPU it is one graph.

A step of a small model is thousands of kernels of a few microseconds, and calling them from Python takes several times
as long as they do.
"""

import warnings
from functools import cache
from typing import Any, Self

import torch
from torch import Tensor

from phoque.inference.residual_stream import blocks, inner

ALIGNED = 8  # places of a mask that attention's kernels read at once
WORTH = 4  # steps that must be left for a capture, which takes as long as two or three
AGREES = 0.02  # largest relative difference of a replayed step's logits from those of the plain one


class Decoding:
    """Rows of one batch while they are answered; each step gives logits (rows, vocabulary), which the next overwrites.

    ids and mask are (rows, longest), padded on the left; `tokens` are the most that a row may get. As a context, it
    gives the memory of its graphs back at the end.
    """

    def __init__(self, model: Any, ids: Tensor, mask: Tensor, tokens: int) -> None:
        self._model, self._prompt = inner(model), (ids, mask)
        rows, begun = ids.shape
        room = -(-(begun + tokens) // ALIGNED) * ALIGNED
        self._ids, self._places = ids.new_zeros(rows, 1), mask.sum(1, keepdim=True) - 1
        self._seen = torch.zeros(rows, 1, 1, room, dtype=torch.bool, device=ids.device)
        self._seen[:, 0, 0, :begun] = mask.bool()
        self._at = torch.tensor([begun - 1], device=ids.device)
        self._cache = _reserved(len(blocks(model)), room, self._at)
        self._captures, self._steps, self._left = ids.is_cuda, 0, tokens
        self._graph: Any = None
        self._last: Any = None  # a graph of more rows: the next is captured into its memory
        self._out = self._seen.new_empty(0)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._graph or self._last:
            self._graph = self._last = None
            self._out = self._out.new_empty(0)
            torch.cuda.empty_cache()  # what graphs have let go of stays taken otherwise

    def begin(self) -> Tensor:
        """The logits of each row's first token."""
        ids, mask = self._prompt
        return self._pass(ids, mask, (mask.cumsum(1) - 1).clamp(min=0))

    def next(self, chosen: Tensor) -> Tensor:
        """The logits after the tokens that were chosen (rows)."""
        self._ids.copy_(chosen[:, None])
        self._places.add_(1)
        self._at.add_(1)
        self._seen.index_fill_(3, self._at, True)
        self._left -= 1
        if self._graph:
            self._graph.replay()
            return self._out
        logits = self._step()
        # the first has loaded what kernels of this shape need
        if self._captures and self._steps == 1 and self._left >= WORTH:
            self._captures = self._captured(logits)
        self._steps += 1
        return logits

    def keep(self, rows: Tensor) -> None:
        """Go on with these rows alone."""
        self._ids, self._places, self._seen = self._ids[rows], self._places[rows], self._seen[rows]
        self._cache.batch_select_indices(rows)
        self._last, self._graph, self._steps = self._graph or self._last, None, 0
        self._out = self._out.new_empty(0)

    def _captured(self, wanted: Tensor) -> bool:
        """Whether the step that gave `wanted` could be captured, and replayed to the same: it may be taken twice."""
        graph = torch.cuda.CUDAGraph()
        try:
            # not torch.cuda.graph, which first gives back all memory that is free
            with torch.cuda.stream(_aside()):
                graph.capture_begin(self._last and self._last.pool(), capture_error_mode="thread_local")
                try:
                    out = self._step()
                finally:
                    graph.capture_end()
            graph.replay()
            far = float((out - wanted).float().norm() / wanted.float().norm())
            if not far <= AGREES:
                raise RuntimeError(f"logits are {far:.1%} off")
        except RuntimeError as error:
            why = " ".join(str(error).split())[:120]
            warnings.warn(f"answers are slow, their steps are not one CUDA graph: {why}", RuntimeWarning, stacklevel=2)
            return False
        self._graph, self._out, self._last = graph, out, None
        return True

    def _step(self) -> Tensor:
        # one new token sees all that is no padding: given so, no mask is built
        return self._pass(self._ids, self._seen, self._places)

    def _pass(self, ids: Tensor, seen: Tensor, places: Tensor) -> Tensor:
        found = self._model(
            input_ids=ids,
            attention_mask=seen,
            position_ids=places,
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=1,
        )
        return found.logits[:, -1]


@cache
def _aside() -> Any:
    """The stream of all captures: cuBLAS keeps a workspace for each stream that it has seen."""
    return torch.cuda.Stream()


def _reserved(layers: int, room: int, at: Tensor) -> Any:
    """A key-value cache with room for all tokens, written at `at`: transformers' own copies itself at every step."""
    from transformers.cache_utils import Cache, DynamicLayer

    class Reserved(DynamicLayer):
        def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> Any:
            new = key_states, value_states
            if self.is_initialized:
                held: Any = self.keys, self.values
                for whole, given in zip(held, new, strict=True):
                    whole.index_copy_(2, at, given)
                return held
            self.lazy_initialization(*new)
            # zeros: what is not seen yet still has to be a number
            held = [given.new_zeros(*given.shape[:2], room, given.shape[3]) for given in new]
            for whole, given in zip(held, new, strict=True):
                whole[:, :, : given.shape[2]] = given
            self.keys, self.values = held
            return new

    return Cache(layers=[Reserved() for _ in range(layers)])
