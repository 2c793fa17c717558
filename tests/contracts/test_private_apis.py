"""Every private API in docs/design/private-apis.md is there and does what phoque needs; a failure says what broke."""

import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

TABLE = Path(__file__).parents[2] / "docs" / "design" / "private-apis.md"


def parameters(function) -> list[str]:
    return list(inspect.signature(function).parameters)


def check_trainer_overrides():
    from transformers import Trainer

    expected = {
        "_prepare_inputs": ["self", "inputs"],
        "_get_num_items_in_batch": ["self", "batch_samples", "device"],
        "_clip_grad_norm": ["self", "model"],
        "_get_output_dir": ["self", "trial"],
        "_save_checkpoint": ["self", "model", "trial"],
        "_save": ["self", "output_dir", "state_dict"],
        "_load_optimizer_and_scheduler": ["self", "checkpoint"],
        "_load_from_checkpoint": ["self", "resume_from_checkpoint", "model"],
    }
    for name, names in expected.items():
        assert parameters(getattr(Trainer, name)) == names, f"Trainer.{name} has other parameters"
    source = inspect.getsource(Trainer)
    for name in expected:
        assert re.search(rf"self\.{name}\(", source), f"Trainer does not call {name} any more"


def check_llama_layout(tmp_path):
    """The defaults lie where the structs have them: opening the library compares them, and names what to do if not."""
    script = """
import ctypes, pathlib, sys
from phoque.console import Console
from phoque.errors import RunError
from phoque.gguf.c_api import ContextParams
from phoque.gguf.llama_cpp import Library, binaries, open_library
client, cache = binaries(), pathlib.Path(sys.argv[1])
client.install(cache, Console())
library = open_library(client.modules(cache))
fields = ContextParams._fields_  # with one field left out, everything behind it lies elsewhere
shorter = type("Shorter", (ctypes.Structure,), {"_fields_": (*fields[:3], *fields[4:])})
library.llama_context_default_params.restype = shorter
try:
    Library._check_layout(library)
except RunError as error:
    print(error.what)
"""
    # in a process of its own: the library has one log, and the tests beside this one read it
    ran = subprocess.run([sys.executable, "-c", script, tmp_path], capture_output=True, text=True)
    assert "not the version" in ran.stdout, ran.stderr


def check_training_arguments_n_gpu(tmp_path):
    from transformers import TrainingArguments

    arguments = TrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    arguments._n_gpu = 7
    assert arguments.n_gpu == 7, "_n_gpu is not what n_gpu returns"


def check_scheduler_last_lr():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.5)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    schedule._last_lr = [0.25]
    assert schedule.get_last_lr() == [0.25], "_last_lr is not what get_last_lr returns"


def check_scaled_mm():
    assert callable(torch._scaled_mm)
    assert "use_fast_accum" in str(torch.ops.aten._scaled_mm.default._schema)


def check_functorch_config():
    from torch._functorch import config

    with config.patch(ban_recompute_materialized_backward=False):
        assert config.ban_recompute_materialized_backward is False


def check_dynamo_exception():
    from torch._dynamo.exc import BackendCompilerFailed, TorchDynamoException

    assert issubclass(BackendCompilerFailed, TorchDynamoException)


def check_torch_check():
    torch._check(True)
    with pytest.raises(RuntimeError):
        torch._check(False)


def check_module_parameters():
    layer = torch.nn.Linear(2, 2)
    weight = torch.nn.Parameter(torch.ones(2, 2), requires_grad=False)
    layer._parameters["weight"] = weight
    assert layer.weight is weight
    module = torch.nn.BatchNorm1d(2)
    mean = torch.ones(2)
    module._buffers["running_mean"] = mean
    assert module.running_mean is mean


def check_pattern_key():
    from peft.utils.other import get_pattern_key

    assert get_pattern_key(["q_proj", r"layers\.1\..*k_proj"], "model.layers.1.self_attn.k_proj").endswith("k_proj")
    assert get_pattern_key(["q_proj"], "model.layers.0.mlp.up_proj") == "model.layers.0.mlp.up_proj"


def check_render_template():
    from transformers.utils.chat_template_utils import render_jinja_template

    chats, _ = render_jinja_template([[{"role": "user", "content": "gull"}]], chat_template="{{ messages[0].content }}")
    assert chats == ["gull"]
    marked = "a {% generation %}{{ messages[0].content }}{% endgeneration %} b"
    chats, spans = render_jinja_template(
        [[{"role": "user", "content": "gull"}]], chat_template=marked, return_assistant_tokens_mask=True
    )
    assert chats == ["a gull b"] and [tuple(span) for span in spans[0]] == [(2, 6)]


def check_data_files(tmp_path):
    from datasets.data_files import DataFilesDict, get_data_patterns, sanitize_patterns

    for name in ("train.jsonl", "test.jsonl"):
        (tmp_path / name).write_text("{}")
    patterns = get_data_patterns(str(tmp_path))
    files = DataFilesDict.from_local_or_remote(patterns, base_path=str(tmp_path))
    assert {str(split): [Path(path).name for path in paths] for split, paths in files.items()} == {
        "train": ["train.jsonl"],
        "test": ["test.jsonl"],
    }
    assert sanitize_patterns([{"split": "dev", "path": "x.jsonl"}]) == {"dev": ["x.jsonl"]}


def check_jobs_image():
    from huggingface_hub._jobs_api import DEFAULT_UV_IMAGE

    assert "uv" in DEFAULT_UV_IMAGE


def check_consistency_check():
    from huggingface_hub import file_download

    assert "Consistency check failed" in inspect.getsource(file_download), "a cut download is worded differently"


def check_httpx_module():
    from huggingface_hub.errors import HfHubHTTPError

    assert any(kind.__module__.startswith("httpx2") for kind in HfHubHTTPError.__mro__), HfHubHTTPError.__mro__


def check_flash_attention_4(monkeypatch):
    stand_in = Path(__file__).parents[1] / "training" / "engine" / "flash_stand_in"
    monkeypatch.syspath_prepend(str(stand_in))
    from phoque.training.engine.flash_attn4 import _load_kernels

    kernels = _load_kernels()
    assert {"cu_seqlens_q", "max_seqlen_q", "softmax_scale", "return_lse"} <= set(parameters(kernels._flash_attn_fwd))
    assert callable(kernels._flash_attn_bwd)


CHECKS = {
    name.removeprefix("check_").replace("_", "-"): check
    for name, check in list(globals().items())
    if name.startswith("check_")
}


@pytest.mark.parametrize("id", CHECKS)
def test_contract(id, request):
    check = CHECKS[id]
    check(**{name: request.getfixturevalue(name) for name in parameters(check)})


def test_the_table_lists_exactly_these():
    rows = re.findall(r"^\| ([a-z0-9-]+) \|", TABLE.read_text(), re.MULTILINE)
    assert [row for row in rows if row != "id" and not set(row) <= set("-")] == list(CHECKS)
