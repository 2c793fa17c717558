"""Batched decoding with static buffers; on a GPU one decoding step is one CUDA graph.

A step of a small model launches thousands of kernels of a few microseconds each. Launching them from Python takes
several times as long as running them.
"""

import warnings
from functools import cache
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor

from phoque.inference.residual_stream import get_blocks, unwrap_model
from phoque.models.architectures import architecture_of
from phoque.models.config import sliding_window_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MASK_ALIGNMENT = 8  # attention kernels need a mask whose length is a multiple of this
MIN_STEPS_TO_CAPTURE = 4  # steps that must remain for a capture, which takes as long as two or three steps
MAX_LOGIT_DIFFERENCE = 0.02  # largest relative difference between the logits of a replayed and an uncaptured step


class BatchDecoder:
    """Decodes one batch; each step returns logits (rows, vocabulary), which the next step overwrites.

    ids and mask are (rows, longest), padded on the left; `tokens` is the most that a row may generate. As a context
    manager it frees the memory of its graphs at the end.
    """

    def __init__(self, model: "PreTrainedModel", ids: Tensor, mask: Tensor, tokens: int) -> None:
        self._model, self._prompt = unwrap_model(model), (ids, mask)
        rows, prompt_length = ids.shape
        max_length = -(-(prompt_length + tokens) // MASK_ALIGNMENT) * MASK_ALIGNMENT
        self._ids, self._position_ids = ids.new_zeros(rows, 1), mask.sum(1, keepdim=True) - 1
        self._attention_mask = torch.zeros(rows, 1, 1, max_length, dtype=torch.bool, device=ids.device)
        self._attention_mask[:, 0, 0, :prompt_length] = mask.bool()
        self._cache_position = torch.tensor([prompt_length - 1], device=ids.device)
        self._is_recurrent = architecture_of(self._model.config).is_recurrent
        if self._is_recurrent:  # its state is not a list of tokens, so transformers' own cache keeps it
            from transformers import DynamicCache

            self._cache: Any = DynamicCache(config=self._model.config)
        else:
            self._cache = _make_cache(len(get_blocks(model)), max_length, self._cache_position)
        config = self._model.config.get_text_config()
        self._window = sliding_window_of(config)
        self._has_layer_types = bool(getattr(config, "layer_types", None))
        self._window_mask = self._attention_mask.clone()
        self._can_capture, self._uncaptured_steps = ids.is_cuda and not self._is_recurrent, 0
        self._steps_left, self._cache_length = tokens, prompt_length
        self._graph: Any = None
        self._previous_graph: Any = None  # the graph of the larger batch, whose memory pool the next capture reuses
        self._logits = self._attention_mask.new_empty(0)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._graph or self._previous_graph:
            self._graph = self._previous_graph = None
            self._logits = self._logits.new_empty(0)
            torch.cuda.empty_cache()  # otherwise the memory of freed graphs stays reserved

    def prefill(self) -> Tensor:
        """Run the prompts; return the logits of each row's first token."""
        ids, mask = self._prompt
        return self._forward(ids, mask, (mask.cumsum(1) - 1).clamp(min=0))

    def step(self, tokens: Tensor) -> Tensor:
        """Append one token per row (rows,); return the logits of the next token."""
        self._ids.copy_(tokens[:, None])
        self._position_ids.add_(1)
        self._cache_position.add_(1)
        self._attention_mask.index_fill_(3, self._cache_position, True)
        if self._window:
            columns = torch.arange(self._attention_mask.shape[3], device=tokens.device)
            is_near = columns > self._cache_position - self._window
            torch.logical_and(self._attention_mask, is_near, out=self._window_mask)
        self._cache_length += 1
        self._steps_left -= 1
        if self._graph:
            self._graph.replay()
            return self._logits
        logits = self._step()
        # not at the first step, which still loads the kernels for this shape
        if self._can_capture and self._uncaptured_steps == 1 and self._steps_left >= MIN_STEPS_TO_CAPTURE:
            self._can_capture = self._capture(logits)
        self._uncaptured_steps += 1
        return logits

    def select_rows(self, rows: Tensor) -> None:
        """Keep only these rows of the batch."""
        self._ids, self._position_ids = self._ids[rows], self._position_ids[rows]
        self._attention_mask, self._window_mask = self._attention_mask[rows], self._window_mask[rows]
        self._cache.reorder_cache(rows)  # batch_select_indices would leave recurrent states as they are
        self._previous_graph, self._graph, self._uncaptured_steps = self._graph or self._previous_graph, None, 0
        self._logits = self._logits.new_empty(0)

    def _capture(self, expected: Tensor) -> bool:
        """Capture the step that gave `expected` and check its replay; return whether the graph can be used.

        The step may run twice: it writes the same values to the same cache position.
        """
        graph = torch.cuda.CUDAGraph()
        try:
            # not torch.cuda.graph, which first empties the cache of free memory
            with torch.cuda.stream(_get_capture_stream()):
                graph.capture_begin(
                    self._previous_graph and self._previous_graph.pool(), capture_error_mode="thread_local"
                )
                try:
                    out = self._step()
                finally:
                    graph.capture_end()
            graph.replay()
            difference = float((out - expected).float().norm() / expected.float().norm())
            if not difference <= MAX_LOGIT_DIFFERENCE:
                raise RuntimeError(f"logits are {difference:.1%} off")
        except RuntimeError as error:
            reason = " ".join(str(error).split())[:120]
            warnings.warn(
                f"generation is slow because its steps do not run as a CUDA graph: {reason}",
                RuntimeWarning,
                stacklevel=2,
            )
            return False
        self._graph, self._logits, self._previous_graph = graph, out, None
        return True

    def _step(self) -> Tensor:
        return self._forward(self._ids, self._visible_tokens(), self._position_ids)

    def _visible_tokens(self) -> Tensor | dict[str, Tensor]:
        """Return which tokens a new token attends to: all but padding, or those in its window.

        From 4D boolean masks transformers builds none itself; a model whose layers have types takes one for each type.
        """
        if self._is_recurrent:
            return self._attention_mask[:, 0, 0, : self._cache_length]
        if not self._window:
            return self._attention_mask
        if not self._has_layer_types:
            return self._window_mask
        return {"full_attention": self._attention_mask, "sliding_attention": self._window_mask}

    def _forward(self, ids: Tensor, visible: Tensor | dict[str, Tensor], positions: Tensor) -> Tensor:
        output = self._model(
            input_ids=ids,
            attention_mask=visible,
            position_ids=positions,
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=1,
        )
        return output.logits[:, -1]


@cache
def _get_capture_stream() -> Any:
    """The one stream of all captures: cuBLAS keeps a workspace for each stream that it was used on."""
    return torch.cuda.Stream()


def _make_cache(layers: int, max_length: int, position: Tensor) -> Any:
    """Make a KV cache of `max_length` tokens that writes at `position`; DynamicCache copies itself at each step."""
    from transformers.cache_utils import Cache, DynamicLayer

    class PreallocatedLayer(DynamicLayer):
        def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> Any:
            new = key_states, value_states
            if self.is_initialized:
                buffers: Any = self.keys, self.values
                for buffer, states in zip(buffers, new, strict=True):
                    buffer.index_copy_(2, position, states)
                return buffers
            self.lazy_initialization(*new)
            # zeros, not empty: masked positions still have to be finite
            buffers = [states.new_zeros(*states.shape[:2], max_length, states.shape[3]) for states in new]
            for buffer, states in zip(buffers, new, strict=True):
                buffer[:, :, : states.shape[2]] = states
            self.keys, self.values = buffers
            return new

    return Cache(layers=[PreallocatedLayer() for _ in range(layers)])
