"""The command that installs an extra, from where phoque was installed."""

import json

import pytest

from phoque import extras


@pytest.mark.parametrize(
    ("origin", "command"),
    [
        (None, "pip install 'phoque[onnx]'"),
        (
            {"url": "https://pier.example/phoque", "vcs_info": {"vcs": "git", "commit_id": "abc"}},
            "pip install 'phoque[onnx] @ git+https://pier.example/phoque@abc'",
        ),
        ({"url": "file:///home/pier/a%20clone", "dir_info": {}}, "pip install '/home/pier/a clone[onnx]'"),
        ({"url": "file:///home/pier", "dir_info": {"editable": True}}, "pip install -e '/home/pier[onnx]'"),
    ],
)
def test_an_extra_is_installed_from_where_phoque_came_from(monkeypatch, origin, command):
    class Installed:
        def read_text(self, name):
            return json.dumps(origin) if origin else None

    monkeypatch.setattr(extras, "distribution", lambda name: Installed())
    assert extras.install_command("onnx") == command
