"""Run an export with ONNX Runtime on the CPU, with the same sessions and inputs as Transformers.js."""

import time
from pathlib import Path
from typing import Any

import numpy as np

SUFFIXES = {"fp32": "", "fp16": "_fp16", "q8": "_quantized", "q4": "_q4", "q4f16": "_q4f16", "int8": "_int8"}
DTYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(int64)": np.int64}
DECODER_NAMES = ("decoder_model_merged", "model")
Past = list[np.ndarray]


def open_session(file: Path, threads: int = 0) -> Any:
    """Open an ONNX Runtime session on the CPU; 0 threads lets ONNX Runtime choose. Raises ONNX Runtime's own errors."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 4
    return onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])


def find_decoder(folder: Path, dtype: str) -> str:
    """Return the name of the decoder session. Raises FileNotFoundError if there is none in that precision."""
    for name in DECODER_NAMES:
        if (folder / "onnx" / f"{name}{SUFFIXES[dtype]}.onnx").is_file():
            return name
    raise FileNotFoundError(f"no decoder in {dtype}")


class OnnxChatModel:
    """The text model of an export in one precision: token ids in, logits and KV cache out."""

    def __init__(self, folder: Path, dtype: str, threads: int = 0) -> None:
        name = find_decoder(folder, dtype)
        self.decoder = open_session(folder / "onnx" / f"{name}{SUFFIXES[dtype]}.onnx", threads)
        has_embed_session = name == "decoder_model_merged"
        file = folder / "onnx" / f"embed_tokens{SUFFIXES[dtype]}.onnx"
        self.embed: Any = open_session(file, threads) if has_embed_session else None
        self.inputs = {entry.name: entry for entry in self.decoder.get_inputs()}
        self.cache = [name for name in self.inputs if name.startswith("past_key_values.")]
        self.outputs = [entry.name for entry in self.decoder.get_outputs()]

    def embed_tokens(self, ids: np.ndarray) -> np.ndarray:
        """Return inputs_embeds [1, length, width] of ids [1, length]; for exports with a session embed_tokens only."""
        return self.embed.run(None, {"input_ids": ids})[0]

    def run(
        self,
        ids: np.ndarray,
        past: Past | None = None,
        num_logits: int = 0,
        first_position: int | None = None,
        embeds: np.ndarray | None = None,
    ) -> tuple[np.ndarray, Past]:
        """Return logits [1, length, vocabulary] for `ids` [1, length] that follow `past`, and the cache after them.

        `num_logits` is the number of last positions to return logits for, 0 for all. `first_position` is the position
        of the first token, by default the length of `past`. `embeds` [1, length, width] replaces the embeddings of
        `ids`, for exports with a session embed_tokens only.
        """
        past_length, new_length = (past[0].shape[2] if past else 0), ids.shape[1]
        start = past_length if first_position is None else first_position
        feeds: dict[str, Any] = {
            "attention_mask": np.ones((1, past_length + new_length), np.int64),
            "position_ids": np.arange(start, start + new_length)[None],
            "num_logits_to_keep": np.array(num_logits, np.int64),
        }
        if self.embed is None:
            feeds["input_ids"] = ids
        else:
            feeds["inputs_embeds"] = self.embed_tokens(ids) if embeds is None else embeds
        feeds |= dict(zip(self.cache, past or self.empty_cache(), strict=True))
        results = dict(
            zip(self.outputs, self.decoder.run(None, {k: v for k, v in feeds.items() if k in self.inputs}), strict=True)
        )
        return results["logits"], [results[name.replace("past_key_values", "present")] for name in self.cache]

    def empty_cache(self) -> Past:
        """Return an empty cache, made as Transformers.js makes it: a symbolic dimension is 0, but batch_size is 1."""
        tensors = []
        for name in self.cache:
            entry = self.inputs[name]
            shape = [d if isinstance(d, int) else 1 if d == "batch_size" else 0 for d in entry.shape]
            tensors.append(np.zeros(shape, DTYPES[entry.type]))
        return tensors

    def generate(self, ids: np.ndarray, max_new_tokens: int, seconds: float) -> list[int]:
        """Return the greedy continuation of `ids`: `max_new_tokens` tokens, or fewer when `seconds` have passed."""
        tokens: list[int] = []
        deadline = time.monotonic() + seconds
        logits, past = self.run(ids, None, 1)
        while len(tokens) < max_new_tokens and time.monotonic() < deadline:
            tokens.append(int(logits[0, -1].argmax()))
            logits, past = self.run(np.array([tokens[-1:]]), past, 1)
        return tokens
