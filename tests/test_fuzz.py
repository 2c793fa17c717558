"""Random damage to what people bring: it is read, or refused in words; no other error, no hang, nothing written."""

import json
import os
import random
import shutil
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from phoque.errors import PhoqueError
from tests.merging.test_adapter_options import make_adapter
from tests.rows import row

EXAMPLES = int(os.environ.get("PHOQUE_TEST_EXAMPLES", "200"))
SECONDS = 30  # for one example; more is a hang
VALUES = [None, True, -1, 0, 2**70, 1e308, float("nan"), "", "ü" * 40, "../../x", [], {}, [[]], {"a": {}}, "\x00"]


def damage_bytes(content: bytes, rng: random.Random) -> bytes:
    """Flip bits, cut, repeat, insert or swap bytes, one to four times."""
    raw = bytearray(content)
    for _ in range(rng.randint(1, 4)):
        at, length = rng.randrange(len(raw) + 1), rng.choice([1, 2, 8, 64])
        match rng.randrange(5):
            case 0 if raw:
                raw[at % len(raw)] ^= 1 << rng.randrange(8)
            case 1:
                del raw[at : at + length]
            case 2:
                raw[at:at] = rng.randbytes(length)
            case 3:
                raw[at:at] = raw[max(0, at - length) : at]
            case _:
                del raw[at:]
    return bytes(raw)


def damage_json(value, rng: random.Random):
    """Replace, remove or add one value anywhere in a JSON document."""
    if isinstance(value, dict) and value and rng.random() < 0.85:
        key = rng.choice([*value])
        if rng.random() < 0.15:
            return {name: item for name, item in value.items() if name != key}
        return value | {key: damage_json(value[key], rng)}
    if isinstance(value, list) and value and rng.random() < 0.7:
        at = rng.randrange(len(value))
        return [*value[:at], damage_json(value[at], rng), *value[at + 1 :]]
    return rng.choice(VALUES)


@contextmanager
def time_limit() -> Iterator[None]:
    def stop(number, frame):
        raise AssertionError(f"not done after {SECONDS} s")

    previous = signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)


def fuzz(read: Callable[[random.Random], object], folder: Path) -> None:
    """Run `read` EXAMPLES times: it may raise PhoqueError alone, and change no file beside its input."""
    outside = {path for path in folder.parent.iterdir()}
    outcomes = {"read": 0, "refused": 0}
    for seed in range(EXAMPLES):
        with time_limit():
            try:
                read(random.Random(seed))
                outcomes["read"] += 1
            except PhoqueError as error:
                assert error.what and error.why and error.fix
                outcomes["refused"] += 1
            except BaseException as error:
                raise AssertionError(f"seed {seed}: {type(error).__name__}: {error}") from error
    assert {path for path in folder.parent.iterdir()} == outside
    assert outcomes["refused"], outcomes


@pytest.fixture
def folder(tmp_path) -> Path:
    made = tmp_path / "fuzz" / "input"
    made.mkdir(parents=True)
    return made


pytestmark = pytest.mark.slow


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "parquet", "jsonl.gz"])
def test_a_dataset(folder, kind, tiny_llama):
    import gzip

    import pyarrow as pa
    import pyarrow.parquet
    from transformers import AutoTokenizer

    from phoque.data.chat_template import ChatTemplate
    from phoque.data.readers import open_dataset
    from phoque.data.scan import scan_dataset

    chat = ChatTemplate(AutoTokenizer.from_pretrained(tiny_llama), "", 512)
    rows = [row(number) for number in range(6)]
    lines = "\n".join(map(json.dumps, rows)).encode()
    file = folder / f"rows.{kind}"
    if kind == "parquet":
        pa.parquet.write_table(pa.Table.from_pylist(rows), file)
        whole = file.read_bytes()
    else:
        table = b"prompt,completion\n" + b"\n".join(b'"gull %d, what?","hrmph"' % n for n in range(6))
        whole = {"jsonl": lines, "json": json.dumps(rows).encode(), "csv": table, "jsonl.gz": gzip.compress(lines)}[
            kind
        ]

    def read(rng: random.Random) -> None:
        if kind in ("jsonl", "json") and rng.random() < 0.5:
            damaged = damage_json(rows, rng)
            text = json.dumps(damaged)
            if kind == "jsonl":
                text = "\n".join(map(json.dumps, damaged if isinstance(damaged, list) else [damaged]))
            file.write_text(text)
        else:
            file.write_bytes(damage_bytes(whole, rng))
        scan_dataset(open_dataset(str(file)), chat, 2, 0.5)

    fuzz(read, folder)


def test_a_persona_file(folder):
    from phoque.probes.persona import load_persona
    from tests.probes.persona_vectors.test_psm_probe import PERSONA

    file = folder / "persona.toml"

    def read(rng: random.Random) -> None:
        file.write_bytes(damage_bytes(PERSONA.encode(), rng))
        load_persona(str(file))

    fuzz(read, folder)


@pytest.mark.parametrize("part", ["adapter_config.json", "adapter_model.safetensors"])
def test_an_adapter(folder, tiny_llama, part):
    from phoque.merging.writer import write_merged
    from phoque.models.checkpoint_reader import CheckpointReader
    from phoque.models.source import Source

    make_adapter(tiny_llama, folder, r=4, target_modules=["q_proj", "v_proj"])
    whole = (folder / part).read_bytes()
    reader = CheckpointReader(Source(str(tiny_llama), tiny_llama, "", ""))

    def read(rng: random.Random) -> None:
        is_json = part.endswith("json") and rng.random() < 0.7
        damaged = json.dumps(damage_json(json.loads(whole), rng)).encode() if is_json else damage_bytes(whole, rng)
        (folder / part).write_bytes(damaged)
        shutil.rmtree(folder / "out", ignore_errors=True)
        write_merged(reader, folder, folder / "out", "fp32")

    fuzz(read, folder)


def test_a_safetensors_header(folder, tiny_llama):
    from phoque.models.safetensors_files import SafetensorsFiles

    whole = (tiny_llama / "model.safetensors").read_bytes()
    length = int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8 : 8 + length])

    def read(rng: random.Random) -> None:
        text = json.dumps(damage_json(header, rng)).encode() if rng.random() < 0.6 else whole[8 : 8 + length]
        head = len(text).to_bytes(8, "little") + text
        if rng.random() < 0.5:
            head = damage_bytes(head, rng)
        (folder / "model.safetensors").write_bytes(head + whole[8 + length :])
        files = SafetensorsFiles(folder)
        for name in files.tensors:
            files.read(name)

    fuzz(read, folder)


def test_a_model_config(folder, tiny_llama):
    from phoque.console import Console
    from phoque.models.checkpoint_reader import CheckpointReader
    from phoque.models.source import find_model
    from phoque.services import Services

    for path in tiny_llama.iterdir():
        shutil.copyfile(path, folder / path.name)
    whole = (tiny_llama / "config.json").read_bytes()

    def read(rng: random.Random) -> None:
        is_json = rng.random() < 0.8
        damaged = json.dumps(damage_json(json.loads(whole), rng)).encode() if is_json else damage_bytes(whole, rng)
        (folder / "config.json").write_bytes(damaged)
        CheckpointReader(find_model(str(folder), None, Services.without_token(Console(), folder)))

    fuzz(read, folder)


def test_a_secrets_file(folder):
    from phoque.settings.presets import PRESETS
    from phoque.settings.resolve import resolve_settings
    from phoque.settings.train import TrainSettings

    text = (
        'HF_TOKEN=hf_harbour\nMAX_STEPS=7\nexport WANDB_MODE=\'offline\'\nPHOQUE_PROMPTS=["a", "b"]\nHUB_MODEL_ID=a/b\n'
    )
    file = folder / ".env.secrets"

    def read(rng: random.Random) -> None:
        file.write_bytes(damage_bytes(text.encode(), rng))
        resolve_settings(TrainSettings, {}, PRESETS, file)

    fuzz(read, folder)


def test_a_gguf_file(folder, tiny_llama):
    import gguf
    import numpy

    from phoque.console import Console
    from phoque.models.source import find_model
    from phoque.services import Services

    file = folder / "tiny.gguf"
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_block_count(1)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(64)
    writer.add_head_count(2)
    writer.add_context_length(64)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(["a", "b", "c"])
    writer.add_tensor("token_embd.weight", numpy.zeros((3, 32), numpy.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    whole = file.read_bytes()

    def read(rng: random.Random) -> None:
        file.write_bytes(damage_bytes(whole, rng))
        find_model(str(file), None, Services.without_token(Console(), folder / "cache"))

    fuzz(read, folder)


def test_a_page_request(folder):
    from phoque.page_server import PageServer

    (folder / "secret.txt").write_text("herring")
    export = folder / "models" / "seal"
    export.mkdir(parents=True)
    (export / "config.json").write_text("{}")
    (export / "link.txt").symlink_to(folder / "secret.txt")
    folders = {"/models/seal/": export, "/modules/": folder / "modules"}
    asked = []
    with PageServer(0, folders, {}, lambda request: iter([asked.append(request) or {"done": {}}])) as server:
        port = server.port
        parts = [
            "/",
            "..",
            "%2e%2e",
            "%",
            "%00",
            "models/seal/",
            "link.txt",
            "api/chat",
            "api/info",
            "modules/",
            "secret.txt",
            "config.json",
            "\\",
            "//",
            "é",
        ]
        for seed in range(EXAMPLES):
            rng = random.Random(seed)
            target = "".join(rng.choices(parts, k=rng.randint(1, 8)))
            method = rng.choice(["GET", "GET", "HEAD", "POST", "PUT"])
            head = f"{method} {target} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nConnection: close\r\n"
            body = json.dumps({"messages": []})
            more = f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n{body}"
            request = (head + (more if method == "POST" else "\r\n")).encode()
            if rng.random() < 0.3:
                request = damage_bytes(request, rng)
            with socket.create_connection(("127.0.0.1", port), timeout=SECONDS) as connection:
                connection.sendall(request)
                connection.shutdown(socket.SHUT_WR)
                try:
                    answer = b"".join(iter(lambda c=connection: c.recv(65536), b""))
                except ConnectionResetError:
                    answer = b""
            assert b"herring" not in answer, request
        ok = f"GET /models/seal/config.json HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nConnection: close\r\n\r\n"
        with socket.create_connection(("127.0.0.1", port), timeout=SECONDS) as connection:
            connection.sendall(ok.encode())
            answer = b"".join(iter(lambda: connection.recv(65536), b""))
        assert answer.endswith(b"{}"), "the server no longer answers"


def test_damage_is_repeatable():
    whole = b"the gulls are back"
    assert damage_bytes(whole, random.Random(3)) == damage_bytes(whole, random.Random(3)) != whole
