"""Add the verdicts of a probe to the card of the adapter on the Hub, with a link to the run folder."""

import re
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from phoque.artifacts import Upload
from phoque.errors import PhoqueError, RunError, UsageError
from phoque.hub.client import describe_error
from phoque.hub.refs import hub_id
from phoque.hub.repo import Repo
from phoque.hub.store import CARD, FileHashes, Snapshot
from phoque.models.adapter_source import WEIGHTS, AdapterSource
from phoque.services import Services
from phoque.settings.probe import ProbeSettings
from phoque.version import __version__

HEADING = "## Probe results"


@dataclass(frozen=True)
class AdapterCard:
    """The card of an adapter on the Hub, which a probe may add to; `weights` is the SHA-256 of the adapter's file."""

    repo: Repo
    weights: str
    is_required: bool  # whether a failure ends the command
    services: Services

    def add(self, command: str, verdicts: dict[str, Any], upload: Upload) -> None:
        """Replace the section of this command, or add it; one commit. A failure is a warning unless it is required."""
        try:
            self._push(command, render_section(command, verdicts, upload, self.weights))
        except Exception as error:
            why = error.what if isinstance(error, PhoqueError) else describe_error(error)
            if self.is_required:
                raise RunError(
                    what=f"The card of {self.repo.name} could not be changed.", why=why, fix=f"See {upload.url}."
                ) from error
            self.services.console.warn(f"the card of {self.repo.name} could not be changed ({why})")

    def _push(self, command: str, section: str) -> None:
        before = self.repo.snapshot()
        with TemporaryDirectory() as folder:
            path = Path(folder) / CARD
            if CARD in before.files:
                self.repo.fetch(before, CARD, Path(folder))
            card = path.read_bytes().decode() if path.exists() else ""
            path.write_bytes(replace_section(card, command, section).encode())
            self.repo.push({CARD: path}, f"Verdicts of {command}", partial(_check_unchanged, before, path))


def _check_unchanged(before: Snapshot, card: Path, now: Snapshot) -> list[str]:
    """Raise RunError if somebody edited the card since `before`; no file is to be deleted.

    The new card may be there already: a push whose reply was lost is repeated.
    """
    present = now.files.get(CARD)
    if present != before.files.get(CARD) and not FileHashes(card).matches(present):
        raise RunError(
            what="The card was edited meanwhile.", why="The edit would be lost.", fix="Add the verdicts by hand."
        )
    return []


def find_card(
    s: ProbeSettings, adapter: AdapterSource | None, services: Services, *, dry_run: bool
) -> AdapterCard | None:
    """The card that --update-card names: that of the adapter's repository, by its name or by its run.json.

    Raises UsageError if the adapter is not on the Hub, if the repository holds other weights now, or without a token;
    PublicRepoError for a public repository without --public; and the Hub's error if the token cannot write, which a dry
    run does not ask.
    """
    if not s.update_card:
        return None
    name = _find_repository(adapter) if adapter else None
    if adapter is None or name is None:
        raise UsageError(
            what="There is no card to update.",
            why="The adapter is not in a repository on the Hub." if adapter else "No adapter is given.",
            fix="Leave out --update-card, or name the adapter's repository.",
        )
    services.secrets.require_hub(name)
    repo = Repo(services.hub, name)
    weights = FileHashes(adapter.folder / WEIGHTS)
    if not weights.matches(repo.snapshot().files.get(WEIGHTS)):
        raise UsageError(
            what=f"{name} does not hold this adapter.",
            why=f"Its {WEIGHTS} differs from that in {adapter.label}, so the verdicts would be about other weights.",
            fix="Leave out --update-card, or probe the adapter that the repository holds now.",
        )
    repo.check_visibility(public=s.public)
    if not dry_run:
        repo.check_write_access()
    return AdapterCard(repo, weights.sha256, s.fail_on_artifacts_upload_error, services)


def _find_repository(adapter: AdapterSource) -> str | None:
    recorded = (adapter.run_record() or {}).get("settings", {}).get("hub_model_id", {})
    return hub_id(adapter.name) or recorded.get("value")


def render_section(command: str, verdicts: dict[str, Any], upload: Upload, weights: str) -> str:
    """The verdicts of one command as a table, below the heading of the command."""
    rows = [f"| {name} | {v['verdict']} | {_describe_number(v)} | {_explain(v)} |" for name, v in verdicts.items()]
    lines = [
        f"### phoque {command}",
        "",
        f"Files: [`{upload.path}`]({upload.url}) in {upload.repo}. By phoque {__version__}, of the adapter "
        f"whose weights have the SHA-256 `{weights[:16]}`.",
        "",
    ]
    return "\n".join([*lines, "| question | verdict | number | why |", "|---|---|---|---|", *rows])


def _explain(verdict: dict[str, Any]) -> str:
    """Why a verdict is not yes: the first condition that fails, or why it was not given."""
    failed = next((c["text"] for c in verdict.get("conditions", []) if not c["holds"]), "")
    return (verdict.get("why") or failed).replace("|", "\\|")


def _describe_number(verdict: dict[str, Any]) -> str:
    if verdict["number"] is None:
        return ""
    return f"{verdict['number']:.3g} {verdict['unit']} (n = {verdict['n']})".replace("  ", " ")


def replace_section(card: str, command: str, section: str) -> str:
    """The card with the section of a command in place of an earlier one, or at its end; its line ends stay.

    A section whose end was deleted is left as it is, without its marker.
    """
    newline = "\r\n" if "\r\n" in card else "\n"
    begin, end = f"<!-- phoque {command} -->", f"<!-- end of phoque {command} -->"
    marked = newline.join([begin, *section.split("\n"), end])
    whole = re.compile(rf"{re.escape(begin)}(?:(?!<!-- (?:end of )?phoque ).)*{re.escape(end)}", re.DOTALL)
    if whole.search(card):
        return whole.sub(lambda _: marked, card, count=1)
    card = re.sub(rf"{re.escape(begin)}\s*|{re.escape(end)}\s*", "", card)
    heading = [] if re.search(rf"^{HEADING}\s*$", card, re.MULTILINE) else [HEADING, ""]
    return newline.join([card.rstrip(), "", *heading, marked, ""]).lstrip()
