"""A model to talk to, whatever runs it: torch, llama.cpp or ONNX Runtime give the logits of the next token."""

from collections.abc import Generator, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from phoque.data.chat_template import encode_prompt, render_prompt
from phoque.data.template_renderer import TemplateOnly
from phoque.gguf.llama_cpp import Library, LlamaCppModel
from phoque.onnx.session import OnnxChatModel, Past

Logits = Generator[np.ndarray, int, None]


class ChatModel(Protocol):
    """What an answer needs of a model; `label` names it where several answer side by side."""

    label: str

    def encode(self, messages: Sequence[dict[str, Any]]) -> list[int]:
        """Token ids of a conversation, up to where the answer begins."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """The text of an answer, without control tokens. An incomplete character at its end is U+FFFD."""
        ...

    def is_end(self, token: int) -> bool:
        """Whether an answer ends with this token."""
        ...

    def stream_logits(self, ids: list[int], tokens: int) -> Logits:
        """Yield the logits [vocabulary] of the next token, and be sent the token that was chosen."""
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

    def stream_logits(self, ids: list[int], tokens: int) -> Logits:
        import torch
        from torch.nn.attention import sdpa_kernel

        from phoque.inference.cuda_decoder import BatchDecoder
        from phoque.inference.generate import KERNELS

        prompt = torch.tensor([ids], device=self._model.device)
        decoder = BatchDecoder(self._model, prompt, torch.ones_like(prompt), tokens)
        with torch.no_grad(), self._switched(), sdpa_kernel(KERNELS), decoder:
            logits = decoder.prefill()
            for _ in range(tokens):
                token = yield logits[0].float().cpu().numpy()
                logits = decoder.step(torch.tensor([token], device=prompt.device))

    def _switched(self) -> AbstractContextManager[Any]:
        if not hasattr(self._model, "disable_adapter"):
            return nullcontext()
        if self._adapter is None:
            return self._model.disable_adapter()
        self._model.set_adapter(self._adapter)
        return nullcontext()


class LlamaCppChatModel:
    """A GGUF file in llama.cpp, with the chat template in the file."""

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

    def stream_logits(self, ids: list[int], tokens: int) -> Logits:
        ids = list(ids)
        for _ in range(max(1, min(tokens, self._model.length - len(ids)))):
            ids.append((yield self._model.run(ids)[0]))


class OnnxModel(_TokenizerModel):
    """An ONNX export in ONNX Runtime, with the tokenizer in its folder."""

    def __init__(self, label: str, folder: Path, dtype: str, tokenizer: Any, ends: set[int]) -> None:
        super().__init__(label, tokenizer, ends)
        self._model = OnnxChatModel(folder, dtype)

    def stream_logits(self, ids: list[int], tokens: int) -> Logits:
        past: Past | None = None
        new = np.array([ids], np.int64)
        for _ in range(tokens):
            logits, past = self._model.run(new, past, 1)
            new = np.array([[(yield logits[0, -1].astype(np.float32))]], np.int64)
