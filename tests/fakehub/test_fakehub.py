"""The Hub that the tests run against, through the unmodified client."""

import hashlib
import os
import subprocess
import sys
import threading

import pytest

from tests.fakehub import CHUNK, READ_ONLY, TOKEN
from tests.fakehub.jobs import Jobs

REPO = "harbour/seal"
BIG = bytes(range(256)) * (CHUNK // 256 * 2) + b"the end"  # three parts


@pytest.fixture
def api(hub):
    from huggingface_hub import HfApi

    client = HfApi(endpoint=hub.url, token=TOKEN)
    client.create_repo(REPO, private=True)
    return client


def add(path, content):
    from huggingface_hub import CommitOperationAdd

    return CommitOperationAdd(path, content)


def test_what_is_committed_comes_back(api, hub, tmp_path):
    files = {"a/weights.safetensors": BIG, "a/small.pt": b"p" * 10, "README.md": b"gulls", "a/b/c.json": b"{}"}
    made = api.create_commit(REPO, [add(p, c) for p, c in files.items()], commit_message="one")
    assert api.repo_info(REPO).sha == made.oid == hub.sha("models", REPO)
    assert hub.repos["models", REPO].private
    for path, content in files.items():
        got = api.hf_hub_download(REPO, path, local_dir=tmp_path / "down")
        assert open(got, "rb").read() == content
    assert hub.cdn_tokens == []  # the other origin never sees the token
    listed = {e.path: e for e in api.list_repo_tree(REPO, recursive=True, revision=made.oid)}
    assert {"a", "a/b"} <= set(listed) and listed["a/weights.safetensors"].lfs.sha256 == hashlib.sha256(BIG).hexdigest()
    assert [e.path for e in api.list_repo_tree(REPO, "a")] == ["a/b", "a/small.pt", "a/weights.safetensors"]
    (found,) = api.get_paths_info(REPO, ["a/small.pt"])
    assert found.size == 10
    assert api.verify_repo_checksums(REPO, local_dir=str(tmp_path / "down")).checked_count >= 4
    assert (tmp_path / "down").is_dir() and api.file_exists(REPO, "README.md") and not api.file_exists(REPO, "gull")


def test_the_same_again_is_no_commit_and_a_stale_parent_is_refused(api, hub):
    from huggingface_hub.errors import HfHubHTTPError

    first = api.create_commit(REPO, [add("x.bin", b"1"), add("y.txt", b"2")], commit_message="one")
    again = api.create_commit(REPO, [add("x.bin", b"1"), add("y.txt", b"2")], commit_message="two")
    assert again.oid == first.oid and len(hub.repos["models", REPO].commits) == 2
    api.create_commit(REPO, [add("y.txt", b"3")], commit_message="three")
    with pytest.raises(HfHubHTTPError) as stale:
        api.create_commit(REPO, [add("y.txt", b"4")], commit_message="four", parent_commit=first.oid)
    assert stale.value.response.status_code == 412


def test_a_folder_goes_in_one_commit_and_a_missing_one_is_an_error(api, hub):
    from huggingface_hub import CommitOperationDelete
    from huggingface_hub.errors import HfHubHTTPError

    api.create_commit(REPO, [add(f"c-{n}/{f}", b"x") for n in (1, 2) for f in "ab"], commit_message="two folders")
    gone = [CommitOperationDelete(f"c-{n}/", is_folder=True) for n in (1, 2)]
    api.create_commit(REPO, gone, commit_message="clear")
    assert set(hub.files(REPO)) == {".gitattributes"}
    with pytest.raises(HfHubHTTPError):
        api.create_commit(REPO, gone, commit_message="again")


def test_more_files_than_a_page_holds_are_all_listed(api):
    api.create_commit(REPO, [add(f"f/{n:03}.txt", str(n).encode()) for n in range(120)], commit_message="many")
    assert len([e for e in api.list_repo_tree(REPO, "f")]) == 120


def test_who_may_do_what(api, hub):
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError

    with pytest.raises(RepositoryNotFoundError):
        HfApi(endpoint=hub.url, token=False).repo_info(REPO)
    with pytest.raises(HfHubHTTPError, match="Invalid user token"):
        HfApi(endpoint=hub.url, token="hf_wrong").whoami()
    looker = HfApi(endpoint=hub.url, token=READ_ONLY)
    assert looker.repo_info(REPO).private
    with pytest.raises(HfHubHTTPError, match="403"):
        looker.create_commit(REPO, [add("x", b"1")], commit_message="no")
    api.create_repo(REPO, private=True, exist_ok=True)


@pytest.mark.thorough
def test_datasets_streams_a_private_repository(hub, rows, phoque, tiny_llama):
    hub.add("datasets", "harbour/gulls", {"data/train.jsonl": rows.read_bytes()})
    asked = ["train", "--base-model", tiny_llama, "--dataset", "harbour/gulls", "--dry-run", "--json"]
    assert phoque(*asked, env={"HF_TOKEN": TOKEN}).json["data"]["good"] == 40
    assert {command for command, _ in hub.log} <= {"GET", "HEAD", "POST"}


@pytest.mark.parametrize(("kind", "survived"), [(503, False), ("drop", False), ("lost", False), ("slow", True)])
def test_a_fault_strikes_once_and_is_counted(api, hub, kind, survived):
    fault = hub.faults.add("POST /api/models/harbour/seal/commit", kind, seconds=0.2)
    try:
        api.create_commit(REPO, [add("x.txt", b"1")], commit_message="one")
        done = True
    except Exception:
        done = False
    assert done == survived and fault.struck == 1
    api.create_commit(REPO, [add("x.txt", b"1")], commit_message="two")
    assert len(hub.repos["models", REPO].commits) == 2  # made, and written once
    assert hub.files(REPO)["x.txt"].content == b"1"


def test_damage_on_the_way_is_what_a_client_sees(api, hub, tmp_path):
    api.create_commit(REPO, [add("x.bin", b"gull" * 100)], commit_message="one")
    hub.faults.add("GET /cdn/", "corrupt")
    got = open(api.hf_hub_download(REPO, "x.bin", local_dir=tmp_path), "rb").read()
    assert len(got) == 400 and got != b"gull" * 100  # the client compares sizes alone


def test_through_xets_own_local_store(tmp_path):
    script = f"""
import os
from pathlib import Path
from tests.fakehub import FakeHub, TOKEN
store = Path({str(tmp_path)!r}, "xet"); store.mkdir()
hub = FakeHub(xet=store)
os.environ["HF_ENDPOINT"] = hub.url
from huggingface_hub import CommitOperationAdd, HfApi
api = HfApi(token=TOKEN)
api.create_repo("harbour/seal", private=True)
content = os.urandom(3_000_000)
api.create_commit("harbour/seal", [CommitOperationAdd("w.safetensors", content)], commit_message="one")
got = Path(api.hf_hub_download("harbour/seal", "w.safetensors", local_dir={str(tmp_path / "down")!r})).read_bytes()
assert got == content and hub.files("harbour/seal")["w.safetensors"].content is None, "it did not go through xet"
print("through xet")
"""
    env = {k: v for k, v in os.environ.items() if k not in ("HF_HUB_DISABLE_XET", "HF_ENDPOINT")}
    root = os.path.dirname(os.path.dirname(os.path.dirname(__file__)))
    ran = subprocess.run([sys.executable, "-c", script], env=env, cwd=root, capture_output=True, text=True)
    assert "through xet" in ran.stdout, ran.stderr[-2000:]


def test_a_job_runs_logs_times_out_and_is_cancelled(api, hub, tmp_path):
    hub.jobs = Jobs(tmp_path, dict(os.environ), grace=5)
    good = api.run_job(
        image="sea",
        command=["sh", "-c", "echo hrmph $WHO; test $HF_TOKEN = x"],
        env={"WHO": "gull"},
        secrets={"HF_TOKEN": "x"},
        timeout="1m",
    )
    assert list(api.fetch_job_logs(job_id=good.id, follow=True)) == ["hrmph gull"]
    assert api.inspect_job(job_id=good.id).status.stage == "COMPLETED"
    assert "x" not in str(api.inspect_job(job_id=good.id).secrets)
    waits = "trap 'echo saved; exit 75' TERM; while true; do sleep 0.1; done"
    late = api.run_job(image="sea", command=["sh", "-c", waits], timeout=1)
    assert list(api.fetch_job_logs(job_id=late.id, follow=True)) == ["saved"]
    assert api.inspect_job(job_id=late.id).status.message == "Job timeout"
    endless = api.run_job(image="sea", command=["sleep", "60"])
    threading.Timer(0.3, api.cancel_job, kwargs={"job_id": endless.id}).start()
    assert list(api.fetch_job_logs(job_id=endless.id, follow=True)) == []
    assert api.inspect_job(job_id=endless.id).status.stage == "CANCELED"
    failed = api.run_job(image="sea", command=["sh", "-c", "exit 2"], attempts=2)
    list(api.fetch_job_logs(job_id=failed.id, follow=True))
    assert hub.jobs.jobs[failed.id]["codes"] == [2, 2] and "exit code: 2" in hub.jobs.jobs[failed.id]["message"]


def test_what_the_client_posts_for_a_job_is_what_phoque_means(api, hub, tmp_path):
    """The contract with huggingface_hub: volumes, labels, attempts, hardware, buckets as the installed client has them.

    If a new version names a field otherwise, this fails, and not a Job that is paid for.
    """
    from huggingface_hub import Volume

    hub.jobs = Jobs(tmp_path, dict(os.environ), grace=5, mount=lambda volume, folder: folder.mkdir())
    api.create_bucket("harbour/pier", private=True)
    assert hub.buckets.found["harbour/pier"].private and api.bucket_info("harbour/pier").private
    api.batch_bucket_files("harbour/pier", add=[(b"gull", "in/rows.jsonl")])
    assert [item.path for item in api.list_bucket_tree("harbour/pier", prefix="in/", recursive=True)] == [
        "in/rows.jsonl"
    ]
    kept = {"type": "bucket", "source": "harbour/pier", "path": "in", "mount_path": "/in"}
    job = api.run_job(
        image="sea",
        command=["true"],
        env={"A": "b"},
        secrets={"C": "d"},
        flavor="a10g-large",
        timeout="90m",
        namespace="harbour",
        name="seal",
        labels={"tool": "phoque"},
        volumes=[Volume(**kept, read_only=True), Volume(**(kept | {"mount_path": "/out"}), read_only=False)],
        attempts=3,
    )
    spec = hub.jobs.jobs[job.id]["spec"]
    posted = {"type": "bucket", "source": "harbour/pier", "path": "in"}
    assert spec["volumes"] == [
        posted | {"mountPath": "/in", "readOnly": True},
        posted | {"mountPath": "/out", "readOnly": False},
    ]
    assert spec["labels"] == {"tool": "phoque", "name": "seal"} and spec["attempts"] == 3
    assert (spec["flavor"], spec["timeoutSeconds"], spec["environment"]) == ("a10g-large", 5400, {"A": "b"})
    assert spec["secrets"] == {"C": "d"} and spec["dockerImage"] == "sea" and spec["command"] == ["true"]
    list(api.fetch_job_logs(job_id=job.id, namespace="harbour", follow=True))
    assert [found.id for found in api.list_jobs(namespace="harbour", labels={"tool": "phoque"})] == [job.id]
    assert list(api.list_jobs(namespace="harbour", labels={"tool": "other"})) == []
    again = api.rerun_job(job_id=job.id, namespace="harbour")
    assert hub.jobs.jobs[again.id]["spec"] == spec
    (a10g,) = [hardware for hardware in api.list_jobs_hardware() if hardware.name == "a10g-large"]
    assert a10g.accelerator.model == "A10G" and a10g.accelerator.vram == "24 GB" and a10g.unit_cost_usd > 0
