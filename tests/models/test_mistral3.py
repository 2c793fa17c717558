"""The layout of Ministral 3: FP8 to NF4 in one pass, text only, and an adapter that speaks the full model's names."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests import tiny

from phoque.errors import PhoqueError
from phoque.models.architectures import MISTRAL3
from phoque.models.load import load_model
from phoque.models.lora import LoraOptions, add_lora_adapter, load_adapter, save_adapter
from phoque.models.source import Source

SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
IDS = torch.arange(20, 60)[None]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return tiny.fp8_mistral3(tmp_path_factory.mktemp("mistral3") / "model")


@pytest.fixture
def base(made):
    return Source("harbour/ministral", made[0], "0", "test")


@pytest.fixture
def copy_of_base(made, tmp_path):
    """A copy to spoil."""
    return Source("harbour/ministral", shutil.copytree(made[0], tmp_path / "copy"), "0", "test")


def full_model(folder):
    """The whole vision-language model as transformers loads it: dequantised to BF16."""
    from transformers import AutoModelForImageTextToText

    return AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.bfloat16).eval()


def test_nf4_is_bit_for_bit_the_quantised_dequantised_weight(made, base):
    from bitsandbytes.functional import quantize_4bit

    model = load_model(base, "nf4")
    projections = [n for n, m in model.named_modules() if type(m).__name__ == "Linear4bit"]
    assert len(projections) == 7 * 3
    for name in projections:
        packed, state = quantize_4bit(
            made[1][f"{name}.weight"].bfloat16(), quant_type="nf4", compress_statistics=True, blocksize=64
        )
        held = model.get_submodule(name).weight
        assert torch.equal(held.data, packed)
        assert torch.equal(held.quant_state.absmax, state.absmax)
        assert torch.equal(held.quant_state.state2.absmax, state.state2.absmax)


def test_bf16_and_fp32_are_the_true_weights(made, base):
    for quantization, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        weights = load_model(base, quantization).state_dict()
        assert {n for n in weights if n != "lm_head.weight"} == set(made[1])
        assert all(torch.equal(weights[name], true.to(dtype)) for name, true in made[1].items())


def test_text_only_logits_equal_the_full_models(made, base):
    ours, full = load_model(base, "bf16"), full_model(made[0])
    assert not any("vision" in n or "projector" in n for n, _ in ours.named_modules())
    with torch.no_grad():
        assert torch.equal(ours(IDS).logits, full(input_ids=IDS).logits)


def test_the_decoy_is_never_read(copy_of_base):
    (copy_of_base.folder / "consolidated.safetensors").write_bytes(b"not even a safetensors file")
    load_model(copy_of_base, "bf16")


def add_random_adapter(base):
    model = add_lora_adapter(load_model(base, "bf16"), LoraOptions(rank=4, alpha=8))
    torch.manual_seed(3)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


def test_lora_is_on_seven_projections_a_layer_and_none_in_vision(made, base):
    import re

    model = add_random_adapter(base)
    assert sum(n.endswith("lora_A.default") for n, _ in model.named_modules()) == 7 * 3
    names = [n for n, _ in full_model(made[0]).named_modules()]
    hit = [n for n in names if re.fullmatch(MISTRAL3.lora_targets, n)]
    assert len(hit) == 7 * 3 and not any("vision" in n for n in hit)


def test_the_adapter_loads_on_the_full_model_with_the_same_logits(made, base, tmp_path):
    from peft import PeftModel

    model = add_random_adapter(base)
    save_adapter(model, tmp_path / "adapter", MISTRAL3)
    full = full_model(made[0])
    with torch.no_grad():
        plain = full(input_ids=IDS).logits
        ours = model(input_ids=IDS).logits
        theirs = PeftModel.from_pretrained(full, tmp_path / "adapter")(input_ids=IDS).logits
    torch.testing.assert_close(theirs, ours, atol=0.02, rtol=0.02)
    assert (theirs - plain).abs().max() > 0.5  # no silent no-op
    keys = load_file(tmp_path / "adapter" / "adapter_model.safetensors").keys()
    assert all(k.startswith("base_model.model.model.language_model.layers.") for k in keys)


def test_an_adapter_comes_back_as_it_was_under_either_name(base, tmp_path):
    model = add_random_adapter(base)
    save_adapter(model, tmp_path / "full", MISTRAL3)
    model.save_pretrained(tmp_path / "text", save_embedding_layers=False)
    for folder in ("full", "text"):
        again = add_lora_adapter(load_model(base, "bf16"), LoraOptions(rank=4, alpha=8))
        load_adapter(again, tmp_path / folder, MISTRAL3)
        with torch.no_grad():
            assert torch.equal(again(input_ids=IDS).logits, model(input_ids=IDS).logits)


@pytest.mark.parametrize("kind", ["rank", "vision"])
def test_an_adapter_that_does_not_fit_is_named(base, tmp_path, kind):
    save_adapter(add_random_adapter(base), tmp_path / "adapter", MISTRAL3)
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    if kind == "vision":
        weights = load_file(file)
        name = "base_model.model.model.vision_tower.transformer.layers.0.attention.q_proj.lora_A.weight"
        save_file(weights | {name: torch.zeros(4, 32)}, file)
    model = add_lora_adapter(load_model(base, "bf16"), LoraOptions(rank=8 if kind == "rank" else 4, alpha=8))
    with pytest.raises(PhoqueError, match="does not fit harbour/ministral") as caught:
        load_adapter(model, tmp_path / "adapter", MISTRAL3)
    assert ("vision_tower" if kind == "vision" else "layers.0") in caught.value.why


def measure_change(source: Source, shard: str, edit) -> Source:
    weights = load_file(source.folder / shard)
    edit(weights)
    save_file(weights, source.folder / shard, {"format": "pt"})
    return source


def test_a_missing_scale_is_an_error_before_anything_is_read(copy_of_base):
    def edit(weights):
        weights.pop(next(n for n in weights if n.endswith("_scale_inv")))

    with pytest.raises(PhoqueError, match="no scale") as caught:
        load_model(measure_change(copy_of_base, SHARDS[0], edit), "nf4")
    assert "weight_scale_inv is missing" in caught.value.why


def test_bf16_weights_under_an_fp8_config_are_refused(copy_of_base, made):
    for shard in SHARDS:

        def edit(weights):
            for name in [n for n in weights if n.endswith(("_scale_inv", "activation_scale"))]:
                weights.pop(name)
            for name, tensor in weights.items():
                weights[name] = tensor.bfloat16()

        measure_change(copy_of_base, shard, edit)
    with pytest.raises(PhoqueError, match="no weight is FP8"):
        load_model(copy_of_base, "nf4")


def test_a_scale_without_its_fp8_weight_is_refused(copy_of_base):
    def edit(weights):
        name = next(n for n in weights if n.endswith("_proj.weight"))
        weights[name] = weights[name].bfloat16()

    with pytest.raises(PhoqueError, match="its weight is not FP8"):
        load_model(measure_change(copy_of_base, SHARDS[0], edit), "nf4")


def test_a_truncated_shard_is_named_with_its_first_lost_tensor(copy_of_base):
    shard = copy_of_base.folder / SHARDS[1]
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(PhoqueError, match=SHARDS[1]) as caught:
        load_model(copy_of_base, "nf4")
    assert "cut short" in caught.value.why


def test_a_missing_shard_is_named(copy_of_base):
    (copy_of_base.folder / SHARDS[0]).unlink()
    with pytest.raises(PhoqueError, match=SHARDS[0]):
        load_model(copy_of_base, "nf4")


def test_another_quantisation_is_refused(copy_of_base):
    config = json.loads((copy_of_base.folder / "config.json").read_text())
    config["quantization_config"]["quant_method"] = "awq"
    (copy_of_base.folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(PhoqueError, match="awq"):
        load_model(copy_of_base, "nf4")


def test_a_scale_may_be_a_grid_of_blocks():
    from phoque.models.fp8 import dequantize

    weight = torch.randn(5, 6).to(torch.float8_e4m3fn)
    scale = torch.rand(3, 2)
    wanted = torch.stack([weight[r].float() * scale[r // 2][torch.arange(6) // 3] for r in range(5)])
    assert torch.equal(dequantize(weight, scale, None), wanted)
    assert torch.equal(dequantize(weight, scale, (2, 3)), wanted)


def test_the_last_block_of_scales_may_be_cut_off():
    from phoque.models.fp8 import dequantize

    weight = torch.randn(576, 200).to(torch.float8_e4m3fn)  # five blocks of 128 rows, the last of 64
    scale = torch.rand(5, 2)
    wanted = weight.float() * scale[torch.arange(576) // 128][:, torch.arange(200) // 128]
    assert torch.equal(dequantize(weight, scale, (128, 128)), wanted)


@pytest.mark.thorough
def test_the_command_trains_it_and_goes_on(phoque, made, rows, tmp_path):
    run = tmp_path / "run"
    common = [
        "--base-model",
        made[0],
        "--dataset",
        rows,
        "--batch-size",
        4,
        "--log-every",
        1,
        "--sample-tokens",
        4,
        "--quantization",
        "nf4",
        "--save-steps",
        2,
        "--learning-rate",
        0.005,
        "--output-dir",
        run,
        "--json",
    ]
    ran = phoque("train", *common, "--max-steps", 6)
    whole = load_file(run / "adapter" / "adapter_model.safetensors")
    assert all(".language_model.layers." in key for key in whole)
    assert "AutoModelForImageTextToText" in (run / "adapter" / "README.md").read_text()
    record = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps({k: v for k, v in record.items() if k != "result"}))
    shutil.rmtree(run / "checkpoint-6")
    again = phoque("train", *common, "--max-steps", 6)
    assert "continuing from step 4" in again.err
    assert again.json["held_out_loss"]["after"] == ran.json["held_out_loss"]["after"]
    after = load_file(run / "adapter" / "adapter_model.safetensors")
    assert all(torch.equal(after[k], whole[k]) for k in whole)


@pytest.mark.parametrize("family", ["qwen3", "mistral", "ministral3"])
@pytest.mark.thorough
def test_other_families_train_by_the_same_command(phoque, rows, tmp_path, family):
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(family, **tiny.SIZES)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / family)
    (tiny.tokenizer() if family == "qwen3" else tiny.mistral_tokenizer()).save_pretrained(tmp_path / family)
    run = tmp_path / "run"
    phoque(
        "train",
        "--base-model",
        tmp_path / family,
        "--dataset",
        rows,
        "--batch-size",
        4,
        "--max-steps",
        2,
        "--quantization",
        "fp32",
        "--sample-tokens",
        4,
        "--log-every",
        1,
        "--output-dir",
        run,
    )
    assert len(load_file(run / "adapter" / "adapter_model.safetensors")) == 2 * 7 * 2
