"""Tiny exports, each made once a session by the command; the models are opinionated, so that a damage is heard."""

import json
import os
import shutil

import pytest
import torch
from filelock import FileLock
from tests import tiny
from tests.conftest import Running, isolate, write_rows
from tests.rows import row as a_row

TEXT = ("fp32", "q4")
SEEING = ("fp32", "q8")


@pytest.fixture(scope="session")
def chats(tmp_path_factory):
    """Forty conversations for 4 bits and accuracy."""
    return write_rows(tmp_path_factory.mktemp("chats") / "rows.jsonl", [a_row(n) for n in range(40)])


@pytest.fixture(scope="session")
def text_model(tmp_path_factory):
    return tiny.llama(tmp_path_factory.mktemp("text") / "llama", num_hidden_layers=4, initializer_range=0.3)


@pytest.fixture(params=["llama", "qwen2", "qwen3"])
def any_model(request, tmp_path):
    """A text model of five layers in each architecture that has something of its own."""
    if request.param == "llama":
        return tiny.llama(tmp_path / "m", num_hidden_layers=5, initializer_range=0.3)
    import transformers

    torch.manual_seed(3)
    name = request.param.capitalize()
    config = getattr(transformers, f"{name}Config")(**tiny.SIZES | {"num_hidden_layers": 5, "initializer_range": 0.3})
    model = getattr(transformers, f"{name}ForCausalLM")(config)
    for parameter in model.parameters():  # biases and norms that could be forgotten otherwise
        if parameter.dim() == 1:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    model.save_pretrained(tmp_path / "m")
    tiny.tokenizer().save_pretrained(tmp_path / "m")
    return tmp_path / "m"


@pytest.fixture(scope="session")
def seeing_model(tmp_path_factory):
    """A tiny Mistral3 in FP8 whose logits are far apart."""
    folder, _ = tiny.fp8_mistral3(tmp_path_factory.mktemp("seeing") / "mistral3")
    from safetensors.torch import load_file, save_file

    for file in folder.glob("model-*.safetensors"):
        tensors = load_file(file)
        for name, tensor in tensors.items():
            if name.endswith("weight_scale_inv") or "embed_tokens" in name:
                tensors[name] = (tensor.float() * 12).to(tensor.dtype)
        save_file(tensors, file, {"format": "pt"})
    return folder


def export(forkserver, home, served, source, folder, chats, dtypes):
    """Run export-onnx into `folder`; return the folder and what --json printed."""
    with pytest.MonkeyPatch.context() as patch:
        isolate(patch, home, served.url)
        words = [word for dtype in dtypes for word in ("--dtype", dtype)]
        ran = Running(
            forkserver,
            ["export-onnx", "--merged-dir", source, "--output-dir", folder, "--chats", chats, *words, "--json"],
            {},
        ).ended()
    assert ran.code == 0, ran.err
    return ran.json


def export_once(tmp_path_factory, name, make):
    """`make(folder)` in the first worker that needs it; the others wait for its result and use it too."""
    base = tmp_path_factory.getbasetemp()
    root = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    folder, result = root / name, root / f"{name}.json"
    with FileLock(root / f"{name}.lock"):
        if not result.is_file():
            result.write_text(json.dumps(make(folder)))
    return folder, json.loads(result.read_text())


@pytest.fixture(scope="session")
def text_export(forkserver, home, served, tmp_path_factory, text_model, chats):
    return export_once(
        tmp_path_factory, "text", lambda folder: export(forkserver, home, served, text_model, folder, chats, TEXT)
    )


@pytest.fixture(scope="session")
def seeing_export(forkserver, home, served, tmp_path_factory, seeing_model, chats):
    return export_once(
        tmp_path_factory, "seeing", lambda folder: export(forkserver, home, served, seeing_model, folder, chats, SEEING)
    )


@pytest.fixture
def broken_text(text_export, tmp_path):
    """A copy of the text export, to break."""
    return shutil.copytree(text_export[0], tmp_path / "text")


@pytest.fixture
def broken_seeing(seeing_export, tmp_path):
    return shutil.copytree(seeing_export[0], tmp_path / "seeing")


torch.set_num_threads(1)
