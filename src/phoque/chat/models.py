"""A model to talk to, whatever runs it: torch, llama.cpp or ONNX Runtime give the logits of the next token."""

from collections.abc import Generator, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from phoque.data.chat_template import encode_prompt, render_prompt
from phoque.data.template_renderer import TemplateOnly
from phoque.gguf.llama_cpp import Library
from phoque.gguf.llama_cpp_model import LlamaCppModel
from phoque.onnx.session import OnnxChatModel, Past

# Yields the logits [vocabulary] of each unfinished row; is sent the tokens that were chosen. A row without one ends.
Logits = Generator[dict[int, np.ndarray], dict[int, int], None]
TOKENS_AT_ONCE = {"cuda": 32_768, "cpu": 8_192}  # in the key-value cache of a batch: 3.5 GB at the 3B shape on a GPU


class ChatModel(Protocol):
    """What an answer needs of a model; `label` names it where several answer side by side.

    `tokens_at_once` is how many tokens a batch of conversations may have, 1 if the model runs them one by one.
    """

    label: str
    tokens_at_once: int

    def encode(self, messages: Sequence[dict[str, Any]]) -> list[int]:
        """Token ids of a conversation, up to where the answer begins."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """The text of an answer, without control tokens. An incomplete character at its end is U+FFFD."""
        ...

    def is_end(self, token: int) -> bool:
        """Whether an answer ends with this token."""
        ...

    def stream_logits(self, prompts: list[list[int]], tokens: int) -> Logits:
        """Continue the prompts, each by at most `tokens` tokens."""
        ...


class _TokenizerModel:
    """What models with a tokenizer of transformers have in common; `ends` are the tokens that end an answer."""

    def __init__(self, label: str, tokenizer: Any, ends: set[int]) -> None:
        self.label, self._tokenizer, self._ends = label, tokenizer, ends

    def encode(self, messages: Sequence[dict[str, Any]]) -> list[int]:
        return encode_prompt(self._tokenizer, list(messages))

    def decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(list(ids), skip_special_tokens=True)

    def is_end(self, token: int) -> bool:
        return token in self._ends


class TorchChatModel(_TokenizerModel):
    """A checkpoint in torch; `adapter` is the one that is switched on for its answers, None for the base alone."""

    def __init__(self, label: str, model: Any, tokenizer: Any, ends: set[int], adapter: str | None = None) -> None:
        super().__init__(label, tokenizer, ends)
        self._model, self._adapter = model, adapter
        self.tokens_at_once = TOKENS_AT_ONCE.get(model.device.type, TOKENS_AT_ONCE["cpu"])

    def stream_logits(self, prompts: list[list[int]], tokens: int) -> Logits:
        import torch
        from torch.nn.attention import sdpa_kernel

        from phoque.inference.cuda_decoder import BatchDecoder
        from phoque.inference.generate import KERNELS, SHRINK_AT
        from phoque.inference.residual_stream import pad_rows

        ids, mask = pad_rows(prompts, self._model.device, left=True)
        decoder = BatchDecoder(self._model, ids, mask, tokens)
        rows = unfinished = list(range(len(prompts)))  # rows: those that are still in the batch
        with torch.no_grad(), self._switched(), sdpa_kernel(KERNELS), decoder:
            logits = decoder.prefill()
            for _ in range(tokens):
                values = dict(zip(rows, logits.float().cpu().numpy(), strict=True))
                chosen = yield {row: values[row] for row in unfinished}
                unfinished = list(chosen)
                if len(unfinished) <= SHRINK_AT * len(rows):
                    decoder.select_rows(torch.tensor([rows.index(row) for row in unfinished], device=ids.device))
                    rows = unfinished
                logits = decoder.step(torch.tensor([chosen.get(row, 0) for row in rows], device=ids.device))

    def _switched(self) -> AbstractContextManager[Any]:
        if not hasattr(self._model, "disable_adapter"):
            return nullcontext()
        if self._adapter is None:
            return self._model.disable_adapter()
        self._model.set_adapter(self._adapter)
        return nullcontext()


class LlamaCppChatModel:
    """A GGUF file in llama.cpp, with the chat template in the file."""

    tokens_at_once = 1

    def __init__(self, label: str, library: Library, file: Path, length: int) -> None:
        self.label = label
        self._model = LlamaCppModel(library, file, length)
        self._template = TemplateOnly(self._model.template, self._model.special_tokens())

    def encode(self, messages: Sequence[dict[str, Any]]) -> list[int]:
        return self._model.tokenize(render_prompt(self._template, list(messages)))

    def decode(self, ids: Sequence[int]) -> str:
        return self._model.detokenize(ids).decode(errors="replace")

    def is_end(self, token: int) -> bool:
        return self._model.is_end(token)

    def stream_logits(self, prompts: list[list[int]], tokens: int) -> Logits:
        [prompt] = prompts
        ids = list(prompt)
        for _ in range(max(1, min(tokens, self._model.length - len(ids)))):
            chosen = yield {0: self._model.run(ids)[0]}
            ids.append(chosen[0])


class OnnxModel(_TokenizerModel):
    """An ONNX export in ONNX Runtime, with the tokenizer in its folder."""

    tokens_at_once = 1

    def __init__(self, label: str, folder: Path, dtype: str, tokenizer: Any, ends: set[int]) -> None:
        super().__init__(label, tokenizer, ends)
        self._model = OnnxChatModel(folder, dtype)

    def stream_logits(self, prompts: list[list[int]], tokens: int) -> Logits:
        past: Past | None = None
        new = np.array(prompts, np.int64)
        for _ in range(tokens):
            logits, past = self._model.run(new, past, 1)
            chosen = yield {0: logits[0, -1].astype(np.float32)}
            new = np.array([[chosen[0]]], np.int64)
