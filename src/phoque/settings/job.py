"""What every command that can run as an HF Job has in its settings."""

from typing import ClassVar

from phoque.settings.fields import CommandSettings, setting

REPO = r"^[\w.-]+/[\w.-]+$"
DURATION = r"^(\d+|\d+(\.\d+)?[smhd])$"


class JobSettings(CommandSettings):
    """`keeps` is the field of the repository that keeps a Job's work; `reads` are those of what it reads.

    Each of the latter with the field of its revision, or None. `extra` is the extra of phoque that the command needs.
    A `resumable` command that stops before its end goes on from what it has kept; others begin anew.
    """

    keeps: ClassVar[str]
    reads: ClassVar[dict[str, str | None]]
    extra: ClassVar[str] = ""
    resumable: ClassVar[bool] = False

    public: bool = setting(False, "make the Hub repository public, or accept that it is: anyone can see what is in it")
    hub_patience: int = setting(300, "seconds for which a request that the Hub fails is tried again", ge=0)
    timeout: str | None = setting(
        None,
        "the time there is: 4h, 90m, 14400 (seconds) since the process or Job began; train saves and pushes before it",
        pattern=DURATION,
    )
    on: str | None = setting(None, "run as an HF Job on this flavor, such as a10g-large, and follow its log")
    attempts: int = setting(1, "how often a Job of train that stopped before its end is submitted", ge=1)
    package: str | None = setting(None, "what the Job installs: a requirement that pip takes; default this version")

    @property
    def seconds(self) -> float | None:
        """The timeout in seconds."""
        return seconds(self.timeout) if self.timeout else None


def seconds(duration: str) -> float:
    """A duration as Jobs write it, 300, 90m, 4h or 1d, in seconds."""
    factors = {"s": 1, "m": 60, "h": 3600, "d": 86400}
    return float(duration[:-1]) * factors[duration[-1]] if duration[-1] in factors else float(duration)
