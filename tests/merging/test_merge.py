"""`phoque merge`: the same weights as peft's own merge, in bounded memory, and proven."""

import json
import os
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests import tiny
from tests.fakehub import TOKEN

PROJECTIONS = r".*layers\.\d+\.(?:self_attn|mlp)\.(?:q|k|v|o|gate|up|down)_proj"
TEXT_ONLY = r"(?!.*vision).*layers\.\d+\.(?:self_attn|mlp)\.(?:q|k|v|o|gate|up|down)_proj"


def randomize(model):
    """Every trained tensor away from what makes an adapter a no-op."""
    torch.manual_seed(5)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.requires_grad:
                p.copy_(p + 0.05 * torch.randn_like(p) if "magnitude" in name else 0.05 * torch.randn_like(p))
    return model


def save_random_adapter(base, folder, model=None, merged=True, **options):
    """An adapter of peft on a base, saved; and the model that peft merges from it."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = model or AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    asked = {"r": 4, "lora_alpha": 16, "target_modules": TEXT_ONLY, "task_type": "CAUSAL_LM"} | options
    tuned = randomize(get_peft_model(model, LoraConfig(**asked)))
    tuned.save_pretrained(folder)
    return tuned.merge_and_unload() if merged else None


KINDS = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "patterns": {"rank_pattern": {"q_proj": 2, "layers.1.mlp.up_proj": 8}, "alpha_pattern": {"v_proj": 40}},
    "saved modules": {"modules_to_save": ["norm"]},
    "some": {"target_modules": ["q_proj", "down_proj"]},
}


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_pefts_own_merge(phoque, tmp_path, tiny_llama, kind):
    wanted = save_random_adapter(tiny_llama, tmp_path / "adapter", **KINDS[kind]).state_dict()
    ran = phoque(
        "merge",
        "--adapter-source",
        tmp_path / "adapter",
        "--base-model",
        tiny_llama,
        "--output-dir",
        tmp_path / "out",
        "--dtype",
        "fp32",
        "--json",
    )
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert set(found) == set(load_file(tiny_llama / "model.safetensors"))
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, wanted[name], rtol=0, atol=2e-6, msg=name)
    proof = ran.json["proof"]
    assert proof["holds"] and proof["max_difference"] < 1e-3 < proof["adapter_effect"]
    assert proof["agreeing"] == proof["tokens"] > 64


def test_biases_are_replaced(phoque, tmp_path):
    base = tiny.llama(tmp_path / "base", attention_bias=True)
    wanted = save_random_adapter(base, tmp_path / "adapter", bias="all").state_dict()
    phoque(
        "merge",
        "--adapter-source",
        tmp_path / "adapter",
        "--base-model",
        base,
        "--output-dir",
        tmp_path / "out",
        "--dtype",
        "fp32",
        "--no-proof",
    )
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert any(name.endswith("bias") and tensor.abs().max() > 0 for name, tensor in found.items())
    assert all(torch.allclose(tensor, wanted[name], atol=2e-6) for name, tensor in found.items())


@pytest.fixture(scope="module")
def fp8(tmp_path_factory):
    folder, true = tiny.fp8_mistral3(tmp_path_factory.mktemp("fp8") / "base")
    (folder / "preprocessor_config.json").write_text("{}")
    (folder / "processor_config.json").write_text("{}")
    (folder / "generation_config.json").write_text('{"max_length": 77}')
    return folder, true


def rename_tensors(folder, pattern, to):
    """The adapter under other names."""
    weights = load_file(folder / "adapter_model.safetensors")
    changed = {name.replace(pattern, to): tensor for name, tensor in weights.items()}
    assert changed.keys() != weights.keys()
    save_file(changed, folder / "adapter_model.safetensors", {"format": "pt"})


@pytest.mark.parametrize("names", ["full", "text only", "unsloth", "unsloth, old"])
@pytest.mark.thorough
def test_a_full_mistral3_stays_full_whatever_the_adapter_calls_it(phoque, tmp_path, fp8, names):
    from transformers import AutoModelForImageTextToText

    base, true = fp8
    full = AutoModelForImageTextToText.from_pretrained(base, dtype=torch.float32)
    wanted = save_random_adapter(base, tmp_path / "adapter", full).state_dict()
    before = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert all(".language_model.layers." in name for name in before)
    if names != "full":
        other = {
            "text only": "model.layers",
            "unsloth": "language_model.model.layers",
            "unsloth, old": "model.language_model.model.layers",
        }[names]
        rename_tensors(tmp_path / "adapter", "model.language_model.layers", other)
    out = tmp_path / "out"
    ran = phoque("merge", "--adapter-source", tmp_path / "adapter", "--base-model", base, "--output-dir", out, "--json")
    assert ran.json["proof"]["holds"] and ran.json["changed"] == 21
    stored = {k: v for f in base.glob("model-*.safetensors") for k, v in load_file(f).items()}
    found = load_file(out / "model.safetensors")
    assert set(found) == {k for k in stored if not k.endswith(("_scale_inv", "activation_scale"))}
    for name, tensor in found.items():
        if "vision_tower" in name or "projector" in name:
            assert tensor.dtype == stored[name].dtype and torch.equal(tensor, stored[name])
        else:
            assert tensor.dtype == torch.bfloat16
    again = AutoModelForImageTextToText.from_pretrained(out, dtype=torch.float32).state_dict()
    name = "model.language_model.layers.1.mlp.up_proj.weight"
    torch.testing.assert_close(again[name], wanted[name], rtol=8e-3, atol=1e-3)
    assert not torch.allclose(again[name], true["model.layers.1.mlp.up_proj.weight"], atol=1e-3)
    config = json.loads((out / "config.json").read_text())
    assert "quantization_config" not in config and config["dtype"] == "bfloat16"
    assert {
        "processor_config.json",
        "preprocessor_config.json",
        "generation_config.json",
        "chat_template.jinja",
        "tokenizer.json",
        "README.md",
    } <= {p.name for p in out.iterdir()}
    assert json.loads((out / "tokenizer_config.json").read_text())["chat_template"]
    assert "Content warning" in (out / "README.md").read_text()


def test_an_adapter_that_does_not_fit_is_named(phoque, tmp_path, tiny_llama):
    other = tiny.llama(tmp_path / "other", hidden_size=32)
    save_random_adapter(other, tmp_path / "adapter")
    asked = ["merge", "--adapter-source", tmp_path / "adapter", "--output-dir", tmp_path / "out"]
    error = phoque(*asked, "--base-model", tiny_llama, expect=2).error
    assert "layers.0.mlp.down_proj" in error[1] and "is [64, 96]" in error[1] and not (tmp_path / "out").exists()
    rename_tensors(tmp_path / "adapter", "self_attn.q_proj", "self_attn.gull_proj")
    assert "gull_proj" in phoque(*asked, "--base-model", other, expect=2).error[1]
    assert "no such" in phoque(*asked, "--base-model", other, expect=2).error[1]


@pytest.mark.thorough
def test_a_second_run_does_nothing_and_another_input_is_merged_anew(phoque, tmp_path, tiny_llama):
    save_random_adapter(tiny_llama, tmp_path / "adapter")
    asked = [
        "merge",
        "--adapter-source",
        tmp_path / "adapter",
        "--base-model",
        tiny_llama,
        "--output-dir",
        tmp_path / "out",
        "--json",
    ]
    first = phoque(*asked)
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "out").iterdir()}
    again = phoque(*asked)
    assert again.json == first.json and "nothing to do" in again.err
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "out").iterdir()} == before
    config = tmp_path / "adapter" / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"lora_alpha": 3}))
    assert "nothing to do" not in phoque(*asked).err  # other weights, from the same files beside it
    phoque(*asked, "--dtype", "fp16")
    assert load_file(tmp_path / "out" / "model.safetensors")["model.norm.weight"].dtype == torch.float16
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("gulls")
    error = phoque(*asked[:-3], "--output-dir", tmp_path / "mine", expect=2).error
    assert "not empty" in error[0] and (tmp_path / "mine" / "thesis.txt").read_text() == "gulls"


def test_several_shards_get_an_index(tmp_path, tiny_llama, monkeypatch):
    from phoque.merging import writer as module
    from phoque.models.checkpoint_reader import CheckpointReader
    from phoque.models.safetensors_files import SafetensorsFiles
    from phoque.models.source import Source

    save_random_adapter(tiny_llama, tmp_path / "adapter")
    monkeypatch.setattr(module, "SHARD_BYTES", 100_000)
    reader = CheckpointReader(Source("x", tiny_llama, "1", "x"))
    made = module.write_merged(reader, tmp_path / "adapter", tmp_path / "out", "fp32")
    assert made["shards"] > 3
    found, first = SafetensorsFiles(tmp_path / "out"), SafetensorsFiles(tiny_llama)
    assert found.tensors.keys() == first.tensors.keys()
    from transformers import AutoModelForCausalLM

    _, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]


@pytest.mark.thorough
def test_a_full_disk_or_a_kill_leaves_no_half_written_folder(phoque, start, tmp_path):
    big = tiny.llama(tmp_path / "big", hidden_size=1024, intermediate_size=8192, num_hidden_layers=8)
    save_random_adapter(big, tmp_path / "adapter")
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=120m", "tmpfs", disk], check=True)
    asked = ["merge", "--adapter-source", tmp_path / "adapter", "--base-model", big, "--no-proof", "--output-dir"]
    try:
        error = phoque(*asked, disk / "out", "--dtype", "fp32", expect=1).error
        assert "are free" in error[0] and not list(disk.iterdir())
    finally:
        subprocess.run(["umount", disk], check=True)
    process = start(*asked, tmp_path / "out", "--dtype", "fp32")
    process.until(lambda: list(tmp_path.glob(".out.*.partial")))
    os.kill(process.pid, signal.SIGKILL)
    process.ended()
    assert not (tmp_path / "out").exists()
    phoque(*asked, tmp_path / "out", "--dtype", "fp32")
    assert (tmp_path / "out" / "merge.json").is_file() and not list(tmp_path.glob(".out.*.partial"))


def test_a_merge_that_lost_the_adapter_fails_its_proof(phoque, tmp_path, tiny_llama):
    save_random_adapter(tiny_llama, tmp_path / "adapter")
    out = tmp_path / "out"
    asked = ["merge", "--adapter-source", tmp_path / "adapter", "--base-model", tiny_llama, "--output-dir", out]
    phoque(*asked, "--no-proof", "--dtype", "fp32")
    shutil.copyfile(tiny_llama / "model.safetensors", out / "model.safetensors")  # as if nothing had been merged
    error = phoque(*asked, "--dtype", "fp32", expect=1).error
    assert "does not compute what the base with its adapter computes" in error[0]


def test_from_the_hub_to_the_hub(phoque, hub, tmp_path, tiny_llama):
    save_random_adapter(tiny_llama, tmp_path / "adapter")
    hub.add("models", "harbour/seal", {p.name: p.read_bytes() for p in (tmp_path / "adapter").iterdir()})
    hub.add("models", "harbour/tiny", {p.name: p.read_bytes() for p in tiny_llama.iterdir()})
    ran = phoque(
        "merge",
        "--adapter-source",
        "harbour/seal",
        "--base-model",
        "harbour/tiny",
        "--push-repo-id",
        "harbour/seal-merged",
        "--output-dir",
        tmp_path / "out",
        "--json",
        env={"HF_TOKEN": TOKEN},
    )
    merged = ("models", "harbour/seal-merged")
    files = hub.files(merged[1])
    assert hub.repos[merged].private and ran.json["commit"] == hub.sha(*merged)
    assert files["model.safetensors"].content == (tmp_path / "out" / "model.safetensors").read_bytes()
    assert "Content warning" in files["README.md"].content.decode()
    # a repository that another program wrote, and a second push to one that phoque wrote
    hub.add("models", "harbour/other", {"model-00001-of-00002.safetensors": b"theirs", "mine.txt": b"kept"})
    record = {"settings": {}, "fingerprint": {}, "data": {"name": "harbour/private-rows"}}
    hub.put("harbour/seal", {"run.json": json.dumps(record).encode()})
    again = [
        "merge",
        "--adapter-source",
        "harbour/seal",
        "--base-model",
        "harbour/tiny",
        "--output-dir",
        tmp_path / "out",
    ]
    ran = phoque(*again, "--push-repo-id", "harbour/other", env={"HF_TOKEN": TOKEN})
    assert "model-00001-of-00002.safetensors, which phoque did not write" in ran.err
    assert {"mine.txt", "merge.json"} < hub.files("harbour/other").keys()
    assert "model-00001-of-00002.safetensors" not in hub.files("harbour/other")
    assert "did not write" not in phoque(*again, "--push-repo-id", merged[1], env={"HF_TOKEN": TOKEN}).err
    shown = phoque(*again, "--push-repo-id", "harbour/shown", "--public", env={"HF_TOKEN": TOKEN}).err
    assert "harbour/shown is public" in shown and "on harbour/private-rows" in shown
    missing = phoque(
        "merge", "--adapter-source", "harbour/tiny", "--output-dir", tmp_path / "no", expect=2, env={"HF_TOKEN": TOKEN}
    ).error
    assert "holds no adapter" in missing[0]


@pytest.mark.thorough
def test_memory_is_a_few_tensors(tmp_path):
    """What the peak grows by when 0.4 GB are merged: less than that; what is read ahead, and a few tensors."""
    big = tiny.llama(tmp_path / "big", hidden_size=1024, intermediate_size=4096, num_hidden_layers=8)
    save_random_adapter(big, tmp_path / "adapter")
    script = f"""
from pathlib import Path
from phoque.merging.writer import write_merged
from phoque.models.checkpoint_reader import CheckpointReader
from phoque.models.source import Source
import peft, transformers
from transformers import AutoConfig
def peak():
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024
Path("/proc/self/clear_refs").write_text("5")
before = peak()
root = Path({str(tmp_path)!r})
made = write_merged(CheckpointReader(Source("x", root / "big", "1", "x")), root / "adapter", root / "out", "fp32")
print(made["bytes"], peak() - before)
"""
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    written, grown = map(int, ran.stdout.split())
    assert written > 4e8 and grown < 0.75 * written, (written, grown)
