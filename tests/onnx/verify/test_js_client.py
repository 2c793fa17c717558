"""Real clients: Transformers.js in Node and in Chromium, installed as phoque installs it, and the chat page."""

import json
import shutil

import pytest
from tests.chat.page import check_page, look_at_page

from phoque.checks import CheckFailed
from phoque.onnx.verify.js_client import CLIENT, _ask_client
from phoque.settings.verify_onnx import LEVELS

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def cache(home):
    return home / "cache" / "phoque"


def test_a_page_without_a_precision_takes_int8_on_wasm(phoque, text_model, chats, cache, tmp_path):
    asked = ["export-onnx", "--merged-dir", text_model, "--chats", chats, "--dtype", "q8", "--dtype", "int8"]
    phoque(*asked, "--output-dir", "x")
    checks = phoque("verify-onnx", "--local-dir", "x", "--install", "--level", "browser", "--json").json["checks"]
    (found,) = [check for check in checks if check["level"] == "browser" and check["asks"].startswith("int8: a page")]
    assert found["result"] == "PASS"
    for file in (tmp_path / "x" / "onnx").glob("model_quantized*"):
        file.unlink()
    assert _ask_client("browser.mjs", tmp_path / "x", layout="text", dtype=None, device="wasm", cache=cache)["said"]
    with pytest.raises(CheckFailed):  # Node asks for q8, which is no longer there
        _ask_client("node.mjs", tmp_path / "x", layout="text", dtype=None, device="cpu", cache=cache)


def test_a_folder_with_any_name_is_loaded(phoque, text_export, tmp_path):
    """Transformers.js loads nothing from a name that cannot be a Hub id, such as that of a folder in phoque's cache."""
    folder = shutil.copytree(text_export[0], tmp_path / "harbour--seal.. (1)")
    words = ["verify-onnx", "--local-dir", folder, "--install", "--level", "browser", "--dtype", "fp32", "--json"]
    assert phoque(*words).json["levels"]["browser"] == "PASS"


@pytest.mark.parametrize("kind", ["text_export", "seeing_export"])
def test_an_export_passes_every_level(phoque, request, kind, cache):
    folder, _ = request.getfixturevalue(kind)
    ran = phoque("verify-onnx", "--local-dir", folder, "--install", "--json")
    assert ran.json["levels"] == dict.fromkeys(("files", "graph", "ort", "node", "browser"), "PASS"), ran.json["checks"]
    ran = [check for check in ran.json["checks"] if check["level"] in ("node", "browser") and check["result"] == "PASS"]
    assert len(ran) == 4 and all("tokens/s" in check["said"] for check in ran)
    assert CLIENT.is_installed(cache)


def test_webgpu_says_what_wasm_says_with_plain_operators(phoque, text_model, text_export, chats):
    """On the software adapter of headless Chromium, which has no shader-f16, and computes fused attention wrongly."""
    asked = ["export-onnx", "--merged-dir", text_model, "--no-fuse", "--chats", chats, "--output-dir", "plain"]
    phoque(*asked, "--dtype", "fp32", "--dtype", "q4")
    ran = phoque("verify-onnx", "--local-dir", "plain", "--install", "--webgpu", "--json")
    found = [check for check in ran.json["checks"] if "WebGPU's logits" in check["asks"]]
    assert len(found) == 2 and {check["result"] for check in found} == {"PASS"}, found
    ran = phoque("verify-onnx", "--local-dir", text_export[0], "--webgpu", "--dtype", "fp32", "--json", expect=1)
    (fused,) = [check for check in ran.json["checks"] if check["result"] == "FAIL"]
    assert "--no-fuse" in fused["said"] and "of the largest logit" in fused["said"]


def test_what_only_a_browser_finds_fails_there(phoque, text_export, tmp_path, monkeypatch):
    """A graph that points to its data under another name than config.json declares loads in Node all the same."""
    from phoque.checks import Verdict
    from phoque.onnx.verify import js_client
    from phoque.settings.verify_onnx import VerifySettings

    folder = shutil.copytree(text_export[0], tmp_path / "broken")
    config = json.loads((folder / "config.json").read_text())
    config["transformers.js_config"]["use_external_data_format"] = {}
    (folder / "config.json").write_text(json.dumps(config))
    phoque("verify-onnx", "--local-dir", text_export[0], "--install", "--level", "node")
    from phoque.console import console
    from phoque.services import Services
    from phoque.settings.environment import cache_folder

    verdict, s = Verdict(LEVELS), VerifySettings(local_dir=folder)
    services = Services.without_token(console, cache_folder())
    js_client.check_node(folder, "text", ["fp32"], s, services, verdict)
    js_client.check_browser(folder, "text", ["fp32"], s, services, verdict)
    assert verdict.level("node") == "PASS" and verdict.level("browser") == "FAIL"


@pytest.mark.parametrize("size", [(1280, 800), (390, 780)])
def test_the_chat_page_answers_without_a_network(phoque, start, text_export, cache, tmp_path, size):
    phoque("verify-onnx", "--local-dir", text_export[0], "--install", "--level", "node")
    words = ["verify-onnx", "--local-dir", text_export[0], "--serve", "--port", 0, "--json"]
    seen = look_at_page(start, words, CLIENT.folder(cache), tmp_path / "page.png", size)
    assert "loaded in" in seen["loaded"]
    check_page(seen, size)
