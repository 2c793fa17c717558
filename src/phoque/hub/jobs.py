"""`--on FLAVOR`: run the command as an HF Job, follow its log, and resubmit it if it stops before its end."""

import json
import re
import time
from dataclasses import dataclass
from pathlib import Path
from secrets import token_hex
from typing import Any

from phoque.console import Console
from phoque.errors import FAILED, INTERRUPTED, RESUMABLE, USAGE, PhoqueError, PublicRepoError, UsageError
from phoque.hub.client import Hub, describe_error, is_transient
from phoque.settings.fields import PREFIX, Resolved, Secrets, env_name, flag_names
from phoque.version import __version__

NOT_PASSED = ("on", "attempts", "package", "output_dir", "yes", "timeout")  # settings that are not passed to the Job
LOCAL_PATHS = ("report_json", "report_md", "merged_out_dir", "onnx_export_python")  # settings that name local paths
DATASET_SETTINGS = ("dataset", "chat", "chats", "text")  # settings that name a dataset
DEFAULT_TIMEOUT = "30m"  # the limit that HF Jobs apply if none is given
FINAL_STAGES = ("COMPLETED", "CANCELED", "ERROR", "DELETED")


@dataclass(frozen=True)
class Job:
    """A Job to submit. `secrets` contains the values: display only the result of `to_redacted_dict`."""

    image: str
    command: list[str]
    env: dict[str, str]
    secrets: dict[str, str]
    flavor: str
    timeout: str

    def to_redacted_dict(self) -> dict[str, Any]:
        """Return the fields of the Job, with the names of the secrets in place of their values."""
        return vars(self) | {"secrets": sorted(self.secrets)}


def _list_inputs(s: Any) -> list[tuple[str, str]]:
    """Each setting that names an input, with each of its values."""
    values = [(name, getattr(s, name)) for name in s.reads]
    return [(name, item) for name, value in values for item in (value if isinstance(value, list) else [value])]


def build_job(command: str, resolved: Resolved[Any]) -> Job:
    """Build the Job that runs a command with these settings: non-default values as flags, secrets as Job secrets.

    Raises UsageError for settings that refer to this machine, and for a missing token or output repository.
    """
    from huggingface_hub._jobs_api import DEFAULT_UV_IMAGE

    s = resolved.settings
    for name, value in _list_inputs(s):
        if value and Path(value).expanduser().exists():
            raise UsageError(
                what=f"{flag_names(type(s), name)[0]} {value} is on this machine only.",
                why="A Job cannot read local files.",
                fix="Upload it to a private repository on the Hub, and give that repository instead.",
            )
    for name in LOCAL_PATHS:
        if getattr(s, name, None):
            raise UsageError(
                what=f"{flag_names(type(s), name)[0]} names a path on this machine.",
                why="A Job's disk is deleted when the Job ends.",
                fix=f"Leave it out: a Job keeps its output in the repository of {flag_names(type(s), s.keeps)[0]}.",
            )
    if resolved.secrets.hf_token is None:
        raise UsageError(
            what="There is no Hub token.", why="Jobs need one.", fix="Set HF_TOKEN, or run `hf auth login`."
        )
    if not getattr(s, s.keeps):
        raise UsageError(
            what="A Job needs a Hub repository for its output.",
            why="The Job's disk is deleted when it ends.",
            fix=f"Give one with {flag_names(type(s), s.keeps)[0]}; it is created private.",
        )
    keys = {name: getattr(resolved.secrets, name) for name in s.used_secrets}
    secrets = {env_name(Secrets, name): key.get_secret_value() for name, key in keys.items() if key}
    timeout = s.timeout or DEFAULT_TIMEOUT
    package = s.package or pip_requirement(s.needed_extra)
    run = ["uv", "run", "--no-project", "--with", package, "phoque", command, *to_flags(resolved)]
    # the Job counts its timeout from the start of the container, see settings.environment.deadline
    env = {f"{PREFIX}TIMEOUT": timeout, f"{PREFIX}SUBMISSION": token_hex(6), "PYTHONUNBUFFERED": "1"}
    return Job(DEFAULT_UV_IMAGE, run, env, secrets, s.on, timeout)


def to_flags(resolved: Resolved[Any]) -> list[str]:
    """Return the flags that reproduce these settings; values from a default or preset are left out."""
    model, flags = type(resolved.settings), []
    for name, field in model.model_fields.items():
        value = getattr(resolved.settings, name)
        if name in NOT_PASSED or value is None or _is_default(resolved.origins[name].source):
            continue
        flag = flag_names(model, name)[0]
        if field.annotation is bool:
            flags.append(flag if value else flag.replace("--", "--no-", 1))
        else:
            for item in value if isinstance(value, list) else [value]:
                flags += [flag, str(item)]
    return flags


def _is_default(source: str) -> bool:
    return source == "default" or source.startswith("preset ")


def pip_requirement(extra: str = "") -> str:
    """Return the pip requirement of the running phoque: its release, or the commit it was installed from (PEP 610).

    `extra` is the optional dependency group that the command needs, or empty. Raises UsageError if phoque was
    installed from a local folder or file, which a Job cannot read.
    """
    from importlib.metadata import distribution

    origin = json.loads(distribution("phoque").read_text("direct_url.json") or "{}")
    name = f"phoque[{extra}]" if extra else "phoque"
    if not origin:
        return f"{name}=={__version__}"
    if vcs := origin.get("vcs_info"):
        return f"{name} @ {vcs['vcs']}+{origin['url']}@{vcs['commit_id']}"
    raise UsageError(
        what="A Job cannot install this copy of phoque.",
        why="It was installed from a folder or a file on this machine.",
        fix=f"Give the package to install, such as --package phoque=={__version__} or --package git+https://...",
    )


def check_job(hub: Hub, resolved: Resolved[Any]) -> dict[str, str]:
    """Check that the Job's inputs and repository are accessible, with GET requests only.

    Returns what was found as {name: description}. Raises the Hub's error for anything that is missing.
    """
    from huggingface_hub.errors import RepositoryNotFoundError

    s, api = resolved.settings, hub.api
    account = hub.retry("checking the token", api.whoami)
    checks = {"account": account["name"], "token": account["auth"].get("accessToken", {}).get("role", "unknown")}
    for name, value in _list_inputs(s):
        pinned = s.reads[name]
        revision = getattr(s, pinned) if pinned else None
        value = re.split("[#:]", value)[0]  # a folder in it, or a split of it
        if value.count("/") == 1:
            checks[name] = f"{value}@{_find_commit(hub, name, value, revision)[:8]}"
    repo, kind = getattr(s, s.keeps), getattr(s, "artifacts_repo_type", "model")
    try:
        private = hub.retry(repo, lambda: api.repo_info(repo, repo_type=kind)).private
        if not private and not s.public:
            raise PublicRepoError(repo)
        checks["repository"] = f"{repo}, {'private' if private else 'PUBLIC'}"
    except RepositoryNotFoundError:
        checks["repository"] = f"{repo}, will be made, {'PUBLIC' if s.public else 'private'}"
    return checks


def _find_commit(hub: Hub, setting: str, name: str, revision: str | None) -> str:
    """Return the commit of the repository that a setting names; a merged model may be in a dataset repository."""
    from huggingface_hub.errors import RepositoryNotFoundError

    info = hub.api.dataset_info if setting in DATASET_SETTINGS else hub.api.model_info
    try:
        return str(hub.retry(name, lambda: info(name, revision=revision)).sha)
    except RepositoryNotFoundError:
        if setting != "merged_dir":
            raise
        return str(hub.retry(name, lambda: hub.api.dataset_info(name, revision=revision)).sha)


def run_job(hub: Hub, job: Job, attempts: int, resumable: bool, console: Console) -> dict[str, Any]:
    """Submit the Job and follow its log; a `resumable` Job that stops early is resubmitted, up to `attempts` times.

    Returns {job, url, stage, attempts}. Raises PhoqueError with 75 if the Job can be resumed, 1 or 2 if it failed for
    good, and 130 at Ctrl-C, which leaves the Job running.
    """
    for attempt in range(1, attempts + 1):
        submitted = hub.api.run_job(**vars(job))  # not retried: if the reply is lost, a retry would start a second Job
        console.say(f"job {submitted.id} on {job.flavor}, at most {job.timeout}: {submitted.url}")
        try:
            message, stage = _follow_log(hub, submitted.id, console)
        except KeyboardInterrupt:
            raise _not_followed_error(submitted.id, "", INTERRUPTED) from None
        except Exception as error:  # reading the log failed; the Job is still running
            raise _not_followed_error(submitted.id, f"{describe_error(error)}. ", RESUMABLE) from error
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
        fix="Run the same command again: it resumes from the newest checkpoint on the Hub."
        if final == RESUMABLE
        else "Read the last lines of its log. If it ran out of time, set a longer --timeout.",
        code=final,
    )


def _not_followed_error(job_id: str, why: str, code: int) -> PhoqueError:
    return PhoqueError(
        what=f"Job {job_id} is no longer followed; it keeps running.",
        why=f"{why}To follow it: hf jobs logs --follow {job_id}",
        fix=f"To stop it: hf jobs cancel {job_id}",
        code=code,
    )


def _follow_log(hub: Hub, number: str, console: Console) -> tuple[str, str]:
    """Print the log until the Job has ended; return its final message and stage."""
    seen = 0
    while True:
        try:
            for line_number, line in enumerate(hub.api.fetch_job_logs(job_id=number, follow=True)):
                if line_number >= seen:  # a stream that is reopened starts at the first line
                    console.say(line)
                    seen += 1
        except Exception as error:
            if not is_transient(error):
                raise
            console.say(f"reading the log failed: {describe_error(error)}; reconnecting")
        status = hub.retry("reading the Job's status", lambda: hub.api.inspect_job(job_id=number)).status
        if str(getattr(status.stage, "value", status.stage)) in FINAL_STAGES:
            return status.message or "", str(getattr(status.stage, "value", status.stage))
        time.sleep(1.0)


def parse_exit_code(message: str) -> int | None:
    """Return the exit code of the command from the Job's final message, or None if it has none."""
    match = re.search(r"exit code:? (\d+)", message)
    return int(match[1]) if match else None
