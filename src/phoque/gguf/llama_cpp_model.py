"""A GGUF file that runs in llama.cpp: logits, answers, and the text of tokens."""

import ctypes as c
import os
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import numpy as np

from phoque.errors import RunError, UsageError
from phoque.gguf.c_api import Batch
from phoque.gguf.llama_cpp import Library, load_model, tokenize

F32_CACHE = 0  # ggml_type of the KV cache
FLASH_ATTENTION_OFF = 0
MIN_CONTEXT = 64  # tokens
BATCH_TOKENS = 512  # that are decoded at once


class LlamaCppModel:
    """A GGUF file that runs in llama.cpp, with a context of `length` tokens, or of as many as the model was trained on.

    `adapter` is a LoRA GGUF file.

    `exact` keeps keys and values in 32 bits, so that logits can be compared with another implementation's.
    As a context manager it frees its memory at the end. Raises UsageError if llama.cpp cannot load a file.
    """

    def __init__(
        self,
        library: Library,
        file: Path,
        length: int = 2048,
        *,
        adapter: Path | None = None,
        exact: bool = False,
        threads: int = 0,
    ) -> None:
        self._library = library
        params = library.llama_model_default_params()
        self._model = load_model(library, file, params)
        self.length = length = min(length, max(library.llama_model_n_ctx_train(self._model), MIN_CONTEXT))
        self.vocab = library.llama_model_get_vocab(self._model)
        self.vocabulary_size: int = library.llama_vocab_n_tokens(self.vocab)
        context = library.llama_context_default_params()
        context.n_ctx, context.n_batch, context.n_ubatch = length, BATCH_TOKENS, BATCH_TOKENS
        if exact:
            context.type_k = context.type_v = F32_CACHE
            context.flash_attn_type = FLASH_ATTENTION_OFF
        context.n_threads = context.n_threads_batch = threads or idle_cores()
        self._context = library.llama_init_from_model(self._model, context)
        if not self._context:
            library.llama_model_free(self._model)
            raise UsageError(
                what=f"llama.cpp cannot run {file.name}.", why=library.last_error(), fix="Use a shorter context."
            )
        self._adapter = library.llama_adapter_lora_init(self._model, str(adapter).encode()) if adapter else None
        if adapter and not self._adapter:
            self.close()
            raise UsageError(
                what=f"llama.cpp cannot load the adapter {adapter.name}.",
                why=library.last_error(),
                fix="Use the base model that it was exported for.",
            )
        if self._adapter:
            adapters, scales = (c.c_void_p * 1)(self._adapter), (c.c_float * 1)(1.0)
            library.llama_set_adapters_lora(self._context, adapters, 1, scales)
        self._cached: list[int] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Free the model's memory."""
        self._library.llama_free(self._context)
        self._library.llama_model_free(self._model)

    @property
    def template(self) -> str:
        """The chat template in the file, or ""."""
        text = self._library.llama_model_chat_template(self._model, None)
        return text.decode() if text else ""

    def special_tokens(self) -> dict[str, str]:
        """The texts of the special tokens that a chat template may name: bos_token and eos_token."""
        vocabulary = self._library
        tokens = {
            "bos_token": vocabulary.llama_vocab_bos(self.vocab),
            "eos_token": vocabulary.llama_vocab_eos(self.vocab),
        }
        return {name: self._piece(token, special=True).decode() for name, token in tokens.items() if token >= 0}

    def is_end(self, token: int) -> bool:
        """Whether llama.cpp stops at this token."""
        return self._library.llama_vocab_is_eog(self.vocab, token)

    def tokenize(self, text: str) -> list[int]:
        """The token ids of a rendered chat: control tokens are recognized, and none is added."""
        return tokenize(self._library, self.vocab, text)

    def detokenize(self, ids: Sequence[int]) -> bytes:
        """The text of tokens as UTF-8, which may end within a character; control tokens have none."""
        return b"".join(self._piece(token) for token in ids)

    def _piece(self, token: int, *, special: bool = False) -> bytes:
        buffer = c.create_string_buffer(256)
        size = self._library.llama_token_to_piece(self.vocab, token, buffer, len(buffer), 0, special)
        if size < 0:
            buffer = c.create_string_buffer(-size)
            size = self._library.llama_token_to_piece(self.vocab, token, buffer, len(buffer), 0, special)
        return buffer.raw[:size]

    def run(self, ids: Sequence[int], *, all_logits: bool = False) -> np.ndarray:
        """The logits [1, vocabulary] that follow `ids`, or with `all_logits` [length, vocabulary].

        What `ids` begin with, and the last call's too, is not computed again. Raises UsageError if they are longer than
        the context, RunError if llama.cpp fails.
        """
        ids = list(ids)
        if len(ids) > self.length:
            raise UsageError(
                what="The conversation is longer than the model's context.",
                why=f"It has {len(ids):,} tokens, and the context {self.length:,}.",
                fix="Begin another one (/reset), or ask less at once.",
            )
        kept = 0 if all_logits else shared_length(self._cached, ids[:-1])
        memory = self._library.llama_get_memory(self._context)
        if not self._library.llama_memory_seq_rm(memory, 0, kept, -1):  # a recurrent state cannot be cut
            kept = 0
            self._library.llama_memory_seq_rm(memory, 0, 0, -1)
        self._cached = ids[:kept]
        rows: list[np.ndarray] = []
        for start in range(kept, len(ids), BATCH_TOKENS):
            new = ids[start : start + BATCH_TOKENS]
            is_last = start + len(new) == len(ids)
            rows += self._decode(new, start, range(len(new)) if all_logits else [len(new) - 1] if is_last else [])
            self._cached = ids[: start + len(new)]
        return np.stack(rows)

    def _decode(self, ids: list[int], start: int, rows: Sequence[int]) -> list[np.ndarray]:
        """Append tokens at position `start`; return the logits of the rows."""
        self._library.forget_messages()
        with self._batch(ids, start, set(rows)) as batch:
            if code := self._library.llama_decode(self._context, batch):
                raise RunError(
                    what="llama.cpp cannot run the model.",
                    why=f"llama_decode returned {code}: {self._library.last_error()}",
                    fix="Verify the file with `phoque verify-gguf`.",
                )
        read = self._library.llama_get_logits_ith
        return [np.ctypeslib.as_array(read(self._context, row), (self.vocabulary_size,)).copy() for row in rows]

    def generate(self, ids: Sequence[int], tokens: int) -> tuple[list[int], bool]:
        """The greedy answer to `ids` without its end token, and whether it ended within `tokens` tokens."""
        answer: list[int] = []
        while len(answer) < tokens:
            token = int(self.run([*ids, *answer])[0].argmax())
            if self.is_end(token):
                return answer, True
            answer.append(token)
        return answer, False

    @contextmanager
    def _batch(self, ids: list[int], start: int, logits_at: set[int]) -> Generator[Batch]:
        batch = self._library.llama_batch_init(len(ids), 0, 1)
        try:
            batch.n_tokens = len(ids)
            sequences = c.cast(batch.seq_id, c.POINTER(c.POINTER(c.c_int32)))
            for name, kind, values in (
                ("token", c.c_int32, ids),
                ("pos", c.c_int32, range(start, start + len(ids))),
                ("n_seq_id", c.c_int32, [1] * len(ids)),
                ("logits", c.c_int8, [row in logits_at for row in range(len(ids))]),
            ):
                c.memmove(getattr(batch, name), (kind * len(ids))(*values), c.sizeof(kind) * len(ids))
            for row in range(len(ids)):
                sequences[row][0] = 0
            yield batch
        finally:
            self._library.llama_batch_free(batch)


def idle_cores() -> int:
    """The cores that nothing else uses now, at least one.

    ggml's threads spin while they wait for one another: on two cores at a load of 4, SmolLM2 generates 0.4 tokens per
    second with two threads and 54 with one.
    """
    busy = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    return max(1, round((os.cpu_count() or 1) - busy))


def shared_length(first: Sequence[Any], second: Sequence[Any]) -> int:
    """How many items two sequences have in common at their start."""
    pairs = zip(first, second, strict=False)
    return next((n for n, (a, b) in enumerate(pairs) if a != b), min(len(first), len(second)))
