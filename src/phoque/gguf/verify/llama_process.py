"""Runs a GGUF file in llama.cpp in a process of its own: a damaged file can end the process that loads it.

Reads {modules, file, texts, prompts, ends, tokens, length, logits} as JSON from stdin. Prints the answer as JSON: `ids`
of each text and of the `prompts`, `answers` to each prompt (token ids), `said`, `ended`; the logits go into the .npz
file that `logits` names.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from phoque.errors import PhoqueError
from phoque.gguf.llama_cpp import open_library
from phoque.gguf.llama_cpp_model import LlamaCppModel


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """Load the file and run the request."""
    library = open_library(Path(request["modules"]))
    start = time.monotonic()
    with LlamaCppModel(library, Path(request["file"]), request["length"], exact=True) as model:
        loaded = time.monotonic()
        ids = [model.tokenize(text) for text in request["texts"]]
        prompts = [model.tokenize(prompt) if isinstance(prompt, str) else prompt for prompt in request["prompts"]]
        logits = {str(n): model.run(prompt, all_logits=True) for n, prompt in enumerate(prompts)}
        np.savez(request["logits"], **logits)  # ty: ignore[invalid-argument-type]
        began = time.monotonic()
        answers = [model.generate(prompt, request["tokens"]) for prompt in prompts]
        seconds = time.monotonic() - began
        generated = sum(len(tokens) for tokens, _ in answers)
        return {
            "ids": ids,
            "prompts": prompts,
            "answers": [tokens for tokens, _ in answers],
            "said": [model.detokenize(tokens).decode(errors="replace") for tokens, _ in answers],
            "ended": [ended for _, ended in answers],
            "is_end": [model.is_end(token) for token in request["ends"]],
            "load_s": loaded - start,
            "tokens_per_s": generated / seconds if seconds else 0.0,
        }


def main() -> None:
    """One request from stdin, one answer to stdout."""
    try:
        result = answer(json.load(sys.stdin))
    except PhoqueError as error:
        result = {"error": f"{error.what} {error.why}"}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
