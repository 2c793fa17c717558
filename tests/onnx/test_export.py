"""export-onnx as a user runs it: its sources, its folder, its numbers, what it refuses."""

import json
import os
import shutil
import signal
import sys
import time

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from tests import tiny
from tests.fakehub import TOKEN
from tests.jobs.test_jobs import ON, SECRETS, cluster  # noqa: F401

from phoque.models.load import load_model
from phoque.models.source import Source
from phoque.onnx.session import OnnxChatModel

ENV = {"HF_TOKEN": TOKEN}


def compute_logits(model, ids):
    with torch.no_grad():
        return load_model(Source("x", model, "1", ""), "fp32", on=torch.device("cpu"))(input_ids=ids).logits.numpy()


@pytest.mark.thorough
def test_each_precision_says_what_the_model_says(text_export, text_model):
    folder, result = text_export
    assert result["verdict"] == "PASS" and result["layout"] == "text"
    assert result["dtypes"]["fp32"]["kl"] < 1e-6 and result["dtypes"]["fp32"]["agreement"] == 1.0
    assert result["dtypes"]["q4"]["kl"] > 0
    assert result["dtypes"]["q4"]["bytes"] < result["dtypes"]["fp32"]["bytes"] / 2
    ids = torch.arange(3, 40)[None]
    wanted = compute_logits(text_model, ids)
    found, _ = OnnxChatModel(folder, "fp32").run(ids.numpy())
    assert np.abs(found - wanted).max() < 1e-4 * np.abs(wanted).max()


@pytest.mark.thorough
def test_int8_is_eight_bits_to_fetch_and_whole_in_memory(phoque, text_model, chats, tmp_path):
    asked = ["export-onnx", "--merged-dir", text_model, "--chats", chats, "--output-dir", "x", "--json"]
    found = phoque(*asked, "--dtype", "fp32", "--dtype", "int8").json["dtypes"]
    assert found["int8"]["bytes"] < 0.6 * found["fp32"]["bytes"] and found["int8"]["kl"] < 0.05
    settings = json.loads((tmp_path / "x" / "config.json").read_text())["transformers.js_config"]
    assert settings["dtype"] == settings["device_config"]["wasm"]["dtype"] == "int8"
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "loaded.onnx")
    onnxruntime.InferenceSession(tmp_path / "x" / "onnx" / "model_int8.onnx", options)
    loaded = onnx.load(tmp_path / "loaded.onnx", load_external_data=False).graph
    codes = [one.name for one in loaded.initializer if one.data_type == onnx.TensorProto.UINT8]
    assert codes == ["model.embed_tokens.weight.codes"]  # of which a token's row is read
    assert not any(node.op_type == "MatMulNBits" for node in loaded.node)
    (tmp_path / "x" / "onnx" / "model_int8.onnx").rename(tmp_path / "x" / "onnx" / "elsewhere.onnx")
    ran = phoque("verify-onnx", "--local-dir", "x", "--level", "files", "--json", expect=1)
    assert any("loads onnx/model_int8.onnx, which is missing" in check["said"] for check in ran.json["checks"])


def test_the_folder_is_what_transformersjs_reads(text_export, seeing_export):
    for folder, layout in ((text_export[0], "text"), (seeing_export[0], "multimodal")):
        config = json.loads((folder / "config.json").read_text())
        declared = config["transformers.js_config"]["use_external_data_format"]
        assert set(declared) == {f.name for f in (folder / "onnx").glob("*.onnx")} and set(declared.values()) == {1}
        settings = json.loads((folder / "tokenizer_config.json").read_text())
        assert settings["chat_template"] == (folder / "chat_template.jinja").read_text()
        assert "quantization_config" not in config and settings["tokenizer_class"] == "PreTrainedTokenizerFast"
        card = (folder / "README.md").read_text()
        assert "Content warning" in card and "| fp32 |" in card and str(folder.parent) not in card
        if layout == "multimodal":
            assert {"preprocessor_config.json", "processor_config.json"} <= {f.name for f in folder.iterdir()}
            names = {"decoder_model_merged", "embed_tokens", "vision_encoder"}
            assert {f.name.split(".")[0].removesuffix("_quantized") for f in (folder / "onnx").iterdir()} == names


@pytest.mark.thorough
def test_mistral3_alone_as_text(phoque, seeing_model, chats, tmp_path):
    """The layout text of a model with eyes: its text side under its own class, YaRN and query scaling right far out."""
    ran = phoque(
        "export-onnx",
        "--merged-dir",
        seeing_model,
        "--layout",
        "text",
        "--dtype",
        "fp16",
        "--chats",
        chats,
        "--output-dir",
        tmp_path / "x",
        "--json",
    )
    config = json.loads((tmp_path / "x" / "config.json").read_text())
    assert config["architectures"] == ["Ministral3ForCausalLM"] and config["model_type"] == "ministral3"
    assert ran.json["verdict"] == "PASS" and ran.json["dtypes"]["fp16"]["kl"] < 1e-2


@pytest.mark.thorough
def test_from_an_adapter_to_the_hub(phoque, hub, tiny_llama, rows, chats, tmp_path):
    phoque(
        "train",
        "--base-model",
        tiny_llama,
        "--dataset",
        rows,
        "--quantization",
        "fp32",
        "--max-steps",
        2,
        "--batch-size",
        2,
        "--max-length",
        256,
        "--output-dir",
        "run",
        "--sample-every",
        0,
    )
    asked = [
        "export-onnx",
        "--adapter-source",
        "run",
        "--merged-out-dir",
        "merged",
        "--dtype",
        "fp32",
        "--chats",
        chats,
        "--push-repo-id",
        "harbour/seal-onnx",
    ]
    ran = phoque(*asked, "--json", env=ENV)
    assert (tmp_path / "merged" / "model.safetensors").is_file()
    assert ran.json["output_dir"] == "run-onnx" and ran.json["dtypes"]["fp32"]["kl"] < 1e-6
    files = hub.files("harbour/seal-onnx")
    assert {"onnx/model.onnx", "onnx/model.onnx_data", "config.json", "README.md", "export.json"} <= set(files)
    assert (
        hub.repos["models", "harbour/seal-onnx"].private and len(hub.repos["models", "harbour/seal-onnx"].commits) == 2
    )
    ids = torch.arange(3, 40)[None]
    wanted = compute_logits(tmp_path / "merged", ids)
    found, _ = OnnxChatModel(tmp_path / "run-onnx", "fp32").run(ids.numpy())
    assert np.abs(found - wanted).max() < 1e-4 * np.abs(wanted).max()
    phoque(*asked, "--dtype", "q8", "--no-accuracy", env=ENV)  # fp32 and q8 now
    phoque(
        "export-onnx",
        "--merged-dir",
        "merged",
        "--dtype",
        "q8",
        "--no-accuracy",
        "--push-repo-id",
        "harbour/seal-onnx",
        env=ENV,
    )
    left = {path for path in hub.files("harbour/seal-onnx") if path.startswith("onnx/")}
    assert left == {"onnx/model_quantized.onnx", "onnx/model_quantized.onnx_data"}


@pytest.mark.parametrize("kind", ["models", "datasets"])
@pytest.mark.thorough
def test_a_merged_model_on_the_hub_in_either_kind_of_repository(phoque, hub, text_model, tmp_path, kind):
    hub.add(kind, "harbour/merged", {f.name: f.read_bytes() for f in text_model.iterdir()})
    asked = (
        "export-onnx --merged-dir harbour/merged --dtype fp32 --no-accuracy --output-dir x --merged-out-dir kept"
    ).split()
    commands = hub.log
    assert phoque(*asked, "--dry-run", "--json", env=ENV).json["layout"] == "text"
    assert not (tmp_path / "x").exists() and {command for command, _ in commands} <= {"GET", "HEAD"}
    assert phoque(*asked, "--json", env=ENV).json["verdict"] == "PASS"
    assert (tmp_path / "kept" / "model.safetensors").is_file() and (tmp_path / "x" / "onnx" / "model.onnx").is_file()


@pytest.mark.thorough
def test_an_earlier_export_is_replaced_at_the_end_and_only_then(phoque, start, text_model, chats, tmp_path):
    asked = ["export-onnx", "--merged-dir", text_model, "--dtype", "fp32", "--no-accuracy", "--output-dir", "x"]
    phoque(*asked)
    before = {f.name: f.stat().st_mtime_ns for f in (tmp_path / "x").rglob("*")}
    running = start(*asked[:-1], "x", "--dtype", "q8")
    running.until(lambda: list(tmp_path.glob(".x.*.partial/onnx")))
    time.sleep(0.5)
    os.kill(running.pid, signal.SIGKILL)
    running.ended()
    assert {f.name: f.stat().st_mtime_ns for f in (tmp_path / "x").rglob("*")} == before
    phoque(*asked[:-1], "x", "--dtype", "q8")
    assert (tmp_path / "x" / "onnx" / "model_quantized.onnx").is_file() and not list(tmp_path.glob(".x.*.partial"))


@pytest.mark.thorough
def test_what_does_not_verify_is_not_kept_unless_asked(phoque, text_model, tmp_path):
    """A model that names a token to end at that it does not have passes the exporter, and would talk for ever."""
    endless = shutil.copytree(text_model, tmp_path / "endless")
    (endless / "generation_config.json").unlink()
    config = json.loads((endless / "config.json").read_text())
    (endless / "config.json").write_text(json.dumps(config | {"eos_token_id": 99_999}))
    asked = ["export-onnx", "--merged-dir", endless, "--dtype", "fp32", "--no-accuracy", "--output-dir", "x"]
    error = phoque(*asked, expect=1).error
    assert "does not verify" in error[0] and "never end" in error[1] and not (tmp_path / "x").exists()
    ran = phoque(*asked, "--no-verify-strict", "--json")
    assert ran.json["verdict"] == "FAIL" and "never end" in ran.err and (tmp_path / "x" / "config.json").is_file()


@pytest.mark.thorough
def test_damaged_weights_are_not_exported(phoque, text_model, tmp_path):
    from safetensors.torch import load_file, save_file

    broken = shutil.copytree(text_model, tmp_path / "broken")
    weights = load_file(broken / "model.safetensors")
    weights["model.layers.2.mlp.up_proj.weight"][3] = float("nan")
    save_file(weights, broken / "model.safetensors", {"format": "pt"})
    error = phoque("export-onnx", "--merged-dir", broken, "--dtype", "fp32", "--no-accuracy", expect=2).error
    assert (
        "layers.2.mlp.up_proj" in error[0]
        and "above 100 or NaN" in error[0]
        and not list(tmp_path.glob("*broken-onnx*"))
    )


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "nothing to export"),
        (["--adapter-source", "you/a", "--merged-dir", "you/b"], "Two sources"),
        (["--merged-dir", "MODEL", "--dtype", "q5"], "no precision 'q5'"),
        (["--merged-dir", "MODEL", "--layout", "multimodal"], "no vision tower"),
        (["--merged-dir", "nowhere"], "There is no model at nowhere"),
        (["--merged-dir", "MODEL", "--output-dir", "full"], "it is not an export"),
        (["--merged-dir", "MODEL", "--output-dir", "full/a"], "is a file"),
        (["--merged-dir", "MODEL", "--chats", "none.jsonl"], "There is no file or folder none.jsonl"),
        (["--merged-dir", "MODEL", "--engine", "optimum"], "exports fp32 only"),
        (["--merged-dir", "SEEING", "--engine", "optimum", "--dtype", "fp32"], "does not support mistral3"),
        (["--merged-dir", "BARE"], "chat template"),
    ],
)
def test_what_cannot_be_exported_is_said(phoque, text_model, seeing_model, tmp_path, arguments, words):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "a").write_text("gull")
    bare = tiny.llama(tmp_path / "bare")
    (bare / "chat_template.jinja").unlink()
    places = {"MODEL": text_model, "SEEING": seeing_model, "BARE": bare}
    error = phoque("export-onnx", *[places.get(a, a) for a in arguments], expect=2).error
    assert words in " ".join(error)
    assert not list(tmp_path.glob(".*.partial")) and (tmp_path / "full" / "a").read_text() == "gull"


@pytest.mark.thorough
def test_it_runs_as_a_job(cluster, phoque, text_model):  # noqa: F811
    cluster.add("models", "harbour/merged", {f.name: f.read_bytes() for f in text_model.iterdir()})
    asked = "export-onnx --merged-dir harbour/merged --dtype fp32 --no-accuracy --push-repo-id harbour/out".split()
    ran = phoque(*asked, *ON, "--timeout", "10m", "--json", env=SECRETS)
    assert ran.json["stage"] == "COMPLETED" and "onnx/model.onnx" in cluster.files("harbour/out")


def test_an_interpreter_that_has_no_optimum_is_an_error(phoque, text_model, tmp_path):
    asked = ["export-onnx", "--merged-dir", text_model, "--engine", "optimum", "--dtype", "fp32", "--no-accuracy"]
    error = phoque(*asked, "--onnx-export-python", sys.executable, expect=1).error
    assert "optimum-onnx failed" in error[0] and "No module named 'optimum'" in error[1]
    assert not list(tmp_path.iterdir())
