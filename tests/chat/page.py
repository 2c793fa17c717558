"""Look at a chat page in Chromium, at the size of a laptop or a phone."""

import json
import os
import shutil
import signal
import subprocess
from pathlib import Path

from phoque.files import split_lines
from phoque.npm import find_chromium

SCRIPT = Path(__file__).with_name("page.mjs")


def look_at_page(start, words: list, modules: Path, picture: Path, size: tuple[int, int], *more: str) -> dict:
    """Start a command with --serve, ask a question in its page, and return what was seen; `modules` has puppeteer."""
    running = start(*words)
    out = running._files[0]
    running.until(lambda: '"url"' in out.read_text(), 180)
    url = json.loads(out.read_text())["url"]
    script = shutil.copyfile(SCRIPT, modules / SCRIPT.name)
    command = ["node", script.name, url, picture, *map(str, size), find_chromium(), *more]
    ran = subprocess.run(command, cwd=modules, capture_output=True, text=True, timeout=500)
    os.kill(running.pid, signal.SIGINT)
    ended = running.ended()
    assert ended.code in (0, 130), ended.err
    assert ran.returncode == 0, ran.stderr
    return json.loads(split_lines(ran.stdout)[-1])


def check_page(seen: dict, size: tuple[int, int], answers: int = 1) -> None:
    """The page has answered, showed its speed while it did, fits the window, and asked no other host."""
    assert "per second" in seen["state"] and "first after" in seen["state"], seen
    assert "reading the prompt" in seen["states"] and "N tokens, N per second" in seen["states"], seen["states"]
    assert [kind for kind, _ in seen["turns"]] == ["turn user"] + ["turn assistant"] * answers, seen["turns"]
    assert all(text for _, text in seen["turns"]) and not seen["problems"], seen
    assert seen["overflow"] <= 0 and seen["button"] <= size[1]
    assert all(host.startswith("127.0.0.1") or not host for host in seen["hosts"])  # data: and blob: have none
