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


HARDWARE = [  # as the Hub lists it; prices of 2026-11
    ("cpu-basic", "CPU Basic", "2 vCPU", "16 GB", None, 167),
    ("t4-small", "Nvidia T4 - small", "4 vCPU", "15 GB", ("T4", "1", "16 GB"), 6667),
    ("a10g-large", "Nvidia A10G - large", "12 vCPU", "46 GB", ("A10G", "1", "24 GB"), 25000),
    ("a10g-largex2", "2x Nvidia A10G - large", "24 vCPU", "92 GB", ("A10G", "2", "48 GB"), 50000),
    ("a100-large", "Nvidia A100 - large", "12 vCPU", "142 GB", ("A100", "1", "80 GB"), 41667),
    ("h200", "Nvidia H200", "23 vCPU", "256 GB", ("H200", "1", "141 GB"), 83333),
]


def list_hardware() -> list[dict[str, Any]]:
    """What the Hub answers to a request for its hardware."""
    found = []
    for name, title, cpu, ram, gpu, price in HARDWARE:
        accelerator = gpu and {"type": "gpu", "model": gpu[0], "quantity": gpu[1], "vram": gpu[2]}
        found.append(
            {
                "name": name,
                "prettyName": title,
                "cpu": cpu,
                "ram": ram,
                "ephemeralStorage": "100 GB",
                "accelerator": accelerator and accelerator | {"manufacturer": "Nvidia"},
                "unitCostMicroUSD": price,
                "unitCostUSD": price / 1e6,
                "unitLabel": "minute",
            }
        )
    return found


class Jobs:
    """Runs what is posted; `grace` is the time between SIGTERM and SIGKILL, `env` what every container has.

    `mount(volume, folder)` fills a folder with what a volume holds; in a container's command and environment, the
    volume's mount path is replaced by that folder.
    """

    def __init__(
        self,
        root: Path,
        env: dict[str, str],
        grace: float,
        start: Callable[..., Any] = Process,
        mount: Callable[[dict[str, Any], Path], None] | None = None,
    ) -> None:
        self.root, self.env, self.grace, self.start, self.mount = root, env, grace, start, mount
        self.jobs: dict[str, dict[str, Any]] = {}
        self.has_machines = True  # False: what is submitted stays in the queue

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
            "volumes": spec.get("volumes"),
            "dockerImage": spec.get("dockerImage"),
            "status": {"stage": job["stage"], "message": job["message"]},
            "finishedAt": f"{job['finished']:%Y-%m-%dT%H:%M:%S.%f}Z" if "finished" in job else None,
            "durations": {"schedulingSecs": 1, "runningSecs": 90, "totalSecs": 91},
        }

    def listed(self, namespace: str, labels: list[str], stages: list[str]) -> list[dict[str, Any]]:
        """The jobs of a namespace with all of the labels, each key=value, in one of the stages, if any are given."""
        wanted = dict(label.split("=", 1) for label in labels)
        return [
            self.shown(number)
            for number, job in self.jobs.items()
            if job["namespace"] == namespace
            and (not stages or job["stage"] in stages)
            and wanted.items() <= (job["spec"].get("labels") or {}).items()
        ]

    def duplicate(self, number: str) -> dict[str, Any]:
        """Run the same once more."""
        return self.submit(self.jobs[number]["namespace"], self.jobs[number]["spec"])

    def cancel(self, number: str) -> None:
        self.jobs[number]["stage"] = "CANCELED"

    def _run(self, job: dict[str, Any]) -> None:
        while not self.has_machines and job["stage"] == "SCHEDULING":
            time.sleep(0.05)
        if job["stage"] != "SCHEDULING":
            return
        spec, folder = job["spec"], self.root / f"container-{job['id']}"
        for attempt in range(spec.get("attempts") or 1):
            place = folder / str(attempt)  # what is on a container's disk is gone with it
            place.mkdir(parents=True)
            env = self.env | spec["environment"] | spec.get("secrets", {}) | {"JOB_ID": job["id"]}
            job["stage"] = "RUNNING"
            command = list(spec["command"])
            for volume in spec.get("volumes") or []:
                folder_here = place / volume["mountPath"].strip("/").replace("/", "-")
                self.mount(volume, folder_here)
                command = [word.replace(volume["mountPath"], str(folder_here)) for word in command]
            process = self.start(command, env, place, job["log"])
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
        job["finished"] = datetime.now(UTC)
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
