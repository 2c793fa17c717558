"""The Jobs that phoque submitted: their state and cost, canceling, running again, and what they were given."""

import time
from typing import Any

from phoque.errors import UsageError
from phoque.hub.client import Hub
from phoque.jobs.buckets import delete_folder, list_folder
from phoque.jobs.build import SUBMISSION, TOOL
from phoque.jobs.flavors import dollars_per_hour
from phoque.jobs.inputs import BUCKET, FOLDER
from phoque.jobs.submit import FINAL_STAGES, RUNNING_STAGES, refusal_of, stage_of

# seconds for which inputs are left alone: their Job may be about to be submitted, or be saving, or another attempt
# may follow
RECENT_S = 3600.0


def list_jobs(hub: Hub, namespace: str, *, every: bool) -> list[dict[str, Any]]:
    """The Jobs of phoque in a namespace, newest first: {id, name, command, flavor, stage, created, minutes, cost, url}.

    Those that have ended only with `every`. The cost is in dollars, of the minutes that the Job has run.
    """
    listed = hub.retry("listing the hardware", hub.api.list_jobs_hardware)
    prices = {hardware.name: dollars_per_hour(hardware) for hardware in listed}
    rows = [_describe(job, prices) for job in _list(hub, namespace, None if every else RUNNING_STAGES)]
    return sorted(rows, key=lambda row: row["created"], reverse=True)


def cancel_job(hub: Hub, job_id: str, namespace: str) -> dict[str, Any]:
    """Stop a Job; training saves before it ends, if the Hub gives it the time."""
    inspect_job(hub, job_id, namespace)
    hub.retry("canceling the Job", lambda: hub.api.cancel_job(job_id=job_id, namespace=namespace))
    return {"job": job_id, "stage": "CANCELED"}


def rerun_job(hub: Hub, job_id: str, namespace: str) -> dict[str, Any]:
    """Submit a Job once more with the same command; training resumes from the newest checkpoint on the Hub.

    Raises UsageError if the local files that it was given are deleted.
    """
    from huggingface_hub.errors import HfHubHTTPError

    job = inspect_job(hub, job_id, namespace)
    for volume in job.volumes or []:
        if volume.type == "bucket" and not list_folder(hub, volume.source, volume.path or ""):
            raise UsageError(
                what=f"Job {job_id} cannot be run again.",
                why=f"The uploaded copies of its local inputs were deleted from {volume.source}.",
                fix="Run the original command again: it uploads them, and training resumes.",
            )
    try:  # not retried: a second Job would be paid too
        submitted = hub.api.rerun_job(job_id=job_id, namespace=namespace)
    except HfHubHTTPError as error:
        raise refusal_of(error, namespace) or error from error
    return {"job": submitted.id, "url": submitted.url, "stage": stage_of(submitted.status)}


def clean_inputs(hub: Hub, namespace: str, *, dry_run: bool) -> list[str]:
    """Delete the inputs of submissions of which no Job is running or ended in the last hour; return their folders."""
    bucket = f"{namespace}/{BUCKET}"
    newest: dict[str, float] = {}  # by submission; listed before the Jobs, so that a new one is not overlooked
    for item in list_folder(hub, bucket, FOLDER):
        submission = item.path.split("/")[1]
        newest[submission] = max(newest.get(submission, 0.0), item.uploaded_at.timestamp())
    now = time.time()
    needed = {(job.labels or {}).get(SUBMISSION) for job in _list(hub, namespace) if _may_need_inputs(job, now)}
    unused = [name for name, uploaded in newest.items() if name not in needed and now - uploaded >= RECENT_S]
    folders = [f"{FOLDER}/{submission}" for submission in sorted(unused)]
    if not dry_run:
        for folder in folders:
            delete_folder(hub, bucket, folder)
    return folders


def _may_need_inputs(job: Any, now: float) -> bool:
    """Whether a Job has not ended, or has only just ended: another attempt of it may follow."""
    if stage_of(job.status) not in FINAL_STAGES:
        return True
    return job.finished_at is not None and now - job.finished_at.timestamp() < RECENT_S


def inspect_job(hub: Hub, job_id: str, namespace: str) -> Any:
    """A Job as the Hub has it. Raises UsageError if there is none."""
    from huggingface_hub.errors import HfHubHTTPError

    try:
        return hub.retry("reading the Job", lambda: hub.api.inspect_job(job_id=job_id, namespace=namespace))
    except HfHubHTTPError as error:
        if error.response.status_code != 404:
            raise
        raise UsageError(
            what=f"There is no Job {job_id} in {namespace}.",
            why="The Hub does not know it.",
            fix="`phoque jobs --all` lists the Jobs that phoque submitted; --namespace looks in another namespace.",
        ) from error


def _list(hub: Hub, namespace: str, stages: tuple[str, ...] | None = None) -> list[Any]:
    status = None if stages is None else list(stages)
    labels = dict([TOOL])
    return hub.retry(
        "listing the Jobs", lambda: list(hub.api.list_jobs(namespace=namespace, labels=labels, status=status))
    )


def _describe(job: Any, prices: dict[str, float]) -> dict[str, Any]:
    labels, flavor = job.labels or {}, str(getattr(job.flavor, "value", job.flavor))
    running = (job.durations.running_secs or 0) if job.durations else 0
    price = prices.get(flavor)
    return {
        "id": job.id,
        "name": labels.get("name", ""),
        "command": labels.get("command", ""),
        "flavor": flavor,
        "stage": stage_of(job.status),
        "created": job.created_at.isoformat() if job.created_at else "",
        "minutes": running / 60,
        "cost": "" if price is None else f"${running / 3600 * price:.2f}",
        "url": job.url,
    }
