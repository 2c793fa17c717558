"""What every command can return besides its own result: the plan of a dry run."""

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class DryRun:
    """What a command would do: facts by name, every setting with its origin, and warnings."""

    facts: dict[str, Any]
    settings: dict[str, dict[str, Any]]
    warnings: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """The facts, then `settings`, then `warnings`."""
        return self.facts | {"settings": self.settings} | ({"warnings": self.warnings} if self.warnings else {})
