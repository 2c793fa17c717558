"""Submit a Job, once, and follow its log to its end."""

import re
import time
from collections.abc import Callable
from typing import Any

from phoque.console import Console
from phoque.errors import (
    FAILED,
    INTERRUPTED,
    RESUMABLE,
    USAGE,
    PhoqueError,
    Resumable,
    UsageError,
    first_line,
)
from phoque.hub.client import Hub, describe_error, is_transient
from phoque.jobs.build import Job

QUEUE_PATIENCE_S = 3600.0  # for which a Job that does not start is followed
RUNNING_STAGES = ("SCHEDULING", "RUNNING")
FINAL_STAGES = ("COMPLETED", "CANCELED", "ERROR", "DELETED")


def submit_job(hub: Hub, job: Job, console: Console) -> Any:
    """Submit a Job once. Raises UsageError or Resumable if the Hub refuses it, NotFollowed if its answer was lost."""
    from huggingface_hub.errors import HfHubHTTPError

    try:  # not retried: if the reply is lost, a retry would start a second Job
        submitted = hub.api.run_job(**vars(job))
    except HfHubHTTPError as error:
        if refusal := refusal_of(error, job.namespace):
            raise refusal from error
        if error.response.status_code < 500:
            raise
        raise _unknown_error(job, error) from error
    except Exception as error:
        if not is_transient(error):
            raise
        raise _unknown_error(job, error) from error
    console.say(f"job {submitted.id} on {job.flavor}, at most {job.timeout}: {submitted.url}")
    return submitted


def _unknown_error(job: Job, error: Exception) -> "NotFollowed":
    return NotFollowed(
        what="It is not known whether the Job was submitted.",
        why=f"{describe_error(error)}.",
        fix=f"Look first: phoque jobs{of_namespace(job.namespace)}. If it is not there, run the same command again.",
        code=RESUMABLE,
    )


def refusal_of(error: Any, namespace: str) -> PhoqueError | None:
    """What a Hub that refuses a Job means: no credits, no permission, or too many Jobs; None for another answer."""
    status, reason = error.response.status_code, first_line(error)[:160]
    if status == 402:
        return UsageError(
            what="The Hub did not accept the Job: the account has no credits.",
            why=reason,
            fix=f"Add credits to the account {namespace}, or give another --namespace.",
        )
    if status in (401, 403):
        return UsageError(
            what=f"The token may not run Jobs in {namespace}.",
            why=reason,
            fix="Use a token with the permission to run Jobs, or give another --namespace.",
        )
    if status == 429:
        return Resumable(
            what="The Hub did not accept the Job: too many requests, or too many Jobs.",
            why=reason,
            fix="Run the same command later.",
        )
    return None


def run_job(hub: Hub, job: Job, attempts: int, resumable: bool, console: Console) -> dict[str, Any]:
    """Submit the Job and follow its log; a `resumable` Job that stops early is resubmitted, up to `attempts` times.

    Returns {job, url, stage, attempts}. Raises PhoqueError with 75 if the Job can be resumed, 1 or 2 if it failed for
    good, and NotFollowed, with 130 at Ctrl-C, which leaves the Job running.
    """
    for attempt in range(1, attempts + 1):
        submitted = submit_job(hub, job, console)
        message, stage = follow_job(hub, submitted.id, job.namespace, console)
        if stage == "COMPLETED":
            return {"job": submitted.id, "url": submitted.url, "stage": stage, "attempts": attempt}
        code = parse_exit_code(message)
        if stage != "ERROR" or code in (FAILED, USAGE) or not resumable:
            break
        if attempt < attempts:
            console.say(f"attempt {attempt} of {attempts} stopped before its end ({message}); submitting it again")
    final = code if code in (FAILED, USAGE) else RESUMABLE if stage == "ERROR" and resumable else FAILED
    raise PhoqueError(
        what=f"Job {submitted.id} ended as {stage}.",
        why=f"{message or 'It gave no message'}; its log is at {submitted.url}.",
        fix="Run the same command again: it resumes from the newest checkpoint that was pushed."
        if final == RESUMABLE
        else "Read the last lines of its log. If it ran out of time, set a longer --timeout.",
        code=final,
    )


class NotFollowed(PhoqueError):
    """A Job is running, or may be, and its log is not read any more."""


def of_namespace(namespace: str) -> str:
    """The flag that `phoque jobs` needs to find a Job there."""
    return f" --namespace {namespace}"


def follow_job(hub: Hub, job_id: str, namespace: str, console: Console) -> tuple[str, str]:
    """Print a Job's log until the Job has ended; return its final message and stage.

    Raises NotFollowed at Ctrl-C, and if the log can no longer be read.
    """
    try:
        return _follow_log(hub, job_id, namespace, console)
    except NotFollowed:
        raise
    except KeyboardInterrupt:
        raise _not_followed_error(job_id, namespace, "", INTERRUPTED) from None
    except Exception as error:  # reading the log failed; the Job is still running
        raise _not_followed_error(job_id, namespace, f"{describe_error(error)}. ", RESUMABLE) from error


def _not_followed_error(job_id: str, namespace: str, why: str, code: int) -> NotFollowed:
    return NotFollowed(
        what=f"Job {job_id} is no longer followed; it keeps running.",
        why=f"{why}To follow it: phoque jobs follow {job_id}{of_namespace(namespace)}",
        fix=f"To stop it: phoque jobs cancel {job_id}{of_namespace(namespace)}",
        code=code,
    )


def _follow_log(hub: Hub, number: str, namespace: str, console: Console) -> tuple[str, str]:
    inspect = lambda: hub.api.inspect_job(job_id=number, namespace=namespace)
    read_status = lambda: hub.retry("reading the Job's status", inspect).status
    _wait_for_start(number, namespace, read_status, console)
    seen = 0
    while True:
        try:
            lines = hub.api.fetch_job_logs(job_id=number, namespace=namespace, follow=True)
            for line_number, line in enumerate(lines):
                if line_number >= seen:  # a stream that is reopened starts at the first line
                    console.say(line)
                    seen += 1
        except Exception as error:
            if not is_transient(error):
                raise
            console.say(f"reading the log failed: {describe_error(error)}; reconnecting")
        status = read_status()
        if stage_of(status) in FINAL_STAGES:
            return status.message or "", stage_of(status)
        time.sleep(1.0)


def _wait_for_start(number: str, namespace: str, read_status: Callable[[], Any], console: Console) -> None:
    """Wait until a Job leaves the queue; the client itself would wait for its log without end."""
    begun = time.monotonic()
    while stage_of(read_status()) == "SCHEDULING":
        if (waited := time.monotonic() - begun) > QUEUE_PATIENCE_S:
            raise NotFollowed(
                what=f"Job {number} has not started for {waited / 60:.0f} minutes; it stays in the queue.",
                why=f"No machine is free. To follow it: phoque jobs follow {number}{of_namespace(namespace)}",
                fix=f"To take it back: phoque jobs cancel {number}{of_namespace(namespace)}",
                code=RESUMABLE,
            )
        if waited < 1.0:
            console.stage("waiting for the hardware; a Job is not billed before it starts")
        time.sleep(1.0)
    console.end_stage()


def stage_of(status: Any) -> str:
    """The stage of a Job's status as text."""
    return str(getattr(status.stage, "value", status.stage))


def parse_exit_code(message: str) -> int | None:
    """Return the exit code of the command from the Job's final message, or None if it has none."""
    match = re.search(r"exit code:? (\d+)", message)
    return int(match[1]) if match else None
