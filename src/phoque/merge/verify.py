"""Whether a merged model is its base with the adapter: the same texts through both, and what the adapter changes."""

import gc
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from phoque.data.chat_template import ChatTemplate
from phoque.data.rows import open_dataset, parsed
from phoque.models.architectures import architecture_of
from phoque.models.load import load_config, load_model, load_tokenizer, measuring
from phoque.models.lora import attach_adapter
from phoque.models.source import Source

ROWS = 3
NEW_TOKENS = 64
# Rounding the merged weights moves the logits a little; the adapter moves them much. A merge that missed a tenth of the
# adapter would leave a tenth of that.
LARGEST_SHARE = 0.1
LARGEST_NO_OP = 1e-3  # mean difference that an adapter of zeros may leave


def proof(base: Source, adapter: Path, merged: Path, dtype: str) -> dict[str, Any]:
    """Compare on conversations of the bundled seal: {max_difference, mean_difference, adapter_effect, agreeing, ...}.

    Both are loaded in turn, text only, in fp32 for an fp32 merge and in the merge's own 16 bits on a GPU, else fp32.
    `adapter_effect` is the mean difference between base and base + adapter; `holds` is the verdict.
    """
    held = "bf16" if dtype == "bf16" and torch.cuda.is_available() else "none"
    chat = ChatTemplate(load_tokenizer(base), "", 2048)
    stream = iter(open_dataset("seal", "train", None, None).stream)
    rows = [parsed(next(stream)) for _ in range(ROWS)]
    texts = [torch.tensor([chat.encode(row.messages).ids]) for row in rows]
    prompts = [torch.tensor([chat.prompt_ids(_question(row.messages), None)]) for row in rows]
    with _held(base, held) as model:
        plain = [_logits(model, ids) for ids in texts]
        tuned = attach_adapter(model, adapter, architecture_of(load_config(base)))
        wanted = [_logits(tuned, ids) for ids in texts]
        spoken = [_greedy(tuned, ids) for ids in prompts]
        del model, tuned  # before the next is loaded
    with _held(Source(str(merged), merged, "", ""), held) as model:
        found = [_logits(model, ids) for ids in texts]
        said = [_greedy(model, ids) for ids in prompts]
    gaps = torch.cat([(f - w).abs().flatten() for f, w in zip(found, wanted, strict=True)])
    effect = torch.cat([(w - p).abs().flatten() for w, p in zip(wanted, plain, strict=True)]).mean().item()
    same = [(a == b) for one, other in zip(said, spoken, strict=True) for a, b in zip(one, other, strict=False)]
    mean = gaps.mean().item()
    return {
        "max_difference": gaps.max().item(),
        "mean_difference": mean,
        "adapter_effect": effect,
        "agreeing": sum(same),
        "tokens": sum(map(len, spoken)),
        "precision": "fp32" if held == "none" else held,
        "holds": mean <= max(LARGEST_SHARE * effect, LARGEST_NO_OP),
    }


def _question(messages: list[dict[str, str]]) -> str:
    return next(turn["content"] for turn in messages if turn["role"] == "user")


@contextmanager
def _held(source: Source, quantization: str) -> Generator[Any]:
    """The text model while the block runs; memory for one at a time."""
    model = load_model(source, quantization)
    with measuring(model):
        yield model
    del model
    gc.collect()


@torch.no_grad()
def _logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    return model(input_ids=ids.to(model.device)).logits.float().cpu()


@torch.no_grad()
def _greedy(model: Any, ids: torch.Tensor) -> list[int]:
    ids = ids.to(model.device)
    out = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        use_cache=True,
        temperature=None,
        top_p=None,
        top_k=None,
        pad_token_id=0,
    )
    return out[0, ids.shape[1] :].tolist()
