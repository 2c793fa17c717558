"""A command as an HF Job: what is checked before money is spent, and the Job itself."""

from dataclasses import dataclass, field, replace
from typing import Any

from phoque.errors import LOG_IN, UsageError
from phoque.extras import name_package, read_origin
from phoque.hub.client import Hub
from phoque.hub.refs import hub_ref
from phoque.hub.repo import Repo
from phoque.jobs.inputs import DATASET_SETTINGS, RESERVED, LocalInput, with_mounted_paths
from phoque.settings.fields import PREFIX, Origin, Resolved, Secrets, env_name, flag_names
from phoque.version import __version__

# settings that are not passed to the Job

NOT_PASSED = (
    "on",
    "send_token",
    "attempts",
    "package",
    "output_dir",
    "yes",
    "timeout",
    "namespace",
    "job_name",
    "labels",
    "detach",
    "keep_inputs",
)
LOCAL_PATHS = (
    "report_json",
    "report_md",
    "merged_out_dir",
    "onnx_export_python",
    "answers_file",
)  # settings that name local paths
EITHER_KIND = ("merged_dir", "persona", "roles", "prompts_file")  # may be in a model or a dataset repository
DEFAULT_TIMEOUT = "30m"  # the limit that HF Jobs apply if none is given
TOOL = "tool", "phoque"  # the label by which `phoque jobs` finds its own
SUBMISSION = "submission"  # label: the folder of the Job's inputs in the bucket


@dataclass(frozen=True)
class Job:
    """A Job to submit. `secrets` contains the values: display only the result of `to_redacted_dict`.

    `attempts` are made by the Hub; it does not look at the exit code.
    """

    image: str
    command: list[str]
    env: dict[str, str]
    secrets: dict[str, str]
    flavor: str
    timeout: str
    namespace: str
    name: str
    labels: dict[str, str]
    volumes: list[Any] = field(default_factory=list)
    attempts: int | None = None

    def to_redacted_dict(self) -> dict[str, Any]:
        """Return the fields of the Job, with the names of the secrets in place of their values."""
        volumes = [volume.to_dict() for volume in self.volumes]
        return vars(self) | {"secrets": sorted(self.secrets), "volumes": volumes}


def check_token(secrets: Secrets, why: str) -> None:
    """Raise UsageError, with the reason for which one is needed, if there is no Hub token."""
    if secrets.hf_token is None:
        raise UsageError(what="There is no Hub token.", why=why, fix=LOG_IN)


def check_local_settings(resolved: Resolved[Any]) -> None:
    """Raise UsageError for settings that a Job cannot have, and without a token, an output repository or a package."""
    s = resolved.settings
    for name in LOCAL_PATHS:
        if getattr(s, name, None):
            raise UsageError(
                what=f"{flag_names(type(s), name)[0]} names a path on this machine.",
                why="A Job's disk is deleted when the Job ends.",
                fix=f"Leave it out: a Job keeps its output in the repository of {flag_names(type(s), s.keeps)[0]}."
                if s.keeps
                else "Leave it out: the Job's log has the output.",
            )
    check_token(resolved.secrets, "Submitting a Job needs one here; --no-token only keeps it out of the Job.")
    if not s.package:
        pip_requirement(s.needed_extra)
    if s.keeps and not (getattr(s, s.keeps) or getattr(s, "run_dir", None)):
        raise UsageError(
            what="A Job needs a Hub repository for its output.",
            why="The Job's disk is deleted when it ends.",
            fix=f"Give one with {flag_names(type(s), s.keeps)[0]}; it is created private.",
        )


def build_job(
    command: str,
    resolved: Resolved[Any],
    *,
    namespace: str,
    submission: str,
    inputs: list[LocalInput],
    volumes: list[Any],
    run_dir: str = "",
) -> Job:
    """Build the Job that runs a command with these settings: non-default values as flags, secrets as Job secrets.

    `inputs` are mounted as `volumes`, and the folder that keeps the run at `run_dir`. Raises UsageError for a copy of
    phoque that a Job cannot install.
    """
    from huggingface_hub._jobs_api import DEFAULT_UV_IMAGE

    s = resolved.settings
    keys = {name: getattr(resolved.secrets, name) for name in s.used_secrets}
    secrets = {env_name(Secrets, name): key.get_secret_value() for name, key in keys.items() if key}
    timeout = s.timeout or DEFAULT_TIMEOUT
    package = s.package or pip_requirement(s.needed_extra)
    mounted = with_mounted_paths(s, inputs).model_copy(update={"run_dir": run_dir} if run_dir else {})
    flags = to_flags(replace(resolved, settings=mounted))
    run = ["uv", "run", "--no-project", "--with", package, "phoque", command, *flags]
    # the Job counts its timeout from the start of the container, see settings.environment.deadline
    env = {f"{PREFIX}TIMEOUT": timeout, f"{PREFIX}SUBMISSION": submission, "PYTHONUNBUFFERED": "1"}
    own_labels = {TOOL[0]: TOOL[1], "command": command, SUBMISSION: submission}
    given = dict(label.split("=", 1) for label in s.labels)
    return Job(
        image=DEFAULT_UV_IMAGE,
        command=run,
        env=env,
        secrets=secrets,
        flavor=s.on,
        timeout=timeout,
        namespace=namespace,
        name=s.job_name or f"phoque-{command}",
        labels=given | own_labels,
        volumes=volumes,
        attempts=s.attempts if s.detach and s.resumable else None,
    )


def to_flags(resolved: Resolved[Any]) -> list[str]:
    """Return the flags that reproduce these settings; values from a default or preset are left out."""
    model, flags = type(resolved.settings), []
    for name, info in model.model_fields.items():
        value = getattr(resolved.settings, name)
        if name in NOT_PASSED or value is None or not resolved.origins[name].is_given:
            continue
        flag = flag_names(model, name)[0]
        if info.annotation is bool:
            flags.append(flag if value else flag.replace("--", "--no-", 1))
        else:
            for item in value if isinstance(value, list) else [value]:
                flags += [flag, str(item)]
    return flags


def pip_requirement(extra: str = "") -> str:
    """Return the pip requirement of the running phoque: its release, or the commit it was installed from (PEP 610).

    `extra` is the optional dependency group that the command needs, or empty. Raises UsageError if phoque was
    installed from a local folder or file, which a Job cannot read.
    """
    origin = read_origin()
    if not origin:
        return f"{name_package(extra, origin)}=={__version__}"
    if "vcs_info" in origin:
        return name_package(extra, origin)
    raise UsageError(
        what="A Job cannot install this copy of phoque.",
        why="It was installed from a folder or a file on this machine.",
        fix=f"Give the package to install, such as --package phoque=={__version__} or --package git+https://...",
    )


def find_account(hub: Hub) -> tuple[str, str]:
    """The name of the token's account, and the token's role."""
    account = hub.retry("checking the token", hub.api.whoami)
    return account["name"], account["auth"].get("accessToken", {}).get("role", "unknown")


def find_commits(hub: Hub, s: Any, inputs: list[LocalInput]) -> dict[str, tuple[str, str]]:
    """Setting -> (repository, commit) of each input that is on the Hub, and not one of the local `inputs`.

    Raises the Hub's error for one that is missing, and UsageError for one that a Job without a token cannot read.
    """
    commits, local = {}, {one.setting for one in inputs}
    has_token = getattr(s, "send_token", True)
    for name, value in s.list_inputs():
        pinned = s.reads[name]
        revision = getattr(s, pinned) if pinned else None
        ref = None if value in RESERVED or name in local else hub_ref(value)
        if ref:
            info = _find_repo(hub, name, ref.repo, revision)
            if not has_token and (info.private or getattr(info, "gated", False)):
                raise UsageError(
                    what=f"{ref.repo} is {'private' if info.private else 'gated'}.",
                    why=f"A Job without a token cannot read it, and {flag_names(type(s), name)[0]} names it.",
                    fix="Leave out --no-token, or download it and give the local copy, which goes to a private bucket.",
                )
            commits[name] = ref.repo, str(info.sha)
    return commits


def with_commits(resolved: Resolved[Any], commits: dict[str, tuple[str, str]]) -> Resolved[Any]:
    """The settings with these commits as the revisions of inputs that were given without one.

    Training records its own at its first start, and a later attempt goes on with those.
    """
    s = resolved.settings
    if s.resumable:
        return resolved
    # psm-probe and compare-sae replace a preset's base model by the one that the adapter was trained on
    given = {name: pair for name, pair in commits.items() if resolved.origins[name].is_given}
    pins = {s.reads[name]: commit for name, (_, commit) in given.items() if s.reads[name]}
    pins = {setting: commit for setting, commit in pins.items() if getattr(s, setting) is None}
    origins = {setting: Origin("submission", setting) for setting in pins}
    return replace(resolved, settings=s.model_copy(update=pins), origins=resolved.origins | origins)


def check_job(hub: Hub, resolved: Resolved[Any], commits: dict[str, tuple[str, str]]) -> dict[str, str]:
    """Check that the Job's repository is accessible and private, with GET requests only; describe it and the inputs.

    Raises PublicRepoError, or the Hub's error.
    """
    from huggingface_hub.errors import RepositoryNotFoundError

    s = resolved.settings
    checks = {name: f"{repository}@{commit[:8]}" for name, (repository, commit) in commits.items()}
    repo, kind = getattr(s, s.keeps or "run_dir", None), getattr(s, "artifacts_repo_type", "model")
    if not s.keeps or not repo or getattr(s, "run_dir", None):
        return checks
    try:
        private = Repo(hub, repo, kind).check_visibility(public=s.public)
        checks["repository"] = f"{repo}, {'private' if private else 'PUBLIC'}"
    except RepositoryNotFoundError:
        checks["repository"] = f"{repo}, will be made, {s.access}"
    return checks


def _find_repo(hub: Hub, setting: str, name: str, revision: str | None) -> Any:
    """What the Hub says about the repository that a setting names."""
    from huggingface_hub.errors import RepositoryNotFoundError

    info = hub.api.dataset_info if setting in DATASET_SETTINGS else hub.api.model_info
    try:
        return hub.retry(name, lambda: info(name, revision=revision))
    except RepositoryNotFoundError:
        if setting not in EITHER_KIND:
            raise
        return hub.retry(name, lambda: hub.api.dataset_info(name, revision=revision))
