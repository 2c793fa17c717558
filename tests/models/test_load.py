"""Loading: every weight accounted for and sane, or an error before any time is spent."""

import json
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from phoque.errors import PhoqueError, UsageError
from phoque.models.architectures import architecture_of
from phoque.models.config import load_config
from phoque.models.load import default_device, load_model
from phoque.models.lora import LoraOptions, add_lora_adapter, check_finite, compute_lora_norms
from phoque.models.source import Source


def source_of(folder):
    return Source("tiny", folder, "0", "test")


@pytest.fixture
def change_weights(tiny_llama, tmp_path):
    """A copy of the tiny model whose weights a function has changed."""

    def spoil(change):
        folder = shutil.copytree(tiny_llama, tmp_path / "spoilt")
        weights = load_file(folder / "model.safetensors")
        change(weights)
        save_file(weights, folder / "model.safetensors", {"format": "pt"})
        return source_of(folder)

    return spoil


def test_a_missing_weight_is_named(change_weights):
    with pytest.raises(PhoqueError) as caught:
        load_model(change_weights(lambda w: w.pop("model.layers.1.mlp.up_proj.weight")), "fp32")
    assert "model.layers.1.mlp.up_proj.weight" in caught.value.why


@pytest.mark.parametrize(
    ("name", "value"), [("model.norm.weight", float("nan")), ("model.layers.0.mlp.up_proj.weight", 448)]
)
def test_insane_magnitudes_are_refused(change_weights, name, value):
    with pytest.raises(PhoqueError, match="above 100 or NaN") as caught:
        load_model(change_weights(lambda w: w[name][..., :1].fill_(value)), "fp32")
    assert name in caught.value.what


def test_loading_is_what_transformers_loads(tiny_llama):
    from transformers import AutoModelForCausalLM

    ours, theirs = load_model(source_of(tiny_llama), "fp32"), AutoModelForCausalLM.from_pretrained(tiny_llama)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    assert all(torch.equal(v, theirs.state_dict()[k]) for k, v in ours.state_dict().items())
    ids = torch.arange(30)[None]
    assert torch.equal(ours(ids).logits, theirs(ids).logits)
    assert ours.lm_head.weight is ours.model.embed_tokens.weight


def test_nf4_is_bit_for_bit_what_transformers_quantises(tiny_llama):
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    nf4 = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    theirs = AutoModelForCausalLM.from_pretrained(tiny_llama, quantization_config=nf4, dtype=torch.bfloat16)
    ours = load_model(source_of(tiny_llama), "nf4")
    ids = torch.arange(30)[None]
    assert torch.equal(ours(ids).logits, theirs(ids).logits)
    packed = {n: m.weight.data for n, m in theirs.named_modules() if type(m).__name__ == "Linear4bit"}
    assert len(packed) == 14 and all(torch.equal(ours.get_submodule(n).weight.data, w) for n, w in packed.items())


def test_an_unknown_architecture_says_what_an_entry_needs(tmp_path):
    from transformers import GPT2Config

    GPT2Config(n_layer=1).save_pretrained(tmp_path / "gpt2")
    with pytest.raises(PhoqueError) as caught:
        load_config(source_of(tmp_path / "gpt2"))
    assert "gpt2" in caught.value.what and "architectures" in caught.value.fix


def test_code_that_a_repository_brings_is_refused_without_a_question(tmp_path, monkeypatch):
    config = {"model_type": "gull", "auto_map": {"AutoConfig": "gull.GullConfig"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "gull.py").write_text("raise SystemExit('it ran')")
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("a question was asked"))
    with pytest.raises(UsageError, match="cannot be read"):
        load_config(source_of(tmp_path))


def test_the_adapter_is_on_the_seven_projections_of_each_layer(tiny_llama):
    model = add_lora_adapter(load_model(source_of(tiny_llama), "fp32"), LoraOptions(rank=4, alpha=8))
    adapted = [n for n, _ in model.named_modules() if n.endswith("lora_A.default")]
    assert len(adapted) == 7 * 2 and not any("lm_head" in n or "embed" in n for n in adapted)
    assert architecture_of(model.config).lora_targets == model.peft_config["default"].target_modules
    norms = compute_lora_norms(model)
    assert norms["lora_norm_A"] > 0 and norms["lora_norm_B"] == 0


def test_an_adapter_that_is_not_finite_is_never_saved(tiny_llama):
    model = add_lora_adapter(load_model(source_of(tiny_llama), "fp32"), LoraOptions(rank=4, alpha=8))
    check_finite(model, 3)
    next(p for n, p in model.named_parameters() if "lora_B" in n).data[0] = float("inf")
    with pytest.raises(PhoqueError, match="step 3") as caught:
        check_finite(model, 3)
    assert "lora_B" in caught.value.why


@pytest.mark.parametrize(("quantization", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_weights_are_held_as_asked_and_frozen(tiny_llama, quantization, dtype):
    model = load_model(source_of(tiny_llama), quantization)
    assert {p.dtype for p in model.parameters()} == {dtype} and not any(p.requires_grad for p in model.parameters())


def test_nf4_holds_the_projections_in_four_bits(tiny_llama):
    model = load_model(source_of(tiny_llama), "nf4")
    kinds = {type(m).__name__ for n, m in model.named_modules() if n.endswith("_proj")}
    assert kinds == {"Linear4bit"} and model.lm_head.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("own", ["", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"])
def test_memory_of_a_gpu_may_grow_where_it_lies_unless_the_user_decides(monkeypatch, own):
    for name in ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"):
        monkeypatch.setenv(name, "backend:native")  # also so that what `device` sets is undone
        if name != own:
            monkeypatch.delenv(name)
    default_device()
    wanted = {"": "expandable_segments:True", "PYTORCH_ALLOC_CONF": "backend:native"}
    assert os.environ.get("PYTORCH_ALLOC_CONF") == wanted.get(own)
