"""Scorers measure how strongly an answer shows the persona. The first `--scorer` is the trait that verdicts use."""

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from phoque.distributed.processes import current
from phoque.errors import RunError
from phoque.files import write_atomically
from phoque.inference.generate import Reply
from phoque.inference.residual_stream import Turn
from phoque.probes.persona import Persona
from phoque.probes.word_profile import WordProfile
from phoque.settings.probe import check_scorer


@dataclass(frozen=True)
class ScoredAnswer:
    """An answer to score: the question, the text, and the reply with its token ids and finish reason."""

    prompt: str
    text: str
    reply: Reply


@dataclass(frozen=True)
class Scorer:
    """A way to score answers: `score` returns {label: number} for each; higher means more of the persona.

    `primary` is the label that verdicts use. `fingerprint` identifies everything that a score depends on besides the
    question and the text; scores are not cached if it is empty. A scorer that `is_weak` misses most of what it is meant
    to detect. Of several processes, all score together if it `runs_model`, the one that is probed; otherwise process 0
    does.
    """

    name: str
    primary: str
    score: Callable[[Sequence[ScoredAnswer]], list[dict[str, float]]]
    fingerprint: str = ""
    is_weak: bool = False
    runs_model: bool = False


@dataclass
class Context:
    """What scorers may use. `nll` runs the base model, with all adapters disabled."""

    persona: Persona
    lexicon_token_ids: dict[int, str]  # id of a token that begins a word of the lexicon -> the word
    token: str | None  # of the Hub
    api_key: str | None
    nll: Callable[[Sequence[Turn]], list[float]]
    prompt_ids: Callable[[str, str], list[int]]
    model: str  # identifies weights and quantization, for the cache
    cache: Path
    profile: WordProfile | None = None  # of the roles' answers, once these are there
    paraphrases: int | None = None  # with which `contrast` reads each answer, of each prompt; None: with all


def make_scorer(spec: str, context: Context) -> Scorer:
    """Make the scorer that a `--scorer` value names. Raises UsageError if there is no such scorer."""
    from phoque.probes.scorers import model, remote, words

    check_scorer(spec)
    kind, _, rest = spec.partition(":")
    if spec == "words":
        return words.role_words(context)
    if spec == "lexicon":
        return words.lexicon(context.persona.lexicon)
    if spec == "profanity":
        return words.profanity()
    if spec in ("nll", "contrast"):
        return getattr(model, spec)(context)
    if spec == "logprob":
        return model.logprob(context)
    if kind == "hf":
        return make_in_main(lambda: model.classifier(spec, rest, context))
    if kind == "openai":
        return remote.moderation(spec, rest, context)
    return remote.command(spec, rest)


def make_in_main(make: Callable[[], Scorer]) -> Scorer:
    """A scorer that process 0 makes, because it alone scores with it; the others know what it is called."""
    scorers: list[Scorer] = []

    def describe() -> tuple[str, str, str, bool]:
        scorers.append(make())
        return scorers[0].name, scorers[0].primary, scorers[0].fingerprint, scorers[0].is_weak

    name, primary, fingerprint, is_weak = current().broadcast_from_main(describe)
    return scorers[0] if scorers else Scorer(name, primary, lambda answers: [], fingerprint, is_weak)


def score_answers(scorer: Scorer, answers: Sequence[ScoredAnswer], context: Context) -> list[dict[str, float]]:
    """Score these answers, or take their scores from the cache.

    Raises RunError if the primary label of any is missing, which must never count as zero, or is not finite.
    """
    keys = [hashlib.sha256(f"{s.prompt}\0{s.text}".encode()).hexdigest() for s in answers]
    path = context.cache / "scores" / f"{hashlib.sha256(scorer.fingerprint.encode()).hexdigest()[:24]}.json"
    processes = current()

    def score(given: Sequence[ScoredAnswer]) -> list[dict[str, float]]:
        return _check_scores(
            scorer,
            scorer.score(given) if scorer.runs_model else processes.broadcast_from_main(lambda: scorer.score(given)),
        )

    if not scorer.fingerprint:  # the score depends on more than the question and the text
        return score(answers)
    cached: dict[str, Any] = processes.broadcast_from_main(
        lambda: json.loads(path.read_text()) if path.is_file() else {}
    )
    uncached = {key: s for key, s in zip(keys, answers, strict=True) if key not in cached}
    if uncached:
        cached |= dict(zip(uncached, score(list(uncached.values())), strict=True))
        if processes.is_main:
            write_atomically(path, json.dumps(cached))
    return _check_scores(scorer, [cached[key] for key in keys])  # a cached score may lack this label


def _check_scores(scorer: Scorer, rows: list[dict[str, float]]) -> list[dict[str, float]]:
    for row in rows:
        if scorer.primary not in row or not math.isfinite(row[scorer.primary]):
            raise RunError(
                what=f"The scorer {scorer.name} gave no {scorer.primary!r}.",
                why=f"It gave {', '.join(row) or 'nothing'}; a missing or non-finite score must not count as zero.",
                fix="Name one of its labels after the # in --scorer.",
            )
    return rows
