"""The background push by itself: its pace, and what it holds on to."""

import threading
import time

import pytest
from tests.fakehub import TOKEN
from tests.forkserver import slowly
from tests.training.test_resume import COMMON

from phoque.console import Console
from phoque.errors import IntegrityError, Resumable, Superseded, UsageError
from phoque.hub.client import Hub, is_transient
from phoque.training import push
from phoque.training.push import CheckpointPusher


class ControlledRepo:
    """Takes a push when it is told to."""

    name, place, flag, commits_per_hour = "harbour/seal", "on the Hub", "--hub-model-id", 128

    def __init__(self):
        self.open, self.pushed, self.commits = threading.Event(), [], 0

    def push(self, files, message, stale, wait):
        while not self.open.wait(0.01):
            wait(0.01)
        self.pushed.append(message)
        self.commits += 1
        return "commit"


@pytest.fixture
def make_checkpoint(tmp_path):
    card = tmp_path / "card"
    card.write_text("")
    folders = [tmp_path / f"checkpoint-{n}" for n in range(1, 6)]
    for folder in folders:
        folder.mkdir()
    repo = ControlledRepo()
    return repo, CheckpointPusher(repo, keep=2, card=lambda _: card, console=Console(), every=1), folders


def test_a_newer_checkpoint_replaces_the_one_that_is_tried_and_the_one_that_waits(make_checkpoint):
    repo, pusher, folders = make_checkpoint
    pusher.offer(folders[0])
    while folders[0] not in pusher.in_use() or len(pusher.in_use()) != 1:
        time.sleep(0.001)
    pusher.offer(folders[1])
    pusher.offer(folders[2])
    assert folders[2] in pusher.in_use()
    repo.open.set()
    assert pusher.drain() and repo.pushed[-1] == "Step 3" and pusher.pushed == 3 and pusher.in_use() == set()


def test_a_merged_model_that_cannot_be_made_on_the_way_ends_nothing(tmp_path, make_checkpoint, capsys):
    def export(folder):
        raise UsageError(what="The merged model needs 6.8 GB.", why="why", fix="do")

    repo, plain, folders = make_checkpoint
    pusher = CheckpointPusher(repo, keep=2, card=plain._card, console=Console(), every=1, export=export)
    repo.open.set()
    pusher.offer(folders[0])
    assert pusher.drain(5) and pusher.pushed == 1 and not pusher.failure
    pusher.offer(folders[1])
    assert "checkpoint-1 is on the Hub, but no merged model" in capsys.readouterr().err


def test_the_hubs_limit_is_kept_until_the_end_of_the_run(make_checkpoint, monkeypatch):
    repo, pusher, folders = make_checkpoint
    repo.commits_per_hour = push.RESERVED_COMMITS + 2
    repo.open.set()
    for number, folder in enumerate(folders[:3]):
        pusher.offer(folder)
        end = time.monotonic() + 1
        while pusher.pushed != number + 1 and time.monotonic() < end:
            time.sleep(0.001)
    assert repo.pushed == ["Step 1", "Step 2"] and folders[2] in pusher.in_use()  # the hour's share is used up
    assert pusher.drain(5) and repo.pushed[-1] == "Step 3"  # but the last one always goes


def test_a_wait_for_the_deadline_ends_with_it(make_checkpoint):
    _, pusher, folders = make_checkpoint
    pusher.offer(folders[0])
    begun = time.monotonic()
    assert not pusher.drain(0.3) and time.monotonic() - begun < 1


class Answer(Exception):
    def __init__(self, status, **headers):
        super().__init__(str(status))
        self.response = type("Response", (), {"status_code": status, "headers": headers})


@pytest.mark.parametrize(
    ("error", "again"),
    [
        (Answer(503), True),
        (Answer(429), True),
        (Answer(412), True),
        (Answer(403), False),
        (Answer(404), False),
        (ConnectionResetError(), True),
        (ValueError("x"), False),
        (OSError(28, "No space left on device"), False),
    ],
)
def test_what_is_tried_again(error, again):
    assert is_transient(error) == again
    wrapped = RuntimeError("Error while uploading")
    wrapped.__cause__ = error
    assert is_transient(wrapped) == again


def test_retry_after_is_kept_patience_ends_and_damage_is_tried_twice():
    waits, hub = [], Hub("hf_x", lambda _: None, patience=10)
    answers = iter([Answer(429, **{"Retry-After": "7"}), Answer(503), None])

    def once():
        if error := next(answers):
            raise error
        return "there"

    assert hub.retry("x", once, waits.append) == "there" and waits == [7.0, 2.0]
    with pytest.raises(Resumable, match="refused a request"):
        hub.retry("x", lambda: (_ for _ in ()).throw(Answer(429, **{"Retry-After": "60"})), waits.append)
    answers = iter([Answer(429, RateLimit='"api";r=0;t=5'), None])  # the Hub's header for a spent quota
    assert hub.retry("x", once, waits.append) == "there" and waits[2:] == [5.0]
    tries = []
    with pytest.raises(IntegrityError):
        hub.retry("x", lambda: tries.append(1) or (_ for _ in ()).throw(IntegrityError("bit")), lambda _: None)
    assert len(tries) == 2

    def newer(_):
        raise Superseded

    with pytest.raises(Superseded):
        hub.retry("x", lambda: (_ for _ in ()).throw(Answer(503)), newer)


class Tree:
    """A snapshot with the manifests of these checkpoints, by git's hash."""

    def __init__(self, **manifests):
        entry = type("Entry", (), {})
        self.files = {f"checkpoint-{step[1:]}/MANIFEST.json": entry() for step in manifests}
        for file, blob_id in zip(self.files.values(), manifests.values(), strict=True):
            file.blob_id = blob_id


def test_a_run_is_ended_by_the_second_checkpoint_of_another_and_never_by_its_own():
    said = []
    console = Console()
    console.warn = said.append
    pusher = CheckpointPusher(ControlledRepo(), keep=2, card=None, console=console, every=1)
    pusher._notice_other_writers(Tree(_2="before"))
    pusher._sent.add("own")
    for _ in range(3):  # a lost reply: what was sent is there when the push is tried again
        pusher._notice_other_writers(Tree(_2="before", _4="own"))
    assert not said
    for _ in range(3):  # the last push of a killed attempt, seen at each retry
        pusher._notice_other_writers(Tree(_4="own", _3="straggler"))
    assert len(said) == 1
    with pytest.raises(UsageError, match="Another process"):
        pusher._notice_other_writers(Tree(_4="own", _5="other"))


@pytest.mark.alone
def test_two_runs_in_one_repository_notice_each_other(start, hub, tiny_llama, rows, tmp_path):
    asked = ["train", "--base-model", tiny_llama, "--dataset", rows, *COMMON, "--max-steps", 40, "--save-steps", 2]
    env = {"HF_TOKEN": TOKEN}
    running = [
        start(*asked, "--hub-model-id", "harbour/both", "--output-dir", tmp_path / name, env=env, prelude=slowly(0.2))
        for name in ("one", "two")
    ]
    ended = [process.ended() for process in running]
    assert sorted(run.code for run in ended) in ([0, 2], [2, 2])
    stopped = next(run for run in ended if run.code == 2)
    # a warning comes first, unless two checkpoints of the other run arrive between two pushes
    assert "Another process is writing" in stopped.error[0]
