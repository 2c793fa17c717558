"""`--on FLAVOR`: this very command as an HF Job, followed to its end and submitted again if it stopped before it."""

import json
import re
import time
from dataclasses import dataclass
from pathlib import Path
from secrets import token_hex
from typing import Any

from phoque import __version__
from phoque.console import Console
from phoque.errors import FAILED, INTERRUPTED, RESUMABLE, USAGE, PhoqueError
from phoque.hub.client import Hub, is_transient, reason
from phoque.errors import PublicRepoError
from phoque.settings.fields import PREFIX, Resolved, Secrets, env_name, flag_names

HERE = ("on", "attempts", "package", "output_dir", "yes", "timeout")  # settings that do not go into the Job's arguments
WRITTEN = ("report_json", "report_md", "merged_out_dir", "onnx_export_python")  # places on the machine that runs it
DATASETS = ("dataset", "chat", "chats", "text")  # settings that name one
DEFAULT_TIMEOUT = "30m"  # what Jobs give one that names none
OVER = ("COMPLETED", "CANCELED", "ERROR", "DELETED")


@dataclass(frozen=True)
class Job:
    """What is submitted; `secrets` holds values, and only `shown` may be shown."""

    image: str
    command: list[str]
    env: dict[str, str]
    secrets: dict[str, str]
    flavor: str
    timeout: str

    def shown(self) -> dict[str, Any]:
        """The job with the names of its secrets alone."""
        return vars(self) | {"secrets": sorted(self.secrets)}


def job_for(command: str, resolved: Resolved[Any]) -> Job:
    """The Job that runs a command with these settings: every value that is not a default, secrets as secrets.

    Raises PhoqueError (2) for settings that only mean something on this machine.
    """
    from huggingface_hub._jobs_api import DEFAULT_UV_IMAGE

    s = resolved.settings
    for name in s.reads:
        value = getattr(s, name)
        if value and Path(value).expanduser().exists():
            raise PhoqueError(
                f"{flag_names(type(s), name)[0]} {value} is on this machine.",
                "A Job sees nothing of it.",
                "Upload it to a private repository on the Hub and name that.",
            )
    for name in WRITTEN:
        if getattr(s, name, None):
            raise PhoqueError(
                f"{flag_names(type(s), name)[0]} names a place on this machine.",
                "A Job's disk is gone when it ends.",
                f"Leave it out: what a Job makes is kept with {flag_names(type(s), s.keeps)[0]}.",
            )
    if resolved.secrets.hf_token is None:
        raise PhoqueError("There is no Hub token.", "Jobs need one.", "Set HF_TOKEN, or run `hf auth login`.")
    if not getattr(s, s.keeps):
        raise PhoqueError(
            "A Job needs a repository to keep its work in.",
            "Its disk is gone when it ends.",
            f"Name one with {flag_names(type(s), s.keeps)[0]}; it is made private.",
        )
    keys = {name: getattr(resolved.secrets, name) for name in Secrets.model_fields}
    secrets = {env_name(Secrets, name): key.get_secret_value() for name, key in keys.items() if key}
    timeout = s.timeout or DEFAULT_TIMEOUT
    package = s.package or requirement(s.extra)
    run = ["uv", "run", "--no-project", "--with", package, "phoque", command, *arguments(resolved)]
    # its own clock begins when the container does, see settings.base.deadline
    env = {f"{PREFIX}TIMEOUT": timeout, f"{PREFIX}SUBMISSION": token_hex(6), "PYTHONUNBUFFERED": "1"}
    return Job(DEFAULT_UV_IMAGE, run, env, secrets, s.on, timeout)


def arguments(resolved: Resolved[Any]) -> list[str]:
    """The flags that give a command these settings, those at their default or preset left out."""
    model, found = type(resolved.settings), []
    for name, field in model.model_fields.items():
        value = getattr(resolved.settings, name)
        if name in HERE or value is None or _own(resolved.origins[name].source):
            continue
        flag = flag_names(model, name)[0]
        if field.annotation is bool:
            found.append(flag if value else flag.replace("--", "--no-", 1))
        else:
            for one in value if isinstance(value, list) else [value]:
                found += [flag, str(one)]
    return found


def _own(source: str) -> bool:
    return source == "default" or source.startswith("preset ")


def requirement(extra: str = "") -> str:
    """What a Job installs to have this copy of phoque: the release, or the commit it was installed from (PEP 610).

    `extra` is the extra that its command needs, if any.

    Raises PhoqueError (2) for a copy from a folder or file, which no Job can reach.
    """
    from importlib.metadata import distribution

    origin = json.loads(distribution("phoque").read_text("direct_url.json") or "{}")
    name = f"phoque[{extra}]" if extra else "phoque"
    if not origin:
        return f"{name}=={__version__}"
    if vcs := origin.get("vcs_info"):
        return f"{name} @ {vcs['vcs']}+{origin['url']}@{vcs['commit_id']}"
    raise PhoqueError(
        "A Job cannot install this copy of phoque.",
        "It was installed from a folder or a file of this machine.",
        f"Say what it shall install, such as --package phoque=={__version__} or --package git+https://...",
    )


def checked(hub: Hub, resolved: Resolved[Any]) -> dict[str, str]:
    """What the Job is going to need, asked with GET alone; raises the Hub's error for what is not there."""
    from huggingface_hub.errors import RepositoryNotFoundError

    s, api = resolved.settings, hub.api
    who = hub.retry("asking who this is", api.whoami)
    found = {"account": who["name"], "token": who["auth"].get("accessToken", {}).get("role", "unknown")}
    for name, pinned in s.reads.items():
        value, revision = getattr(s, name), getattr(s, pinned) if pinned else None
        value = re.split("[#:]", value)[0]  # a folder in it, or a split of it
        if value.count("/") == 1:
            found[name] = f"{value}@{_commit(hub, name, value, revision)[:8]}"
    kept, kind = getattr(s, s.keeps), getattr(s, "artifacts_repo_type", "model")
    try:
        private = hub.retry(kept, lambda: api.repo_info(kept, repo_type=kind)).private
        if not private and not s.public:
            raise PublicRepoError(kept)
        found["repository"] = f"{kept}, {'private' if private else 'PUBLIC'}"
    except RepositoryNotFoundError:
        found["repository"] = f"{kept}, will be made, {'PUBLIC' if s.public else 'private'}"
    return found


def _commit(hub: Hub, setting: str, name: str, revision: str | None) -> str:
    """The commit of what a setting names; a merged model may be kept in a dataset repository."""
    from huggingface_hub.errors import RepositoryNotFoundError

    info = hub.api.dataset_info if setting in DATASETS else hub.api.model_info
    try:
        return str(hub.retry(name, lambda: info(name, revision=revision)).sha)
    except RepositoryNotFoundError:
        if setting != "merged_dir":
            raise
        return str(hub.retry(name, lambda: hub.api.dataset_info(name, revision=revision)).sha)


def run_on(hub: Hub, job: Job, attempts: int, resumable: bool, console: Console) -> dict[str, Any]:
    """Submit the job and follow it; again, up to `attempts` times, while it stops before its end and is `resumable`.

    Returns {job, url, stage, attempts}. Raises PhoqueError with 75 if it can still go on, 1 or 2 if it failed for good,
    and 130 at Ctrl-C, which leaves the job running.
    """
    for attempt in range(1, attempts + 1):
        made = hub.api.run_job(**vars(job))  # not tried again: a lost reply would make two of them
        console.say(f"job {made.id} on {job.flavor}, at most {job.timeout}: {made.url}")
        try:
            message, stage = _followed(hub, made.id, console)
        except KeyboardInterrupt:
            raise _unfollowed(made.id, "", INTERRUPTED) from None
        except Exception as error:  # the log, not the job
            raise _unfollowed(made.id, f"{reason(error)}. ", RESUMABLE) from error
        if stage == "COMPLETED":
            return {"job": made.id, "url": made.url, "stage": stage, "attempts": attempt}
        code = exit_code(message)
        if stage != "ERROR" or code in (FAILED, USAGE) or not resumable:
            break
        if attempt < attempts:
            console.say(f"attempt {attempt} of {attempts} stopped before its end ({message}); submitting it again")
    final = code if code in (FAILED, USAGE) else RESUMABLE if stage == "ERROR" and resumable else FAILED
    raise PhoqueError(
        f"Job {made.id} ended as {stage}.",
        f"{message or 'It says no more'}; its log is at {made.url}.",
        "Run the same command: it goes on from the newest checkpoint on the Hub."
        if final == RESUMABLE
        else "See the last lines of its log; if it ran out of time, give it a longer --timeout.",
        final,
    )


def _unfollowed(number: str, why: str, code: int) -> PhoqueError:
    return PhoqueError(
        f"Job {number} is no longer followed; it goes on.",
        f"{why}To follow it: hf jobs logs --follow {number}",
        f"To stop it: hf jobs cancel {number}",
        code,
    )


def _followed(hub: Hub, number: str, console: Console) -> tuple[str, str]:
    """Show the log until the job is over; return its message and stage."""
    seen = 0
    while True:
        try:
            for line_number, line in enumerate(hub.api.fetch_job_logs(job_id=number, follow=True)):
                if line_number >= seen:  # a stream that broke begins at the beginning
                    console.say(line)
                    seen += 1
        except Exception as error:
            if not is_transient(error):
                raise
            console.say(f"the log broke off: {reason(error)}")
        status = hub.retry("asking for the job", lambda: hub.api.inspect_job(job_id=number)).status
        if str(getattr(status.stage, "value", status.stage)) in OVER:
            return status.message or "", str(getattr(status.stage, "value", status.stage))
        time.sleep(1.0)


def exit_code(message: str) -> int | None:
    """The exit code of the command, as far as the job's message names it."""
    found = re.search(r"exit code:? (\d+)", message)
    return int(found[1]) if found else None
