"""HF Jobs on this machine: each a process with a time limit, SIGTERM, a grace period, SIGKILL, and its log."""

import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

DONE = ("COMPLETED", "CANCELED", "ERROR")


class Process:
    """The default way to start a command; the tests start it from their forkserver, which is quicker."""

    def __init__(self, argv: list[str], env: dict[str, str], cwd: Path, out: Path) -> None:
        with out.open("ab") as log:
            self._process = subprocess.Popen(argv, env=env, cwd=cwd, stdout=log, stderr=log, stdin=subprocess.DEVNULL)
        self.pid = self._process.pid

    def poll(self) -> int | None:
        return self._process.poll()


class Jobs:
    """Runs what is posted; `grace` is the time between SIGTERM and SIGKILL, `env` what every container has."""

    def __init__(self, root: Path, env: dict[str, str], grace: float, start: Callable[..., Any] = Process) -> None:
        self.root, self.env, self.grace, self.start = root, env, grace, start
        self.jobs: dict[str, dict[str, Any]] = {}

    def submit(self, namespace: str, spec: dict[str, Any]) -> dict[str, Any]:
        number = f"{len(self.jobs) + 1:024x}"
        job = {"id": number, "namespace": namespace, "spec": spec, "stage": "SCHEDULING", "message": None}
        job |= {"created": datetime.now(UTC), "log": self.root / f"job-{number}.log", "codes": []}
        job["log"].write_text("")
        self.jobs[number] = job
        threading.Thread(target=self._run, args=(job,), daemon=True).start()
        return self.shown(number)

    def shown(self, number: str) -> dict[str, Any]:
        """A job as the Hub shows it: with the names of its secrets, never their values."""
        job = self.jobs[number]
        spec = job["spec"]
        return {
            "id": number,
            "createdAt": f"{job['created']:%Y-%m-%dT%H:%M:%S.%f}Z",
            "owner": {"id": "1", "name": job["namespace"], "type": "user"},
            "command": spec["command"],
            "arguments": spec["arguments"],
            "environment": spec["environment"],
            "secrets": dict.fromkeys(spec.get("secrets", {}), ""),
            "flavor": spec["flavor"],
            "labels": spec.get("labels"),
            "dockerImage": spec.get("dockerImage"),
            "status": {"stage": job["stage"], "message": job["message"]},
        }

    def cancel(self, number: str) -> None:
        self.jobs[number]["stage"] = "CANCELED"

    def _run(self, job: dict[str, Any]) -> None:
        spec, folder = job["spec"], self.root / f"container-{job['id']}"
        for attempt in range(spec.get("attempts") or 1):
            place = folder / str(attempt)  # what is on a container's disk is gone with it
            place.mkdir(parents=True)
            env = self.env | spec["environment"] | spec.get("secrets", {}) | {"JOB_ID": job["id"]}
            job["stage"] = "RUNNING"
            process = self.start(spec["command"], env, place, job["log"])
            end, message = time.monotonic() + (spec.get("timeoutSeconds") or 1800), "Job timeout"
            while process.poll() is None and time.monotonic() < end and job["stage"] == "RUNNING":
                time.sleep(0.02)
            if process.poll() is None:
                self._kill(process)
            else:
                message = f"Job failed with exit code: {process.poll()}"
            job["codes"].append(process.poll())
            if process.poll() == 0 or job["stage"] == "CANCELED":
                break
        if job["stage"] == "RUNNING":
            job["stage"], job["message"] = ("COMPLETED", None) if job["codes"][-1] == 0 else ("ERROR", message)

    def _kill(self, process: Any) -> None:
        os.kill(process.pid, signal.SIGTERM)
        end = time.monotonic() + self.grace
        while process.poll() is None and time.monotonic() < end:
            time.sleep(0.02)
        if process.poll() is None:
            os.kill(process.pid, signal.SIGKILL)
            while process.poll() is None:
                time.sleep(0.02)

    def lines(self, number: str, follow: bool = True):
        """The log's lines, to the end of the job."""
        job, at = self.jobs[number], 0
        while True:
            over = job["stage"] in DONE
            text = job["log"].read_text(errors="replace")[at:]
            whole = text if over else text[: text.rfind("\n") + 1]
            at += len(whole)
            yield from whole.splitlines()
            if over:
                return
            time.sleep(0.05)
