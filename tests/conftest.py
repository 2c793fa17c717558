"""Every test runs in a home of its own: nothing of the user's caches, tokens or settings is seen or touched."""

import gc
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from filelock import FileLock

from tests.fakehub import FakeHub
from tests.forkserver import ForkServer
from tests.rows import row, write_rows

# read once, when huggingface_hub is imported, which collecting the tests may do
HUB = FakeHub()
os.environ |= {"HF_HUB_DISABLE_XET": "1", "HF_ENDPOINT": HUB.url}
if not shutil.which("nvidia-smi"):  # Triton, once imported, runs its kernels as Python
    os.environ["TRITON_INTERPRET"] = "1"

OURS = (
    "PHOQUE_",
    "HF_",
    "WANDB_",
    "HUB_",
    "DATASET_",
    "MAX_STEPS",
    "BASE_MODEL",
    "OUTPUT_DIR",
    "FORCE_",
    "EXPORT_",
    "MERGED_",
    "JOB_ID",
    "MODEL_",
    "ADAPTER_",
    "MERGE_",
    "ARTIFACTS_",
    "FAIL_",
    "OPENAI_",
)


# The slow files, so that no worker is left with one of them at the end; the first trains the seal that others wait for.
LONGEST_FIRST = [
    "training/test_demo.py",
    "onnx/test_smollm2_export.py",
    "probes/test_smollm2_probes.py",
    "training/test_faults.py",
    "test_script_lines.py",
    "chat/test_seal.py",
]


def pytest_collection_modifyitems(items):
    rank = {Path(__file__).parent / name: number for number, name in enumerate(LONGEST_FIRST)}
    items.sort(key=lambda item: rank.get(item.path, len(rank)))
    gc.freeze()  # what was imported stays; a collection need not walk it


@pytest.fixture(scope="session")
def home(tmp_path_factory):
    """A home folder for the session, so that the demo's weights are dequantised once."""
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="session")
def served():
    """The Hub of this session."""
    yield HUB
    HUB.stop()


@pytest.fixture
def hub(served):
    """An empty Hub without faults."""
    served.empty()
    return served


@pytest.fixture(autouse=True)
def isolated(home, served, monkeypatch, tmp_path):
    """Environment and working folder of one test."""
    isolate(monkeypatch, home, served.url)
    monkeypatch.setenv("WANDB_DIR", str(tmp_path / "wandb"))
    monkeypatch.chdir(tmp_path)


def isolate(patch: pytest.MonkeyPatch, home: Path, hub: str) -> None:
    for name in list(os.environ):
        if name.startswith(OURS):
            patch.delenv(name)
    places = {
        "HOME": home,
        "HF_HOME": home / "hf",
        "XDG_CACHE_HOME": home / "cache",
        "XDG_CONFIG_HOME": home / "config",
    }
    for name, place in places.items():
        patch.setenv(name, str(place))
    patch.setenv("HF_ENDPOINT", hub)
    patch.setenv("HF_HUB_DISABLE_XET", "1")
    patch.setenv("COLUMNS", "120")
    patch.setenv("OMP_NUM_THREADS", "1")  # two workers share two cores


class Ran:
    """What a finished command left behind."""

    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err

    @property
    def json(self):
        return json.loads(self.out)

    @property
    def error(self) -> list[str]:
        """The three lines of an error; fails if there was a traceback or none."""
        assert "Traceback" not in self.err, self.err
        lines = self.err.rstrip().splitlines()
        assert len(lines) >= 3 and lines[-3].startswith("error: "), self.err
        return lines[-3:]


class Running:
    """A command under way."""

    def __init__(self, forkserver, arguments, env, prelude="") -> None:
        self._files = [Path(tempfile.mkstemp(prefix="phoque-test-")[1]) for _ in range(2)]
        self._forkserver, self._code = forkserver, None
        env = os.environ | (env or {})
        self.pid = forkserver.start([str(a) for a in arguments], env, Path.cwd(), *self._files, prelude)

    def poll(self, wait: bool = False) -> int | None:
        if self._code is None:
            self._code = self._forkserver.poll(self.pid, wait)
        return self._code

    def ended(self) -> Ran:
        code = self.poll(wait=True)
        texts = [file.read_text() for file in self._files]
        for file in self._files:
            file.unlink()
        return Ran(code, *texts)

    def read_stderr(self) -> str:
        """What it has printed to stderr so far."""
        return self._files[1].read_text()

    def until(self, condition, seconds: float = 120) -> None:
        """Wait for something to happen while the command runs."""
        end = time.monotonic() + seconds
        while not condition():
            assert self.poll() is None, self.ended().err
            assert time.monotonic() < end, "nothing happened"
            time.sleep(0.01)


@pytest.fixture(scope="session")
def forkserver(home, served):
    with pytest.MonkeyPatch.context() as patch:
        isolate(patch, home, served.url)
        server = ForkServer()
    yield server
    server.stop()


@pytest.fixture
def start(forkserver):
    """Start phoque in a process of its own: `start("train", ...)` returns a Running."""
    return lambda *arguments, env=None, prelude="": Running(forkserver, arguments, env, prelude)


@pytest.fixture
def phoque(start):
    """Run phoque to its end, in a process of its own, and check its exit code."""

    def run(*arguments, expect: int = 0, env: dict | None = None, prelude: str = "") -> Ran:
        ran = start(*arguments, env=env, prelude=prelude).ended()
        assert ran.code == expect, f"exit {ran.code}\n{ran.out}\n{ran.err}"
        return ran

    return run


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory) -> Path:
    from tests import tiny

    return tiny.llama(tmp_path_factory.mktemp("tiny") / "llama")


def run_as_user(*arguments) -> dict:
    """Run phoque as a user does, in a process of its own that imports everything; return its --json."""
    env = os.environ | {"WANDB_MODE": "disabled"}
    command = [sys.executable, "-m", "phoque", *map(str, arguments), "--json"]
    ran = subprocess.run(command, env=env, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    return json.loads(ran.stdout)


@pytest.fixture(scope="session")
def shared(tmp_path_factory) -> Path:
    """A folder that all workers of this session share."""
    base = tmp_path_factory.getbasetemp()
    return base.parent if "PYTEST_XDIST_WORKER" in os.environ else base


@pytest.fixture
def seal(shared, isolated) -> dict:
    """The demo's whole run in `shared / "seal"`, trained once for all workers: its --json. For the slow tests only."""
    record = shared / "seal.json"
    with FileLock(shared / "seal.lock"):
        if not record.exists():
            command = ["train", "--preset", "demo", "--output-dir", shared / "seal", "--sample-every", 60]
            record.write_text(json.dumps(run_as_user(*command)))
    return json.loads(record.read_text())


@pytest.fixture
def rows(tmp_path) -> Path:
    """A file of forty good rows."""
    return write_rows(tmp_path / "rows.jsonl", [row(n) for n in range(40)])
