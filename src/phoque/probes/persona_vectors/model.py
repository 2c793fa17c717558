"""What is measured with: one model in memory, its adapters on or off, and the questions of a persona file."""

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy
import torch

from phoque.console import Console
from phoque.errors import PhoqueError
from phoque.inference.generate import Ask, Reply, prompt_ids, replies
from phoque.inference.residual_stream import Turn, residual_means
from phoque.probes.persona import Persona
from phoque.settings.psm_probe import PsmSettings

EXTRACTIONS = ("response_avg", "prompt_last")


@dataclass(frozen=True)
class Answer:
    """One answer in its place: which question of a list, which condition, which paraphrase of its system prompt."""

    question: int
    condition: str
    paraphrase: int
    spoken: Turn


class Residuals:
    """Residual streams a question: `of[condition][extraction]` is (questions, blocks, hidden), paraphrases averaged.

    `norm` (blocks,) is the mean norm of response tokens; `kept` and `massive` count tokens, a block.
    """

    def __init__(self) -> None:
        self.of: dict[str, dict[str, Any]] = {}
        self.norm: Any = None
        self.kept: list[int] = []
        self.massive: list[int] = []

    def pair(self, condition: str, extraction: str = "response_avg") -> Any:
        """One condition's residual streams."""
        return self.of[condition][extraction]


class ProbeModel:
    """Runs `model`, which may have adapters, for the probe."""

    model: Any

    def __init__(self, tokenizer: Any, persona: Persona, settings: PsmSettings, console: Console) -> None:
        self.tokenizer, self.persona, self.s, self.console = tokenizer, persona, settings, console

    def prompt_ids(self, question: str, system: str) -> list[int]:
        """Token ids of a question that the assistant is about to answer."""
        return prompt_ids(self.tokenizer, question, system)

    @contextmanager
    def base(self) -> Generator[None]:
        """The base model, whatever adapters are loaded."""
        if hasattr(self.model, "disable_adapter"):
            with self.model.disable_adapter():
                yield
        else:
            yield

    @contextmanager
    def tuned(self, name: str) -> Generator[None]:
        """The model with one of its adapters, merged into the weights for the time if that was asked for."""
        self.model.set_adapter(name)
        if not self.s.merge_adapter:
            yield
            return
        self.model.merge_adapter(adapter_names=[name])
        try:
            yield
        finally:
            self.model.unmerge_adapter()

    def asked(self, asks: Sequence[Ask], tokens: int, what: str, watched: Sequence[int] = ()) -> list[Reply]:
        """Answers, all together, with the settings' sampling."""
        self.console.say(f"{what}: {len(asks)} answers of at most {tokens} tokens")
        with self.console.progress(len(asks)) as show:
            return replies(
                self.model,
                asks,
                tokens,
                self.s.temperature,
                self.s.top_p,
                watched,
                self.s.positions == "response",
                show,
            )

    def answers(
        self, questions: dict[str, tuple[str, ...]], conditions: Sequence[str], what: str
    ) -> dict[str, list[Answer]]:
        """Greedy answers to lists of questions under every paraphrase of these conditions' system prompts."""
        places, asks = [], []
        for split, texts in questions.items():
            for condition in conditions:
                for k, system in enumerate(self.persona.systems(condition)):
                    for n, text in enumerate(texts):
                        places.append((split, n, condition, k))
                        asks.append(Ask(self.prompt_ids(text, system)))
        found: dict[str, list[Answer]] = {split: [] for split in questions}
        for (split, n, condition, k), ask, reply in zip(
            places, asks, self.asked(asks, self.s.extraction_tokens, what), strict=True
        ):
            found[split].append(Answer(n, condition, k, Turn(ask.prompt, reply.ids)))
        return found

    def residuals(self, answers: Sequence[Answer], questions: int) -> Residuals:
        """What the model holds while it reads these answers. Raises PhoqueError (1) if all of them are empty."""
        means = residual_means(self.model, [a.spoken for a in answers])
        empty = torch.tensor([not a.spoken.response for a in answers])
        means.response[empty] = torch.nan
        found = Residuals()
        found.norm = _mean(means.norm[~empty].numpy())
        found.kept, found.massive = means.kept.tolist(), means.massive.tolist()
        for condition in dict.fromkeys(a.condition for a in answers):
            found.of[condition] = {}
            for extraction, values in (("response_avg", means.response), ("prompt_last", means.last)):
                rows = [
                    [i for i, a in enumerate(answers) if (a.condition, a.question) == (condition, n)]
                    for n in range(questions)
                ]
                averaged = numpy.stack([_mean(values[own].numpy()) for own in rows])
                if not numpy.isfinite(averaged).all():
                    raise PhoqueError(
                        "A question got nothing but empty answers, or numbers that are none.",
                        f"Condition {condition}; the model ends before it begins, or its weights are damaged.",
                        "Probe a model that answers.",
                        1,
                    )
                found.of[condition][extraction] = averaged
        return found

    def under(self, answers: Sequence[Answer], questions: Sequence[str], condition: str, name: str) -> list[Answer]:
        """The same texts, as if they had been said after another condition's system prompts."""
        systems = self.persona.systems(condition)
        return [
            Answer(
                a.question,
                name,
                a.paraphrase,
                Turn(self.prompt_ids(questions[a.question], systems[a.paraphrase % len(systems)]), a.spoken.response),
            )
            for a in answers
        ]


def _mean(values: Any) -> Any:
    """The mean over axis 0 of what is finite in it; NaN where nothing is."""
    fine = values[numpy.isfinite(values).reshape(len(values), -1).all(1)]
    return fine.mean(0) if len(fine) else numpy.full(values.shape[1:], numpy.nan)
