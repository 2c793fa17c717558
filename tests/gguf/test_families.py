"""Every family that export-gguf supports computes in llama.cpp what it computes in transformers."""

import numpy as np
import pytest
import torch

from phoque.console import Console
from phoque.errors import UsageError
from phoque.gguf.llama_cpp_model import LlamaCppModel
from phoque.gguf.metadata import find_format, write_metadata
from phoque.gguf.reader import read_gguf
from phoque.gguf.tensors import GgufTensors
from phoque.gguf.vocabulary import find_pre_tokenizer, read_vocabulary
from phoque.gguf.writer import write_file
from phoque.models.architectures import ARCHITECTURES
from phoque.models.checkpoint_reader import CheckpointReader
from phoque.models.config import load_config, load_tokenizer
from phoque.models.load import load_model
from phoque.models.source import find_model
from phoque.services import Services
from tests import tiny
from tests.gguf.conftest import add_merges, build_family
from tests.tiny import families

SUPPORTED = [name for name, (kind, _, _) in families.FAMILIES.items() if ARCHITECTURES[kind].gguf]
# llama.cpp looks GELU up in a table of 16-bit values
TOLERANCE = {"gemma3": 5e-3, "gemma3 with vision": 5e-3}


def write_whole(source, llama_cpp, folder):
    """Write a model in f32; return the file."""
    reader, tokenizer = CheckpointReader(source), load_tokenizer(source)
    form = find_format(reader.config)
    vocabulary = read_vocabulary(tokenizer, reader.text_config.vocab_size, tokenizer.eos_token_id)
    pre = find_pre_tokenizer(vocabulary, tokenizer, llama_cpp, folder)
    tensors = GgufTensors(reader, form, "f32")

    def add_metadata(writer):
        write_metadata(writer, reader.config, form, name="x", dtype="f32")
        vocabulary.write(writer, pre.name, space_prefix=pre.space_prefix)

    write_file(folder / "x.gguf", form.name, add_metadata, tensors.plan(), tensors.values())
    return folder / "x.gguf"


@pytest.mark.parametrize("family", SUPPORTED)
def test_logits_are_those_of_transformers(family, llama_cpp, tmp_path):
    source = find_model(str(build_family(family, tmp_path / "m")), None, Services.without_token(Console(), tmp_path))
    file = write_whole(source, llama_cpp, tmp_path)
    ids = torch.randint(20, 250, (1, 30), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = load_model(source, "fp32", on=torch.device("cpu"))(input_ids=ids).logits[0].numpy()
    with LlamaCppModel(llama_cpp, file, 64, exact=True, threads=1) as model:
        whole = model.run(ids[0].tolist(), all_logits=True)
        model.run(ids[0, :20].tolist())
        last = model.run(ids[0].tolist())  # the first 20 tokens are in the cache
    scale = np.abs(expected).max()
    assert np.abs(whole - expected).max() / scale < TOLERANCE.get(family, 2e-5)
    assert np.abs(last[0] - whole[-1]).max() / scale < 1e-4


@pytest.mark.parametrize("family", ["qwen3.5", "lfm2", "granite 4", "ministral", "gemma3", "smollm3", "olmo2"])
def test_what_llama_cpp_cannot_run_is_refused_with_its_reason(family, tmp_path):
    """The first four as a family; the others because these tiny models differ from what llama.cpp has in its code."""
    source = find_model(str(families.build(family, tmp_path / "m")), None, Services.without_token(Console(), tmp_path))
    with pytest.raises(UsageError) as caught:
        find_format(load_config(source))
    assert "to GGUF" in caught.value.what and len(caught.value.why) > 20


def test_every_architecture_has_a_format_or_a_reason():
    for architecture in ARCHITECTURES.values():
        assert bool(architecture.gguf) != bool(architecture.no_gguf), architecture.model_type


def test_ministral_3_in_fp8_with_its_vision_tower_becomes_its_text_model(llama_cpp, tmp_path):
    """YaRN, queries that grow with the position, FP8 weights, and a tower that is left out."""
    folder, _ = tiny.fp8_mistral3(tmp_path / "m")
    source = find_model(str(add_merges(folder)), None, Services.without_token(Console(), tmp_path))
    file = write_whole(source, llama_cpp, tmp_path)
    keys = read_gguf(file).metadata
    assert keys["general.architecture"] == "mistral3" and keys["mistral3.rope.scaling.type"] == "yarn"
    assert keys["mistral3.attention.temperature_scale"] > 0
    assert not [name for name in read_gguf(file).tensors if "v." in name.split("blk")[0] or "mm." in name]
    ids = torch.randint(20, 250, (1, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = load_model(source, "fp32", on=torch.device("cpu"))(input_ids=ids).logits[0].numpy()
    with LlamaCppModel(llama_cpp, file, 64, exact=True, threads=1) as model:
        whole = model.run(ids[0].tolist(), all_logits=True)
    assert np.abs(whole - expected).max() / np.abs(expected).max() < 2e-5
