"""How far an export is from the model it came from: KL and agreement on chats that nothing was fitted to."""

import gc
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from phoque.data.chat_template import ChatTemplate
from phoque.data.rows import BadRow, open_dataset, parsed
from phoque.errors import PhoqueError
from phoque.models.load import load_model, load_tokenizer
from phoque.models.source import Source
from phoque.onnx.session import OnnxChatModel

MEASURED_TOKENS = 1200
FITTED_TOKENS = 9000
LONGEST = 2048  # tokens of a chat
Ids = list[torch.Tensor]


def chats(source: Source, dataset: str, split: str, token: str | None) -> tuple[Ids, Ids]:
    """Conversations of a dataset as token ids [1, length]: those to fit to, and others that are held out.

    Which is which is told by a hash of each row, whatever their order; from a long dataset the first rows are taken.
    Raises PhoqueError (2) if none of them can be used.
    """
    chat = ChatTemplate(load_tokenizer(source), "", LONGEST)
    found: list[tuple[str, torch.Tensor]] = []
    for raw in open_dataset(dataset, split, None, token).stream:
        try:
            messages = parsed(raw).messages
            ids = chat.encode(messages).ids
        except BadRow:  # `phoque train --dry-run` names each of them; here only good ones are needed
            continue
        digest = hashlib.sha256(json.dumps(messages).encode()).hexdigest()
        found.append((digest, torch.tensor([ids])))
        if sum(ids.shape[1] for _, ids in found) >= 2 * FITTED_TOKENS:
            break
    if not found:
        raise PhoqueError(
            f"No conversation in {dataset} can be used.",
            f"Each is broken, or longer than {LONGEST} tokens.",
            "Check --chats, or leave out the accuracy and 4 bits: --no-accuracy --dtype q8.",
        )
    ordered = [ids for _, ids in sorted(found, key=lambda pair: pair[0])]
    held_out = _first(ordered, MEASURED_TOKENS)
    return _first(ordered[len(held_out) :], FITTED_TOKENS), held_out


def _first(all_ids: Ids, tokens: int) -> Ids:
    """The first conversations that have so many tokens together; never all of them where there are two or more."""
    total, taken = 0, []
    for ids in all_ids[: max(1, len(all_ids) - 1)]:
        taken.append(ids)
        total += ids.shape[1]
        if total >= tokens:
            break
    return taken


@torch.no_grad()
def reference(source: Source, held_out: Ids) -> list[np.ndarray]:
    """Log-probabilities [length, vocabulary] that the checkpoint itself gives, computed in fp32 on the CPU."""
    model = load_model(source, "none", on=torch.device("cpu"))
    found = [model(input_ids=ids).logits[0].log_softmax(-1).numpy() for ids in held_out]
    del model
    gc.collect()
    return found


def distance(folder: Path, dtype: str, held_out: Ids, wanted: list[np.ndarray]) -> dict[str, float]:
    """Mean KL(checkpoint || export) over tokens in nats, and the share of tokens with the same likeliest successor."""
    return measured(OnnxChatModel(folder, dtype).run, held_out, wanted)


def measured(run: Callable[[np.ndarray], Any], held_out: Ids, wanted: list[np.ndarray]) -> dict[str, float]:
    """The same for any function from ids [1, length] to logits [1, length, vocabulary] and something else."""
    divergence, same, tokens = 0.0, 0, 0
    for ids, whole in zip(held_out, wanted, strict=True):
        found = torch.from_numpy(run(ids.numpy())[0][0].astype(np.float32)).log_softmax(-1).numpy()
        divergence += float((np.exp(whole) * (whole - found)).sum())
        same += int((whole.argmax(-1) == found.argmax(-1)).sum())
        tokens += len(whole)
    return {"kl": max(0.0, divergence / tokens), "agreement": same / tokens, "tokens": tokens}
