"""README and docs: short enough, links that lead somewhere, flags that exist, and references that are not stale."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from phoque.cli.main import COMMANDS
from phoque.settings.chat import ChatSettings
from phoque.settings.compare_sae import SaeSettings
from phoque.settings.export_gguf import GgufSettings
from phoque.settings.export_onnx import ExportSettings
from phoque.settings.fields import flag_names
from phoque.settings.jobs import JobsSettings
from phoque.settings.merge import MergeSettings
from phoque.settings.psm_probe import PsmSettings
from phoque.settings.train import TrainSettings
from phoque.settings.verify_gguf import VerifyGgufSettings
from phoque.settings.verify_onnx import VerifySettings

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "SECURITY.md", *sorted((ROOT / "docs").rglob("*.md"))]
MODELS = {
    "chat": ChatSettings,
    "export-gguf": GgufSettings,
    "verify-gguf": VerifyGgufSettings,
    "train": TrainSettings,
    "merge": MergeSettings,
    "jobs": JobsSettings,
    "export-onnx": ExportSettings,
    "verify-onnx": VerifySettings,
    "compare-sae": SaeSettings,
    "psm-probe": PsmSettings,
}
COMMON_FLAGS = {"--dry-run", "--json", "--quiet", "--config", "--secrets-file", "--help", "--version"}


def command_lines(text: str) -> list[list[str]]:
    """The words of every phoque command line, in console blocks and in `code`; continued lines are joined."""
    blocks = re.findall(r"^ *```(?:console|bash)\n(.*?)^ *```", text.replace("\\\n", " "), re.MULTILINE | re.DOTALL)
    lines = [line for block in blocks for line in re.findall(r"(?:^|\s)(phoque [a-z-]+(?: .*)?)$", block, re.MULTILINE)]
    return [shlex.split(line, comments=True) for line in [*lines, *re.findall(r"`(phoque [a-z-]+ --[^`]*)`", text)]]


def test_the_readme_is_read_in_two_minutes():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 160 and len(text.split()) <= 1300


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere_and_flags_exist(page):
    text = page.read_text()
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", text):
        assert target.startswith("http") or (page.parent / target).exists(), target
    for words in command_lines(text):
        command = words[1]
        assert command in COMMANDS, words
        model = MODELS[command]
        known = {flag for name in model.model_fields for flag in flag_names(model, name)} | COMMON_FLAGS
        for flag in (word.split("=")[0] for word in words if word.startswith("--")):
            assert flag in known or flag.replace("--no-", "--", 1) in known, f"{flag} in {words}"


def test_each_defence_names_tests_that_exist():
    named = re.findall(r"`(tests/[^`]+\.py)::(test_\w+)`", (ROOT / "SECURITY.md").read_text())
    assert len(named) > 20
    for file, test in named:
        assert f"\ndef {test}(" in (ROOT / file).read_text(), test


def test_the_generated_references_are_not_stale():
    ran = subprocess.run([sys.executable, ROOT / "docs" / "generate.py", "--check"], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
