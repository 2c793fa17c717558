"""verify-gguf refuses damaged files in words, and passes whole ones up to Node and a browser."""

import json
import random
import shutil
import struct
from pathlib import Path

import gguf
import numpy as np
import pytest
from filelock import FileLock

from phoque.gguf.reader import read_gguf
from tests.conftest import Running, isolate, write_rows
from tests.rows import row


@pytest.fixture(scope="session")
def export(shared, llama_cpp, llama_model, forkserver, home, served, tmp_path_factory):
    """A tiny export in f32 and q8_0, made once for all workers."""
    folder, done = shared / "seal-gguf", shared / "seal-gguf.done"
    chats = write_rows(tmp_path_factory.mktemp("chats") / "rows.jsonl", [row(n) for n in range(40)])
    with FileLock(shared / "seal-gguf.lock"):
        if not done.exists():
            with pytest.MonkeyPatch.context() as patch:
                isolate(patch, home, served.url)
                words = ["export-gguf", "--merged-dir", llama_model, "--chats", chats, "--output-dir", folder]
                ran = Running(forkserver, [*words, "--dtype", "f32,q8_0", "--install"], {}).ended()
            assert ran.code == 0, ran.err
            done.touch()
    return folder


def rewrite(source: Path, target: Path, *, drop=(), tensors=None, **changes) -> None:
    """Write a file again with entries left out or changed, and tensors replaced (None leaves one out)."""
    file = gguf.GGUFReader(source)
    architecture = file.fields["general.architecture"].contents()
    writer = gguf.GGUFWriter(target, changes.pop("architecture", architecture))
    for name, field in file.fields.items():
        if name.startswith("GGUF.") or name == "general.architecture" or name in drop:
            continue
        value = changes.pop(name, field.contents())
        if isinstance(value, list):
            writer.add_array(name, value)
        else:
            kind = field.types[0] if isinstance(value, type(field.contents())) else gguf.GGUFValueType.STRING
            writer.add_key_value(name, value, kind)
    assert not changes, changes
    for tensor in file.tensors:
        data = (tensors or {}).get(tensor.name, tensor.data)
        if data is not None:
            writer.add_tensor(
                tensor.name, np.array(data), raw_dtype=tensor.tensor_type if data is tensor.data else None
            )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-4000])


def _poke(offset: int, data: bytes):
    def damage(file: Path) -> None:
        content = bytearray(file.read_bytes())
        content[offset : offset + len(data)] = data
        file.write_bytes(content)

    return damage


def _entry(name, value):
    return lambda file: _again(file, **{name: value})


def _without(name):
    return lambda file: _again(file, drop=(name,))


def _tensor(name, data):
    return lambda file: _again(file, tensors={name: data(file)})


def _again(file: Path, **options) -> None:
    source = file.with_suffix(".old")
    file.rename(source)
    rewrite(source, file, **options)
    source.unlink()


def _values(name):
    return lambda file: np.array(next(t for t in gguf.GGUFReader(file).tensors if t.name == name).data)


def _nan(file):
    values = _values("blk.1.ffn_up.weight")(file)
    values[3, 3] = np.nan
    return values


IN_LLAMA_CPP = ["--level", "llama.cpp", "--install", "--json"]
T, A = "tokenizer.ggml.", "llama."
BROKEN = {
    "a pointer": (lambda f: f.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0"), "Git LFS"),
    "another format": (lambda f: f.write_bytes(b"PK\x03\x04" + bytes(100)), "not a GGUF file"),
    "empty": (lambda f: f.write_bytes(b""), "not a GGUF file"),
    "version": (_poke(4, b"\x09\0\0\0"), "version 9"),
    "cut": (_cut, "cut short"),
    "count": (_poke(16, b"\xff\xff\xff\x7f"), "damaged"),
    "type of an entry": (_poke(24 + 8 + 20, b"\x77\0\0\0"), "damaged"),
    "architecture": (_entry("architecture", "gulls"), "does not know the architecture 'gulls'"),
    "another model": (_entry("architecture", "mamba"), "mamba"),
    "blocks": (_entry(A + "block_count", 5), "no tensor blk.3"),
    "more blocks than named": (_entry(A + "block_count", 2), "2 blocks"),
    "no blocks": (_entry(A + "block_count", 0), "block_count is 0"),
    "width": (_entry(A + "embedding_length", 32), "the metadata say"),
    "heads": (_entry(A + "attention.head_count", 3), "cannot share"),
    "no epsilon": (_without(A + "attention.layer_norm_rms_epsilon"), "layer_norm_rms_epsilon"),
    "no tokens": (_without(T + "tokens"), "no tokenizer.ggml.tokens"),
    "fewer tokens": (lambda f: _again(f, **{T + "tokens": ["a", "b"], T + "token_type": [1, 1]}), "2 tokens"),
    "fewer types": (_entry(T + "token_type", [1, 1, 1]), "token types"),
    "no merges": (_without(T + "merges"), "merges"),
    "no pre-tokenizer": (_without(T + "pre"), "tokenizer.ggml.pre"),
    "kind of tokenizer": (_entry(T + "model", "bert"), "tokenizer.ggml.model is 'bert'"),
    "an end that is none": (_entry(T + "eos_token_id", 99_999), "eos_token_id is 99999"),
    "no end": (_without(T + "eos_token_id"), "never end"),
    "another end": (lambda f: _again(f, **{T + "eos_token_id": 5, T + "eot_token_id": 5}), "neither"),
    "no template": (_without("tokenizer.chat_template"), "chat_template"),
    "a template with an error": (_entry("tokenizer.chat_template", "{% for %}"), "does not render"),
    "a template without messages": (_entry("tokenizer.chat_template", "hello"), "leaves out"),
    "a template without a stop": (
        _entry("tokenizer.chat_template", "{% for m in messages %}{{ m['content'] }}\n{% endfor %}"),
        "would not stop",
    ),
    "a missing tensor": (_tensor("blk.1.attn_k.weight", lambda f: None), "no tensor blk.1.attn_k"),
    "a shape": (_tensor("blk.0.ffn_down.weight", lambda f: np.zeros((64, 32), np.float32)), "ffn_down"),
    "not a number": (_tensor("blk.1.ffn_up.weight", _nan), "NaN"),
    "a magnitude": (_tensor("output_norm.weight", lambda f: _values("output_norm.weight")(f) * 1e6), "trained weights"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_file_is_refused_in_words(phoque, export, tmp_path, kind):
    damage, expected = BROKEN[kind]
    file = shutil.copyfile(export / "llama-F32.gguf", tmp_path / "broken.gguf")
    damage(Path(file))
    ran = phoque("verify-gguf", "--local-dir", file, "--level", "graph", "--json", expect=1)
    failed = [check["said"] for check in ran.json["checks"] if check["result"] == "FAIL"]
    assert any(expected in text for text in failed), failed
    assert ran.json["verdict"] == "FAIL" and "Traceback" not in ran.err


def check_in_llama_cpp(phoque, file, reference):
    """The checks of a file that fails beside its reference."""
    words = ["verify-gguf", "--local-dir", file, "--reference", reference, "--level", "llama.cpp", "--install"]
    return phoque(*words, "--json", expect=1).json["checks"]


def test_a_file_of_other_weights_is_found_in_llama_cpp(phoque, export, llama_model, tmp_path):
    file = tmp_path / "other.gguf"
    swap = {"blk.0.attn_q.weight": _values("blk.1.attn_q.weight")(export / "llama-F32.gguf")}
    rewrite(export / "llama-F32.gguf", file, tensors=swap)
    checks = check_in_llama_cpp(phoque, file, llama_model)
    assert any("other weights" in check["said"] for check in checks if check["result"] == "FAIL"), checks


def test_a_file_that_splits_texts_otherwise_is_found_in_llama_cpp(phoque, export, llama_model, tmp_path):
    file = tmp_path / "other.gguf"
    rewrite(export / "llama-F32.gguf", file, **{"tokenizer.ggml.merges": ["Ġ t"]})
    checks = check_in_llama_cpp(phoque, file, llama_model)
    (failed,) = [check for check in checks if check["result"] == "FAIL" and "tokens" in check["asks"]]
    assert "in a conversation of" in failed["said"]


def test_a_folder_whose_files_changed_fails(phoque, export, tmp_path):
    folder = shutil.copytree(export, tmp_path / "copy")
    record = json.loads((folder / "export.json").read_text())
    record["sha256"]["llama-Q8_0.gguf"] = "0" * 64
    (folder / "export.json").write_text(json.dumps(record))
    (folder / "Modelfile").write_text("FROM ./gone.gguf\n")
    failed = [
        check["said"]
        for check in phoque("verify-gguf", "--local-dir", folder, "--level", "files", "--json", expect=1).json["checks"]
        if check["result"] == "FAIL"
    ]
    assert any("SHA-256" in text for text in failed) and any("gone.gguf" in text for text in failed)


def test_the_levels_without_clients_pass(phoque, export, llama_model):
    words = [
        "verify-gguf",
        "--local-dir",
        export,
        "--reference",
        llama_model,
        "--level",
        "llama.cpp",
        "--install",
        "--json",
    ]
    ran = phoque(*words)
    assert ran.json["verdict"] == "PASS", ran.json["checks"]
    assert ran.json["numbers"]["llama-F32.gguf"]["kl"] < 1e-6
    tokens = [check["said"] for check in ran.json["checks"] if "its tokens are those" in check["asks"]]
    assert len(tokens) == 2 and all("conversations" in text for text in tokens)


def test_what_is_no_gguf_is_refused_at_once(phoque, tmp_path):
    (tmp_path / "empty").mkdir()
    assert "no GGUF file" in phoque("verify-gguf", "--local-dir", "empty", expect=2).error[0]
    assert "No export is given" in phoque("verify-gguf", expect=2).error[0]
    assert "no precision" in phoque("verify-gguf", "--local-dir", "empty", "--dtype", "q3", expect=2).error[0]


@pytest.mark.slow
def test_node_and_a_browser_answer_as_llama_cpp_does(phoque, export, tmp_path):
    ran = phoque("verify-gguf", "--local-dir", export, "--install", "--json", "--report-md", tmp_path / "report.md")
    levels = dict.fromkeys(("files", "graph", "llama.cpp", "node", "browser"), "PASS")
    assert ran.json["levels"] == levels, ran.json["checks"]
    assert sum("tokens per second" in check["said"] for check in ran.json["checks"]) == 6
    assert "| browser | PASS |" in (tmp_path / "report.md").read_text()


def test_the_reader_says_what_a_file_is(export):
    file = read_gguf(export / "llama-Q8_0.gguf")
    assert file.precision == "q8_0" and file.architecture == "llama" and file.key("block_count") == 3


def test_counts_that_no_file_can_hold_are_refused_at_once(phoque, tmp_path):
    """gguf's own reader believes them, and reads for ever or fills the memory."""
    head = b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q", 1) + b"a"
    bombs = {
        "array": head + struct.pack("<IIQ", 9, 0, 2**40),
        "strings": head + struct.pack("<IIQ", 9, 8, 2**40),
        "text": head + struct.pack("<IQ", 8, 2**50),
        "entries": b"GGUF" + struct.pack("<IQQ", 3, 0, 2**60),
        "tensors": b"GGUF" + struct.pack("<IQQ", 3, 2**60, 0),
        "nested": head + struct.pack("<IIQ", 9, 9, 4),
    }
    for name, content in bombs.items():
        (tmp_path / f"{name}.gguf").write_bytes(content)
    ran = phoque("verify-gguf", "--local-dir", tmp_path, "--level", "files", "--json", expect=1)
    failed = [check for check in ran.json["checks"] if check["result"] == "FAIL"]
    assert len(failed) == len(bombs) and all("damaged" in check["said"] for check in failed), failed


@pytest.mark.thorough
def test_random_damage_is_refused_in_words_or_changes_no_more_than_a_value(export, tmp_path):
    from phoque.checks import Verdict
    from phoque.gguf.verify.files import check_file

    whole = (export / "llama-Q8_0.gguf").read_bytes()
    for seed in range(200):
        rng = random.Random(seed)
        content = bytearray(whole)
        for _ in range(rng.randint(1, 4)):
            content[rng.randrange(12_000)] = rng.randrange(256)
        file = tmp_path / "damaged.gguf"
        file.write_bytes(content[: rng.randrange(len(content))] if rng.random() < 0.2 else content)
        check_file(file, Verdict(("files", "graph")))  # raises nothing, whatever it finds
