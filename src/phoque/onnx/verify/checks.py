"""What was checked, and what came of it."""

from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

LEVELS = ("files", "graph", "ort", "node", "browser")
PASS, FAIL, NOT_RUN = "PASS", "FAIL", "NOT RUN"


class CheckFailed(Exception):
    """A check says no; the text says what is wrong, in words that a user can act on."""


@dataclass(frozen=True)
class Check:
    """One check: its level, what it asks, PASS, FAIL or NOT RUN, and what was found."""

    level: str
    asks: str
    result: str
    said: str


@dataclass
class Verdict:
    """All checks in the order they ran, and numbers worth keeping; `asked` is a level that was asked for by name."""

    asked: str | None = None
    checks: list[Check] = field(default_factory=list)
    numbers: dict[str, Any] = field(default_factory=dict)

    @contextmanager
    def check(self, level: str, asks: str) -> Generator[list[str]]:
        """Run one check in the block: it passes unless Fails is raised; what is appended to the list is reported."""
        said: list[str] = []
        try:
            yield said
        except CheckFailed as problem:
            self.checks.append(Check(level, asks, FAIL, str(problem)))
        else:
            self.checks.append(Check(level, asks, PASS, "; ".join(said)))

    def leave_out(self, level: str, asks: str, why: str) -> None:
        """Say that something did not run, and why."""
        self.checks.append(Check(level, asks, NOT_RUN, why))

    def failed(self) -> list[Check]:
        """The checks that say no."""
        return [check for check in self.checks if check.result == FAIL]

    def level(self, name: str) -> str:
        """PASS, FAIL or NOT RUN: a level of which something failed fails, one that ran nothing did not run."""
        results = {check.result for check in self.checks if check.level == name}
        return FAIL if FAIL in results else PASS if PASS in results else NOT_RUN

    def whole(self) -> str:
        """FAIL if anything failed, else what came of the level that was asked for, else PASS."""
        return FAIL if self.failed() else self.level(self.asked) if self.asked else PASS

    def as_dict(self) -> dict[str, Any]:
        """For --json."""
        return {
            "schema_version": 1,
            "verdict": self.whole(),
            "levels": {name: self.level(name) for name in LEVELS},
            "checks": [vars(check) for check in self.checks],
            "numbers": self.numbers,
        }

    def as_markdown(self, name: str) -> str:
        """For a model card."""
        lines = [f"## Verified: {name}", "", "| level | verdict |", "|---|---|"]
        lines += [f"| {level} | {self.level(level)} |" for level in LEVELS]
        lines += ["", "| level | check | result | found |", "|---|---|---|---|"]
        lines += [
            f"| {c.level} | {c.asks} | {c.result} | {' '.join(c.said.split()).replace('|', chr(92) + '|')} |"
            for c in self.checks
        ]
        return "\n".join(lines) + "\n"
