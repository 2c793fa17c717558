"""llama.cpp for the tests, and tiny models that it can load: their tokenizers have merges, as every real one has."""

import json
import os
from pathlib import Path

import pytest
from filelock import FileLock

from phoque.console import Console
from phoque.gguf.llama_cpp import binaries, open_library
from phoque.services import Services
from tests import tiny
from tests.tiny import families

MERGES = (("h", "e"), ("Ġ", "t"), ("Ġt", "he"), ("i", "n"), ("1", "2"))
# how Llama 3's byte-level tokenizer splits a text
WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
LLAMA3 = WORDS + r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# families whose tiny models need other settings for llama.cpp, which fixes them in its code
GEMMA = {
    "num_hidden_layers": 6,
    "layer_types": ["sliding_attention"] * 5 + ["full_attention"],
    "query_pre_attn_scalar": 16,
}
CHANGES = {
    "gemma3": GEMMA,
    "gemma3 with vision": GEMMA,
    "qwen2 with windows": {"sliding_window": 512},  # no conversation here is longer
    "smollm3": {"no_rope_layers": [1, 1, 1, 0]},
    "phi3": {"sliding_window": None},
    "mistral": {"sliding_window": None},
    "olmo2": {"tie_word_embeddings": False},
    "olmo3": {"tie_word_embeddings": False},
}


def add_merges(folder: Path, pattern: str = LLAMA3) -> Path:
    """Give the byte-level tokenizer in a folder a few merges, and the rules by which it splits a text."""
    file = folder / "tokenizer.json"
    core = json.loads(file.read_text())
    vocabulary = core["model"]["vocab"]
    first_free = max(vocabulary.values()) + 1
    for entry in core["added_tokens"]:  # tokenizers numbers them behind the vocabulary, whatever the file says
        entry["id"] += len(MERGES) * (entry["id"] >= first_free)
    for number, (first, second) in enumerate(MERGES, first_free):
        vocabulary[first + second] = number
        core["model"]["merges"].append([first, second])
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    core["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [split, byte_level]}
    file.write_text(json.dumps(core))
    return folder


def build_family(family: str, folder: Path) -> Path:
    """A tiny model of a family as llama.cpp supports it."""
    model_type, changes, template = families.FAMILIES[family]
    families.FAMILIES["gguf"] = (model_type, changes | CHANGES.get(family, {}), template)
    return add_merges(families.build("gguf", folder))


@pytest.fixture(scope="session")
def llama_cpp(shared, home):
    """llama.cpp, installed once for all workers from npm."""
    services = Services.without_token(Console(), shared / "llama")
    client = binaries()
    with FileLock(shared / "llama.lock"):
        if not client.is_installed(services.cache):
            client.install(services.cache, services.console)
    return open_library(client.modules(services.cache))


@pytest.fixture
def with_llama_cpp(llama_cpp, home):
    """The commands find the installed llama.cpp in their cache."""
    target = home / "cache" / "phoque" / "client"
    source = llama_cpp.file
    while source.name != "client":
        source = source.parent
    target.mkdir(parents=True, exist_ok=True)
    for folder in source.iterdir():
        if not (target / folder.name).exists():
            os.symlink(folder, target / folder.name)


@pytest.fixture(scope="session")
def llama_model(tmp_path_factory) -> Path:
    """A tiny Llama that llama.cpp can load."""
    folder = tmp_path_factory.mktemp("gguf") / "llama"
    return add_merges(tiny.llama(folder, num_hidden_layers=3, initializer_range=0.3))
