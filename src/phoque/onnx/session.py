"""An export under ONNX Runtime on the CPU: the sessions that Transformers.js makes, fed as it feeds them."""

import time
from pathlib import Path
from typing import Any

import numpy as np

SUFFIXES = {"fp32": "", "fp16": "_fp16", "q8": "_quantized", "q4": "_q4", "q4f16": "_q4f16", "int8": "_int8"}
DTYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(int64)": np.int64}
DECODERS = ("decoder_model_merged", "model")
Past = list[np.ndarray]


def session(file: Path, threads: int = 0) -> Any:
    """An ONNX Runtime session on the CPU. Raises what ONNX Runtime raises for a file that it cannot run."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 4
    return onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])


def decoder_of(folder: Path, dtype: str) -> str:
    """The name of the decoder's session. Raises FileNotFoundError if there is none of that precision."""
    for name in DECODERS:
        if (folder / "onnx" / f"{name}{SUFFIXES[dtype]}.onnx").is_file():
            return name
    raise FileNotFoundError(f"no decoder in {dtype}")


class OnnxChatModel:
    """The text side of an export in one precision: token ids in, logits out, with a cache."""

    def __init__(self, folder: Path, dtype: str, threads: int = 0) -> None:
        name = decoder_of(folder, dtype)
        self.decoder = session(folder / "onnx" / f"{name}{SUFFIXES[dtype]}.onnx", threads)
        apart = name == "decoder_model_merged"
        file = folder / "onnx" / f"embed_tokens{SUFFIXES[dtype]}.onnx"
        self.embed: Any = session(file, threads) if apart else None
        self.inputs = {entry.name: entry for entry in self.decoder.get_inputs()}
        self.cache = [name for name in self.inputs if name.startswith("past_key_values.")]
        self.outputs = [entry.name for entry in self.decoder.get_outputs()]

    def embeddings(self, ids: np.ndarray) -> np.ndarray:
        """inputs_embeds [1, length, width] of ids [1, length]; only where embeddings are a session of their own."""
        return self.embed.run(None, {"input_ids": ids})[0]

    def run(
        self,
        ids: np.ndarray,
        past: Past | None = None,
        keep: int = 0,
        at: int | None = None,
        embeds: np.ndarray | None = None,
    ) -> tuple[np.ndarray, Past]:
        """Logits [1, length, vocabulary] and the cache after `ids` [1, length], which follow `past`.

        `keep` is how many of the last logits are wanted, 0 for all; `at` is the first position, if not after the past.
        """
        so_far, new = (past[0].shape[2] if past else 0), ids.shape[1]
        first = so_far if at is None else at
        given: dict[str, Any] = {
            "attention_mask": np.ones((1, so_far + new), np.int64),
            "position_ids": np.arange(first, first + new)[None],
            "num_logits_to_keep": np.array(keep, np.int64),
        }
        if self.embed is None:
            given["input_ids"] = ids
        else:
            given["inputs_embeds"] = self.embeddings(ids) if embeds is None else embeds
        given |= dict(zip(self.cache, past or self.empty(), strict=True))
        found = dict(
            zip(self.outputs, self.decoder.run(None, {k: v for k, v in given.items() if k in self.inputs}), strict=True)
        )
        return found["logits"], [found[name.replace("past_key_values", "present")] for name in self.cache]

    def empty(self) -> Past:
        """A cache with nothing in it, made as Transformers.js makes it: what is no number, nor batch_size, is 0."""
        made = []
        for name in self.cache:
            entry = self.inputs[name]
            shape = [d if isinstance(d, int) else 1 if d == "batch_size" else 0 for d in entry.shape]
            made.append(np.zeros(shape, DTYPES[entry.type]))
        return made

    def greedy(self, ids: np.ndarray, new: int, seconds: float) -> list[int]:
        """The likeliest continuation: `new` tokens, or as many as the time allows."""
        said: list[int] = []
        end = time.monotonic() + seconds
        logits, past = self.run(ids, None, 1)
        while len(said) < new and time.monotonic() < end:
            said.append(int(logits[0, -1].argmax()))
            logits, past = self.run(np.array([said[-1:]]), past, 1)
        return said
