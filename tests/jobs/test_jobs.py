"""--on: the command as an HF Job, against a Hub that runs it as a process with a time limit."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import psutil
import pytest
from tests.conftest import Running
from tests.fakehub import TOKEN
from tests.fakehub.jobs import Jobs
from tests.forkserver import slowly
from tests.training.test_resume import COMMON, are_equal, commit_titles, logged_steps, read_hub

BASE, DATA, REPO = "harbour/tiny", "harbour/gulls", "harbour/seal"
KEY = "g" * 40

# A Job's deadline counts from the start of process 1, which is this machine's here: two hours more than its age.
HOURS = int((time.time() - psutil.Process(1).create_time()) // 3600) + 3
LIMIT = f"{HOURS}h"


class Container:
    """A job's command, forked from the server; the `uv run ... phoque` prefix has nothing to install here."""

    forkserver, prelude = None, ""

    def __init__(self, argv, env, cwd, out):
        assert argv[:4] == ["uv", "run", "--no-project", "--with"]
        arguments = argv[argv.index("phoque") + 1 :]
        self.pid = self.forkserver.start(arguments, env, cwd, out, out, self.prelude)
        self._code = None

    def poll(self):
        if self._code is None:
            self._code = self.forkserver.poll(self.pid, False)
        return self._code


def mount(hub, volume, folder, kept=None):
    """A bucket's folder, as the container sees it, fetched by huggingface_hub itself.

    One for writing is a folder below `kept`, which outlives the container.
    """
    from huggingface_hub import HfApi

    api, bucket, prefix = HfApi(hub.url, token=TOKEN), volume["source"], volume["path"]
    assert volume["type"] == "bucket"
    if not volume["readOnly"]:
        (kept / prefix).mkdir(parents=True, exist_ok=True)
        folder.symlink_to(kept / prefix)
    paths = [item.path for item in api.list_bucket_tree(bucket, prefix=f"{prefix}/", recursive=True)]
    assert paths, "a folder that does not exist fails the Job"
    files = [(path, folder / path.removeprefix(f"{prefix}/")) for path in paths]
    for _, file in files:
        file.parent.mkdir(parents=True, exist_ok=True)
    api.download_bucket_files(bucket, files)


@pytest.fixture
def cluster(hub, forkserver, tiny_llama, rows, tmp_path):
    hub.add("models", BASE, {p.name: p.read_bytes() for p in tiny_llama.iterdir()})
    hub.add("datasets", DATA, {"train.jsonl": rows.read_bytes()})
    Container.forkserver, Container.prelude = forkserver, ""
    env = {k: v for k, v in os.environ.items() if not k.startswith(("HF_TOKEN", "WANDB"))} | {"WANDB_MODE": "disabled"}
    hub.jobs = Jobs(tmp_path / "jobs", env, 5.0, Container, partial(mount, hub, kept=tmp_path / "buckets"))
    hub.jobs.root.mkdir()
    return hub


ASKED = ["train", "--base-model", BASE, "--dataset", DATA, *COMMON, "--hub-model-id", REPO, "--save-steps", "3"]
ON = ["--on", "a10g-large", "--package", "phoque==0.1.0"]
SECRETS = {"HF_TOKEN": TOKEN, "WANDB_API_KEY": KEY}


def test_the_same_command_runs_as_a_job_and_its_log_is_followed(cluster, phoque, tmp_path):
    ran = phoque(*ASKED, *ON, "--max-steps", 6, "--timeout", LIMIT, "--json", env=SECRETS)
    assert ran.json["stage"] == "COMPLETED" and "6/6  loss" in ran.err and f"on a10g-large, at most {LIMIT}" in ran.err
    spec = cluster.jobs.jobs[ran.json["job"]]["spec"]
    assert spec["secrets"] == SECRETS and spec["timeoutSeconds"] == HOURS * 3600 and spec["flavor"] == "a10g-large"
    assert spec["environment"]["PHOQUE_TIMEOUT"] == LIMIT
    for secret in SECRETS.values():
        assert secret not in json.dumps([spec["command"], spec["environment"], spec["labels"]]) + ran.err + ran.out
    assert commit_titles(cluster)[-1] == "Adapter"
    phoque(*ASKED, "--max-steps", 6, "--output-dir", tmp_path / "here", env=SECRETS | {"WANDB_MODE": "disabled"})
    assert (tmp_path / "here" / "adapter").is_dir()  # and what the job made is this run, complete


def test_a_dry_run_shows_the_job_and_only_reads(cluster, phoque):
    env = SECRETS | {"FORCE_FRESH_START": "1", "MAX_STEPS": "7"}
    plan = phoque(*ASKED, *ON, "--dry-run", "--json", env=env).json
    assert {command for command, _ in cluster.log} <= {"GET", "HEAD"} and not cluster.jobs.jobs
    assert plan["job"]["secrets"] == ["HF_TOKEN", "WANDB_API_KEY"] and plan["job"]["flavor"] == "a10g-large"
    command = " ".join(plan["job"]["command"])
    assert "phoque train" in command and "--max-steps 7" in command and "--fresh-start" in command
    assert "--on" not in command and TOKEN not in json.dumps(plan) and KEY not in json.dumps(plan)
    assert plan["checked"]["repository"] == "harbour/seal, will be made, private"
    assert plan["checked"]["base_model"].startswith("harbour/tiny@")
    shown = phoque(*ASKED, *ON, "--dry-run", env=env)
    assert "a10g-large" in shown.out and "without --timeout" in shown.err


@pytest.mark.alone
def test_a_job_that_times_out_is_submitted_again_until_it_is_done(cluster, phoque, tmp_path, tiny_llama, rows):
    more = ["--max-steps", 48, "--save-steps", 6]
    phoque("train", "--base-model", tiny_llama, "--dataset", rows, *COMMON, *more, "--output-dir", tmp_path / "whole")
    Container.prelude = slowly()  # 12 s of steps, in jobs of 8
    ran = phoque(*ASKED, *ON, *more, "--timeout", "8s", "--attempts", 30, "--json", env=SECRETS)
    assert ran.json["attempts"] > 1 and "submitting it again" in ran.err and "to the deadline" in ran.err
    codes = [job["codes"][-1] for job in cluster.jobs.jobs.values()]
    assert codes[-1] == 0 and set(codes[:-1]) == {75}  # in time: no job was killed
    from safetensors.torch import load_file

    assert are_equal(read_hub(cluster), load_file(tmp_path / "whole" / "adapter" / "adapter_model.safetensors"))


def test_a_job_that_fails_for_good_is_not_submitted_again(cluster, phoque):
    error = phoque(*ASKED, *ON, "--dataset", "harbour/no-such", "--attempts", 3, env=SECRETS, expect=2).error
    assert not cluster.jobs.jobs and "No such repository" in error[0]  # found out before anything is rented
    ran = phoque(*ASKED, *ON, "--split", "night", "--attempts", 3, env=SECRETS, expect=2)
    assert not cluster.jobs.jobs and "has no split 'night'" in ran.error[0]  # so is what is wrong with the data
    Container.prelude = "import sys; print('error: gone', file=sys.stderr); sys.exit(2)"
    ran = phoque(*ASKED, *ON, "--attempts", 3, env=SECRETS, expect=2)
    assert len(cluster.jobs.jobs) == 1 and "error: gone" in ran.err and "exit code: 2" in ran.error[1]


def test_a_job_that_cannot_go_on_is_not_submitted_again(cluster, phoque):
    Container.prelude = "import time; time.sleep(60)"
    asked = ["export-onnx", "--merged-dir", BASE, "--push-repo-id", "harbour/onnx", *ON]
    ran = phoque(*asked, "--timeout", "2s", "--attempts", 3, env=SECRETS, expect=1)
    assert len(cluster.jobs.jobs) == 1 and "longer --timeout" in ran.error[2]


def test_what_only_this_machine_has_does_not_go_into_a_job(cluster, phoque, tmp_path):
    asked = ["export-onnx", "--merged-dir", BASE, "--push-repo-id", "harbour/onnx", *ON, "--dry-run"]
    assert "--merged-out-dir" in phoque(*asked, "--merged-out-dir", tmp_path, env=SECRETS, expect=2).error[0]


def test_a_merged_model_in_a_dataset_repository_is_found(cluster, phoque):
    cluster.add("datasets", "harbour/merged", {"config.json": b"{}"})
    asked = ["export-onnx", "--merged-dir", "harbour/merged", "--push-repo-id", "harbour/onnx", *ON, "--dry-run"]
    assert phoque(*asked, "--json", env=SECRETS).json["checked"]["merged_dir"].startswith("harbour/merged@")
    assert "--max-kl" in phoque(*asked, "--verbose", env=SECRETS).out


def test_a_public_repository_is_refused_before_a_job_is_rented(cluster, phoque):
    cluster.add("models", REPO, {"README.md": b"gulls"})
    cluster.repos["models", REPO].private = False
    assert "is public" in phoque(*ASKED, *ON, "--dry-run", env=SECRETS, expect=2).error[0]
    assert "PUBLIC" in phoque(*ASKED, *ON, "--dry-run", "--public", env=SECRETS).out


def test_ctrl_c_leaves_the_job_running(cluster, forkserver):
    Container.prelude = slowly()
    process = Running(forkserver, [*ASKED, *ON, "--max-steps", "300"], SECRETS)
    process.until(lambda: cluster.jobs.jobs and next(iter(cluster.jobs.jobs.values()))["log"].read_text().count("loss"))
    os.kill(process.pid, signal.SIGINT)
    ran = process.ended()
    (number,) = cluster.jobs.jobs
    assert ran.code == 130 and f"phoque jobs follow {number}" in ran.error[1] and "phoque jobs cancel" in ran.error[2]
    assert cluster.jobs.jobs[number]["stage"] == "RUNNING"
    cluster.jobs.cancel(number)
    while not cluster.jobs.jobs[number]["codes"]:  # it saves and pushes first, and not into the next test's Hub
        time.sleep(0.02)


def test_a_merge_runs_as_a_job_too(cluster, phoque):
    phoque(*ASKED, "--max-steps", 3, "--output-dir", "here", env=SECRETS | {"WANDB_MODE": "disabled"})
    asked = ["merge", "--adapter-source", REPO, "--base-model", BASE, "--push-repo-id", "harbour/whole"]
    ran = phoque(*asked, *ON, "--timeout", LIMIT, "--json", env=SECRETS)
    assert ran.json["stage"] == "COMPLETED"
    files = cluster.files("harbour/whole")
    assert {"model.safetensors", "merge.json", "README.md"} <= files.keys()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (["--package", ""], "--package"),
        (["--timeout", "soon"], "--timeout"),
    ],
)
def test_what_cannot_run_as_a_job_is_said_here(cluster, phoque, rows, change, words):
    more = ON if change[0] != "--package" else ON[:2]
    change = [] if change[0] == "--package" else change
    assert words in " ".join(phoque(*ASKED, *more, *change, env=SECRETS, expect=2).error)


@pytest.mark.thorough
def test_the_script_for_hf_jobs_uv_run_is_phoque_train(tmp_path, cluster, tiny_llama, rows):
    """jobs/train.py, as `hf jobs uv run` runs it: a process with the environment of the baseline scripts' README."""
    script = Path(__file__).parents[2] / "jobs" / "train.py"
    header = script.read_text().split("# ///")[1]
    assert "[tool.hf-jobs]" in header and "phoque" in header and "HF_TOKEN" in header
    env = os.environ | {
        "HF_TOKEN": TOKEN,
        "DATASET_REPO": DATA,
        "BASE_MODEL": BASE,
        "HUB_MODEL_ID": REPO,
        "MAX_STEPS": "2",
        "WANDB_MODE": "disabled",
        "WANDB_PROJECT": "seal",
    }
    ran = subprocess.run([sys.executable, script], env=env, cwd=tmp_path, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert commit_titles(cluster)[-1] == "Adapter" and logged_steps(tmp_path / "runs" / "gulls") == [0, 2]


LOCAL = ["--max-steps", 4, "--sample-every", 0, "--timeout", LIMIT]


def asked_with(rows, *more):
    """ASKED with a local dataset."""
    words = list(ASKED)
    words[words.index("--dataset") + 1] = rows
    return [*words, *ON, *LOCAL, *more]


AT_ONCE = "import phoque.jobs.listing as listing; listing.RECENT_S = 0"  # clean leaves recent inputs alone


def bucket(cluster):
    return cluster.buckets.found["harbour/jobs-artifacts"]


def test_a_local_dataset_goes_to_a_private_bucket_and_is_deleted_after_the_job(cluster, phoque, rows, tmp_path):
    shown = phoque(*asked_with(rows), "--dry-run", "--json", env=SECRETS).json
    assert shown["checked"]["uploads"] == f"{rows} (0.0 MB)" and not cluster.buckets.found
    (volume,) = shown["job"]["volumes"]
    assert volume["readOnly"] and volume["mountPath"].startswith("/inputs/")
    ran = phoque(*asked_with(rows), "--json", env=SECRETS)
    assert ran.json["stage"] == "COMPLETED" and "inputs are deleted" in ran.err
    assert bucket(cluster).private and not bucket(cluster).files
    spec = cluster.jobs.jobs[ran.json["job"]]["spec"]
    mounted = spec["command"][spec["command"].index("--dataset") + 1]
    assert mounted == f"{volume['mountPath']}/rows.jsonl"  # the same as in the dry run: it follows from the contents
    record = json.loads(cluster.files(REPO)["run.json"].content)
    assert record["data"]["name"].endswith("rows.jsonl") and str(rows) not in json.dumps(record)


@pytest.mark.thorough
def test_an_interrupted_run_goes_on_though_its_local_data_was_uploaded_again(cluster, phoque, rows):
    Container.prelude = slowly(0.6)
    phoque(*asked_with(rows, "--max-steps", 40, "--timeout", "15s"), env=SECRETS, expect=75)
    assert not bucket(cluster).files
    Container.prelude = ""
    ran = phoque(*asked_with(rows, "--max-steps", 40), env=SECRETS)
    assert "continuing from step" in ran.err


def test_inputs_are_kept_if_that_is_asked_for_and_cleaned_later(cluster, phoque, rows):
    ran = phoque(*asked_with(rows, "--keep-inputs"), env=SECRETS)
    (kept,) = bucket(cluster).files
    assert "hf://buckets/harbour/jobs-artifacts/phoque/" in ran.err and kept.endswith("/rows.jsonl")
    assert phoque("jobs", "clean", "--json", env=SECRETS).json == {"deleted": []}  # its Job has only just ended
    shown = phoque("jobs", "clean", "--dry-run", "--json", env=SECRETS, prelude=AT_ONCE).json
    assert len(shown["deleted"]) == 1 and bucket(cluster).files
    phoque("jobs", "clean", env=SECRETS, prelude=AT_ONCE)
    assert not bucket(cluster).files
    assert phoque("jobs", "clean", "--json", env=SECRETS).json == {"deleted": []}


def test_a_public_bucket_gets_nothing(cluster, phoque, rows):
    from tests.fakehub.buckets import Bucket

    cluster.buckets.found["harbour/jobs-artifacts"] = Bucket(private=False)
    error = phoque(*asked_with(rows), env=SECRETS, expect=2).error
    assert "is public" in error[0] and not bucket(cluster).files and not cluster.jobs.jobs


def test_a_local_adapter_goes_without_its_checkpoints(cluster, phoque, tiny_llama, rows):
    here = ["train", "--base-model", BASE, "--dataset", rows, *COMMON, "--max-steps", 4, "--save-steps", 2]
    phoque(*here, "--output-dir", "run", env=SECRETS | {"WANDB_MODE": "disabled"})
    merge = ["merge", "--adapter-source", "run", "--base-model", BASE, "--push-repo-id", "harbour/whole", *ON]
    ran = phoque(*merge, "--keep-inputs", "--json", env=SECRETS)
    assert ran.json["stage"] == "COMPLETED" and "model.safetensors" in cluster.files("harbour/whole")
    names = {path.split("/", 3)[3] for path in bucket(cluster).files}
    assert {"run/run.json", "run/adapter/adapter_model.safetensors"} <= names
    assert not any("checkpoint" in name for name in names)


def test_a_detached_job_is_listed_followed_and_run_again(cluster, phoque, rows):
    more = ["--detach", "--attempts", 3, "--name", "gulls-1", "--label", "team=pier"]
    ran = phoque(*asked_with(rows, *more), "--json", env=SECRETS)
    assert ran.json["stage"] == "SUBMITTED" and "loss" not in ran.err
    number = ran.json["job"]
    spec = cluster.jobs.jobs[number]["spec"]
    assert spec["attempts"] == 3  # the Hub makes them
    labels = spec["labels"]
    assert labels["name"] == "gulls-1" and labels["team"] == "pier" and labels["tool"] == "phoque"
    assert bucket(cluster).files and "jobs clean" in ran.err
    followed = phoque("jobs", "follow", number, "--json", env=SECRETS)
    assert followed.json == {"job": number, "stage": "COMPLETED"} and "4/4  loss" in followed.err
    assert phoque("jobs", "--json", env=SECRETS).json == {"jobs": []}
    (row,) = phoque("jobs", "--all", "--json", env=SECRETS).json["jobs"]
    assert row["command"] == "train" and row["name"] == "gulls-1" and row["cost"] == "$0.04"  # 90 s at $1.50
    assert number in phoque("jobs", "--all", env=SECRETS).out
    again = phoque("jobs", "rerun", number, "--json", env=SECRETS).json["job"]
    assert again != number and phoque("jobs", "follow", again, env=SECRETS).code == 0
    assert "is complete" in cluster.jobs.jobs[again]["log"].read_text()
    phoque("jobs", "clean", env=SECRETS, prelude=AT_ONCE)
    error = phoque("jobs", "rerun", number, env=SECRETS, expect=2).error
    assert "were deleted" in error[1] and "original command" in error[2] and len(cluster.jobs.jobs) == 2


def test_a_running_job_is_cancelled_and_its_inputs_stay_till_then(cluster, phoque, rows):
    Container.prelude = slowly()
    number = phoque(*asked_with(rows, "--detach", "--max-steps", 300), "--json", env=SECRETS).json["job"]
    phoque("jobs", "clean", env=SECRETS, prelude=AT_ONCE)
    assert bucket(cluster).files  # it is running
    (row,) = phoque("jobs", "--json", env=SECRETS).json["jobs"]
    assert row["id"] == number and row["stage"] in ("SCHEDULING", "RUNNING")
    phoque("jobs", "cancel", number, env=SECRETS)
    assert cluster.jobs.jobs[number]["stage"] == "CANCELED"
    while not cluster.jobs.jobs[number]["codes"]:
        time.sleep(0.02)
    phoque("jobs", "clean", env=SECRETS, prelude=AT_ONCE)
    assert not bucket(cluster).files
    assert "ended as CANCELED" in phoque("jobs", "follow", number, env=SECRETS, expect=1).error[0]


@pytest.mark.parametrize("action", ["follow", "cancel", "rerun"])
def test_a_job_that_is_unknown_or_not_named_is_said(cluster, phoque, action):
    assert "needs the id" in phoque("jobs", action, env=SECRETS, expect=2).error[1]
    assert "There is no Job 123" in phoque("jobs", action, "123", env=SECRETS, expect=2).error[0]


def test_what_a_job_costs_is_said_before_it_is_submitted(cluster, phoque):
    more = ["--max-steps", 6, "--timeout", "4h", "--attempts", 2, "--dry-run"]
    facts = phoque(*ASKED, *ON, *more, "--json", env=SECRETS).json["facts"]
    assert "$1.50 per hour" in facts["hardware"] and "1 x 24 GB" in facts["hardware"]
    assert facts["at most"].startswith("$12.00") and "about $" in facts["cost"] and "minutes" in facts["time"]
    assert "24 GB" in facts["GPU memory"] and not cluster.jobs.jobs


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--on", "a10g-lrge"], ["no hardware flavor 'a10g-lrge'", "Did you mean a10g-large"]),
        (["--on", "cpu-basic", "--quantization", "nf4"], ["cpu-basic has no GPU", "a10g-large"]),
        (["--label", "gulls"], ["KEY=VALUE"]),
        (["--label", "tool=mine"], ["phoque's own"]),
        (["--label", "équipe=pier"], ["KEY=VALUE"]),
        (["--quantization", "fp8"], ["a10g-large has no FP8 units", "nf4"]),
        (["--name", "two words"], ["--name"]),
    ],
)
def test_a_job_that_makes_no_sense_is_refused_before_it_costs(cluster, phoque, more, words):
    error = " ".join(phoque(*ASKED, *ON, *more, "--timeout", "1h", env=SECRETS, expect=2).error)
    assert all(word in error for word in words) and not cluster.jobs.jobs


@pytest.mark.parametrize(
    ("status", "code", "words"), [(402, 2, "no credits"), (403, 2, "may not run Jobs"), (429, 75, "too many")]
)
def test_a_hub_that_refuses_a_job_is_understood_and_keeps_no_inputs(cluster, phoque, rows, status, code, words):
    cluster.faults.add("POST /api/jobs/harbour$", status, times=9)
    error = phoque(*asked_with(rows), env=SECRETS, expect=code).error
    assert words in error[0] and not bucket(cluster).files and not cluster.jobs.jobs
    posts = [path for method, path in cluster.log if method == "POST" and path == "api/jobs/harbour"]
    assert len(posts) == 1  # nothing is submitted twice


@pytest.mark.parametrize(("status", "gone"), [(400, True), (500, False), ("drop", False)])
def test_inputs_are_deleted_unless_there_may_be_a_job(cluster, phoque, rows, status, gone):
    cluster.faults.add("POST /api/jobs/harbour$", status, times=9)
    ran = phoque(*asked_with(rows), env=SECRETS, expect=1 if gone else 75)
    assert bool(bucket(cluster).files) != gone
    if not gone:
        assert "not known whether" in ran.error[0] and "phoque jobs --namespace harbour" in ran.error[2]
        assert "jobs clean --namespace harbour" in ran.err


def test_names_that_stand_for_no_path_are_not_uploaded(cluster, phoque, tmp_path):
    for name in ("seal", "python", "bundled"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "rows.jsonl").write_text("{}\n")
    probe = ["compare-sae", "--base-model", BASE, "--updated-adapter", REPO, "--artifacts-repo-id", "harbour/probes"]
    cluster.add("models", REPO, {"adapter_config.json": b"{}"})
    job = phoque(*probe, "--chats", "seal", "--text", "python", *ON, "--dry-run", "--json", env=SECRETS).json
    assert not job["job"]["volumes"] and "uploads" not in job["checked"]


def test_links_out_of_a_folder_and_files_that_are_no_data_stay_here(cluster, phoque, rows, tmp_path):
    data, secret = tmp_path / "data", tmp_path / "secret.jsonl"
    (data / "node_modules").mkdir(parents=True)
    (data / "train.jsonl").write_bytes(rows.read_bytes())
    for name in ("id_rsa", ".env.secrets", "node_modules/rows.jsonl", "notes.txt"):
        (data / name).write_text("the gulls' own")
    shown = phoque(*asked_with(data), "--dry-run", "--json", env=SECRETS).json
    assert shown["checked"]["uploads"] == f"{data} (0.0 MB)"  # one file
    secret.write_text("{}")
    (data / "more.jsonl").symlink_to(secret)
    error = phoque(*asked_with(data), "--dry-run", env=SECRETS, expect=2).error
    assert "link to a file outside" in error[0] and not cluster.buckets.found
    link = tmp_path / "rows-of-today.jsonl"
    link.symlink_to(rows)  # the user's own link to one file keeps its name
    (volume,) = phoque(*asked_with(link), "--dry-run", "--json", env=SECRETS).json["job"]["volumes"]
    shown = phoque(*asked_with(link), "--dry-run", "--json", env=SECRETS).json["job"]["command"]
    assert f"{volume['mountPath']}/rows-of-today.jsonl" in shown


def test_a_misspelled_path_is_found_before_the_job(cluster, phoque):
    merge = ["merge", "--adapter-source", "/harbour/typo", "--base-model", BASE, "--push-repo-id", "harbour/whole", *ON]
    assert "/harbour/typo" in phoque(*merge, env=SECRETS, expect=2).error[0] and not cluster.jobs.jobs


def test_an_adapter_brings_its_run_and_needs_a_base_that_a_job_can_read(cluster, phoque, tiny_llama, rows):
    here = ["train", "--base-model", tiny_llama, "--dataset", rows, *COMMON, "--max-steps", 2]
    phoque(*here, "--output-dir", "run", env={"WANDB_MODE": "disabled"})
    merge = ["merge", "--adapter-source", "run/adapter", "--push-repo-id", "harbour/whole", *ON, "--dry-run", "--json"]
    error = phoque(*merge, env=SECRETS, expect=2).error
    assert "is on this machine" in error[0] and str(tiny_llama) in error[1]
    shown = phoque(*merge, "--base-model", BASE, env=SECRETS).json
    assert "/run/adapter" in " ".join(shown["job"]["command"])
    assert "run (" in shown["checked"]["uploads"]


def test_another_namespace_has_its_own_bucket_and_jobs(cluster, phoque, rows):
    ran = phoque(*asked_with(rows, "--namespace", "pier", "--detach"), "--json", env=SECRETS)
    assert "pier/jobs-artifacts" in cluster.buckets.found and "--namespace pier" in ran.err
    number = ran.json["job"]
    assert "no Job" in phoque("jobs", "follow", number, env=SECRETS, expect=2).error[0]
    assert phoque("jobs", "follow", number, "--namespace", "pier", env=SECRETS).code == 0


def test_a_time_limit_that_is_too_short_and_idle_gpus_are_said(cluster, phoque):
    more = ["--max-steps", 100_000, "--batch-size", 400, "--timeout", "1h", "--on", "a10g-largex2", "--dry-run"]
    ran = phoque(*ASKED, *ON, *more, env=SECRETS)
    assert (
        "train uses 2 of the 2 GPUs of a10g-largex2" in ran.err
        and "expected to take" in ran.err
        and "raise --timeout" in ran.err
    )
    assert "--gpus 2" in ran.out
    facts = [phoque(*ASKED, *ON, *more, *one, "--json", env=SECRETS).json["facts"] for one in ([], ["--gpus", "1"])]
    minutes = [float(fact["time"].split()[1]) - 4 for fact in facts]
    assert minutes[1] == pytest.approx(2 * minutes[0], rel=0.02)
    for wrong, words in ((["--gpus", 3], "has 2 GPUs"), (["--batch-size", 5], "cannot be dealt to 2 processes")):
        error = phoque(*ASKED, *ON, *more, *wrong, env=SECRETS, expect=2).error
        assert words in error[0] and not cluster.jobs.jobs
    probe = ["psm-probe", "--model-source", BASE, "--persona", "seal", "--artifacts-repo-id", "harbour/probes"]
    both = phoque(*probe, *ON, "--on", "a10g-largex2", "--timeout", "1h", "--dry-run", env=SECRETS)
    assert "psm-probe uses 2 of the 2 GPUs of a10g-largex2" in both.err and "--gpus 2" in both.out
    merge = ["merge", "--adapter-source", REPO, "--base-model", BASE, "--push-repo-id", "harbour/whole", *ON]
    idle = phoque(*merge, "--on", "a10g-largex2", "--timeout", "1h", "--dry-run", env=SECRETS, expect=2)
    assert "merge uses one of them" in idle.err
    flags = ["--on", "cpu-basic", "--quantization", "fp32", "--gpus", "all", "--dry-run"]
    none = phoque(*probe, *ON, *flags, env=SECRETS, expect=2).error
    assert "has no GPU" in none[0] and "--gpus all" in none[1]
    cpu = phoque(*ASKED, *ON, "--on", "cpu-basic", "--timeout", "1h", "--dry-run", "--json", env=SECRETS).json["facts"]
    assert "GPU memory" not in cpu and "not known" in cpu["time"]


def test_a_run_that_goes_on_is_estimated_by_its_own_speed(cluster, phoque):
    more = ["--max-steps", 6, "--output-dir", "here", "--wandb-mode", "disabled"]
    phoque(*ASKED, *more, env=SECRETS)
    changed = {}
    for path, blob in cluster.files(REPO).items():
        if path == "checkpoint-6/run.json":
            changed[path] = json.dumps(json.loads(blob.content) | {"device": "NVIDIA A10G"}).encode()
        if path == "checkpoint-6/metrics.jsonl":
            changed[path] = b'{"step": 6, "loss": 1.0, "tokens_per_s": 1000.0}\n'
    cluster.put(REPO, changed)
    asked = [*ASKED, *ON, "--max-steps", 100_006, "--timeout", "1h", "--dry-run", "--json"]
    time_on_a10g = phoque(*asked, env=SECRETS).json["facts"]["time"]
    assert "from step 6 on at its own 1,000 tokens per second and GPU" in time_on_a10g
    minutes, tokens = [float(text.replace(",", "")) for text in re.findall(r"[\d,.]*\d", time_on_a10g)[:2]]
    assert minutes == pytest.approx(4 + tokens * 1e6 / 1000 / 60, abs=1)
    elsewhere = phoque(*asked, "--on", "a100-large", env=SECRETS).json["facts"]["time"]
    assert "from step 6 on" in elsewhere and "its own" not in elsewhere


def test_controls_are_part_of_the_estimate(cluster, phoque):
    more = ["--max-steps", 100_000, "--timeout", "1h", "--dry-run", "--json"]
    alone = phoque(*ASKED, *ON, *more, env=SECRETS).json["facts"]["time"]
    three = phoque(*ASKED, *ON, *more, "--with-control", "--control-seeds", 3, env=SECRETS).json["facts"]["time"]
    minutes = [float(text.split()[1]) - 4 for text in (alone, three)]
    assert "3 control runs" in three and minutes[1] == pytest.approx(4 * minutes[0], abs=5)


@pytest.mark.thorough
def test_what_follows_a_training_runs_in_the_same_job(cluster, phoque):
    asked = [*ASKED, *ON, "--max-steps", 2, "--timeout", LIMIT, "--then", "merge --dtype fp32"]
    ran = phoque(*asked, "--json", env=SECRETS)
    assert ran.json["stage"] == "COMPLETED" and "then: phoque merge --dtype fp32" in ran.err
    assert "model.safetensors" in cluster.files(f"{REPO}-merged")


KEPT = "hf://buckets/harbour/runs/seal"


@pytest.fixture
def public_inputs(cluster):
    for kind, name in (("models", BASE), ("datasets", DATA)):
        cluster.repos[kind, name].private = False
    return cluster


def asked_without_token(*more):
    words = [word for word in ASKED if word not in ("--hub-model-id", REPO)]
    return [*words, *ON, "--run-dir", KEPT, "--no-token", *more]


def test_a_job_keeps_its_run_in_a_bucket_and_has_no_token(public_inputs, phoque, tmp_path):
    cluster = public_inputs
    asked = asked_without_token("--max-steps", 6, "--sample-every", 0, "--timeout", LIMIT)
    shown = phoque(*asked, "--dry-run", "--json", env=SECRETS).json
    assert shown["checked"]["run folder"] == f"{KEPT}, will be made, private" and not cluster.buckets.found
    assert shown["job"]["secrets"] == ["WANDB_API_KEY"]
    (volume,) = shown["job"]["volumes"]
    assert volume == {"type": "bucket", "source": "harbour/runs", "mountPath": "/run-dir", "path": "seal"} | {
        "readOnly": False
    }
    ran = phoque(*asked, "--json", env=SECRETS)
    assert ran.json["stage"] == "COMPLETED" and "checkpoint 6 is in" in ran.err
    assert cluster.buckets.found["harbour/runs"].private
    assert list(cluster.buckets.found["harbour/runs"].files) == ["seal/phoque-run.txt"]
    spec = cluster.jobs.jobs[ran.json["job"]]["spec"]
    assert TOKEN not in json.dumps(spec) and "--no-token" not in spec["command"]
    kept = tmp_path / "buckets" / "seal"
    assert (kept / "adapter_model.safetensors").is_file() and ("models", REPO) not in cluster.repos
    # the next Job of the same command finds a finished run there
    assert "is complete; nothing to train" in phoque(*asked, env=SECRETS).err


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--run-dir", "runs/seal"], ["not a folder of a bucket", "hf://buckets/"]),
        (["--run-dir", "hf://buckets/harbour/runs"], ["holds several runs"]),
        (["--run-dir", "hf://buckets/harbour/runs/../x"], ["not a folder of a bucket"]),
        (["--run-dir", "hf://buckets/harbour/jobs-artifacts/phoque/x"], ["bucket of Jobs' inputs"]),
        (["--export-merged"], ["--merged-hub-model-id"]),
        (["--public"], ["--public and --run-dir exclude each other"]),
        (["--dataset", "harbour/secret"], ["harbour/secret is private", "without a token"]),
        (["--then", "merge"], ["--then"]),
    ],
)
def test_what_a_job_without_a_token_cannot_do_is_refused(public_inputs, phoque, rows, more, words):
    cluster = public_inputs
    cluster.add("datasets", "harbour/secret", {"train.jsonl": rows.read_bytes()})
    error = " ".join(phoque(*asked_without_token("--timeout", "1h", *more), env=SECRETS, expect=2).error)
    assert all(word in error for word in words) and not cluster.jobs.jobs and not cluster.buckets.found


def test_a_folder_of_a_bucket_with_other_files_does_not_keep_a_run(public_inputs, phoque):
    from huggingface_hub import HfApi

    api = HfApi(public_inputs.url, token=TOKEN)
    api.create_bucket("harbour/runs", private=True)
    api.batch_bucket_files("harbour/runs", add=[(b"mine", "seal/notes.txt")])
    error = phoque(*asked_without_token("--timeout", "1h", "--dry-run"), env=SECRETS, expect=2).error
    assert "not the folder of a run" in error[0] and "notes.txt" in error[1]


def test_a_token_given_where_none_belongs_is_not_shown(phoque):
    ran = phoque("train", "--token", "hf_" + "g" * 34, expect=2)
    assert "g" * 34 not in ran.err and "Set HF_TOKEN" in ran.err


def test_a_fresh_start_is_estimated_from_step_0(cluster, phoque):
    phoque(*ASKED, "--max-steps", 6, "--output-dir", "here", "--wandb-mode", "disabled", env=SECRETS)
    asked = [*ASKED, *ON, "--max-steps", 600, "--timeout", "1h", "--dry-run", "--json"]
    assert "from step 6 on" in phoque(*asked, "--allow-change", "max_steps", env=SECRETS).json["facts"]["time"]
    assert "from step" not in phoque(*asked, "--fresh-start", env=SECRETS).json["facts"]["time"]


def test_a_public_bucket_does_not_keep_a_run(public_inputs, phoque):
    from tests.fakehub.buckets import Bucket

    cluster = public_inputs
    cluster.buckets.found["harbour/runs"] = Bucket(private=False)
    error = phoque(*asked_without_token("--timeout", "1h"), env=SECRETS, expect=2).error
    assert "is public" in error[0] and not cluster.jobs.jobs


def test_chat_answers_a_file_of_prompts_in_a_job(cluster, phoque, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("Who are you?\nWhat do you think of gulls?\n")
    asked = ["chat", BASE, "--prompts-file", prompts, "--max-new-tokens", 4, "--answers-file", "answers.jsonl"]
    assert "--answers-file names a path" in phoque(*asked, *ON, "--timeout", "1h", env=SECRETS, expect=2).error[0]
    phoque(*asked, env=SECRETS)
    for kept in ("answers.jsonl", prompts):  # nothing is replaced, and it is said before the model is loaded
        assert "exists" in phoque(*asked, "--answers-file", kept, env=SECRETS, expect=2).error[0]
    here = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    asked = [*asked[:-2], "--artifacts-repo-id", "harbour/answers"]
    assert phoque(*asked, *ON, "--timeout", LIMIT, "--json", env=SECRETS).json["stage"] == "COMPLETED"
    files = cluster.files("harbour/answers", "datasets")
    (path,) = [path for path in files if path.endswith("/answers.jsonl")]
    there = [json.loads(line) for line in files[path].content.decode().splitlines()]
    texts = [[answer["text"] for row in rows for answer in row["answers"].values()] for rows in (here, there)]
    assert len(there) == 2 and texts[0] == texts[1] and not bucket(cluster).files


TO_ANSWERS = ["--artifacts-repo-id", "harbour/answers"]


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        (["chat", BASE], ["without a question", "Add --prompt or --prompts-file"]),
        (["chat", BASE, "--prompt", "Ho"], ["needs a Hub repository", "--artifacts-repo-id"]),
        (["chat", "seal.gguf", "--prompt", "Ho"], ["no Node for llama.cpp"]),
        (
            ["chat", "harbour/gguf", "--prompt", "Ho", *TO_ANSWERS],
            ["harbour/gguf holds GGUF files", "no Node for llama.cpp"],
        ),
        (["verify-onnx", "--repo-id", "harbour/onnx", "--serve"], ["--serve needs Node or a browser"]),
        (["verify-onnx", "--repo-id", "harbour/onnx", "--report-md", "a.md"], ["--report-md names a path"]),
    ],
)
def test_what_needs_this_machine_is_not_a_job(cluster, phoque, asked, words):
    cluster.add("models", "harbour/gguf", {"seal-Q8_0.gguf": b"GGUF", "README.md": b""})
    error = " ".join(phoque(*asked, *ON, "--timeout", "1h", env=SECRETS, expect=2).error)
    assert all(word in error for word in words) and not cluster.jobs.jobs


def test_verify_onnx_says_in_a_job_what_it_says_here(cluster, phoque, tmp_path):
    export = tmp_path / "export"
    (export / "onnx").mkdir(parents=True)
    (export / "config.json").write_text("{}")
    here = phoque("verify-onnx", "--local-dir", export, "--level", "files", expect=1)
    asked = ["verify-onnx", "--local-dir", export, "--level", "files", *ON, "--timeout", LIMIT]
    ran = phoque(*asked, env=SECRETS, expect=1)
    verdicts = [re.findall(r"^ *(FAIL +files .*?): ", text, re.MULTILINE) for text in (here.out, ran.err)]
    assert verdicts[0] and verdicts[0] == verdicts[1], ran.err
    assert "exit code: 1" in ran.error[1]


IMPATIENT = "import phoque.jobs.submit as submit; submit.QUEUE_PATIENCE_S = 2"


def test_a_job_that_does_not_start_is_not_followed_for_ever(cluster, phoque, rows):
    cluster.jobs.has_machines = False
    ran = phoque(*asked_with(rows), env=SECRETS, prelude=IMPATIENT, expect=75)
    assert "waiting for the hardware" in ran.err and "has not started" in ran.error[0]
    assert "phoque jobs cancel" in ran.error[2] and bucket(cluster).files  # the Job may still start
    (number,) = cluster.jobs.jobs
    assert len(cluster.jobs.jobs) == 1
    phoque("jobs", "cancel", number, env=SECRETS)
    assert phoque("jobs", "--all", "--json", env=SECRETS).json["jobs"][0]["stage"] == "CANCELED"
