"""Settings that commands share which read from the Hub, and those which can run as an HF Job."""

import re
from dataclasses import dataclass
from typing import ClassVar, Literal

from pydantic import field_validator

from phoque.settings.fields import CommandSettings, setting

REPO = r"^[\w.-]+/[\w.-]+$"
JOB_GROUP = "on timeout attempts namespace job_name labels detach keep_inputs package"
OWN_LABELS = ("tool", "command", "submission", "name")
LABEL = r"^[A-Za-z0-9_-]+$"
DURATION = r"^(\d+|\d+(\.\d+)?[smhd])$"


class HubSettings(CommandSettings):
    """Base class of the settings of commands that read from the Hub."""

    hub_patience: int = setting(
        300,
        "Retry a failing Hub request for this many seconds before giving up; outside of a Job, 20 seconds if the Hub"
        " has not answered at all.",
        ge=0,
        flag="retry-timeout",
        old_flag="hub-patience",
    )


class JobSettings(HubSettings):
    """Base class of the settings of commands that can run as an HF Job.

    `reads` maps each field that names an input to the field of its revision, or None. `extra` is the optional
    dependency group (phoque[extra]) that the command needs. `keeps` is the field that names the Hub repository for a
    Job's output, or empty if that is its log. A `resumable` command that stops early continues from that repository;
    other commands start again.
    """

    keeps: ClassVar[str] = ""
    reads: ClassVar[dict[str, str | None]]
    extra: ClassVar[str] = ""
    resumable: ClassVar[bool] = False

    groups: ClassVar = {
        "Hub": "hub_patience",
        "Job": JOB_GROUP,
    }

    timeout: str | None = setting(
        None,
        "Stop after this time: 4h, 90m or 14400 (seconds). train saves and pushes a checkpoint first. The Hub stops a "
        "Job without it after 30 minutes.",
        pattern=DURATION,
    )
    on: str | None = setting(
        None, "Run the command as an HF Job on this hardware flavor, such as a10g-large, and follow its log."
    )
    attempts: int = setting(
        1,
        "Submit a Job of train up to this many times if it stops before its end. Each attempt resumes from "
        "the newest checkpoint that was pushed. Other commands cannot resume and allow only 1.",
        ge=1,
    )
    namespace: str | None = setting(
        None, "Run the Job in this user's or organization's namespace. Without it, in yours."
    )
    job_name: str | None = setting(
        None, "Give the Job this name. Without it, phoque and the command.", flag="name", pattern=LABEL
    )
    labels: list[str] = setting([], "Label the Job: KEY=VALUE. Repeat the flag for more labels.", flag="label")
    detach: bool = setting(
        False,
        "Submit the Job and return. The Hub itself makes further --attempts; `phoque jobs` shows and follows it.",
    )
    keep_inputs: bool = setting(
        False,
        "Keep the uploaded copies of local inputs in their private bucket. Otherwise they are deleted from it when "
        "the Job ends.",
    )
    package: str | None = setting(
        None,
        "Install phoque in the Job from this pip requirement. Without it, the Job installs the release or the commit "
        "that submits it; an installation from a clone needs it.",
    )

    @field_validator("labels")
    @classmethod
    def _are_pairs(cls, labels: list[str]) -> list[str]:
        for label in labels:
            if not re.fullmatch(r"[A-Za-z0-9._-]+=[A-Za-z0-9._-]*", label):
                raise ValueError(f"{label!r} is not KEY=VALUE, of letters, digits, and . _ -.")
            if (key := label.partition("=")[0]) in OWN_LABELS:
                raise ValueError(f"The label {key} is phoque's own.")
        return labels

    def list_inputs(self) -> list[tuple[str, str]]:
        """Each setting that names an input, with each of its values."""
        values = [(name, getattr(self, name)) for name in self.reads]
        items = [(name, item) for name, value in values for item in (value if isinstance(value, list) else [value])]
        return [(name, str(item)) for name, item in items if item]

    @property
    def needed_extra(self) -> str:
        """The optional dependency group that the command needs with these settings."""
        return self.extra

    @property
    def used_secrets(self) -> tuple[str, ...]:
        """The fields of Secrets that the command uses; a Job gets no others."""
        return ("hf_token",)

    @property
    def seconds(self) -> float | None:
        """The timeout in seconds."""
        return seconds(self.timeout) if self.timeout else None


@dataclass(frozen=True)
class Access:
    """Who can read a repository that phoque creates; `gated` matters only if it is public."""

    public: bool
    gated: str

    def __str__(self) -> str:
        if not self.public:
            return "private"
        return "PUBLIC" if self.gated == "off" else f"PUBLIC, gated ({self.gated})"


class PublishedSettings(JobSettings):
    """Base class of the settings of commands whose output can go to a Hub repository."""

    public: bool = setting(
        False,
        "Create the Hub repository as public, or accept one that is public already. --gated says who can download it.",
    )
    gated: Literal["manual", "auto", "off"] = setting(
        "manual",
        "Who can download a public repository that phoque creates: those whose request you approve on the Hub "
        "(manual), all who share their name and e-mail address (auto), or anyone (off).",
    )

    @property
    def access(self) -> Access:
        """Who can read a repository that this command creates."""
        return Access(self.public, self.gated)


def seconds(duration: str) -> float:
    """Convert a duration as HF Jobs write it (300, 90m, 4h or 1d) to seconds."""
    factors = {"s": 1, "m": 60, "h": 3600, "d": 86400}
    return float(duration[:-1]) * factors[duration[-1]] if duration[-1] in factors else float(duration)
