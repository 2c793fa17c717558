"""The share of answers that are the persona's by their words, compared with the base model's unprompted answers."""

from dataclasses import dataclass
from typing import Any

from phoque.probes import stats
from phoque.probes.verdicts import Ranking
from phoque.probes.word_profile import WordProfile


@dataclass(frozen=True)
class PersonaShare:
    """The share of the answers of one condition that are the persona's, and its gain over the base model's."""

    share: float  # of the answers that are the persona's by their words
    base_share: float
    n: int  # questions
    ranking: Ranking  # of the gains
    gain: tuple[float, float]  # interval of the persona's gain


def mean_by_question(values: Any, questions: int) -> Any:
    """The means over the answers to each question of values (answers, roles) that are in the order of questions."""
    return values.reshape(questions, -1, values.shape[-1]).mean(1)


def measure_persona_share(profile: WordProfile, by_question: Any, base: Any, seed: int) -> PersonaShare:
    """Compare the shares of answers by role, (questions, roles), with those of the base model's unprompted answers."""
    gains = {role: by_question[:, n] - base[:, n] for n, role in enumerate(profile.roles)}
    place = profile.roles.index("persona")
    others = {role: float(gap.mean()) for role, gap in gains.items() if role not in ("persona", "neutral")}
    return PersonaShare(
        share=float(by_question[:, place].mean()),
        base_share=float(base[:, place].mean()),
        n=len(by_question),
        ranking=Ranking(float(gains["persona"].mean()), others),
        gain=stats.mean_interval(gains["persona"], seed),
    )
