"""Add the verdicts of a probe to the card of the adapter on the Hub, with a link to the run folder."""

import re
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from phoque.artifacts import Upload
from phoque.errors import PhoqueError, RunError, UsageError
from phoque.hub.client import describe_error
from phoque.hub.refs import hub_id
from phoque.hub.repo import Repo
from phoque.hub.store import CARD
from phoque.models.adapter_source import AdapterSource
from phoque.services import Services
from phoque.settings.probe import ProbeSettings

HEADING = "## Probe results"


@dataclass(frozen=True)
class AdapterCard:
    """The card of an adapter on the Hub, which a probe may add to."""

    repo: Repo
    is_required: bool  # whether a failure ends the command
    services: Services

    def add(self, command: str, verdicts: dict[str, Any], upload: Upload) -> None:
        """Replace the section of this command, or add it; one commit. A failure is a warning unless it is required."""
        try:
            with TemporaryDirectory() as folder:
                path = Path(folder) / CARD
                snapshot = self.repo.snapshot()
                if CARD in snapshot.files:
                    self.repo.fetch(snapshot, CARD, Path(folder))
                card = path.read_text(encoding="utf-8") if path.exists() else ""
                path.write_text(replace_section(card, command, render_section(command, verdicts, upload)), "utf-8")
                self.repo.push({CARD: path}, f"Verdicts of {command}", lambda _: [])
        except Exception as error:
            why = error.what if isinstance(error, PhoqueError) else describe_error(error)
            if self.is_required:
                raise RunError(
                    what=f"The card of {self.repo.name} could not be changed.", why=why, fix=f"See {upload.url}."
                ) from error
            self.services.console.warn(f"the card of {self.repo.name} could not be changed ({why})")


def find_card(s: ProbeSettings, adapter: AdapterSource | None, services: Services) -> AdapterCard | None:
    """The card that --update-card names: that of the adapter's repository, by its name or by its run.json.

    Raises UsageError if the adapter is not on the Hub, or if there is no token, and the Hub's error if it cannot write.
    """
    if not s.update_card:
        return None
    name = _find_repository(adapter) if adapter else None
    if name is None:
        raise UsageError(
            what="There is no card to update.",
            why="The adapter is not in a repository on the Hub." if adapter else "No adapter is given.",
            fix="Leave out --update-card, or name the adapter's repository.",
        )
    services.secrets.require_hub(name)
    repo = Repo(services.hub, name)
    repo.check_write_access()
    return AdapterCard(repo, s.fail_on_artifacts_upload_error, services)


def _find_repository(adapter: AdapterSource) -> str | None:
    recorded = (adapter.run_record() or {}).get("settings", {}).get("hub_model_id", {})
    return hub_id(adapter.name) or recorded.get("value")


def render_section(command: str, verdicts: dict[str, Any], upload: Upload) -> str:
    """The verdicts of one command as a table, below the heading of the command."""
    rows = [f"| {name} | {v['verdict']} | {_describe_number(v)} |" for name, v in verdicts.items()]
    lines = [f"### phoque {command}", "", f"Files: [{upload.path}]({upload.url}) in {upload.repo}.", ""]
    return "\n".join([*lines, "| question | verdict | number |", "|---|---|---|", *rows])


def _describe_number(verdict: dict[str, Any]) -> str:
    if verdict["number"] is None:
        return ""
    return f"{verdict['number']:.3g} {verdict['unit']} (n = {verdict['n']})".replace("  ", " ")


def replace_section(card: str, command: str, section: str) -> str:
    """The card with the section of a command in place of an earlier one, or at its end."""
    begin, end = f"<!-- phoque {command} -->", f"<!-- end of phoque {command} -->"
    marked = f"{begin}\n{section}\n{end}"
    earlier = re.compile(f"{re.escape(begin)}.*?{re.escape(end)}", re.DOTALL)
    if earlier.search(card):
        return earlier.sub(lambda _: marked, card)
    heading = "" if HEADING in card else f"{HEADING}\n\n"
    return f"{card.rstrip()}\n\n{heading}{marked}\n".lstrip()
