"""How to install an optional dependency group of phoque where it is missing."""

import json
import shlex
from importlib.metadata import distribution
from urllib.parse import urlsplit
from urllib.request import url2pathname


def install_command(extra: str) -> str:
    """The command that installs an extra from where this phoque came from: an index, a repository or a folder."""
    origin = json.loads(distribution("phoque").read_text("direct_url.json") or "{}")
    name = f"phoque[{extra}]"
    if vcs := origin.get("vcs_info"):
        name = f"{name} @ {vcs['vcs']}+{origin['url']}@{vcs['commit_id']}"
    elif "dir_info" in origin:
        folder = url2pathname(urlsplit(origin["url"]).path)
        editable = "-e " if origin["dir_info"].get("editable") else ""
        return f"pip install {editable}{shlex.quote(f'{folder}[{extra}]')}"
    return f"pip install {shlex.quote(name)}"
