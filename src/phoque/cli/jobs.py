"""--on FLAVOR, for every command that takes it."""

from typing import Any

from phoque.cli.options import plan
from phoque.console import console
from phoque.settings.fields import Resolved


def run(command: str, asked: Resolved[Any], dry_run: bool) -> None:
    """Submit the command as a Job and follow it; with --dry-run, show the Job and send nothing but GET and HEAD."""
    from phoque.hub.client import Hub
    from phoque.hub.jobs import build_job, check_job, run_job

    job = build_job(command, asked)
    hub = Hub(asked.secrets.hub, console.say, asked.settings.hub_patience)
    if asked.settings.timeout is None:
        console.warn(f"without --timeout the Job is stopped after {job.timeout}")
    found = check_job(hub, asked)
    if dry_run:
        shown = {"job": job.to_redacted_dict(), "checked": found, "settings": asked.provenance()}
        told = shown["job"] | {"command": " ".join(job.command)} | found | {"settings": shown["settings"]}
        console.result(shown, lambda: plan(told), " ".join(job.command))
    else:
        result = run_job(hub, job, asked.settings.attempts, asked.settings.resumable, console)
        console.result(result, lambda: _lines(result), result["url"])


def _lines(values: dict[str, Any]) -> str:
    return "\n".join(f"{name:10} {value}" for name, value in values.items())
