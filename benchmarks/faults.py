"""What a run survives: every fault of the table injected for real, into phoque and into plain Trainer beside it.

    uv run python benchmarks/faults.py            43 faults, a few minutes on two cores
    uv run python benchmarks/faults.py --folder   34 faults, with the run in a folder of a bucket (--run-dir)
    uv run python benchmarks/faults.py --together 14 faults: one of two processes is killed in a step, save or upload
    uv run python benchmarks/faults.py --soak 200 one long run, killed or hurt 200 times

A fault is survived only if the exit code is the documented one, the same command then ends with the very adapter (bit
for bit) and the very losses, each step once, that a run without faults has, and no secret is in any output, file or
upload. For plain Trainer it is enough that the adapter in its repository is the one of its run without faults.
"""

import argparse
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from tests.fakehub import TOKEN, FakeHub  # noqa: E402
from tests.fakehub.jobs import Jobs  # noqa: E402
from tests.forkserver import AHEAD, ForkServer, slowly  # noqa: E402
from tests.launching import free_port  # noqa: E402

REPO, BASE, STEPS, SAVE = "harbour/seal", "harbour/tiny", 12, 3
KEY = "g" * 40
SECRETS = {"HF_TOKEN": TOKEN, "WANDB_API_KEY": KEY}
COMMIT, LFS = "POST .*/commit/", "(PUT|POST) /lfs/"
EVERYTHING = 10**9

NAN = AHEAD.format(
    what="if self.state.global_step == 7:"
    " next(p for p in self.model.parameters() if p.requires_grad).data[0, 0] = float('nan')"
)
OOM = AHEAD.format(
    what="if self.state.global_step == 7: raise torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 20 GiB')"
)


class Ended:
    """A command that is over."""

    def __init__(self, code: int, text: str) -> None:
        self.code, self.text = code, text


class Started:
    """A command under way, forked from the forkserver."""

    def __init__(self, bench: "Bench", argv: list[str], env: dict[str, str], prelude: str) -> None:
        self._bench, self._files = bench, [Path(tempfile.mkstemp(dir=bench.root)[1]) for _ in range(2)]
        self.pid = bench.forkserver.start(argv, os.environ | SECRETS | env, bench.place, *self._files, prelude)

    def until(self, condition: Callable[[], Any], seconds: float = 60) -> None:
        end = time.monotonic() + seconds
        while not condition() and self._bench.forkserver.poll_once(self.pid) is None and time.monotonic() < end:
            time.sleep(0.002)

    def kill(self, number: int) -> None:
        if self._bench.forkserver.poll_once(self.pid) is None:
            os.kill(self.pid, number)

    def ended(self) -> Ended:
        code = self._bench.forkserver.poll(self.pid, wait=True)
        text = "".join(f.read_text(errors="replace") for f in self._files)
        self._bench.outputs.append(text)
        return Ended(code, text)


class Bench:
    """A Hub, a tiny model, forty rows, and one of the two sides; every run is on a machine of its own."""

    def __init__(self, root: Path, hub: FakeHub, forkserver: Any, base: Path, rows: Path) -> None:
        self.root, self.hub, self.forkserver, self.base, self.rows = root, hub, forkserver, base, rows
        self.machine, self.outputs = 0, []
        self.place = root
        self.reference: dict[str, bytes] = {}

    def new_machine(self) -> None:
        """An empty disk."""
        self.machine += 1
        self.place = self.root / f"machine-{self.machine}"
        self.place.mkdir()

    def begin(self) -> None:
        self.hub.empty()
        self.hub.add("models", BASE, {p.name: p.read_bytes() for p in self.base.iterdir()})
        self.outputs.clear()
        self.new_machine()

    def run(self, *more: Any, expect: int | None = 0, prelude: str = "", **env: str) -> Ended:
        ended = self.start(*more, prelude=prelude, **env).ended()
        if expect is not None:
            need(ended.code == expect, f"exit {ended.code} instead of {expect}: {ended.text[-300:]}")
        return ended

    def files(self) -> dict[str, bytes]:
        """What the repository holds."""
        return {path: blob.content for path, blob in self.hub.files(REPO).items()}

    def put(self, changes: dict[str, bytes | None]) -> None:
        """Change what the repository holds; None deletes a file."""
        self.hub.put(REPO, changes)

    def adapter(self) -> bytes | None:
        repo = self.hub.repos.get(("models", REPO))
        blob = repo.commits[-1].files.get("adapter_model.safetensors") if repo else None
        return blob.content if blob else None

    def titles(self) -> list[str]:
        repo = self.hub.repos.get(("models", REPO))
        return [c.title for c in repo.commits] if repo else []

    def commits(self) -> int:
        return len(self.titles())

    def pushing(self) -> bool:
        return any(command == "POST" and "/commit/" in path for command, path in self.hub.log)

    def leaked(self) -> str | None:
        texts = {f"output {n}": t.encode() for n, t in enumerate(self.outputs)} | self.hub.contents()
        texts |= {str(p): p.read_bytes() for p in self.root.glob("machine-*/**/*") if p.is_file()}
        return next((f"a secret in {n}" for n, t in texts.items() for s in SECRETS.values() if s.encode() in t), None)


class Phoque(Bench):
    stopped, refused, failed = 75, 2, 1

    def start(self, *more: Any, prelude: str = "", repo: str = REPO, **env: str) -> Started:
        argv = ["train", "--base-model", BASE, "--dataset", self.rows, "--quantization", "fp32", "--batch-size", 4]
        argv += ["--packing", "exact", "--log-every", 1, "--sample-every", 0, "--learning-rate", 0.01]
        argv += ["--lora-dropout", 0.1, "--max-steps", STEPS, "--max-bad-rows", 0.2, "--save-steps", SAVE]
        argv += [*self.keeps(repo), "--hub-patience", 30, "--output-dir", "run"]
        return Started(self, [str(a) for a in (*argv, *more)], {"WANDB_MODE": "disabled"} | env, prelude)

    def keeps(self, repo: str) -> list[Any]:
        """Where the run is kept."""
        return ["--hub-model-id", repo]

    def steps(self) -> list[tuple[int, float]]:
        path = self.place / "run" / "metrics.jsonl"
        rows = [json.loads(x) for x in path.read_text().splitlines()] if path.is_file() else []
        return [(row["step"], row["loss"]) for row in rows if "loss" in row]

    def in_save(self) -> bool:
        return (self.place / "run" / ".saving").exists() and self.commits() > 1

    def whole(self, data: str = "") -> None:
        """Raise Lost unless the run in the repository and on this machine is the one without faults."""
        same(self, data, [loss for _, loss in self.steps()])
        need([step for step, _ in self.steps()] == list(range(1, STEPS + 1)), f"steps {[s for s, _ in self.steps()]}")
        state = self.place / "run" / f"checkpoint-{STEPS}" / "data_state.json"
        seen = json.loads(state.read_text())["rows_seen"] if state.is_file() else 4 * STEPS
        need(seen == 4 * STEPS, f"{seen} rows seen")
        need(self.leaked() is None, self.leaked() or "")


class Folder(Phoque):
    """phoque with the run in a folder that outlives the machines, as a bucket does that a Job mounts."""

    @property
    def store(self) -> Path:
        return self.root / "bucket"

    def begin(self) -> None:
        shutil.rmtree(self.store, ignore_errors=True)
        self.seen: set[tuple[Path, int]] = set()
        super().begin()

    def keeps(self, repo: str) -> list[Any]:
        return ["--run-dir", self.store]

    def files(self) -> dict[str, bytes]:
        found = (path for path in self.store.rglob("*") if path.is_file() and path.name != "phoque-run.txt")
        return {path.relative_to(self.store).as_posix(): path.read_bytes() for path in found}

    def put(self, changes: dict[str, bytes | None]) -> None:
        for name, content in changes.items():
            path = self.store / name
            if content is None:
                path.unlink()
            else:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content)

    def adapter(self) -> bytes | None:
        return self.files().get("adapter_model.safetensors")

    def commits(self) -> int:
        """The last files of a push that were seen so far; asked for often enough, that is the number of pushes."""
        last = [*self.store.glob("checkpoint-*/MANIFEST.json"), *self.store.glob("fresh_start.json")]
        for path in [*last, *self.store.glob("run.json")]:
            with suppress(FileNotFoundError):
                self.seen.add((path, path.stat().st_mtime_ns))
        return 1 + len(self.seen)

    def pushing(self) -> bool:
        return any(not (path / "MANIFEST.json").is_file() for path in self.store.glob("checkpoint-*"))

    def leaked(self) -> str | None:
        inside = (n for n, content in self.files().items() for s in SECRETS.values() if s.encode() in content)
        return super().leaked() or next((f"a secret in {name} of the bucket" for name in inside), None)


class StartedTogether:
    """Two processes of one command under way; signals go to one of them, `target`."""

    def __init__(self, processes: list[Started], target: int) -> None:
        self._processes, self._target, self._signalled = processes, target, False

    def until(self, condition: Callable[[], Any], seconds: float = 60) -> None:
        self._processes[0].until(condition, seconds)

    def kill(self, number: int) -> None:
        self._signalled = True
        self._processes[self._target].kill(number)

    def ended(self) -> Ended:
        begun = time.monotonic()
        endings = [process.ended() for process in self._processes]
        codes = [ending.code for ending in endings]
        need(time.monotonic() - begun < 60, f"it took {time.monotonic() - begun:.0f} s until all had ended")
        need(all(codes) if self._signalled else len(set(codes)) == 1, f"exits {codes}")
        return Ended(codes[self._target if self._signalled else 0], "".join(ending.text for ending in endings))


class Together(Phoque):
    """phoque with two processes that train together."""

    target = 0  # the process that a fault strikes

    def start(self, *more: Any, prelude: str = "", repo: str = REPO, **env: str) -> StartedTogether:
        launch = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        processes = [
            super(Together, self).start(
                *more, prelude=prelude, repo=repo, **env, **launch, RANK=str(rank), LOCAL_RANK=str(rank)
            )
            for rank in range(2)
        ]
        return StartedTogether(processes, self.target)


class Plain(Bench):
    stopped = refused = failed = None  # it documents none

    def start(self, *more: Any, prelude: str = "", **env: str) -> Started:
        names = {"--dataset": "--rows", "--learning-rate": "--lr", "--batch-size": "--batch", "--save-steps": "--save"}
        argv = ["--base", BASE, "--rows", self.rows, "--out", "run", "--repo", REPO, "--log", "log.txt", "--save", SAVE]
        argv += [names.get(str(a), a) for a in more if a not in ("--fresh-start",)]
        script = (
            prelude + f"\nimport runpy\nrunpy.run_path({str(ROOT / 'benchmarks/plain_trainer.py')!r})\nraise SystemExit"
        )
        return Started(self, [str(a) for a in argv], {"WANDB_MODE": "disabled"} | env, script)

    def steps(self) -> list[tuple[int, float]]:
        path = self.place / "log.txt"
        lines = [line.split() for line in path.read_text().splitlines()] if path.is_file() else []
        return [(int(step), float(loss)) for step, loss in lines]

    def in_save(self) -> bool:
        return bool(list((self.place / "run").glob("checkpoint-*"))) and self.commits() > 1

    def whole(self, data: str = "") -> None:
        same(self, data, None)


class Lost(Exception):
    """A fault that was not survived, and why."""


def need(fine: bool, why: str) -> None:
    if not fine:
        raise Lost(why)


def same(b: Bench, data: str, losses: list[float] | None) -> None:
    made = b.adapter()
    need(made is not None, "no adapter in the repository")
    if data not in b.reference:
        b.reference[data] = (made, losses)
    need(b.reference[data][0] == made, "another adapter")
    need(losses is None or b.reference[data][1] == losses, "other losses")


# --- the faults: each takes a side, and raises Lost ---


def in_push(match: str, kind: Any, **options: Any) -> Callable[[Bench], None]:
    def fault(b: Bench) -> None:
        struck = b.hub.faults.add(match, kind, **options)
        b.run()
        need(struck.struck > 0, "the fault did not happen")
        b.whole()

    return fault


def half_done(b: Bench) -> None:
    """A run that was stopped after some checkpoints, and a new machine."""
    process = b.start(prelude=slowly())
    process.until(lambda: len(b.steps()) >= 7 and b.commits() > 2)
    process.kill(signal.SIGKILL)
    process.ended()
    b.new_machine()


def newest_weights(b: Bench) -> str:
    """The SHA-256, under which it is downloaded, of the adapter in the newest checkpoint of the repository."""
    files = b.hub.files(REPO)
    steps = [int(m[1]) for path in files if (m := re.match(r"checkpoint-(\d+)/adapter_model.safetensors", path))]
    return files[f"checkpoint-{max(steps)}/adapter_model.safetensors"].sha256


def in_restore(match: str, kind: Any, **options: Any) -> Callable[[Bench], None]:
    def fault(b: Bench) -> None:
        half_done(b)
        struck = b.hub.faults.add(match.replace("NEWEST", newest_weights(b)), kind, **options)
        b.run()
        need(struck.struck > 0, "the fault did not happen")
        b.whole()

    return fault


def signalled(number: int, where: str) -> Callable[[Bench], None]:
    def fault(b: Bench) -> None:
        if where == "upload":
            b.hub.faults.add(COMMIT, "slow", times=3, seconds=1.0)
        slow_writes = SLOW_WRITES if isinstance(b, Folder) and where == "upload" else ""
        # under nohup, which this script may run under, SIGHUP is ignored
        heard = "\nimport signal\nsignal.signal(signal.SIGHUP, signal.SIG_DFL)\n"
        process = b.start(prelude=slowly() + heard + slow_writes)
        process.until({"step": lambda: len(b.steps()) >= 5, "save": b.in_save, "upload": b.pushing}[where])
        process.kill(number)
        ended = process.ended()
        documented = -number if number == signal.SIGKILL else b.stopped
        need(documented is None or ended.code == documented, f"exit {ended.code} instead of {documented}")
        if number == signal.SIGTERM and b.stopped:  # what was promised is there
            need("holds everything" in ended.text and "has checkpoint-" in ended.text, "it did not say what is where")
        b.new_machine()
        b.run()
        b.whole()

    return fault


def struck(rank: int, fault: Callable[[Any], None]) -> Callable[[Any], None]:
    """The fault, in one of the two processes."""

    def fault_in_process(b: Together) -> None:
        b.target = rank
        fault(b)

    return fault_in_process


def job_timeouts(b: Bench) -> None:
    """A Job's time runs out, with SIGTERM and a grace period and without either; it is submitted until it is done."""
    for grace in (5.0, 0.0):
        b.begin()

        class Container:
            def __init__(self, argv: list[str], env: dict[str, str], cwd: Path, out: Path) -> None:
                b.new_machine()
                self.process = b.start(prelude=slowly())
                self.pid = self.process.pid

            def poll(self) -> int | None:
                return b.forkserver.poll_once(self.pid)

        b.hub.jobs = Jobs(b.root / f"jobs-{time.time_ns()}", {}, grace, Container)
        b.hub.jobs.root.mkdir()
        spec = {"command": [], "arguments": [], "environment": {}, "flavor": "cpu-basic"}
        stages: list[str] = []
        while "COMPLETED" not in stages:
            need(len(stages) < 12, f"it was never done: {stages[-1:]}, {b.outputs[-1:]}")
            # the first is shorter than 12 steps are; a second more each time, for a machine that is busy
            spec["timeoutSeconds"] = 2 + len(stages)
            job = b.hub.jobs.jobs[b.hub.jobs.submit("harbour", spec)["id"]]
            while job["stage"] in ("SCHEDULING", "RUNNING"):
                time.sleep(0.02)
            stages.append(job["stage"])
        need(len(stages) > 1, "it was done before its time ran out")
        b.whole()


def damaged(how: str) -> Callable[[Bench], None]:
    """The newest checkpoint of the repository is damaged, as it was left before the adapter got there."""

    def fault(b: Bench) -> None:
        b.run("--save-steps", 6)
        b.put({path: None for path in b.files() if "/" not in path and path != ".gitattributes"})
        name = f"checkpoint-{STEPS}"
        content = b.files()[f"{name}/optimizer.pt"]
        flipped = content[:5000] + bytes([content[5000] ^ 1]) + content[5001:]
        parts = [p for p in b.files() if p.startswith(f"{name}/")]
        changes = {
            "no manifest": {f"{name}/MANIFEST.json": None},
            "no optimizer.pt": {f"{name}/optimizer.pt": None},
            "truncated": {f"{name}/optimizer.pt": content[: len(content) // 2]},
            "bit flip": {f"{name}/optimizer.pt": flipped},
            "empty": {p: None for p in parts if not p.endswith("adapter_config.json")},
        }
        b.put(changes[how])
        b.new_machine()
        b.run("--save-steps", 6)
        b.whole()

    return fault


def disk_full(b: Bench) -> None:
    disk = b.place / "run"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1200k", "tmpfs", disk], check=True)  # needs root, as CI has
    try:
        ended = b.run("--keep-checkpoints", 9, expect=None)
        need(ended.code in (0, 1) and (b.stopped is None or "disk is full" in ended.text), f"exit {ended.code}")
        b.hub.log.clear()
    finally:
        subprocess.run(["umount", disk], check=True)
    b.new_machine()
    b.run()
    b.whole()


def not_finite(times: int) -> Callable[[Bench], None]:
    def fault(b: Bench) -> None:
        for _ in range(times):
            ended = b.run(expect=b.failed, prelude=NAN)
            need(ended.code != 0, "it called that a success")
            need(b.stopped is None or "not finite at step 8" in ended.text, "it did not say where")
            b.new_machine()
        b.run()
        b.whole()

    return fault


def out_of_memory(b: Bench) -> None:
    ended = b.run(expect=b.failed, prelude=OOM)
    need(b.failed is None or "--micro-batch" in ended.text, "it did not say what to do")
    b.new_machine()
    b.run()
    b.whole()


def resumed_with(*change: Any) -> Callable[[Bench], None]:
    def fault(b: Bench) -> None:
        half_done(b)
        rows = b.root / "other.jsonl"
        rows.write_text("".join(reversed(b.rows.read_text().splitlines(keepends=True))))
        asked = [rows if a == "OTHER" else a for a in change]
        ended = b.run(*asked, expect=b.refused)
        need(ended.code != 0, "it went on as if nothing had changed")
        b.new_machine()
        b.run()
        b.whole()

    return fault


def wandb_down(b: Bench) -> None:
    process = b.start(prelude=slowly(), WANDB_MODE="online", WANDB_BASE_URL="http://127.0.0.1:9")
    process.until(lambda: len(b.steps()) >= 5, 90)
    process.kill(signal.SIGKILL)
    process.ended()
    b.new_machine()
    b.run(WANDB_MODE="online", WANDB_BASE_URL="http://127.0.0.1:9")
    b.whole()


def bad_rows(kind: str, bad: list[str]) -> Callable[[Bench], None]:
    """Rows that no one can train on, among good ones, and a kill; the reference is the same data without the kill."""

    def fault(b: Bench) -> None:
        rows = b.root / f"{kind}.jsonl"
        lines = b.rows.read_text().splitlines()
        rows.write_text("\n".join([*lines[:20], *bad, *lines[20:]]) + "\n")
        b.run("--dataset", rows)
        same(b, kind, [loss for _, loss in b.steps()] if b.stopped else None)
        b.begin()
        process = b.start("--dataset", rows, prelude=slowly())
        process.until(lambda: len(b.steps()) >= 7 and b.commits() > 2)
        process.kill(signal.SIGKILL)
        process.ended()
        b.new_machine()
        ended = b.run("--dataset", rows)
        need(
            sum(int(count) for count in re.findall(r"(\d+) rows? left out", ended.text)) == len(bad),
            "uncounted",
        )
        b.whole(kind)

    return fault


def half_bad(b: Bench) -> None:
    rows = b.root / "half.jsonl"
    rows.write_text(b.rows.read_text() + "{\n" * 40)
    ended = b.run("--dataset", rows, expect=b.refused)
    need(ended.code != 0 and "40 of 80 rows" in ended.text, "it did not count them")
    need(b.commits() < 2, "something was pushed")
    b.new_machine()
    b.run()
    b.whole()


def fresh_start_twice(b: Bench) -> None:
    b.run()
    b.new_machine()
    env = {"FORCE_FRESH_START": "1"}
    before = b.commits()
    process = b.start(prelude=slowly(), **env)
    process.until(lambda: len(b.steps()) >= 7 and b.commits() > before + 2)
    process.kill(signal.SIGKILL)
    process.ended()
    b.new_machine()
    ended = b.run(**env)
    need(
        b.stopped is None or re.search(r"continuing from step [1-9]", ended.text) is not None,
        "it wiped its own progress",
    )
    need(
        b.stopped is not None or "checkpoint-" in str(list((b.place / "run-restored").glob("*"))),
        "it wiped its own progress",
    )
    b.whole()


def malicious(b: Bench) -> None:
    """A checkpoint whose optimizer is a pickle that runs a command, and paths that lead out of the folder."""
    b.run("--save-steps", 6)
    sentinel = b.root / f"owned-{time.time_ns()}"
    pickled = b"cos\nsystem\n(S'touch " + str(sentinel).encode() + b"'\ntR."
    wanted = {path: content for path, content in b.files().items() if path.startswith(f"checkpoint-{STEPS}/")}
    stale = {path: None for path in b.files() if path != ".gitattributes"}
    evil = {p: c for p, c in wanted.items() if not p.endswith(("MANIFEST.json", "data_state.json", "run.json"))}
    evil |= {f"checkpoint-{STEPS}/optimizer.pt": pickled}
    if not isinstance(b, Folder):  # in a folder there are no such paths
        evil |= {f"checkpoint-{STEPS}/../../{sentinel.name}": b"out"}
    b.put(stale)
    b.put(evil)
    b.new_machine()
    ended = b.run(expect=None)
    need(not list(b.root.parent.rglob(sentinel.name)), "it ran what it was sent, or wrote outside of its folder")
    need(
        ended.code != 0 and (b.failed is None or len(re.findall(r"^(error|  why|   do): ", ended.text, re.M)) == 3),
        f"exit {ended.code}",
    )
    b.put({path: None for path in b.files() if path != ".gitattributes"})
    b.new_machine()
    b.run()
    b.whole()


def token_everywhere(b: Bench) -> None:
    """Every way a token could get out: a wrong one in an error, a failing push, W&B's files, run.json."""
    b.hub.faults.add(COMMIT, 503, times=2)
    b.run(WANDB_MODE="offline")
    wrong = b.start(HF_TOKEN="hf_gullgullgull").ended()
    need("gullgullgull" not in wrong.text, "the wrong token is in an error")
    need(b.leaked() is None, b.leaked() or "")
    b.whole()


def at_start(kind: Any) -> Callable[[Bench], None]:
    def fault(b: Bench) -> None:
        struck = b.hub.faults.add("(GET|HEAD) ", kind, times=4)
        b.run()
        need(struck.struck == 4, "the fault did not happen")
        b.whole()

    return fault


def start_without_hub(b: Bench) -> None:
    """The Hub fails for longer than requests are retried: the exit code says that the same command may go on."""
    b.hub.faults.add("(GET|HEAD) ", 503, times=10_000)
    ended = b.run("--hub-patience", 1, expect=b.stopped)
    need(ended.code != 0, "it ended as if it had trained")
    b.hub.faults.clear()
    b.run()
    b.whole()


def token_with_a_line_end(b: Bench) -> None:
    ended = b.run(HF_TOKEN=f"{TOKEN}\n")
    need(TOKEN not in ended.text, "the token is in the output")
    b.whole()


def foreign_files(b: Bench) -> None:
    """Files that training would replace lie in the run folder already."""
    notes = b.place / "run" / "adapter" / "notes.txt"
    notes.parent.mkdir(parents=True)
    notes.write_text("do not lose me")
    b.run(expect=None)
    need(notes.is_file(), "a file of the user's was deleted")
    b.new_machine()
    b.run()
    b.whole()


def two_runs(b: Bench) -> None:
    """The same command runs on two machines at once, as when a Job is submitted twice."""
    first = b.start("--save-steps", 1, prelude=slowly(1.0))
    first.until(lambda: b.commits() > 2)
    b.new_machine()
    second = b.start("--save-steps", 1, prelude=slowly(1.0))
    codes = [first.ended().code, second.ended().code]
    need(any(codes), "both trained to the end, and neither noticed the other")
    b.new_machine()
    b.run()
    b.whole()


SLOW_WRITES = """
import time
from phoque.hub.folder_store import FolderStore
write = FolderStore._write
def slow(*arguments):
    time.sleep(0.2)
    write(*arguments)
FolderStore._write = slow
"""
FAILING_WRITES = """
from phoque.hub.folder_store import FolderStore
write, written = FolderStore._write, []
def failing(store, path, source):
    written.append(path)
    if 20 < len(written) < 40:
        raise OSError(5, "Input/output error")
    write(store, path, source)
FolderStore._write = failing
"""


def bucket_full(b: Folder) -> None:
    """The disk of the store is full, and then it is not."""
    b.store.mkdir(exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", b.store], check=True)  # needs root, as CI has
    try:
        (b.store / "phoque-run.txt").write_text("")
        ballast = b.store / "ballast"
        ballast.write_bytes(bytes(3_900_000))
        ended = b.run(expect=b.stopped)
        need("No space left" in ended.text and "un the same command" in ended.text, f"it said {ended.text[-300:]}")
        ballast.unlink()
        b.run()
        b.whole()
    finally:
        subprocess.run(["umount", b.store], check=True)


def bucket_fails(b: Folder) -> None:
    """Twenty writes in a row fail."""
    ended = b.run(prelude=FAILING_WRITES, expect=None)
    need("Input/output error" in ended.text, "it did not say what is wrong")
    b.new_machine()
    b.run()
    b.whole()


KILLED_IN_CLEAR = """
import os, signal
from phoque.hub.store import Store
Store.clear = lambda *given: os.kill(os.getpid(), signal.SIGKILL)
"""


def killed_in_a_fresh_start(b: Folder) -> None:
    """The old checkpoints are deleted, and the marker of the fresh start is not written yet."""
    half_done(b)
    ended = b.run("--fresh-start", "--yes", prelude=KILLED_IN_CLEAR, expect=-signal.SIGKILL)
    need(ended.code != 0, "it was not killed")
    b.new_machine()
    b.run("--fresh-start", "--yes")
    b.whole()


def cut_off(name: str) -> Callable[[Folder], None]:
    """A file at the root was cut off while it was written."""

    def fault(b: Folder) -> None:
        b.run()
        b.put({name: b.files()[name][:100]})
        b.new_machine()
        b.run()
        b.whole()

    return fault


BAD = ['{"messages": null}', '{"messages": []}', '{"messages": [{"role": "gull", "content": "kri"}]}']
FAULTS: list[tuple[str, Callable[[Any], None]]] = [
    ("commit answers 429", in_push(COMMIT, 429, Retry_After="2")),
    ("commit answers 503", in_push(COMMIT, 503, times=2)),
    ("commit: connection drops", in_push(COMMIT, "drop")),
    ("commit: reply lost", in_push(COMMIT, "lost")),
    ("commit stalls for 10 s", in_push(COMMIT, "slow", seconds=10.0)),
    ("LFS upload answers 500", in_push(LFS, 500, times=2)),
    ("resume: HEAD answers 503", in_restore("HEAD .*/resolve/.*/checkpoint-", 503)),
    ("resume: download truncated", in_restore("GET /cdn/NEWEST", "truncate")),
    ("resume: one bit flipped", in_restore("GET /cdn/NEWEST", "corrupt")),
    ("resume: repo info answers 503", in_restore("GET /api/models/harbour/seal", 503)),
    ("SIGTERM in a step", signalled(signal.SIGTERM, "step")),
    ("SIGTERM in a save", signalled(signal.SIGTERM, "save")),
    ("SIGTERM in an upload", signalled(signal.SIGTERM, "upload")),
    ("SIGHUP in a step", signalled(signal.SIGHUP, "step")),
    ("SIGKILL in a step", signalled(signal.SIGKILL, "step")),
    ("SIGKILL in a save", signalled(signal.SIGKILL, "save")),
    ("SIGKILL in an upload", signalled(signal.SIGKILL, "upload")),
    ("Job timeout, grace 5 s and none", job_timeouts),
    ("newest checkpoint: no manifest", damaged("no manifest")),
    ("newest checkpoint: no optimizer.pt", damaged("no optimizer.pt")),
    ("newest checkpoint: truncated", damaged("truncated")),
    ("newest checkpoint: one bit flipped", damaged("bit flip")),
    ("newest checkpoint: empty folder", damaged("empty")),
    ("disk full in a save", disk_full),
    ("a weight turns NaN once", not_finite(1)),
    ("a weight turns NaN every time", not_finite(3)),
    ("out of memory at step 8", out_of_memory),
    ("resumed with another learning rate", resumed_with("--learning-rate", 0.5)),
    ("resumed with another batch size", resumed_with("--batch-size", 2)),
    ("resumed with other data", resumed_with("--dataset", "OTHER")),
    ("W&B down, and killed", wandb_down),
    ("rows: null, empty, bad role; killed", bad_rows("roles", BAD)),
    ("rows: a broken line; killed", bad_rows("broken", ['{"messages": [{"role": "us'])),
    ("rows: half of them broken", half_bad),
    ("fresh start set on two attempts", fresh_start_twice),
    ("a pickle and paths out of the folder", malicious),
    ("tokens in errors, files, uploads", token_everywhere),
    ("start: four requests answer 503", at_start(503)),
    ("start: four connections drop", at_start("drop")),
    ("start: the Hub fails for longer", start_without_hub),
    ("a token with a line end", token_with_a_line_end),
    ("files of the user's in the run folder", foreign_files),
    ("two runs in one repository", two_runs),
]


ON_THE_HUB = {"a token with a line end", "two runs in one repository"}
FOLDER_FAULTS = [
    *(pair for pair in FAULTS[10:] if pair[0] not in ON_THE_HUB and not pair[0].startswith("start:")),
    ("two runs in one folder", two_runs),
    ("the bucket is full", bucket_full),
    ("the bucket: 20 writes fail", bucket_fails),
    ("the bucket: killed in a fresh start", killed_in_a_fresh_start),
    ("the bucket: run.json cut off", cut_off("run.json")),
    ("the bucket: adapter cut off", cut_off("adapter_model.safetensors")),
]


TOGETHER_FAULTS = [
    (f"{name}, process {rank} of 2", struck(rank, fault))
    for name, fault in FAULTS
    if name.startswith("SIG")
    for rank in range(2)
]


def tried(b: Bench, fault: Callable[[Any], None]) -> str | None:
    """What was lost, or None if the fault was survived."""
    b.begin()
    if "" not in b.reference:
        b.run()
        b.whole()
        b.begin()
    try:
        fault(b)
    except Lost as lost:
        return re.sub(r"\s+", " ", str(lost))
    finally:
        b.hub.faults.clear()
        for machine in b.root.glob("machine-*"):
            shutil.rmtree(machine, ignore_errors=True)
    return None


def soak(b: Phoque, times: int, seed: int) -> int:
    """One run of many steps, killed or hurt `times` times; return how many steps were lost (none) or raise Lost."""
    total = 25 * times
    long = ["--max-steps", total, "--save-steps", 8]
    chance = random.Random(seed)
    b.begin()
    b.run(*long)
    made = b.adapter()
    b.begin()
    kinds = [
        (COMMIT, 503),
        (COMMIT, "drop"),
        (COMMIT, "lost"),
        (LFS, 500),
        ("GET .*/tree/", 503),
        ("GET /cdn/", "corrupt"),
        ("HEAD .*/resolve/", 503),
        ("GET /cdn/", "truncate"),
    ]
    for number in range(times):
        if chance.random() < 0.5:
            b.hub.faults.add(*chance.choice(kinds))
        process = b.start(*long)
        begun = b.commits()
        process.until(lambda begun=begun: b.commits() > begun)
        time.sleep(chance.random() * 0.3)
        process.kill(chance.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGTERM]))
        ended = process.ended()
        need(ended.code in (0, 75, -signal.SIGKILL), f"exit {ended.code}: {ended.text[-400:]}")
        if chance.random() < 0.7:
            b.new_machine()
        if number % 25 == 24:
            print(f"  {number + 1} of {times}, {b.titles()[-1]}", file=sys.stderr, flush=True)
    b.run(*long)
    need(b.adapter() == made, "another adapter")
    steps = [step for step, _ in b.steps()]
    need(steps == list(range(1, total + 1)), "a step is missing, or there twice")
    need(b.leaked() is None, b.leaked() or "")
    return total - len(set(steps))


@contextmanager
def sides() -> Iterator[tuple[Phoque, Folder, Together, Plain]]:
    """All, on one Hub, with one forkserver: what they lean on is imported once."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    root = Path(tempfile.mkdtemp(prefix="faults-"))
    hub = FakeHub()
    for name in [n for n in os.environ if n.startswith(("HF_", "WANDB_", "PHOQUE_"))]:
        del os.environ[name]
    os.environ.update(HF_ENDPOINT=hub.url, HF_HUB_DISABLE_XET="1", HF_HOME=str(root / "hf"), OMP_NUM_THREADS="1")
    os.environ.update(HOME=str(root), XDG_CACHE_HOME=str(root / "cache"))
    from tests import tiny
    from tests.rows import row, write_rows

    base, rows = tiny.llama(root / "llama"), write_rows(root / "rows.jsonl", [row(n) for n in range(40)])
    forkserver = ForkServer()
    made = []
    for side in (Phoque, Folder, Together, Plain):
        (root / side.__name__).mkdir()
        made.append(side(root / side.__name__, hub, forkserver, base, rows))
    try:
        yield tuple(made)  # ty: ignore[invalid-yield]
    finally:
        forkserver.stop()
        hub.stop()
        shutil.rmtree(root, ignore_errors=True)


def table(only: list[int], peer: bool, way: str) -> int:
    """Print the table; return how many faults phoque did not survive. `way` is hub, folder or together."""
    lost, plain_lost = {}, {}
    faults = {"hub": FAULTS, "folder": FOLDER_FAULTS, "together": TOGETHER_FAULTS}[way]
    with sides() as (on_hub, in_folder, together, plain):
        side = {"hub": on_hub, "folder": in_folder, "together": together}[way]
        print("| # | fault | phoque | plain Trainer |\n|---|---|---|---|")
        for number, (name, fault) in enumerate(faults, 1):
            if only and number not in only:
                continue
            if (why := tried(side, fault)) is not None:
                lost[number] = why
            if peer and (why := tried(plain, fault)) is not None:
                plain_lost[number] = why
            theirs = (
                "not run" if not peer else f"lost: {plain_lost[number][:90]}" if number in plain_lost else "survived"
            )
            ours = f"LOST: {lost[number]}" if number in lost else "survived"
            print(f"| {number} | {name} | {ours} | {theirs} |", flush=True)
    count = len(only or faults)
    lost_steps = "0 steps lost" if not lost else f"lost in {len(lost)}"
    print(f"\nfaults: {count} injected, {count - len(lost)} survived, {lost_steps}")
    if peer:
        print(f"plain Trainer: {count} injected, {count - len(plain_lost)} survived")
    return len(lost)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--soak", type=int, default=0, help="kill one long run so many times instead")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, nargs="*", default=[])
    parser.add_argument("--no-peer", action="store_true")
    parser.add_argument("--folder", action="store_true", help="keep the run in a folder, as on a mounted bucket")
    parser.add_argument("--together", action="store_true", help="train with two processes, and kill one of them")
    asked = parser.parse_args()
    if asked.soak:
        with sides() as (phoque, *_):
            print(
                f"soak: {asked.soak} kills and faults over one run, {soak(phoque, asked.soak, asked.seed)} steps lost"
            )
    else:
        way = "folder" if asked.folder else "together" if asked.together else "hub"
        sys.exit(table(asked.only, way == "hub" and not asked.no_peer, way) > 0)
