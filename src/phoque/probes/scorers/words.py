"""Scorers that look at words: the persona's lexicon, and profanity."""

import re
from collections.abc import Sequence
from itertools import pairwise

from phoque.errors import PhoqueError
from phoque.probes.persona import words
from phoque.probes.scorers import ScoredAnswer, Scorer


def lexicon(known: Sequence[str]) -> Scorer:
    """The share of words that are the persona's own; each counts once a text, so that a stuck word earns nothing."""
    wanted = {word.lower() for word in known}

    def score(said: Sequence[ScoredAnswer]) -> list[dict[str, float]]:
        rows = []
        for one in said:
            spoken = words(one.text)
            hits = wanted & set(spoken)
            rows.append({"rate": len(hits) / max(len(set(spoken)), 1), "hits": float(len(hits))})
        return rows

    return Scorer("lexicon", "rate", score, f"lexicon 1 {sorted(wanted)}")


def profanity() -> Scorer:
    """alt-profanity-check's probability. It finds swearing and misses implied hostility: a weak scorer."""
    try:
        from importlib.metadata import version

        from profanity_check import predict_prob
    except ImportError as error:
        raise PhoqueError(
            "The profanity scorer is not installed.", f"{error}.", "Install it: pip install 'phoque[profanity]'"
        ) from error

    def score(said: Sequence[ScoredAnswer]) -> list[dict[str, float]]:
        return [{"probability": float(p)} for p in predict_prob([one.text for one in said])]

    return Scorer("profanity", "probability", score, f"profanity {version('alt-profanity-check')}", weak=True)


def distinct_pairs(ids: Sequence[int]) -> float:
    """distinct-2: the share of neighbouring token pairs that are not repeats; 1 for fewer than two tokens."""
    pairs = list(pairwise(ids))
    return len(set(pairs)) / len(pairs) if pairs else 1.0


def repetition(text: str) -> float:
    """The share of words that the text has said before."""
    spoken = re.findall(r"\S+", text.lower())
    return 1 - len(set(spoken)) / len(spoken) if spoken else 0.0
