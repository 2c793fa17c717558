"""The Jobs that phoque submitted: their state and cost, cancelling, running again, and what they were given."""

from typing import Any

from phoque.errors import UsageError
from phoque.hub.client import Hub
from phoque.hub.flavors import HOURS
from phoque.hub.job_inputs import BUCKET, FOLDER, delete_inputs
from phoque.hub.jobs import FINAL_STAGES, SUBMISSION, TOOL, stage_of


def list_jobs(hub: Hub, namespace: str, *, every: bool) -> list[dict[str, Any]]:
    """The Jobs of phoque in a namespace, newest first: {id, name, command, flavor, stage, created, minutes, cost, url}.

    Those that have ended only with `every`. The cost is in dollars, of the minutes that the Job has run.
    """
    found = _list(hub, namespace)
    prices = {
        hardware.name: hardware.unit_cost_usd / HOURS[hardware.unit_label]
        for hardware in hub.retry("listing the hardware", hub.api.list_jobs_hardware)
    }
    rows = [_describe(job, prices) for job in found if every or stage_of(job.status) not in FINAL_STAGES]
    return sorted(rows, key=lambda row: row["created"], reverse=True)


def cancel_job(hub: Hub, job_id: str, namespace: str) -> dict[str, Any]:
    """Stop a Job; training saves before it ends, if the Hub gives it the time."""
    _inspect(hub, job_id, namespace)
    hub.retry("cancelling the Job", lambda: hub.api.cancel_job(job_id=job_id, namespace=namespace))
    return {"job": job_id, "stage": "CANCELED"}


def rerun_job(hub: Hub, job_id: str, namespace: str) -> dict[str, Any]:
    """Submit a Job once more with the same command; training resumes from the newest checkpoint on the Hub."""
    _inspect(hub, job_id, namespace)
    submitted = hub.api.rerun_job(job_id=job_id, namespace=namespace)  # not retried: a second Job would be paid too
    return {"job": submitted.id, "url": submitted.url, "stage": stage_of(submitted.status)}


def clean_inputs(hub: Hub, namespace: str, *, dry_run: bool) -> list[str]:
    """Delete the inputs of all submissions of which no Job is running; return their folders."""
    from huggingface_hub.errors import HfHubHTTPError

    bucket = f"{namespace}/{BUCKET}"
    needed = {
        (job.labels or {}).get(SUBMISSION) for job in _list(hub, namespace) if stage_of(job.status) not in FINAL_STAGES
    }
    try:
        listed = hub.retry(bucket, lambda: list(hub.api.list_bucket_tree(bucket, prefix=f"{FOLDER}/", recursive=True)))
    except HfHubHTTPError as error:
        if error.response.status_code == 404:  # no Job was ever given a local file
            return []
        raise
    submissions = sorted({item.path.split("/")[1] for item in listed if item.type == "file"} - needed)
    folders = [f"{FOLDER}/{submission}" for submission in submissions]
    if not dry_run:
        for folder in folders:
            delete_inputs(hub, bucket, folder)
    return folders


def _list(hub: Hub, namespace: str) -> list[Any]:
    labels = dict([TOOL])
    return hub.retry("listing the Jobs", lambda: list(hub.api.list_jobs(namespace=namespace, labels=labels)))


def _inspect(hub: Hub, job_id: str, namespace: str) -> Any:
    from huggingface_hub.errors import HfHubHTTPError

    try:
        return hub.retry("reading the Job", lambda: hub.api.inspect_job(job_id=job_id, namespace=namespace))
    except HfHubHTTPError as error:
        if error.response.status_code != 404:
            raise
        raise UsageError(
            what=f"There is no Job {job_id} in {namespace}.",
            why="The Hub does not know it.",
            fix="`phoque jobs --all` lists the Jobs that phoque submitted.",
        ) from error


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
        "created": job.created_at.isoformat(),
        "minutes": running / 60,
        "cost": "" if price is None else f"${running / 3600 * price:.2f}",
        "url": job.url,
    }
