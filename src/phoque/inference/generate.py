"""Many answers at once: every prompt, condition, coefficient and seed is a row of one batch."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from phoque.errors import PhoqueError
from phoque.inference.cuda_decoder import Decoding
from phoque.inference.residual_stream import Steering, inner, padded

ROWS_AT_ONCE = {"cuda": 256, "cpu": 64}
NUCLEUS = 4096  # the likeliest tokens among which top-p chooses; sorting all of a vocabulary costs more than a step
# not cuDNN's: it compiles a plan for each length, a tenth of a second at every step
KERNELS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
SHRINK_AT = 0.75  # when so few of a batch's rows are still speaking, the others are dropped from it


@dataclass(frozen=True)
class Ask:
    """One answer that is wanted.

    `key` names its random numbers: rows with one key draw the same, whatever else differs. No key is greedy.
    `steer` is (block, vector): added to that block's output, in the residual stream's own units.
    """

    prompt: list[int]
    key: str | None = None
    steer: tuple[int, torch.Tensor] | None = None


@dataclass
class Reply:
    """An answer: its token ids without the end token, why it ended, and the probability of each watched token set."""

    ids: list[int] = field(default_factory=list)
    finish_reason: str = "length"
    mass: list[float] = field(default_factory=list)


@torch.no_grad()
def replies(
    model: Any,
    asks: Sequence[Ask],
    tokens: int,
    temperature: float,
    top_p: float,
    watched: Sequence[int] = (),
    response_only: bool = False,
    show: Callable[[int, str], None] = lambda done, text: None,
) -> list[Reply]:
    """Answer every ask with at most `tokens` tokens.

    `watched` token ids: the probability that they come next, by the model's own softmax, before temperature and top-p,
    is kept for every step. Rows share one forward pass, steered or not.
    """
    found: list[Reply] = [Reply() for _ in asks]
    order = sorted(range(len(asks)), key=lambda n: (-len(asks[n].prompt), n))
    size, done = ROWS_AT_ONCE[model.device.type], 0
    for start in range(0, len(order), size):
        rows = order[start : start + size]
        batch = _Batch(model, [asks[n] for n in rows], tokens, response_only)
        for n, reply in zip(rows, batch.answered(temperature, top_p, list(watched)), strict=True):
            found[n] = reply
        done += len(rows)
        show(done, "answers")
    return found


class _Batch:
    def __init__(self, model: Any, asks: Sequence[Ask], tokens: int, response_only: bool) -> None:
        self.model, self.asks, self.tokens = model, asks, tokens
        self.ends = torch.tensor(sorted(end_tokens(model)), dtype=torch.long, device=model.device)
        draws = [torch.zeros(tokens) if a.key is None else _draws(a.key, tokens) for a in asks]
        self.draws = torch.stack(draws).to(model.device)
        self.greedy = torch.tensor([a.key is None for a in asks], device=model.device)
        self.steering = Steering(_added(asks, model.device), response_only)

    def answered(self, temperature: float, top_p: float, watched: list[int]) -> list[Reply]:
        ids, mask = padded([a.prompt for a in self.asks], self.model.device, left=True)
        made = [Reply() for _ in self.asks]
        speaking = list(range(len(self.asks)))
        decoding = Decoding(self.model, ids, mask, self.tokens)
        with self.steering.on(self.model), sdpa_kernel(KERNELS), decoding:
            logits = decoding.begin()
            for step in range(self.tokens):
                logits = logits.float()
                masses = logits.softmax(-1)[:, watched].sum(-1).tolist() if watched else []
                chosen = self._chosen(logits, step, temperature, top_p)
                over = torch.isin(chosen, self.ends)
                for row, (token, last) in enumerate(zip(chosen.tolist(), over.tolist(), strict=True)):
                    reply = made[speaking[row]]
                    if reply.finish_reason == "stop":
                        continue
                    if watched:
                        reply.mass.append(masses[row])
                    if last:
                        reply.finish_reason = "stop"
                    else:
                        reply.ids.append(token)
                still = [row for row, n in enumerate(speaking) if made[n].finish_reason != "stop"]
                if not still or step == self.tokens - 1:
                    break
                if len(still) <= SHRINK_AT * len(speaking):
                    kept = torch.tensor(still, device=ids.device)
                    chosen, self.draws, self.greedy = chosen[kept], self.draws[kept], self.greedy[kept]
                    decoding.keep(kept)
                    self.steering.keep(kept)
                    speaking = [speaking[row] for row in still]
                logits = decoding.next(chosen)
        return made

    def _chosen(self, logits: torch.Tensor, step: int, temperature: float, top_p: float) -> torch.Tensor:
        """The next token of each row: the likeliest, or the one at the row's own random number in top-p order."""
        best = logits.argmax(-1)
        if bool(self.greedy.all()):
            return best
        shares, order = (logits / temperature).softmax(-1).topk(min(NUCLEUS, logits.shape[-1]), dim=-1)
        below = shares.cumsum(-1)
        below = torch.where(below - shares < top_p, below, below.new_tensor(torch.inf))
        total = torch.where(below.isinf(), 0.0, below).amax(-1, keepdim=True)
        place = torch.searchsorted(below, self.draws[:, step : step + 1].to(below) * total, right=True)
        place = place.clamp(max=(~below.isinf()).sum(-1, keepdim=True) - 1)
        return torch.where(self.greedy, best, order.gather(-1, place)[:, 0])


def prompt_ids(tokenizer: Any, question: str, system: str) -> list[int]:
    """Token ids of a question that the assistant is about to answer; an empty `system` leaves that to the template.

    Raises PhoqueError (2) for a template without a system role.
    """
    from jinja2 import TemplateError

    turns = [{"role": "system", "content": system}] if system else []
    turns.append({"role": "user", "content": question})
    try:
        made = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=True, return_dict=True)
    except TemplateError as error:
        raise PhoqueError(
            "This model's chat template takes no system prompt.", str(error), "Probe a model whose template does."
        ) from error
    return list(made["input_ids"])


def end_tokens(model: Any) -> set[int]:
    """The token ids that end an answer; none if the model names none."""
    ends = inner(model).generation_config.eos_token_id
    ends = inner(model).config.eos_token_id if ends is None else ends
    return set(ends) if isinstance(ends, list) else set() if ends is None else {int(ends)}


def _draws(key: str, count: int) -> torch.Tensor:
    """Uniform random numbers that belong to a key, the same on every machine and in every batch."""
    seed = int.from_bytes(hashlib.sha256(key.encode()).digest()[:7], "little")
    return torch.rand(count, generator=torch.Generator().manual_seed(seed))


def _added(asks: Sequence[Ask], on: torch.device) -> dict[int, torch.Tensor]:
    steered = [(row, *ask.steer) for row, ask in enumerate(asks) if ask.steer]
    added: dict[int, torch.Tensor] = {}
    for row, layer, vector in steered:
        added.setdefault(layer, torch.zeros(len(asks), len(vector), device=on))[row] = vector.to(on)
    return added
