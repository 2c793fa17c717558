"""What a fine-tune does at every strength, and what else it does: the dose curve, and its effects on unrelated text.

The scale of a LoRA adapter is its dose: 0 is the base model, 1 the fine-tune. A behavior that the adapter causes rises
with it, and the loss on unrelated text says what the rise costs. The control's curve stands beside it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from phoque.inference.adapter_scale import is_scaled_by_row, scale_adapter
from phoque.inference.generate import Request
from phoque.inference.likelihood import compute_kl, compute_logits
from phoque.inference.residual_stream import Turn, pad_rows, unwrap_model
from phoque.probes import stats
from phoque.probes.persona_vectors.model import ProbeModel
from phoque.probes.shared_inference import mean_nll
from phoque.probes.word_profile import WordProfile

TEXT_TOKENS, TEXTS = 128, 16  # of unrelated text
TOP_TOKENS = 20
FLOOR = 1e-4  # probability
POSITIONS_AT_ONCE = 64  # whose logits are compared together, to bound memory

Array = Any


@dataclass(frozen=True)
class Dose:
    """One adapter at one scale, over `n` questions: the share of its answers that are the persona's, and side effects.

    `loss` is in nats per token of unrelated text, `rise` its rise over the base model's.
    """

    adapter: str
    scale: float
    share: float
    share_ci: tuple[float, float]
    loss: float
    rise: float
    rise_ci: tuple[float, float]
    n: int


@dataclass(frozen=True)
class SideEffects:
    """What an adapter does to unrelated text: KL(base || adapter) in nats per token, and the tokens that it favors.

    `tokens` are those that it makes likelier by the largest factor: (token, logarithm of the ratio of the mean
    probabilities, both with `FLOOR` added, so that tokens which neither model says do not come first).
    """

    kl: float
    kl_ci: tuple[float, float]
    tokens: list[tuple[str, float]]


def measure_doses(
    probe_model: ProbeModel,
    profile: WordProfile,
    greedy: dict[str, list[str]],
    scales: Sequence[float],
    texts: Sequence[list[int]],
) -> list[Dose]:
    """Answer the test questions greedily, and read the texts (token ids), with each adapter at each scale.

    `greedy` has the answers that are known: `neutral` of the base model (scale 0), and of each adapter (scale 1).
    """
    seed, place = probe_model.s.seed, profile.roles.index("persona")
    rows = [Turn(ids[:1], ids[1:]) for ids in texts]
    with probe_model.use_base():
        base_losses = torch.tensor(mean_nll(probe_model.model, rows)).numpy()
    doses = []
    for name in [name for name in greedy if name != "neutral"]:
        probe_model.model.set_adapter(name)
        answers: dict[float, list[str]] = {0.0: greedy["neutral"], 1.0: greedy[name]}
        new = [scale for scale in scales if scale not in answers]
        answers |= _answer(probe_model, new, f"{name} model at {len(new)} doses")
        for scale in scales:
            losses = base_losses
            if scale != 0:
                with scale_adapter(probe_model.model, name, scale):
                    losses = torch.tensor(mean_nll(probe_model.model, rows)).numpy()
            shares = profile.attribute(answers[scale])[:, place]
            doses.append(
                Dose(
                    adapter=name,
                    scale=scale,
                    share=float(shares.mean()),
                    share_ci=stats.share_interval(shares),
                    loss=float(losses.mean()),
                    rise=float((losses - base_losses).mean()),
                    rise_ci=stats.mean_interval(losses - base_losses, seed),
                    n=len(shares),
                )
            )
    return doses


def _answer(probe_model: ProbeModel, scales: Sequence[float], purpose: str) -> dict[float, list[str]]:
    """Greedy answers to the test questions after the neutral prompt with the active adapter, by its scale."""
    persona = probe_model.persona
    prompts = [probe_model.prompt_ids(question, persona.neutral[0]) for question in persona.test]

    def answer(asks: list[Request], what: str) -> list[str]:
        replies = probe_model.generate_replies(asks, probe_model.s.max_new_tokens, what)
        return [str(probe_model.tokenizer.decode(reply.ids)) for reply in replies]

    if not scales:
        return {}
    model = probe_model.model
    if is_scaled_by_row(model, model.active_adapter):
        texts = answer([Request(prompt, scale=scale) for scale in scales for prompt in prompts], purpose)
        return {scale: texts[n * len(prompts) : (n + 1) * len(prompts)] for n, scale in enumerate(scales)}
    answers = {}
    for scale in scales:
        with scale_adapter(model, model.active_adapter, scale):
            answers[scale] = answer([Request(prompt) for prompt in prompts], f"{purpose}, {scale:g}")
    return answers


@torch.no_grad()
def measure_side_effects(
    probe_model: ProbeModel, adapters: Sequence[str], texts: Sequence[list[int]]
) -> dict[str, SideEffects]:
    """Compare each adapter's next-token distributions with the base model's on texts (token ids)."""
    model = probe_model.model
    ids, mask = pad_rows(texts, model.device)

    def read() -> torch.Tensor:
        """The final states of all tokens of all texts, in order, (tokens, hidden)."""
        decoder = unwrap_model(model).model
        return decoder(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state[mask.bool()]

    with probe_model.use_base():
        base = read()
    effects = {}
    for name in adapters:
        model.set_adapter(name)
        kl, sums = [], torch.zeros(2, 1, dtype=torch.float64)  # of the probabilities of every token: base, adapter
        for parts in zip(base.split(POSITIONS_AT_ONCE), read().split(POSITIONS_AT_ONCE), strict=True):
            p, q = (compute_logits(model, part).log_softmax(-1) for part in parts)
            kl.append(compute_kl(p, q).double().cpu())
            sums = sums + torch.stack([part.exp().sum(0).double().cpu() for part in (p, q)])
        kl_by_text = torch.stack([part.mean() for part in torch.cat(kl).split([len(text) for text in texts])]).numpy()
        base_mean, tuned_mean = sums / len(base) + FLOOR
        values, indices = (tuned_mean / base_mean).log().topk(TOP_TOKENS)
        names = [str(probe_model.tokenizer.decode([token])) for token in indices.tolist()]
        effects[name] = SideEffects(
            float(kl_by_text.mean()),
            stats.mean_interval(kl_by_text, probe_model.s.seed),
            list(zip(names, values.tolist(), strict=True)),
        )
    return effects
