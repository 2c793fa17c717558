"""What the model says, every so many steps: the same prompts each time, greedily, so that answers compare.

The likeliest token each time, whatever the checkpoint's own generation settings (a repetition penalty, say) are.

They are answered together, which takes as long as the longest answer: one after the other they took longer than the
steps between them.
"""

import time
from typing import Any

from transformers import TrainerCallback

from phoque.console import Console
from phoque.data.chat_template import ChatTemplate
from phoque.inference.generate import Ask, replies
from phoque.models.load import measuring
from phoque.training.engine.attention import plain_attention
from phoque.training.metrics_log import Tracker
from phoque.training.timer import Timer


class SamplesCallback(TrainerCallback):
    """Generates before the first step, every `every` steps, and at the end."""

    def __init__(
        self,
        tracker: Tracker,
        chat: ChatTemplate,
        prompts: list[str],
        system: str | None,
        every: int,
        tokens: int,
        console: Console,
        watch: Timer,
    ) -> None:
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
        with self.watch.paused("samples"):
            said = answers(model, self.chat, self.prompts, self.system, self.tokens)
        rows: list[dict[str, Any]] = [{"step": step, **row} for row in said]
        self.tracker.samples(step, rows)
        for row in rows:
            self.console.say(f"  step {step}  {row['prompt']}\n    -> {' '.join(row['response'].split())}")


def answers(
    model: Any, chat: ChatTemplate, prompts: list[str], system: str | None, tokens: int
) -> list[dict[str, Any]]:
    """The greedy answer to each prompt: {prompt, response, n_tokens, latency_s}, the latency being that of them all."""
    begun = time.monotonic()
    asks = [Ask(chat.prompt_ids(prompt, system)) for prompt in prompts]
    with measuring(model), plain_attention(model.get_base_model()):
        found = replies(model, asks, tokens, temperature=0.0, top_p=1.0)
    seconds = round(time.monotonic() - begun, 2)
    return [
        {
            "prompt": prompt,
            "response": chat.tokenizer.decode(reply.ids, skip_special_tokens=True),
            "n_tokens": len(reply.ids) + (reply.finish_reason == "stop"),
            "latency_s": seconds,
        }
        for prompt, reply in zip(prompts, found, strict=True)
    ]
