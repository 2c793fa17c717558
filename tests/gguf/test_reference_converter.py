"""Every tensor and entry that phoque writes is, bit for bit, what llama.cpp's own converter writes."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from filelock import FileLock

from phoque.console import Console
from phoque.gguf.adapter import write_lora
from phoque.gguf.metadata import find_format, write_metadata
from phoque.gguf.reader import read_gguf
from phoque.gguf.tensors import GgufTensors
from phoque.gguf.verify.clients import client
from phoque.gguf.vocabulary import read_vocabulary
from phoque.gguf.writer import write_file
from phoque.models.checkpoint_reader import CheckpointReader
from phoque.models.config import load_tokenizer
from phoque.models.source import find_model
from phoque.services import Services
from tests.gguf.conftest import build_family
from tests.gguf.test_families import SUPPORTED

pytestmark = pytest.mark.slow
# the converter reads Phi 3's vocabulary from a file of SentencePiece, which a tiny model does not have
FAMILIES = [family for family in SUPPORTED if family != "phi3"]
WITHOUT_PADDING = ("gemma3", "gemma3 with vision")  # the converter leaves out embeddings that have no token
OTHER_CONTEXT = ("qwen2 with windows",)  # phoque limits the context to a window that llama.cpp does not apply


@pytest.fixture(scope="session")
def converter(shared) -> Path:
    """The source of llama.cpp, with its converter, as node-llama-cpp ships it."""
    folder = shared / "llama.cpp"
    with FileLock(shared / "llama.cpp.lock"):
        if not folder.exists():
            client().install(shared, Console())
            bundle = client().modules(shared) / "node-llama-cpp" / "llama" / "gitRelease.bundle"
            subprocess.run(["git", "clone", "-q", bundle, folder], check=True)
    return folder


def convert(converter: Path, model: Path, out: Path, dtype: str = "f16") -> None:
    script = Path(__file__).with_name("convert.py")
    ran = subprocess.run([sys.executable, script, converter, model, out, dtype], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr


@pytest.mark.parametrize(("family", "dtype"), [*((family, "f16") for family in FAMILIES), ("llama", "bf16")])
def test_the_same_tensors_and_entries(family, dtype, converter, tmp_path):
    model = build_family(family, tmp_path / "m")
    convert(converter, model, tmp_path / "theirs.gguf", dtype)
    source = find_model(str(model), None, Services.without_token(Console(), tmp_path))
    reader, tokenizer = CheckpointReader(source), load_tokenizer(source)
    form = find_format(reader.config)
    vocabulary = read_vocabulary(tokenizer, reader.text_config.vocab_size, tokenizer.eos_token_id)
    tensors = GgufTensors(reader, form, dtype)

    def add_metadata(writer):
        write_metadata(writer, reader.config, form, name="x", dtype=dtype)
        vocabulary.write(writer, "llama-bpe")
        writer.add_chat_template(tokenizer.chat_template)

    write_file(tmp_path / "ours.gguf", form.name, add_metadata, tensors.plan(), tensors.values())
    theirs, ours = read_gguf(tmp_path / "theirs.gguf"), read_gguf(tmp_path / "ours.gguf")
    assert theirs.tensors.keys() == ours.tensors.keys()
    for name, tensor in theirs.tensors.items():
        assert tensor.tensor_type == ours.tensors[name].tensor_type, name
        rows = len(tensor.data) if family in WITHOUT_PADDING and name == "token_embd.weight" else None
        assert np.array_equal(tensor.data, ours.tensors[name].data[:rows]), name
    for key, value in theirs.metadata.items():
        if key.startswith("general.") and key not in ("general.architecture", "general.file_type"):
            continue  # names and sizes that are guessed from the folder
        if key.endswith(".context_length") and family in OTHER_CONTEXT:
            continue
        assert ours.metadata.get(key) == value, key


def test_the_same_adapter(converter, tmp_path):
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = build_family("llama", tmp_path / "m")
    config = LoraConfig(r=4, lora_alpha=12, target_modules=["q_proj", "k_proj", "v_proj", "down_proj"])
    adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(model), config)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter)
    adapted.save_pretrained(tmp_path / "adapter")
    script = converter / "convert_lora_to_gguf.py"
    words = ["--base", model, "--outfile", tmp_path / "theirs.gguf", "--outtype", "f16", tmp_path / "adapter"]
    ran = subprocess.run([sys.executable, script, *words], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    source = find_model(str(model), None, Services.without_token(Console(), tmp_path))
    reader = CheckpointReader(source)
    write_lora(tmp_path / "ours.gguf", reader, find_format(reader.config), tmp_path / "adapter", name="x", dtype="f16")
    theirs, ours = read_gguf(tmp_path / "theirs.gguf"), read_gguf(tmp_path / "ours.gguf")
    assert theirs.tensors.keys() == ours.tensors.keys() and len(theirs.tensors) == 8 * 4
    for name, tensor in theirs.tensors.items():
        assert np.array_equal(tensor.data, ours.tensors[name].data), name
    for key in ("general.type", "general.architecture", "adapter.type", "adapter.lora.alpha"):
        assert theirs.metadata[key] == ours.metadata[key], key
