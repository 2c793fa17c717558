"""The checks of a verification, their results, and the verdict over all of them."""

from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

PASS, FAIL, NOT_RUN = "PASS", "FAIL", "NOT RUN"


class CheckFailed(Exception):
    """A check failed; the message says what is wrong, so that a user can act on it."""


@dataclass(frozen=True)
class Check:
    """One check: what it `asks`, its `result`, and what it measured or why it failed or did not run (`said`)."""

    level: str
    asks: str
    result: str
    said: str
    id: str = ""  # for checks that later levels depend on

    def to_json(self) -> dict[str, str]:
        """{level, asks, result, said}."""
        return {"level": self.level, "asks": self.asks, "result": self.result, "said": self.said}


@dataclass
class Verdict:
    """All checks in the order they ran, and measured numbers; `required_level`, if set, must have run to pass.

    `levels` are the names of all levels of this kind of verification, in their order. `remarks` are what passed and
    yet should be known, such as a speed at which nobody would wait.
    """

    levels: tuple[str, ...]
    required_level: str | None = None
    checks: list[Check] = field(default_factory=list)
    numbers: dict[str, Any] = field(default_factory=dict)
    remarks: list[str] = field(default_factory=list)

    @contextmanager
    def check(self, level: str, asks: str, id: str = "") -> Generator[list[str]]:
        """Run the `with` body as one check: CheckFailed fails it; strings appended to the yielded list are reported."""
        notes: list[str] = []
        try:
            yield notes
        except CheckFailed as problem:
            self.checks.append(Check(level, asks, FAIL, str(problem), id))
        else:
            self.checks.append(Check(level, asks, PASS, "; ".join(notes), id))

    def skip(self, level: str, asks: str, why: str) -> None:
        """Record that a check did not run, and why."""
        self.checks.append(Check(level, asks, NOT_RUN, why))

    def failed_checks(self) -> list[Check]:
        """Return the checks that failed."""
        return [check for check in self.checks if check.result == FAIL]

    def has_failed(self, *ids: str) -> bool:
        """Whether one of the checks with these ids failed."""
        return any(check.id in ids for check in self.failed_checks())

    def level(self, name: str) -> str:
        """Return FAIL if a check of this level failed, NOT RUN if none of its checks ran, else PASS."""
        results = {check.result for check in self.checks if check.level == name}
        return FAIL if FAIL in results else PASS if PASS in results else NOT_RUN

    def overall_result(self) -> str:
        """Return FAIL if any check failed, else the result of `required_level` if one is set, else PASS."""
        return FAIL if self.failed_checks() else self.level(self.required_level) if self.required_level else PASS

    def as_dict(self) -> dict[str, Any]:
        """Return the verdict as the object that --json prints."""
        return {
            "schema_version": 1,
            "verdict": self.overall_result(),
            "levels": {name: self.level(name) for name in self.levels},
            "checks": [check.to_json() for check in self.checks],
            "numbers": self.numbers,
            "remarks": self.remarks,
        }

    def as_markdown(self, name: str) -> str:
        """Return the verdict as Markdown tables for a model card."""
        lines = [f"## Verified: {name}", "", "| level | verdict |", "|---|---|"]
        lines += [f"| {level} | {self.level(level)} |" for level in self.levels]
        lines += ["", "| level | check | result | found |", "|---|---|---|---|"]
        lines += [
            f"| {c.level} | {c.asks} | {c.result} | {' '.join(c.said.split()).replace('|', chr(92) + '|')} |"
            for c in self.checks
        ]
        lines += ["", *self.remarks] if self.remarks else []
        return "\n".join(lines) + "\n"


@dataclass(frozen=True)
class VerifyResult:
    """The verdict on an export, its name, and its folder on this machine, to which it may be downloaded in part."""

    verdict: Verdict
    name: str
    folder: str

    def to_json(self) -> dict[str, Any]:
        """The verdict's JSON with `name` and `folder`."""
        return self.verdict.as_dict() | {"name": self.name, "folder": self.folder}
