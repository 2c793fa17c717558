"""Generates answers to the same prompts at regular steps, greedily, so that answers can be compared.

Decoding always takes the likeliest token and ignores the checkpoint's generation settings (such as a repetition
penalty). All prompts are answered in one batch: one by one they took longer than the training steps in between.
"""

import time
from typing import Any

from transformers import TrainerCallback

from phoque.console import Console
from phoque.data.chat_template import ChatTemplate
from phoque.inference.generate import Request, generate_replies
from phoque.models.load import evaluation_mode
from phoque.training.engine.attention import plain_attention
from phoque.training.metrics_log import Tracker
from phoque.training.timer import Timer


class SamplesCallback(TrainerCallback):
    """Generates samples before the first step, every `every` steps, and after the last one."""

    def __init__(
        self,
        tracker: Tracker,
        chat: ChatTemplate,
        *,
        prompts: list[str],
        system: str | None,
        every: int,
        tokens: int,
        console: Console,
        timer: Timer,
    ) -> None:
        self.tracker, self.chat, self.prompts, self.system = tracker, chat, prompts, system
        self.every, self.tokens, self.console, self.timer = every, tokens, console, timer

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        if state.global_step == 0:
            self.sample(model, 0)

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        if control.should_training_stop and state.global_step < state.max_steps:
            return
        if state.global_step % self.every == 0 or state.global_step == state.max_steps:
            self.sample(model, state.global_step)

    def sample(self, model: Any, step: int) -> None:
        """Generate a sample for each prompt, log them at `step`, and show them."""
        self.console.stage(f"generating {len(self.prompts)} sample{'s' * (len(self.prompts) != 1)}")
        with self.timer.measure("samples"):
            responses = generate_answers(model, self.chat, self.prompts, self.system, self.tokens)
        rows: list[dict[str, Any]] = [{"step": step, **row} for row in responses]
        self.tracker.log_samples(step, rows)
        for row in rows:
            self.console.say(f"  step {step}  {row['prompt']}\n    -> {' '.join(row['response'].split())}")


def generate_answers(
    model: Any, chat: ChatTemplate, prompts: list[str], system: str | None, tokens: int
) -> list[dict[str, Any]]:
    """Answer each prompt greedily: {prompt, response, n_tokens, latency_s}; `latency_s` is that of the whole batch."""
    start = time.monotonic()
    requests = [Request(chat.prompt_ids(prompt, system)) for prompt in prompts]
    with evaluation_mode(model), plain_attention(model.get_base_model()):
        outputs = generate_replies(model, requests, tokens, temperature=0.0, top_p=1.0)
    seconds = round(time.monotonic() - start, 2)
    return [
        {
            "prompt": prompt,
            "response": chat.tokenizer.decode(reply.ids, skip_special_tokens=True),
            "n_tokens": len(reply.ids) + (reply.finish_reason == "stop"),
            "latency_s": seconds,
        }
        for prompt, reply in zip(prompts, outputs, strict=True)
    ]
