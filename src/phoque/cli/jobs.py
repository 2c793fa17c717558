"""--on FLAVOR, for every command that takes it."""

from typing import Any

from phoque.cli.options import render_plan
from phoque.console import console
from phoque.results import DryRun
from phoque.settings.fields import Resolved


def run(command: str, resolved: Resolved[Any], dry_run: bool) -> None:
    """Submit the command as a Job and follow it; with --dry-run, show the Job and send nothing but GET and HEAD."""
    from phoque.hub.client import Hub
    from phoque.hub.jobs import build_job, check_job, run_job

    s = resolved.settings
    job = build_job(command, resolved)
    hub = Hub(resolved.secrets.hub, console.say, s.hub_patience)
    if s.timeout is None:
        console.warn(f"without --timeout the Job is stopped after {job.timeout}")
    checked = check_job(hub, resolved)
    if dry_run:
        description, command_line = job.to_redacted_dict(), " ".join(job.command)
        plan = DryRun(description | {"command": command_line} | checked, resolved.provenance())
        report = {"job": description, "checked": checked, "settings": plan.settings}
        console.result(report, lambda: render_plan(plan), command_line)
    else:
        result = run_job(hub, job, s.attempts, s.resumable, console)
        console.result(result, lambda: _lines(result), result["url"])


def _lines(values: dict[str, Any]) -> str:
    return "\n".join(f"{name:10} {value}" for name, value in values.items())
