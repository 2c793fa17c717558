"""Verdicts: a question, an answer, the number it rests on, and every condition with its own outcome."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

YES, NO, NOT_ENOUGH, NOT_ASKED = "yes", "no", "not enough data", "not asked"
MIN_FOR_YES = 12  # fewer questions give no yes: neither intervals nor p-values hold there
ALPHA = 0.05


@dataclass(frozen=True)
class Condition:
    """A sentence that is true or not, with the numbers that decide it."""

    text: str
    holds: bool


@dataclass(frozen=True)
class Verdict:
    """`yes` if all conditions hold; `number` in `unit` is the effect that the verdict is about, over `n` questions."""

    verdict: str
    number: float | None
    unit: str
    n: int
    conditions: tuple[Condition, ...] = ()
    why: str = ""  # for a verdict that is not given

    @classmethod
    def decide(cls, number: float, unit: str, n: int, *conditions: Condition) -> "Verdict":
        """A yes or a no by the conditions, or `not enough data` for a yes from fewer than MIN_FOR_YES questions."""
        if not all(condition.holds for condition in conditions):
            return cls(NO, number, unit, n, conditions)
        if n < MIN_FOR_YES:
            return cls(NOT_ENOUGH, number, unit, n, conditions, f"a yes needs at least {MIN_FOR_YES} questions")
        return cls(YES, number, unit, n, conditions)

    @classmethod
    def not_asked(cls, why: str) -> "Verdict":
        """A verdict on a question that this run did not ask."""
        return cls(NOT_ASKED, None, "", 0, why=why)

    @property
    def rule(self) -> str:
        """The conditions in one line, each with its outcome."""
        outcomes = [f"{'holds' if c.holds else 'fails'}: {c.text}" for c in self.conditions]
        return "; ".join(outcomes + [self.why] * bool(self.why))

    def to_json(self) -> dict[str, Any]:
        """The verdict as it stands in summary.json."""
        return asdict(self) | {"conditions": [asdict(c) for c in self.conditions], "rule": self.rule}


@dataclass(frozen=True)
class Ranking:
    """The persona's value among those of other roles: `others` maps a role to its value."""

    value: float
    others: dict[str, float]
    lead: tuple[float, float] | None = None  # interval of the lead over the next role, paired by question
    least_lead: float = 0.0  # a smaller lead is no difference that matters
    exchangeable: bool = True  # whether any role in the persona's place would have the same chance to be first

    @property
    def rank(self) -> int:
        """1 if no other role has as high a value."""
        return 1 + sum(other >= self.value for other in self.others.values())

    @property
    def p(self) -> float:
        """The probability of this rank if the persona were any of the roles, where they are exchangeable."""
        return self.rank / (1 + len(self.others))

    @property
    def next_role(self) -> str:
        """The other role with the highest value."""
        return max(self.others, key=lambda role: self.others[role])

    def condition(self, what: str) -> Condition:
        """The persona is first among the roles, and ahead of the next one by more than chance, where that is known."""
        place = f"{what}: the persona is number {self.rank} of {1 + len(self.others)} (must be number 1"
        place += f"; p {self.p:.3f})" if self.exchangeable else ")"
        holds = self.rank == 1 and (self.p <= ALPHA or not self.exchangeable)
        if self.lead is not None:
            place += f", lead over the {self.next_role}: {self.lead[0]:.3g} to {self.lead[1]:.3g}"
            place += f" (must be above {self.least_lead:.3g})"
            holds = holds and self.lead[0] > self.least_lead
        return Condition(place, holds)

    def to_json(self) -> dict[str, Any]:
        """The ranking as it stands in summary.json."""
        return asdict(self) | {"rank": self.rank, "p": self.p, "next_role": self.next_role}


def interval_condition(what: str, interval: Sequence[float], unit: str) -> Condition:
    """The interval of a difference lies above 0. `what` names the difference, so that a failed one claims nothing."""
    ends = f"{interval[0]:.3g} to {interval[1]:.3g} {unit}".rstrip()
    return Condition(f"{what}: {ends} (must be above 0)", interval[0] > 0)


def format_p(p: float) -> str:
    """A p-value for a sentence."""
    return "below 0.001" if p < 0.001 else f"{p:.3f}"
