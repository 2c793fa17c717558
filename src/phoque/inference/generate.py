"""Batched generation: each combination of prompt, condition, steering coefficient and seed is one row of a batch."""

import hashlib
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from phoque.data.chat_template import encode_prompt
from phoque.inference.adapter_scale import RowScales
from phoque.inference.cuda_decoder import BatchDecoder
from phoque.inference.gpu_memory import estimate_row_bytes, measure_available_bytes
from phoque.inference.residual_stream import Steering, pad_rows, unwrap_model

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MOST_ROWS = {"cuda": 1024, "cpu": 64}  # of one batch
TOP_P_CANDIDATES = (
    4096  # top-p samples from this many likeliest tokens; sorting the whole vocabulary takes longer than a step
)
# not cuDNN: it compiles a plan for each length, which takes 0.1 s at every step
KERNELS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
SHRINK_AT = 0.75  # finished rows leave the batch when at most this share of its rows is unfinished


@dataclass(frozen=True)
class Request:
    """A request for one answer to `prompt` (token ids).

    `key` seeds its random numbers: requests with the same key draw the same numbers. Without a key decoding is greedy.
    `steer` is (block, vector): the vector is added to that block's output, in units of the residual stream. The effect
    of the active adapter is multiplied by `scale`.
    """

    prompt: list[int]
    key: str | None = None
    steer: tuple[int, torch.Tensor] | None = None
    scale: float = 1.0


@dataclass
class Reply:
    """An answer: token ids without the end token, `stop` or `length`, and the watched probability of every step."""

    ids: list[int] = field(default_factory=list)
    finish_reason: str = "length"
    mass: list[float] = field(default_factory=list)


@torch.no_grad()
def generate_replies(
    model: Any,
    requests: Sequence[Request],
    tokens: int,
    *,
    temperature: float,
    top_p: float,
    watched: Sequence[int] = (),
    response_only: bool = False,
    show: Callable[[int, str], None] = lambda done, text: None,
) -> list[Reply]:
    """Generate a reply of at most `tokens` tokens to each request; steered and unsteered rows share a forward pass.

    The total probability of the `watched` token ids, before temperature and top-p, is recorded at every step.
    `response_only` steers the response, not the prompt. `show(done, text)` reports progress.
    """
    results: list[Reply] = [Reply() for _ in requests]
    order = sorted(range(len(requests)), key=lambda n: (-len(requests[n].prompt), n))
    done = 0
    while done < len(order):
        rows = order[done : done + count_rows(model, len(requests[order[done]].prompt), tokens)]
        batch = _Batch(model, [requests[n] for n in rows], tokens, response_only)
        for n, reply in zip(rows, batch.generate(temperature, top_p, list(watched)), strict=True):
            results[n] = reply
        done += len(rows)
        show(done, "answers")
    return results


def count_rows(model: Any, prompt: int, tokens: int) -> int:
    """The number of rows of a batch: as many as the free GPU memory allows, a power of two.

    `prompt` is the number of tokens of the longest prompt, `tokens` that of the longest answer.
    """
    rows = MOST_ROWS[model.device.type]
    if model.device.type == "cpu":
        return rows
    available, per_row = measure_available_bytes(), estimate_row_bytes(model, prompt, tokens)
    while rows > 1 and rows * per_row > available:
        rows //= 2
    return rows


class _Batch:
    def __init__(self, model: Any, requests: Sequence[Request], tokens: int, response_only: bool) -> None:
        self.model, self.requests, self.tokens = model, requests, tokens
        self.ends = torch.tensor(sorted(find_end_tokens(model)), dtype=torch.long, device=model.device)
        draws = [
            torch.zeros(tokens) if request.key is None else _draw_uniform(request.key, tokens) for request in requests
        ]
        self.draws = torch.stack(draws).to(model.device)
        self.greedy = torch.tensor([request.key is None for request in requests], device=model.device)
        self.changes: list[Steering | RowScales] = [
            Steering(_stack_steering_vectors(requests, model.device), response_only)
        ]
        if any(request.scale != 1 for request in requests):
            self.changes.append(RowScales([request.scale for request in requests], model.device))

    def generate(self, temperature: float, top_p: float, watched: list[int]) -> list[Reply]:
        ids, mask = pad_rows([request.prompt for request in self.requests], self.model.device, left=True)
        results = [Reply() for _ in self.requests]
        unfinished = list(range(len(self.requests)))
        decoding = BatchDecoder(self.model, ids, mask, self.tokens)
        with ExitStack() as changed, sdpa_kernel(KERNELS), decoding:
            for change in self.changes:
                changed.enter_context(change.activate(self.model))
            logits = decoding.prefill()
            for step in range(self.tokens):
                logits = logits.float()
                probabilities = logits.softmax(-1)[:, watched].sum(-1).tolist() if watched else []
                chosen = self._choose_tokens(logits, step, temperature, top_p)
                ended = torch.isin(chosen, self.ends)
                for row, (token, is_end) in enumerate(zip(chosen.tolist(), ended.tolist(), strict=True)):
                    reply = results[unfinished[row]]
                    if reply.finish_reason == "stop":
                        continue
                    if watched:
                        reply.mass.append(probabilities[row])
                    if is_end:
                        reply.finish_reason = "stop"
                    else:
                        reply.ids.append(token)
                remaining = [row for row, n in enumerate(unfinished) if results[n].finish_reason != "stop"]
                if not remaining or step == self.tokens - 1:
                    break
                if len(remaining) <= SHRINK_AT * len(unfinished):
                    kept_rows = torch.tensor(remaining, device=ids.device)
                    chosen, self.draws, self.greedy = chosen[kept_rows], self.draws[kept_rows], self.greedy[kept_rows]
                    decoding.select_rows(kept_rows)
                    for change in self.changes:
                        change.select_rows(kept_rows)
                    unfinished = [unfinished[row] for row in remaining]
                logits = decoding.step(chosen)
        return results

    def _choose_tokens(self, logits: torch.Tensor, step: int, temperature: float, top_p: float) -> torch.Tensor:
        """Choose the next token of each row: the likeliest, or a top-p sample by the row's own random number."""
        likeliest = logits.argmax(-1)
        if bool(self.greedy.all()):
            return likeliest
        probabilities, candidates = (
            (logits / temperature).softmax(-1).topk(min(TOP_P_CANDIDATES, logits.shape[-1]), dim=-1)
        )
        cumulative = probabilities.cumsum(-1)
        cumulative = torch.where(cumulative - probabilities < top_p, cumulative, cumulative.new_tensor(torch.inf))
        total = torch.where(cumulative.isinf(), 0.0, cumulative).amax(-1, keepdim=True)
        index = torch.searchsorted(cumulative, self.draws[:, step : step + 1].to(cumulative) * total, right=True)
        index = index.clamp(max=(~cumulative.isinf()).sum(-1, keepdim=True) - 1)
        return torch.where(self.greedy, likeliest, candidates.gather(-1, index)[:, 0])


@torch.no_grad()
def generate_greedy(model: Any, ids: torch.Tensor, tokens: int, *, stops: bool = True) -> list[int]:
    """Greedy decoding of one prompt (1, length) by transformers itself: the reference that others are compared with.

    Without `stops` exactly `tokens` tokens are generated.
    """
    ids = ids.to(model.device)
    endless: dict[str, Any] = {"min_new_tokens": tokens, "eos_token_id": None, "repetition_penalty": None}
    output = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=tokens,
        do_sample=False,
        use_cache=True,
        temperature=None,
        top_p=None,
        top_k=None,
        pad_token_id=0,
        **({} if stops else endless),
    )
    return output[0, ids.shape[1] :].tolist()


def prompt_ids(tokenizer: "PreTrainedTokenizerBase", question: str, system: str) -> list[int]:
    """Encode a question up to the start of the answer; with an empty `system` the template decides on a system prompt.

    Raises UsageError for a template without a system role.
    """
    turns = [{"role": "system", "content": system}] if system else []
    return encode_prompt(tokenizer, [*turns, {"role": "user", "content": question}])


def find_end_tokens(model: Any) -> set[int]:
    """Return the token ids that end an answer; an empty set if the model's configuration names none."""
    ends = unwrap_model(model).generation_config.eos_token_id
    ends = unwrap_model(model).config.eos_token_id if ends is None else ends
    return set(ends) if isinstance(ends, list) else set() if ends is None else {int(ends)}


def _draw_uniform(key: str, count: int) -> torch.Tensor:
    """Draw `count` uniform random numbers seeded by a key: the same on every machine and in every batch."""
    seed = int.from_bytes(hashlib.sha256(key.encode()).digest()[:7], "little")
    return torch.rand(count, generator=torch.Generator().manual_seed(seed))


def _stack_steering_vectors(requests: Sequence[Request], target: torch.device) -> dict[int, torch.Tensor]:
    steered = [(row, *request.steer) for row, request in enumerate(requests) if request.steer]
    vectors: dict[int, torch.Tensor] = {}
    for row, layer, vector in steered:
        vectors.setdefault(layer, torch.zeros(len(requests), len(vector), device=target))[row] = vector.to(target)
    return vectors
