"""A process that has imported everything and forks for each command, so that a test does not pay 20 s of imports.

What runs in the fork is phoque's own main() with its own arguments, environment, folder and output files, and it ends
with its own exit code. tests/test_cli.py and the slow tests start phoque the ordinary way.
"""

import gc
import importlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
import traceback
from pathlib import Path

# by name: a linter takes imports that nothing uses away
LEANED_ON = (
    "phoque.training.run",
    "phoque.training.trainer",
    "trl.chat_template_utils",
    "phoque.probes.persona_vectors.run",
    "phoque.probes.sae.run",
    "gguf",
    "jinja2",
    "vl_convert",
    "transformers.models.llama.modeling_llama",
    "phoque.onnx.export",
    "transformers.exporters.exporter_onnx",
    "onnxscript.function_libs.torch_lib.ops.core",
    "onnxruntime",
    "torch.onnx._internal.exporter._core",
)

# preludes: what happens in the process of a command ahead of each training step
AHEAD = """
import time, torch
from transformers import Trainer
whole = Trainer.training_step
def step(self, *a, **k):
    {what}
    return whole(self, *a, **k)
Trainer.training_step = step
"""


def slowly(seconds: float = 0.25) -> str:
    """A wait, which changes nothing: on the fastest machine there is time to stop the run."""
    return AHEAD.format(what=f"time.sleep({seconds})")


class ForkServer:
    """Starts commands; one at a time or several side by side."""

    def __init__(self) -> None:
        arguments = [sys.executable, "-m", "tests.forkserver"]
        here = Path(__file__).parent.parent
        env = os.environ | {"TORCH_CPP_LOG_LEVEL": "ERROR"}  # as claim_gpu sets it before torch is imported
        self._process = subprocess.Popen(arguments, stdin=-1, stdout=-1, text=True, cwd=here, env=env)
        self._lock = threading.Lock()
        self._codes: dict[int, int] = {}

    def start(
        self, arguments: list[str], env: dict[str, str], cwd: Path, out: Path, err: Path, prelude: str = ""
    ) -> int:
        """Fork a command; return its process id. `prelude` is executed in it first, to hurt it from within."""
        asked = {"argv": arguments, "env": env, "cwd": str(cwd), "out": str(out), "err": str(err)}
        with self._lock:
            pid = self._ask(asked | {"prelude": prelude})
            self._codes.pop(pid, None)  # the system gives a number again
            return pid

    def poll(self, pid: int, wait: bool) -> int | None:
        """The exit code (negative for a signal), or None while it runs and `wait` is false."""
        while (code := self.poll_once(pid)) is None and wait:
            time.sleep(0.01)  # here and not there, where it would keep other commands from starting
        return code

    def poll_once(self, pid: int) -> int | None:
        """As poll, without waiting; a code is kept for whoever asks again."""
        with self._lock:  # a second asker must find the code, and not a process that is gone
            if pid not in self._codes and (code := self._ask({"pid": pid})) is not None:
                self._codes[pid] = code
            return self._codes.get(pid)

    def stop(self) -> None:
        self._process.stdin.close()
        self._process.wait()

    def _ask(self, request: dict):
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())


def serve() -> None:
    from phoque.console import silence_libraries

    silence_libraries()
    for name in LEANED_ON:
        importlib.import_module(name)
    gc.freeze()  # a collection in a fork would walk all that was imported, and copy its memory
    for line in sys.stdin:
        request = json.loads(line)
        if "argv" in request:
            answer = os.fork() or run(request)
        else:
            pid, status = os.waitpid(request["pid"], os.WNOHANG)
            answer = os.waitstatus_to_exitcode(status) if pid else None
        print(json.dumps(answer), flush=True)


def run(request: dict) -> None:
    code = 1
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.environ.clear()
        os.environ.update(request["env"])
        os.chdir(request["cwd"])
        for number, name in ((0, os.devnull), (1, request["out"]), (2, request["err"])):
            os.dup2(os.open(name, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND, 0o600), number)
        sys.stdin, sys.stdout, sys.stderr = (
            open(0, closefd=False),
            open(1, "w", closefd=False),
            open(2, "w", closefd=False),
        )
        sys.argv = ["phoque", *request["argv"]]
        exec(request["prelude"], {"__name__": "prelude"})
        from phoque.cli.main import main

        main()
        code = 0
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 0 if stop.code is None else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    serve()
