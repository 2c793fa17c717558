"""Scorers: how much of the persona is in an answer. Of several `--scorer SPEC` the first is the trait."""

import hashlib
import json
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from phoque.errors import FAILED, PhoqueError
from phoque.inference.generate import Reply
from phoque.inference.residual_stream import Turn
from phoque.probes.persona import Persona


@dataclass(frozen=True)
class ScoredAnswer:
    """An answer to be scored: the question, the text, its token ids and how it came about."""

    prompt: str
    text: str
    reply: Reply


@dataclass(frozen=True)
class Scorer:
    """A way to score texts: `score` gives {label: number} for each, higher is more of the persona.

    `primary` is the label that counts. `fingerprint` pins everything that a score depends on but the text and its
    question; without one scores are not cached. A `weak` scorer misses most of what it is meant to find.
    """

    name: str
    primary: str
    score: Callable[[Sequence[ScoredAnswer]], list[dict[str, float]]]
    fingerprint: str = ""
    weak: bool = False


@dataclass
class Context:
    """What scorers may lean on. The model is the base: `nll` and `contrast` run it with its adapters switched off."""

    persona: Persona
    watched: dict[int, str]  # token ids that begin a word of the lexicon
    token: str | None
    api_key: str | None
    nll: Callable[[Sequence[Turn]], list[float]]
    prompt_ids: Callable[[str, str], list[int]]
    model: str
    cache: Path
    called: dict[str, int] = field(default_factory=dict)  # scorer -> texts that were not in the cache


def scorer_for(spec: str, context: Context) -> Scorer:
    """The scorer that a `--scorer` value names. Raises PhoqueError (2) for one that there is not."""
    from phoque.probes.scorers import model, remote, words

    kind, _, rest = spec.partition(":")
    if kind == "lexicon":
        return words.lexicon(context.persona.lexicon)
    if spec == "profanity":
        return words.profanity()
    if spec in ("nll", "contrast"):
        return getattr(model, spec)(context)
    if spec == "logprob":
        return model.logprob(context)
    if kind == "hf" and rest:
        return model.classifier(spec, rest, context)
    if kind == "openai" and rest:
        return remote.moderation(spec, rest, context)
    if kind == "command" and rest:
        return remote.command(spec, rest)
    raise PhoqueError(
        f"No scorer {spec!r}.",
        "There are contrast, lexicon, logprob, nll, profanity, hf:MODEL#LABEL, openai:URL#MODEL and command:COMMAND.",
        "Check --scorer.",
    )


def scores(scorer: Scorer, said: Sequence[ScoredAnswer], context: Context) -> list[dict[str, float]]:
    """The scores of these answers, from the cache where they are there; each must hold the primary label.

    Raises PhoqueError (1) for a missing label, which must never count as zero, and for a number that is none.
    """
    keys = [hashlib.sha256(f"{s.prompt}\0{s.text}".encode()).hexdigest() for s in said]
    path = context.cache / "scores" / f"{hashlib.sha256(scorer.fingerprint.encode()).hexdigest()[:24]}.json"
    known: dict[str, Any] = json.loads(path.read_text()) if scorer.fingerprint and path.is_file() else {}
    new = {key: s for key, s in zip(keys, said, strict=True) if key not in known}
    if not scorer.fingerprint:  # what a score is of was not the text alone
        return _checked(scorer, scorer.score(said))
    if new:
        context.called[scorer.name] = context.called.get(scorer.name, 0) + len(new)
        known |= dict(zip(new, _checked(scorer, scorer.score(list(new.values()))), strict=True))
        path.parent.mkdir(parents=True, exist_ok=True)
        staging = path.with_name(f".{path.name}.{os.getpid()}")
        staging.write_text(json.dumps(known))
        staging.replace(path)
    return _checked(scorer, [known[key] for key in keys])  # the cache may be of a run that wanted another label


def _checked(scorer: Scorer, found: list[dict[str, float]]) -> list[dict[str, float]]:
    for row in found:
        if scorer.primary not in row or not math.isfinite(row[scorer.primary]):
            raise PhoqueError(
                f"The scorer {scorer.name} gave no {scorer.primary!r}.",
                f"It gave {', '.join(row) or 'nothing'}; a label that is missing is not a score of zero.",
                "Name a label that it has, behind the # of --scorer.",
                FAILED,
            )
    return found
