"""What results have in common: the plan of a dry run, and the versions of the libraries that made a result."""

from dataclasses import asdict, dataclass, field
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


@dataclass(frozen=True, kw_only=True)
class RunFolderResult:
    """A finished probe: its run folder, the HTML report in it, warnings, and where it was pushed to, if it was."""

    folder: str
    report: str
    warnings: list[str]
    repo: str | None = None
    commit: str | None = None

    def to_json(self) -> dict[str, Any]:
        """For --json; `repo` and `commit` are left out if nothing was pushed."""
        return {name: value for name, value in asdict(self).items() if value is not None}


def library_versions(*names: str) -> dict[str, str]:
    """The installed version of each library."""
    from importlib.metadata import version

    return {name: version(name) for name in names}
