"""A model's answers end at its template's stop token, whatever its own configs name: here, in merges, in exports."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests import tiny
from tests.merging.test_merge import save_random_adapter

from phoque.inference.generate import Request, generate_replies
from phoque.models.config import load_tokenizer
from phoque.models.load import load_model
from phoque.models.source import Source
from phoque.models.stop_tokens import list_stop_tokens, stop_at_template

END, STOP = 0, 2  # <|endoftext|> and <|im_end|>


@pytest.fixture
def base(tmp_path):
    """A base model with a ChatML template, whose configs name the end of a text alone, such as Qwen2.5's."""
    folder = tiny.llama(tmp_path / "base", eos_token_id=END)
    tokenizer = tiny.tokenizer()
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(END)
    tokenizer.save_pretrained(folder)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": END}))
    return folder


def test_answers_end_at_the_templates_stop_token(base):
    source = Source("base", base, "1", "")
    model, tokenizer = load_model(source, "fp32").eval(), load_tokenizer(source)
    assert list_stop_tokens(tokenizer, base) == [STOP, END]
    head = model.lm_head.forward
    model.lm_head.forward = lambda hidden: head(hidden).index_fill(-1, torch.tensor([STOP]), 1e3)
    for ends, reason in ((END, "length"), ([END, STOP], "stop")):
        (reply,) = generate_replies(model, [Request([1, 5, 9])], 6, temperature=0.0, top_p=1.0)
        assert reply.finish_reason == reason and len(reply.ids) == (6 if reason == "length" else 0)
        assert model.generation_config.eos_token_id == ends
        stop_at_template(model, tokenizer)


def test_a_merge_and_an_export_name_it(phoque, base, tmp_path):
    save_random_adapter(base, tmp_path / "adapter")
    phoque("merge", "--adapter-source", "adapter", "--base-model", base, "--output-dir", "merged", "--dtype", "fp32")
    generation = tmp_path / "merged" / "generation_config.json"
    assert json.loads(generation.read_text())["eos_token_id"] == [END, STOP]
    generation.write_text(json.dumps({"eos_token_id": END}))  # as other tools merge
    export = ["export-onnx", "--merged-dir", "merged", "--output-dir", "onnx", "--dtype", "fp32", "--no-accuracy"]
    assert phoque(*export, "--json").json["verdict"] == "PASS"
    generation = tmp_path / "onnx" / "generation_config.json"
    assert json.loads(generation.read_text())["eos_token_id"] == [END, STOP]
    generation.write_text(json.dumps({"eos_token_id": END}))
    ran = phoque("verify-onnx", "--local-dir", "onnx", "--level", "files", expect=1)
    assert "the chat template ends an answer with <|im_end|>, which is not in eos_token_id" in ran.out


def test_a_model_with_named_templates_is_exported_with_them(phoque, base, tmp_path):
    template = base / "chat_template.jinja"
    named = [{"name": name, "template": template.read_text()} for name in ("default", "tool_use")]
    settings = json.loads((base / "tokenizer_config.json").read_text()) | {"chat_template": named}
    (base / "tokenizer_config.json").write_text(json.dumps(settings))
    template.unlink()
    export = ["export-onnx", "--merged-dir", base, "--output-dir", "onnx", "--dtype", "fp32", "--no-accuracy"]
    assert phoque(*export, "--json").json["verdict"] == "PASS"
    assert json.loads((tmp_path / "onnx" / "tokenizer_config.json").read_text())["chat_template"] == named


def test_a_base_without_a_tokenizer_config_is_merged(phoque, base, tmp_path):
    (base / "tokenizer_config.json").unlink()
    save_random_adapter(base, tmp_path / "adapter")
    phoque("merge", "--adapter-source", "adapter", "--base-model", base, "--output-dir", "merged", "--dtype", "fp32")
    assert "chat_template" in json.loads((tmp_path / "merged" / "tokenizer_config.json").read_text())


def test_a_head_of_its_own_counts_although_the_config_ties_it(phoque, base, tmp_path):
    from transformers import AutoModelForCausalLM

    tensors = load_file(base / "model.safetensors")
    tensors["lm_head.weight"] = torch.randn_like(tensors["model.embed_tokens.weight"])
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        wanted = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)(input_ids=ids).logits
        found = load_model(Source("base", base, "1", ""), "fp32")(input_ids=ids).logits
    torch.testing.assert_close(found, wanted)
    save_random_adapter(base, tmp_path / "adapter")
    phoque("merge", "--adapter-source", "adapter", "--base-model", base, "--output-dir", "merged", "--dtype", "fp32")
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["tie_word_embeddings"] is False
    export = ["export-onnx", "--merged-dir", base, "--output-dir", "onnx", "--dtype", "fp32", "--no-accuracy"]
    assert phoque(*export, "--json").json["verdict"] == "PASS"


def test_a_merge_is_not_called_proven_where_the_adapter_changes_nothing(phoque, base, tmp_path):
    save_random_adapter(base, tmp_path / "adapter")
    weights = tmp_path / "adapter" / "adapter_model.safetensors"
    save_file({name: tensor * 1e-3 for name, tensor in load_file(weights).items()}, weights, {"format": "pt"})
    merge = ["merge", "--adapter-source", "adapter", "--base-model", base, "--output-dir", "merged", "--dtype", "fp32"]
    out = phoque(*merge).out
    assert "not proven, because the adapter hardly changes the base" in out
