"""What both probes do before they measure, and with their run folder afterwards."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

from phoque.artifacts import Upload, open_artifacts_repo, push_run_folder
from phoque.distributed.processes import current
from phoque.hub.repo import Repo
from phoque.models.adapter_source import AdapterSource
from phoque.probes.card_section import AdapterCard, find_card
from phoque.services import Services
from phoque.settings.probe import ProbeSettings


class HasTuned(Protocol):
    """The resolved inputs of a probe."""

    @property
    def tuned(self) -> AdapterSource | None:
        """The adapter that is probed."""
        ...


PlanT = TypeVar("PlanT", bound=HasTuned)


@dataclass(frozen=True)
class Destination:
    """Where a run folder is pushed, and the card that its verdicts are added to; process 0 alone has any."""

    repo: Repo | None = None
    card: AdapterCard | None = None

    def deliver(
        self, command: str, folder: Path, verdicts: dict[str, Any], s: ProbeSettings, services: Services
    ) -> Upload | None:
        """Push the run folder, and add the verdicts to the card; return where the folder is on the Hub, if it is."""
        upload = push_run_folder(self.repo, folder, s, services) if self.repo else None
        if self.card and upload:
            self.card.add(command, verdicts, upload)
        return upload


def prepare_probe(
    command: str, make_plan: Callable[[], PlanT], s: ProbeSettings, services: Services, *, dry_run: bool
) -> tuple[PlanT, Destination]:
    """Resolve the inputs and check the destination before anything is computed, in process 0 first.

    Raises UsageError if the processes are on several machines.
    """
    processes = current()
    processes.watch(services.console)
    processes.check_one_machine(command)
    with processes.main_first():
        plan = make_plan()
        if not processes.is_main:
            return plan, Destination()
        card = find_card(s, plan.tuned, services, dry_run=dry_run)
        return plan, Destination(None if dry_run else open_artifacts_repo(s, services), card)
