"""The model that a probe measures: one copy in memory, adapters on or off, prompted from a persona file."""

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from typing import TYPE_CHECKING, Any

import numpy

from phoque.console import Console
from phoque.errors import RunError
from phoque.inference.generate import Reply, Request, prompt_ids
from phoque.inference.residual_stream import Turn
from phoque.probes.persona import CONDITIONS, Persona
from phoque.probes.roles import Role
from phoque.probes.shared_inference import generate_replies, sum_residuals
from phoque.settings.psm_probe import PsmSettings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

EXTRACTIONS = ("response_avg", "prompt_last")


@dataclass(frozen=True)
class Answer:
    """One answer, with the index of its question, its condition, and the index of its system prompt's paraphrase."""

    question: int
    condition: str
    paraphrase: int
    turn: Turn


class Residuals:
    """Residual streams per question, averaged over the paraphrases of a system prompt.

    `by_condition[condition][extraction]` is (questions, blocks, hidden). `norm` (blocks,) is the mean norm of response
    tokens. `kept` and `massive` count, per block, the response tokens that were averaged and those left out.
    """

    def __init__(self) -> None:
        self.by_condition: dict[str, dict[str, Any]] = {}
        self.norm: Any = None
        self.kept: list[int] = []
        self.massive: list[int] = []

    def get(self, condition: str, extraction: str = "response_avg") -> Any:
        """The residual streams of one condition, (questions, blocks, hidden)."""
        return self.by_condition[condition][extraction]


class ProbeModel:
    """Generates answers with `model`, which may have adapters, and reads its residual streams.

    Of several processes, each has a copy of the model and takes its share of the rows.
    """

    model: Any

    def __init__(
        self,
        tokenizer: "PreTrainedTokenizerBase",
        persona: Persona,
        roles: Sequence[Role],
        settings: PsmSettings,
        console: Console,
    ) -> None:
        self.tokenizer, self.persona, self.s, self.console = tokenizer, persona, settings, console
        self.roles = tuple(role.name for role in roles)
        self.system_prompts = {condition: persona.system_prompts(condition) for condition in CONDITIONS}
        self.system_prompts |= {role.name: (role.prompt,) for role in roles}
        # of a question and a system prompt; the same few pairs are asked for tens of thousands of times
        self.prompt_ids: Callable[[str, str], list[int]] = cache(partial(prompt_ids, tokenizer))

    @contextmanager
    def use_base(self) -> Generator[None]:
        """Disable all adapters within the context, so that `model` is the base model."""
        if hasattr(self.model, "disable_adapter"):
            with self.model.disable_adapter():
                yield
        else:
            yield

    @contextmanager
    def use_adapter(self, name: str) -> Generator[None]:
        """Enable one adapter within the context, merged into the weights if --merge-adapter is set."""
        self.model.set_adapter(name)
        if not self.s.merge_adapter:
            yield
            return
        self.model.merge_adapter(adapter_names=[name])
        try:
            yield
        finally:
            self.model.unmerge_adapter()

    def generate_replies(
        self, asks: Sequence[Request], max_tokens: int, purpose: str, watched: Sequence[int] = ()
    ) -> list[Reply]:
        """Generate a reply to each prompt, in batches, with the sampling of the settings."""
        self.console.stage(f"{purpose}: {len(asks)} answers of at most {max_tokens} tokens")
        with self.console.progress(len(asks)) as show:
            return generate_replies(
                self.model,
                asks,
                max_tokens,
                temperature=self.s.temperature,
                top_p=self.s.top_p,
                watched=watched,
                response_only=self.s.positions == "response",
                show=show,
            )

    def answers(
        self, questions: dict[str, tuple[str, ...]], conditions: Sequence[str], purpose: str
    ) -> dict[str, list[Answer]]:
        """Generate greedy answers to lists of questions under every system prompt of these conditions or roles.

        Returns {list: answers}.
        """
        keys, asks = [], []
        for split, texts in questions.items():
            for condition in conditions:
                for k, system in enumerate(self.system_prompts[condition]):
                    for n, text in enumerate(texts):
                        keys.append((split, n, condition, k))
                        asks.append(Request(self.prompt_ids(text, system)))
        answers_by_split: dict[str, list[Answer]] = {split: [] for split in questions}
        for (split, n, condition, k), ask, reply in zip(
            keys, asks, self.generate_replies(asks, self.s.extraction_tokens, purpose), strict=True
        ):
            answers_by_split[split].append(Answer(n, condition, k, Turn(ask.prompt, reply.ids)))
        return answers_by_split

    def read_residuals(self, answers: Sequence[Answer]) -> Residuals:
        """Read the residual streams of the model over these answers.

        Raises RunError if all answers to a question are empty or have residual streams that are not finite.
        """
        first, groups = {}, 0  # condition -> its first group; the groups of its questions follow one another
        for condition in dict.fromkeys(a.condition for a in answers):
            first[condition] = groups
            groups += 1 + max(a.question for a in answers if a.condition == condition)
        sums = sum_residuals(
            self.model, [a.turn for a in answers], [first[a.condition] + a.question for a in answers], groups
        )
        response, last = sums.means()
        residuals = Residuals()
        residuals.norm = _finite_mean(sums.norm.numpy())
        residuals.kept, residuals.massive = sums.kept.sum(0).tolist(), sums.massive.sum(0).tolist()
        for (condition, start), end in zip(first.items(), [*first.values(), groups][1:], strict=True):
            residuals.by_condition[condition] = {}
            for extraction, values in (("response_avg", response), ("prompt_last", last)):
                if extraction == "prompt_last" and condition in self.roles:
                    continue  # of other roles only the answers are compared
                question_means = values[start:end].numpy()
                if condition in self.roles:  # a role that says nothing to some questions is known by the others
                    missing = ~numpy.isfinite(question_means).reshape(end - start, -1).all(1)
                    question_means[missing] = _finite_mean(question_means)
                if not numpy.isfinite(question_means).all():
                    raise RunError(
                        what="All answers to a question are empty or have residual streams that are not finite.",
                        why=f"Condition {condition}: the model ends its answers at once, or its weights are damaged.",
                        fix="Probe a model that answers.",
                    )
                residuals.by_condition[condition][extraction] = question_means
        return residuals

    def replace_system_prompts(
        self, answers: Sequence[Answer], questions: Sequence[str], condition: str, name: str
    ) -> list[Answer]:
        """The same responses after the system prompts of `condition`, as answers of a new condition `name`."""
        systems = self.system_prompts[condition]
        return [
            Answer(
                a.question,
                name,
                a.paraphrase,
                Turn(self.prompt_ids(questions[a.question], systems[a.paraphrase % len(systems)]), a.turn.response),
            )
            for a in answers
        ]


def _finite_mean(values: Any) -> Any:
    """The mean over axis 0 of the rows that are finite; NaN if none is."""
    finite = values[numpy.isfinite(values).reshape(len(values), -1).all(1)]
    return finite.mean(0) if len(finite) else numpy.full(values.shape[1:], numpy.nan)
