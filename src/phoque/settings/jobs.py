"""The settings of `phoque jobs`."""

from typing import ClassVar, Literal, Self

from pydantic import model_validator

from phoque.settings.fields import conflict, setting
from phoque.settings.job import HubSettings


class JobsSettings(HubSettings):
    """What to do with the Jobs that phoque submitted."""

    groups: ClassVar = {"Jobs": "action job namespace all", "Hub": "hub_patience"}

    action: Literal["list", "follow", "cancel", "rerun", "clean"] = setting(
        "list",
        "List the Jobs (list), print the log of one until it ends (follow), stop it (cancel), submit it again "
        "(rerun), or delete the uploaded inputs of Jobs that have ended (clean); files on this machine are not "
        "touched.",
        positional=True,
    )
    job: str = setting("", "The id of the Job to follow, cancel or rerun.", positional=True)
    namespace: str | None = setting(None, "Look in this user's or organization's namespace. Without it, in yours.")
    all: bool = setting(False, "List Jobs that have ended, too.")

    @model_validator(mode="after")
    def _a_job_is_named(self) -> Self:
        if self.action in ("follow", "cancel", "rerun") and not self.job:
            raise conflict(
                f"phoque jobs {self.action} names no Job.", "It needs the id of one.", "`phoque jobs` lists the ids."
            )
        return self
