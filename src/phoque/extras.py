"""Where this phoque was installed from, and how to install an optional dependency group of it that is missing."""

import json
import shlex
from importlib.metadata import distribution
from typing import Any
from urllib.parse import urlsplit
from urllib.request import url2pathname


def read_origin() -> dict[str, Any]:
    """What pip recorded about the installation from a folder, a file or a repository (PEP 610); empty for an index."""
    return json.loads(distribution("phoque").read_text("direct_url.json") or "{}")


def name_package(extra: str, origin: dict[str, Any]) -> str:
    """The package with an extra, which may be empty, as pip takes it; a repository is named with its commit."""
    name = f"phoque[{extra}]" if extra else "phoque"
    vcs = origin.get("vcs_info")
    return f"{name} @ {vcs['vcs']}+{origin['url']}@{vcs['commit_id']}" if vcs else name


def install_command(extra: str) -> str:
    """The command that installs an extra from where this phoque came from: an index, a repository or a folder."""
    origin = read_origin()
    if "dir_info" not in origin:
        return f"pip install {shlex.quote(name_package(extra, origin))}"
    folder = url2pathname(urlsplit(origin["url"]).path)
    editable = "-e " if origin["dir_info"].get("editable") else ""
    return f"pip install {editable}{shlex.quote(f'{folder}[{extra}]')}"
