"""--on FLAVOR for every command that takes it, and `phoque jobs`."""

from dataclasses import replace
from datetime import UTC, datetime
from secrets import token_hex
from typing import TYPE_CHECKING, Any

from phoque.cli import options
from phoque.console import console
from phoque.errors import RunError, UsageError
from phoque.gpus import find_generation
from phoque.inputs import check_inputs
from phoque.results import DryRun
from phoque.settings.fields import Origin, Resolved
from phoque.settings.job import seconds
from phoque.settings.jobs import JobsSettings

if TYPE_CHECKING:
    from phoque.hub.client import Hub
    from phoque.jobs.flavors import Flavor

WITHOUT_FP8 = ("T4", "A10G", "A100")
EPILOG = (
    "Examples: `phoque jobs` lists the Jobs that phoque submitted. `phoque jobs follow ID` prints a Job's log until it "
    "ends. `phoque jobs clean` deletes the uploaded copies of the inputs of ended Jobs."
)


def command(name: str) -> Any:
    """The command for the root's table."""
    return options.command(name, manage, JobsSettings, EPILOG)


def run(command: str, resolved: Resolved[Any], dry_run: bool) -> None:
    """Submit the command as a Job and follow it; with --dry-run, show the Job and send nothing but GET and HEAD."""
    from phoque.hub.client import Hub
    from phoque.jobs.build import (
        build_job,
        check_job,
        check_local_settings,
        find_account,
        find_commits,
        with_commits,
    )
    from phoque.jobs.flavors import find_flavor
    from phoque.jobs.inputs import JobInputs, find_local_inputs
    from phoque.jobs.run_dir import MOUNT, find_bucket_folder

    s = resolved.settings
    check_local_settings(resolved)
    check_inputs(s)
    inputs = find_local_inputs(resolved)
    hub = Hub(resolved.secrets.hub, console.say, s.hub_patience)
    if s.timeout is None:
        console.warn("without --timeout the Job is stopped after 30m")
    account, role = find_account(hub)
    flavor = find_flavor(hub, s.on)
    _check_hardware(command, s, flavor)
    if hasattr(s, "gpus"):
        resolved = _with_all_gpus(command, resolved, flavor)
    namespace, submission = s.namespace or account, token_hex(6)
    uploaded = JobInputs(hub, namespace, submission, inputs)
    volumes = uploaded.volumes() if inputs else []
    commits = find_commits(hub, s, inputs)
    if command == "chat":
        _check_chat_model(hub, s)
    resolved = with_commits(resolved, commits)
    run_folder = find_bucket_folder(s.run_dir) if getattr(s, "run_dir", None) else None
    if run_folder:
        volumes.append(run_folder.volume())
    job = build_job(
        command,
        resolved,
        namespace=namespace,
        submission=submission,
        inputs=inputs,
        volumes=volumes,
        run_dir=MOUNT if run_folder else "",
    )
    checked = {"account": account, "token": role} | check_job(hub, resolved, commits)
    if run_folder:
        checked["run folder"] = run_folder.describe(hub)
    if inputs:
        uploaded.check()
        checked["uploads"] = ", ".join(one.describe() for one in inputs)
    facts = _describe_cost(command, resolved, flavor, job.timeout)
    if dry_run:
        description, command_line = job.to_redacted_dict(), " ".join(job.command)
        shown = {name: value for name, value in description.items() if value not in (None, [], {})}
        plan = DryRun(shown | {"command": command_line} | facts | checked, resolved.provenance())
        report = {"job": description, "checked": checked, "facts": facts, "settings": plan.settings}
        console.result(report, lambda: options.render_plan(plan), command_line)
        return
    for name, value in facts.items():
        console.say(f"{name}: {value}")
    if run_folder:
        run_folder.create(hub)
    _submit(hub, job, s, uploaded if inputs else None)


def _check_chat_model(hub: "Hub", s: Any) -> None:
    """Raise UsageError for a model on the Hub that llama.cpp would run."""
    from phoque.chat.find import find_kind
    from phoque.hub.refs import hub_id
    from phoque.hub.repo import Repo

    if hub_id(s.model) and find_kind(list(Repo(hub, s.model).snapshot(s.revision).files), s.dtype) == "gguf":
        raise UsageError(
            what=f"{s.model} holds GGUF files.",
            why="A Job has no Node for llama.cpp.",
            fix="Name a checkpoint, an adapter or an ONNX export, or leave out --on.",
        )


def _submit(hub: "Hub", job: Any, s: Any, uploaded: Any) -> None:
    """Upload the inputs, submit, follow unless --detach, and delete the inputs when no Job needs them."""
    from phoque.jobs.submit import NotFollowed, of_namespace, run_job, submit_job

    clean = f"`phoque jobs clean{of_namespace(job.namespace)}` deletes them when the Job has ended"
    try:
        if uploaded:
            uploaded.upload(console.stage)
            console.end_stage()
        if s.detach:
            submitted = submit_job(hub, job, console)
            result: dict[str, Any] = {"job": submitted.id, "url": submitted.url, "stage": "SUBMITTED", "attempts": 0}
        else:
            result = run_job(hub, job, s.attempts, s.resumable, console)
    except (NotFollowed, KeyboardInterrupt):  # after Ctrl-C during the submission there may be a Job
        _say_kept(uploaded, clean)
        raise
    except Exception:
        _delete_inputs(uploaded, s.keep_inputs)
        raise
    if s.detach:
        _say_kept(uploaded, clean)
    else:
        _delete_inputs(uploaded, s.keep_inputs)
    console.result(result, lambda: _render_result(result), result["url"])


def _delete_inputs(uploaded: Any, keep: bool) -> None:
    if uploaded and keep:
        _say_kept(uploaded, "--keep-inputs is given")
    elif uploaded:
        try:
            uploaded.delete()
            console.say("the Job's inputs are deleted from the bucket")
        except Exception as error:  # the Job's result matters more
            console.warn(
                f"the Job's inputs are still in {uploaded.place}: {type(error).__name__}; run phoque jobs clean"
            )


def _say_kept(uploaded: Any, why: str) -> None:
    if uploaded:
        console.say(f"the Job's inputs stay in {uploaded.place}: {why}")


def _describe_cost(command: str, resolved: Resolved[Any], flavor: "Flavor", timeout: str) -> dict[str, str]:
    """The hardware, its price, the most that the Job can cost, and for training an estimate."""
    s = resolved.settings
    count = s.attempts if s.resumable else 1  # other commands are submitted once
    most = seconds(timeout) / 3600 * count * flavor.dollars_per_hour
    attempts = f" in {count} attempts" if count > 1 else ""
    facts = {"hardware": flavor.describe(), "at most": f"${most:.2f}, if it runs for {timeout}{attempts}"}
    if command != "train":
        return facts
    from phoque.jobs.estimate import estimate_job
    from phoque.services import Services

    console.stage("reading the data, for an estimate")
    estimate = estimate_job(resolved, Services.create(resolved, console), flavor)
    if estimate.minutes is not None and estimate.minutes * 60 > seconds(timeout) * count:
        console.warn(
            f"the Job is expected to take {estimate.minutes:.0f} minutes, and its time limit is {timeout}{attempts}: "
            "raise --timeout or --attempts, or run the command again to resume"
        )
    return facts | estimate.describe(flavor)


def _with_all_gpus(command: str, resolved: Resolved[Any], flavor: "Flavor") -> Resolved[Any]:
    """The settings with all GPUs of the flavor, or as many as --gpus says. Raises UsageError for more than it has."""
    s = resolved.settings
    if flavor.gpus < 2 and not s.gpus and not getattr(s, "fsdp", False):
        return resolved
    gpus = flavor.gpus if s.gpus in (None, "all") else int(s.gpus)
    if gpus > flavor.gpus or not gpus:
        raise UsageError(
            what=f"{flavor.name} has {flavor.gpus or 'no'} GPU{'s' * (flavor.gpus != 1)}.",
            why=f"--gpus {s.gpus} asks for more.",
            fix="Lower --gpus, or leave it out.",
        )
    if command == "train":
        from phoque.distributed.launch import check_sharded
        from phoque.training.prepare import choose_micro_batch

        check_sharded(s.fsdp, gpus)
        if gpus > 1:
            choose_micro_batch(s, gpus)
    if gpus < 2:
        return resolved
    share = "every step" if command == "train" else "the rows"
    console.say(f"{command} uses {gpus} of the {flavor.gpus} GPUs of {flavor.name}; each takes its share of {share}")
    origins = resolved.origins | {"gpus": Origin(flavor.name, "--on") if s.gpus is None else resolved.origins["gpus"]}
    return replace(resolved, settings=s.model_copy(update={"gpus": str(gpus)}), origins=origins)


def _check_hardware(command: str, s: Any, flavor: "Flavor") -> None:
    """Raise UsageError for a precision that the flavor's hardware does not have; warn of GPUs that stay idle."""
    quantization = getattr(s, "quantization", None)
    if flavor.gpus > 1 and not hasattr(s, "gpus"):
        console.warn(f"{flavor.name} has {flavor.gpus} GPUs; {command} uses one of them, and all are paid")
    if quantization == "fp8" and find_generation(flavor.gpu_model) in WITHOUT_FP8:
        raise UsageError(
            what=f"{flavor.name} has no FP8 units.",
            why=f"--quantization fp8 needs an L4, L40S, H100 or later, and this is an {flavor.gpu_model}.",
            fix="Choose another flavor, or --quantization nf4.",
        )
    if quantization in ("nf4", "fp8", "bf16") and not flavor.gpus:
        raise UsageError(
            what=f"{flavor.name} has no GPU.",
            why=f"--quantization {quantization} on a CPU takes days.",
            fix="Choose a flavor with a GPU, such as a10g-large, or --quantization fp32 for a small model.",
        )


def _render_result(values: dict[str, Any]) -> str:
    return "\n".join(f"{name:10} {value}" for name, value in values.items())


def manage(resolved: Resolved[JobsSettings], dry_run: bool) -> None:
    """List the Jobs that phoque submitted; follow, cancel or rerun one; delete the inputs of those that have ended."""
    from phoque.hub.client import Hub
    from phoque.jobs.build import check_token, find_account
    from phoque.jobs.listing import cancel_job, clean_inputs, inspect_job, list_jobs, rerun_job
    from phoque.jobs.submit import follow_job

    s = resolved.settings
    check_token(resolved.secrets, "phoque jobs asks the Hub for the Jobs of an account.")
    hub = Hub(resolved.secrets.hub, console.say, s.hub_patience)
    namespace = s.namespace or find_account(hub)[0]
    if s.action == "list":
        rows = list_jobs(hub, namespace, every=s.all)
        console.result({"jobs": rows}, lambda: _render_jobs(rows), "\n".join(row["id"] for row in rows))
    elif s.action == "clean":
        deleted = clean_inputs(hub, namespace, dry_run=dry_run)
        verb = "would be deleted" if dry_run else "deleted"
        console.result({"deleted": deleted}, lambda: f"{len(deleted)} folders of inputs {verb}", "\n".join(deleted))
    elif dry_run:
        console.result({"action": s.action, "job": s.job}, lambda: f"would {s.action} {s.job}", s.job)
    elif s.action == "follow":
        inspect_job(hub, s.job, namespace)
        message, stage = follow_job(hub, s.job, namespace, console)
        if stage != "COMPLETED":
            raise RunError(
                what=f"Job {s.job} ended as {stage}.",
                why=message or "It gave no message.",
                fix=f"To run it again, from its newest checkpoint if it trains: phoque jobs rerun {s.job}",
            )
        result = {"job": s.job, "stage": stage}
        console.result(result, lambda: _render_result(result), stage)
    else:
        result = (cancel_job if s.action == "cancel" else rerun_job)(hub, s.job, namespace)
        console.result(result, lambda: _render_result(result), result["job"])


def _render_jobs(rows: list[dict[str, Any]]) -> str:
    if not rows:
        return "phoque has submitted no Job here, or all are older than the Hub lists; --all lists ended ones too"
    lines = [
        f"{row['id']}  {row['stage']:10}  {row['command']:12}  {row['flavor']:14}  {_age(row['created']):>8}  "
        f"{row['minutes']:6.0f} min  {row['cost']:>8}  {row['name']}"
        for row in rows
    ]
    head = f"{'id':24}  {'stage':10}  {'command':12}  {'flavor':14}  {'age':>8}  {'ran':>10}  {'cost':>8}  name"
    return "\n".join([head, *lines])


def _age(created: str) -> str:
    if not created:
        return ""
    passed = (datetime.now(UTC) - datetime.fromisoformat(created)).total_seconds()
    for unit, length in (("d", 86400), ("h", 3600), ("m", 60)):
        if passed >= length:
            return f"{passed / length:.0f}{unit} ago"
    return "now"
