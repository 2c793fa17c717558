"""Accuracy of an export, ONNX or GGUF: KL to the checkpoint and next-token agreement, on held-out conversations."""

import gc
import hashlib
import json
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from phoque.data.chat_template import ChatTemplate
from phoque.data.readers import open_dataset
from phoque.data.rows import parse_row
from phoque.data.turns import BadRow
from phoque.errors import UsageError
from phoque.hub.client import Hub
from phoque.inference.likelihood import sum_kl
from phoque.models.config import load_tokenizer
from phoque.models.load import load_model
from phoque.models.source import Source

HELD_OUT_TOKENS = 1200
CALIBRATION_TOKENS = 9000
MAX_CHAT_TOKENS = 2048  # tokens per conversation
Ids = list[torch.Tensor]


def load_chats(
    source: Source, dataset: str, split: str, hub: Hub | None, *, config: str | None = None
) -> tuple[Ids, Ids]:
    """Return the calibration and the held-out conversations of a dataset, each as token ids [1, length].

    Conversations are sorted by a hash of their messages and then split, so their order in the dataset does not matter.
    Of a long dataset only the first rows are read. Raises UsageError if no conversation is usable.
    """
    template = ChatTemplate(load_tokenizer(source), "", MAX_CHAT_TOKENS)
    encoded: list[tuple[str, torch.Tensor]] = []
    for raw in open_dataset(dataset, split, None, hub, config=config).stream:
        try:
            row = parse_row(raw)
            messages, ids = row.messages, template.encode_row(row).ids
        except BadRow:  # `phoque train --dry-run` reports bad rows; here they are skipped
            continue
        digest = hashlib.sha256(json.dumps(messages).encode()).hexdigest()
        encoded.append((digest, torch.tensor([ids])))
        if sum(ids.shape[1] for _, ids in encoded) >= 2 * CALIBRATION_TOKENS:
            break
    if not encoded:
        raise UsageError(
            what=f"No conversation in {dataset} can be used.",
            why=f"Every row is malformed or longer than {MAX_CHAT_TOKENS} tokens.",
            fix="Check --chats, or export what needs no conversations: --no-accuracy --dtype fp32.",
        )
    if len(encoded) == 1:
        raise UsageError(
            what=f"Only one conversation in {dataset} can be used.",
            why="One calibrates the precisions, and another measures how accurate they are.",
            fix="Give a --chats with more conversations.",
        )
    ordered = [ids for _, ids in sorted(encoded, key=lambda pair: pair[0])]
    held_out = _take_tokens(ordered, HELD_OUT_TOKENS)
    return _take_tokens(ordered[len(held_out) :], CALIBRATION_TOKENS), held_out


def _take_tokens(all_ids: Ids, tokens: int) -> Ids:
    """Return the first conversations that together have at least `tokens` tokens; of two or more, never all."""
    total, selected = 0, []
    for ids in all_ids[: max(1, len(all_ids) - 1)]:
        selected.append(ids)
        total += ids.shape[1]
        if total >= tokens:
            break
    return selected


@torch.no_grad()
def compute_reference(source: Source, held_out: Ids) -> Ids:
    """Return the checkpoint's log-probabilities [length, vocabulary] per conversation, computed in fp32 on the CPU."""
    model = load_model(source, "fp32", on=torch.device("cpu"))
    log_probs = [model(input_ids=ids).logits[0].log_softmax(-1) for ids in held_out]
    del model
    gc.collect()
    return log_probs


def measure_accuracy(run: Callable[[np.ndarray], Any], held_out: Ids, expected: Ids) -> dict[str, float]:
    """Return {kl, agreement, tokens} of `run`: ids [1, length] -> (logits [1, length, vocabulary], ...).

    `expected` has the log-probabilities [length, vocabulary] for each conversation.
    """
    kl_sum, agreed, tokens = 0.0, 0, 0
    for ids, target in zip(held_out, expected, strict=True):
        predicted = torch.from_numpy(run(ids.numpy())[0][0].astype(np.float32)).log_softmax(-1)
        kl_sum += sum_kl(target, predicted)
        agreed += int((target.argmax(-1) == predicted.argmax(-1)).sum())
        tokens += len(target)
    return {"kl": max(0.0, kl_sum / tokens), "agreement": agreed / tokens, "tokens": tokens}
