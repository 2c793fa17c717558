"""Whose words the answers of a condition are, beside the base model's unprompted answers."""

from dataclasses import dataclass
from typing import Any

from phoque.probes import stats
from phoque.probes.verdicts import Ranking
from phoque.probes.word_profile import WordProfile


@dataclass(frozen=True)
class Voice:
    """Whose words the answers of one condition are, and the gain over the base model's unprompted answers."""

    share: float  # of the answers that are the persona's by their words
    base_share: float
    n: int  # questions
    ranking: Ranking  # of the gains
    gain: tuple[float, float]  # interval of the persona's gain


def mean_by_question(values: Any, questions: int) -> Any:
    """The means over the answers to each question of values (answers, roles) that are in the order of questions."""
    return values.reshape(questions, -1, values.shape[-1]).mean(1)


def hear(profile: WordProfile, by_question: Any, base: Any, seed: int) -> Voice:
    """Whose words answers are, beside the base model's unprompted ones; both are shares, (questions, roles)."""
    gains = {role: by_question[:, n] - base[:, n] for n, role in enumerate(profile.roles)}
    place = profile.roles.index("persona")
    others = {role: float(gap.mean()) for role, gap in gains.items() if role not in ("persona", "neutral")}
    return Voice(
        share=float(by_question[:, place].mean()),
        base_share=float(base[:, place].mean()),
        n=len(by_question),
        ranking=Ranking(float(gains["persona"].mean()), others),
        gain=stats.mean_interval(gains["persona"], seed),
    )
