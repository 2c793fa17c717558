"""What the model says, every so many steps: the same prompts each time, greedily, so that answers compare."""

import time
from typing import Any

import torch
from transformers import TrainerCallback

from phoque.console import Console
from phoque.data.chat import Chat
from phoque.models.load import measuring
from phoque.training.attention import plain_attention
from phoque.training.callbacks.numbers import Stopwatch
from phoque.training.tracking import Tracker


class Samples(TrainerCallback):
    """Generates before the first step, every `every` steps, and at the end."""

    def __init__(
        self, tracker: Tracker, chat: Chat, prompts: list[str], system: str | None, every: int, tokens: int,
        console: Console, watch: Stopwatch,
    ) -> None:  # fmt: skip
        self.tracker, self.chat, self.prompts, self.system = tracker, chat, prompts, system
        self.every, self.tokens, self.console, self.watch = every, tokens, console, watch

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        if state.global_step == 0:
            self._sample(model, 0)

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        if control.should_training_stop and state.global_step < state.max_steps:
            return
        if state.global_step % self.every == 0 or state.global_step == state.max_steps:
            self._sample(model, state.global_step)

    def _sample(self, model: Any, step: int) -> None:
        with self.watch.paused():
            rows: list[dict[str, Any]] = [
                {"step": step, **answer(model, self.chat, p, self.system, self.tokens)} for p in self.prompts
            ]
        self.tracker.samples(step, rows)
        for row in rows:
            self.console.say(f"  step {step}  {row['prompt']}\n    -> {' '.join(row['response'].split())}")


@torch.no_grad()
def answer(model: Any, chat: Chat, prompt: str, system: str | None, tokens: int) -> dict[str, Any]:
    """The greedy answer to one prompt: {prompt, response, n_tokens, latency_s}."""
    ids = torch.tensor([chat.prompt_ids(prompt, system)], device=model.device)
    begun = time.monotonic()
    with measuring(model), plain_attention(model.get_base_model()):
        out = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False, use_cache=True,
            temperature=None, top_p=None, top_k=None, pad_token_id=chat.tokenizer.eos_token_id,
        )  # fmt: skip
    new = out[0, ids.shape[1] :]
    return {
        "prompt": prompt,
        "response": chat.tokenizer.decode(new, skip_special_tokens=True),
        "n_tokens": len(new),
        "latency_s": round(time.monotonic() - begun, 2),
    }
