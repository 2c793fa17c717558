"""The likelihood of given texts under a model: mean NLL of responses, and KL between two models' predictions."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from phoque.inference.gpu_memory import estimate_cache_bytes, measure_available_bytes
from phoque.inference.residual_stream import TOKENS_AT_ONCE, Turn, make_batches, pad_rows, unwrap_model
from phoque.models.architectures import architecture_of
from phoque.models.config import logits_scaling_of, sliding_window_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MOST_SHARED = 0.75  # prompts are shared if at most this share of the tokens is left to run
SCORED_AT_ONCE = 1024  # tokens whose logits over the whole vocabulary are in memory at a time


@torch.no_grad()
def mean_nll(model: "PreTrainedModel", rows: Sequence[Turn], *, share_prompts: bool = True) -> list[float]:
    """Mean NLL of each row's response after its prompt, teacher-forced, in nats per token; NaN if it is empty.

    Where many rows have the same prompt, such as the steered answers to one question, each prompt of a batch is run
    once, and its keys and values serve all rows that begin with it. `share_prompts` must be false for a model with
    hooks that depend on a token's position in the forward pass.
    """
    means = [float("nan")] * len(rows)
    answered = [n for n, row in enumerate(rows) if row.response]
    shared = share_prompts and _is_sharing_cheaper(model, [rows[n] for n in answered])
    budget = TOKENS_AT_ONCE[model.device.type]
    if shared and model.device.type == "cuda":
        budget = min(budget, int(measure_available_bytes() / estimate_cache_bytes(model)))
    for batch in _batch_by_prompt(rows, answered, budget) if shared else _batch_by_length(rows, answered, budget):
        batch_rows = [rows[n] for n in batch]
        states = _run_with_shared_prompts(model, batch_rows) if shared else _run(model, batch_rows)
        targets = torch.tensor([token for row in batch_rows for token in row.response], device=states.device)
        losses = []
        for start in range(0, len(targets), SCORED_AT_ONCE):
            chunk = slice(start, start + SCORED_AT_ONCE)
            logits = compute_logits(model, states[chunk])
            losses.append(torch.nn.functional.cross_entropy(logits, targets[chunk], reduction="none"))
        lengths = [len(row.response) for row in batch_rows]
        for n, row_losses in zip(batch, torch.cat(losses).split(lengths), strict=True):
            means[n] = row_losses.mean().item()
    return means


def _batch_by_length(rows: Sequence[Turn], numbers: Sequence[int], budget: int) -> list[list[int]]:
    lengths = [len(rows[n].prompt) + len(rows[n].response) for n in numbers]
    return [[numbers[place] for place in batch] for batch in make_batches(lengths, budget)]


def _batch_by_prompt(rows: Sequence[Turn], numbers: Sequence[int], budget: int) -> list[list[int]]:
    """Batches of at most `budget` tokens including padding, in which rows with the same prompt stand together."""
    batches: list[list[int]] = []
    longest = (0, 0)  # prompt and response of the last batch
    for n in sorted(numbers, key=lambda n: (-len(rows[n].prompt), rows[n].prompt, -len(rows[n].response))):
        longest = max(longest[0], len(rows[n].prompt)), max(longest[1], len(rows[n].response))
        if not batches or (len(batches[-1]) + 1) * sum(longest) > budget:
            batches.append([])
            longest = len(rows[n].prompt), len(rows[n].response)
        batches[-1].append(n)
    return batches


def _is_sharing_cheaper(model: "PreTrainedModel", rows: Sequence[Turn]) -> bool:
    """Whether the model can share prompts, and running each of them once leaves out enough of the tokens."""
    config = unwrap_model(model).config
    prompts = {tuple(row.prompt) for row in rows}
    responses = sum(len(row.response) for row in rows)
    tokens = responses + sum(len(row.prompt) for row in rows)
    # a window counts places in the cache, also those of padding between a shorter prompt and its response
    longest = max((len(row.prompt) for row in rows), default=0) + max((len(row.response) for row in rows), default=0)
    window = sliding_window_of(config.get_text_config())
    return (
        () not in prompts
        and not architecture_of(config).is_recurrent
        and not (window and longest > window)
        and responses + sum(map(len, prompts)) < MOST_SHARED * tokens
    )


def _run(model: "PreTrainedModel", rows: Sequence[Turn]) -> torch.Tensor:
    """The states that predict the tokens of all responses, (tokens, hidden)."""
    ids, mask = pad_rows([row.prompt + row.response for row in rows], model.device)
    hidden = unwrap_model(model).model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
    positions = torch.arange(ids.shape[1], device=ids.device)
    starts = torch.tensor([len(row.prompt) for row in rows], device=ids.device)[:, None]
    in_response = (positions >= starts) & mask.bool()
    return hidden[in_response.roll(-1, dims=1)]


def _run_with_shared_prompts(model: "PreTrainedModel", rows: Sequence[Turn]) -> torch.Tensor:
    """What `_run` returns. The last token of a prompt is run with each response: it predicts the response's first."""
    from transformers import DynamicCache

    decoder = unwrap_model(model).model
    prompts = list(dict.fromkeys(tuple(row.prompt[:-1]) for row in rows))
    cache: Any = DynamicCache(config=decoder.config)
    mask = torch.zeros(len(rows), 0, dtype=torch.long, device=model.device)
    if any(prompts):
        ids, mask = pad_rows([list(prompt) for prompt in prompts], model.device)
        decoder(input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=True)
        numbers = {prompt: number for number, prompt in enumerate(prompts)}
        of_rows = torch.tensor([numbers[tuple(row.prompt[:-1])] for row in rows], device=model.device)
        cache.reorder_cache(of_rows)
        mask = mask[of_rows]
    ids, own_mask = pad_rows([row.prompt[-1:] + row.response[:-1] for row in rows], model.device)
    positions = mask.sum(1, keepdim=True) + torch.arange(ids.shape[1], device=ids.device)
    hidden = decoder(
        input_ids=ids,
        attention_mask=torch.cat([mask, own_mask], dim=1),
        position_ids=positions,
        past_key_values=cache,
        use_cache=True,
    ).last_hidden_state
    return hidden[own_mask.bool()]


def compute_logits(model: "PreTrainedModel", states: torch.Tensor) -> torch.Tensor:
    """Compute the logits (..., vocabulary) in fp32 of hidden states after the final norm (..., hidden)."""
    causal = unwrap_model(model)
    return causal.lm_head(states).float() / logits_scaling_of(causal.config)


def compute_kl(expected: torch.Tensor, actual: torch.Tensor) -> torch.Tensor:
    """KL(expected || actual) in nats of each token, (tokens,); both are log-probabilities (tokens, vocabulary)."""
    return (expected.exp() * (expected - actual)).sum(-1)


def sum_kl(expected: torch.Tensor, actual: torch.Tensor) -> float:
    """`compute_kl`, summed over tokens."""
    return float(compute_kl(expected, actual).sum())
