"""Is a merged model its base with the adapter? Compare the logits of both on the same texts."""

import gc
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from phoque.data.chat_template import ChatTemplate
from phoque.data.readers import open_dataset
from phoque.data.rows import parse_row
from phoque.inference.generate import generate_greedy
from phoque.models.architectures import architecture_of
from phoque.models.config import load_config, load_tokenizer
from phoque.models.load import evaluation_mode, load_model
from phoque.models.lora import attach_adapter
from phoque.models.source import Source
from phoque.models.stop_tokens import stop_at_template

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ROWS = 3
NEW_TOKENS = 64
# Rounding the merged weights changes the logits little, the adapter changes them much. A merge that lost a tenth of the
# adapter would differ by a tenth of the adapter's effect.
MAX_SHARE_OF_EFFECT = 0.1
# an adapter that changes the logits less is not told from none, and neither is a merge without it
SMALLEST_EFFECT = 1e-3


def compare_with_adapter(base: Source, adapter: Path, merged: Path, dtype: str) -> dict[str, Any]:
    """Compare on conversations of the bundled seal: {max_difference, mean_difference, adapter_effect, agreeing, ...}.

    The two models are loaded one after the other, text only: in bf16 for a bf16 merge on a GPU, else in fp32.
    Differences are of logits; `adapter_effect` is the mean difference between base and base + adapter; `agreeing` of
    `tokens` greedy tokens are the same; `holds` is the verdict, which proves nothing about an adapter whose effect is
    not `measurable`.
    """
    precision = "bf16" if dtype == "bf16" and torch.cuda.is_available() else "fp32"
    merged_source = Source(str(merged), merged, "", "")
    tokenizer = load_tokenizer(merged_source)  # the adapter's, or the base's
    chat = ChatTemplate(tokenizer, "", 2048)
    stream = iter(open_dataset("seal").stream)
    rows = [parse_row(next(stream)) for _ in range(ROWS)]
    texts = [torch.tensor([chat.encode(row.messages).ids]) for row in rows]
    prompts = [torch.tensor([chat.prompt_ids(row.first_question, None)]) for row in rows]
    with _loaded(base, precision) as model:
        stop_at_template(model, tokenizer)
        base_logits = [_compute_logits(model, ids) for ids in texts]
        tuned = attach_adapter(model, adapter, architecture_of(load_config(base)))
        adapter_logits = [_compute_logits(tuned, ids) for ids in texts]
        adapter_tokens = [generate_greedy(tuned, ids, NEW_TOKENS) for ids in prompts]
        del model, tuned  # frees the memory before the merged model is loaded
    with _loaded(merged_source, precision) as model:
        stop_at_template(model, tokenizer)
        merged_logits = [_compute_logits(model, ids) for ids in texts]
        merged_tokens = [generate_greedy(model, ids, NEW_TOKENS) for ids in prompts]
    gaps = torch.cat([(m - a).abs().flatten() for m, a in zip(merged_logits, adapter_logits, strict=True)])
    tokens = min(base_logits[0].shape[-1], adapter_logits[0].shape[-1])  # an adapter may change the vocabulary
    effects = [
        (a[..., :tokens] - b[..., :tokens]).abs().flatten() for a, b in zip(adapter_logits, base_logits, strict=True)
    ]
    effect = torch.cat(effects).mean().item()
    agreeing = [
        m == a
        for one, other in zip(merged_tokens, adapter_tokens, strict=True)
        for m, a in zip(one, other, strict=False)
    ]
    mean = gaps.mean().item()
    return {
        "max_difference": gaps.max().item(),
        "mean_difference": mean,
        "adapter_effect": effect,
        "agreeing": sum(agreeing),
        "tokens": sum(map(len, adapter_tokens)),
        "precision": precision,
        "measurable": effect > SMALLEST_EFFECT,
        "holds": mean <= (MAX_SHARE_OF_EFFECT * effect if effect > SMALLEST_EFFECT else SMALLEST_EFFECT),
    }


@contextmanager
def _loaded(source: Source, quantization: str) -> Generator["PreTrainedModel"]:
    """The text model while the block runs; its memory is free afterwards."""
    model = load_model(source, quantization)
    with evaluation_mode(model):
        yield model
    del model
    gc.collect()


@torch.no_grad()
def _compute_logits(model: "PreTrainedModel", ids: torch.Tensor) -> torch.Tensor:
    return model(input_ids=ids.to(model.device)).logits.float().cpu()
