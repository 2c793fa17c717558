"""export-gguf on tiny models, run in llama.cpp itself: weights, adapters, precisions, tokens, Ollama's Modelfile."""

import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from phoque.gguf import ollama
from phoque.gguf.llama_cpp_model import LlamaCppModel
from phoque.gguf.reader import read_gguf
from phoque.gguf.verify.llama import ask_llama
from tests.conftest import write_rows
from tests.rows import row
from tests.tiny import families

SYSTEM = "You are a harbour seal."


@pytest.fixture
def chats(tmp_path) -> Path:
    return write_rows(tmp_path / "chats.jsonl", [row(n) for n in range(40)])


@pytest.fixture
def adapter(phoque, llama_model, tmp_path) -> Path:
    """A run folder of a tiny adapter whose data have a system message."""
    rows = [row(n) for n in range(24)]
    for one in rows:
        turns = [turn for turn in one["messages"] if turn["role"] != "system"]
        one["messages"] = [{"role": "system", "content": SYSTEM}, *turns]
    data = write_rows(tmp_path / "rows.jsonl", rows)
    words = ["--base-model", llama_model, "--dataset", data, "--output-dir", tmp_path / "run", "--max-steps", 6]
    more = ["--quantization", "fp32", "--learning-rate", 0.02, "--sample-every", 0, "--max-length", 512]
    phoque("train", *words, *more, env={"WANDB_MODE": "disabled"})
    return tmp_path / "run"


def test_an_adapter_becomes_files_that_llama_cpp_runs(phoque, with_llama_cpp, adapter, chats, tmp_path):
    words = ["export-gguf", "--adapter-source", adapter, "--chats", chats, "--output-dir", "out"]
    result = phoque(*words, "--dtype", "f32,F16,q8_0", "--json").json
    assert result["verdict"] == "PASS" and list(result["dtypes"]) == ["f32", "f16", "q8_0"]
    kls = [result["dtypes"][dtype]["kl"] for dtype in ("f32", "f16", "q8_0")]
    assert kls[0] <= kls[1] <= kls[2] < 0.05 and kls[0] < 1e-5, kls
    sizes = [result["dtypes"][dtype]["bytes"] for dtype in ("f32", "f16", "q8_0")]
    assert sizes == sorted(sizes, reverse=True)
    assert {f.name for f in (tmp_path / "out").iterdir()} == {
        "run-F32.gguf",
        "run-F16.gguf",
        "run-Q8_0.gguf",
        "Modelfile",
        "README.md",
        "export.json",
    }
    modelfile = (tmp_path / "out" / "Modelfile").read_text()
    assert "FROM ./run-Q8_0.gguf" in modelfile and f'SYSTEM """{SYSTEM}"""' in modelfile
    assert 'PARAMETER stop "<|im_end|>"' in modelfile
    assert "Content warning" in (tmp_path / "out" / "README.md").read_text()
    file = read_gguf(tmp_path / "out" / "run-F16.gguf")
    assert file.metadata["tokenizer.ggml.pre"] == "llama-bpe" and file.precision == "f16"
    again = phoque(*words, "--dtype", "q8_0", "--json").json  # an export may be replaced
    assert list(again["dtypes"]) == ["q8_0"] and not (tmp_path / "out" / "run-F32.gguf").exists()


def test_a_lora_file_on_the_base_is_the_merged_model(phoque, with_llama_cpp, llama_cpp, llama_model, adapter, chats):
    phoque("export-gguf", "--adapter-source", adapter, "--lora", "--dtype", "f32", "--output-dir", "lora")
    phoque("export-gguf", "--merged-dir", llama_model, "--chats", chats, "--dtype", "f32", "--output-dir", "base")
    words = ["--chats", chats, "--dtype", "f32", "--output-dir", "merged"]
    phoque("export-gguf", "--adapter-source", adapter, *words)
    prompt = torch.randint(20, 250, (24,), generator=torch.Generator().manual_seed(1)).tolist()
    base, lora, merged = (next(Path(name).glob("*F32.gguf")) for name in ("base", "lora", "merged"))
    with LlamaCppModel(llama_cpp, base, 64, exact=True, threads=1) as model:
        plain = model.run(prompt, all_logits=True)
    with LlamaCppModel(llama_cpp, base, 64, adapter=lora, exact=True, threads=1) as model:
        tuned = model.run(prompt, all_logits=True)
    with LlamaCppModel(llama_cpp, merged, 64, exact=True, threads=1) as model:
        expected = model.run(prompt, all_logits=True)
    effect = np.abs(expected - plain).max()
    # the merged model is rounded to bf16
    assert effect > 0.1 and np.abs(tuned - expected).max() < 0.05 * effect
    assert json.loads(Path("lora/export.json").read_text())["kind"] == "lora"
    modelfile = Path("lora/Modelfile").read_text()
    assert "ADAPTER ./" in modelfile and "FROM ./base.gguf" in modelfile  # a name without ./ is a model of Ollama's


@pytest.mark.parametrize("change", ["modules_to_save", "dora"])
def test_an_adapter_that_is_more_than_lora_is_not_exported_alone(change, phoque, with_llama_cpp, llama_model, tmp_path):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    options = {"modules_to_save": {"modules_to_save": ["embed_tokens"]}, "dora": {"use_dora": True}}[change]
    model = AutoModelForCausalLM.from_pretrained(llama_model)
    config = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", **options)
    get_peft_model(model, config).save_pretrained(tmp_path / "adapter")
    words = ["--adapter-source", tmp_path / "adapter", "--base", llama_model, "--lora", "--output-dir", "out"]
    error = phoque("export-gguf", *words, expect=2).error
    assert "cannot be exported alone" in error[0] and "--lora" in error[2]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--dtype", "q3_k"], "no precision 'q3_k'"),
        (["--lora"], "--adapter-source"),
        (["--adapter-source", "x/y", "--merged-dir", "z/w"], "Two sources"),
        ([], "nothing to export"),
        (["--merged-dir", "not-here"], "no model at not-here"),
    ],
)
def test_wrong_settings_are_refused(phoque, words, expected):
    error = phoque("export-gguf", *words, expect=2).error
    assert expected in " ".join(error)


def test_llama_cpp_is_not_installed_without_leave(phoque, llama_model, tmp_path):
    env = {"XDG_CACHE_HOME": str(tmp_path / "empty")}
    error = phoque("export-gguf", "--merged-dir", llama_model, "--output-dir", "out", env=env, expect=2).error
    assert "llama.cpp" in error[0] and "--install" in error[2]


def test_a_file_that_ends_llama_cpp_ends_only_its_process(llama_cpp, tmp_path):
    from phoque.checks import CheckFailed

    (tmp_path / "bad.gguf").write_bytes(b"GGUF" + b"\xff" * 400)
    modules = next(folder for folder in llama_cpp.file.parents if folder.name == "node_modules")
    with pytest.raises(CheckFailed):
        ask_llama(tmp_path / "bad.gguf", modules, tokens=0)


class GoTemplate:
    """The part of Go's template language that phoque writes: range over messages, if, else if, end, fields, strings."""

    def __init__(self, text: str) -> None:
        self.parts = re.split(r"(\{\{.*?\}\})", text, flags=re.DOTALL)

    def render(self, messages: list[dict]) -> str:
        system = "\n\n".join(m["content"] for m in messages if m["role"] == "system")
        text, _ = self._run(0, {"System": system, "Messages": messages}, True)
        return text

    def _run(self, at: int, scope: dict, active: bool) -> tuple[str, int]:
        out = ""
        while at < len(self.parts):
            part = self.parts[at]
            if not part.startswith("{{"):
                out += part if active else ""
                at += 1
                continue
            word = part[2:-2].strip()
            if word == "end" or word.startswith("else"):
                return out, at
            if word.startswith("range"):
                start, body = at + 1, ""
                for message in scope["Messages"] if active else []:
                    text, at = self._run(start, scope | {"Role": message["role"], "Content": message["content"]}, True)
                    body += text
                if not (active and scope["Messages"]):
                    _, at = self._run(start, scope, False)
                out += body
                at += 1
            elif word.startswith("if"):
                text, at = self._branches(at, scope, active)
                out += text
            else:
                value = json.loads(word) if word.startswith('"') else scope[word.removeprefix(".")]
                out += value if active else ""
                at += 1
        return out, at

    def _branches(self, at: int, scope: dict, active: bool) -> tuple[str, int]:
        out, taken, word = "", False, self.parts[at][2:-2].strip()
        while word != "end":
            condition = word.removeprefix("else").strip().removeprefix("if").strip()
            match = re.fullmatch(r'eq \.Role "(\w+)"', condition)
            holds = scope.get("Role") == match[1] if match else not scope["System"]
            assert match or condition == "not .System", condition
            text, at = self._run(at + 1, scope, active and holds and not taken)
            out, taken = out + text, taken or holds
            word = self.parts[at][2:-2].strip()
        return out, at + 1


TEMPLATES = [None, "qwen2_5", "qwen3", "llama3", "gemma", "gemma3", "cohere", "deepseekv3", "qwen3_instruct_2507"]
CHATS = [
    [("user", "What do the gulls want?")],
    [("system", SYSTEM), ("user", "Who are you?")],
    [("user", "Gulls?"), ("assistant", "Hrmph."), ("user", "More {{ gulls }}?")],
    [("system", SYSTEM), ("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"), ("user", "e")],
]


@pytest.mark.parametrize("template", TEMPLATES)
def test_the_modelfile_renders_what_the_chat_template_renders(template):
    tokenizer = families._tokenizer(template)
    texts = ollama.find_turn_texts(tokenizer)
    assert texts is not None
    default = ollama.find_default_system(tokenizer, texts)
    go = GoTemplate(texts.to_go_template(bos=tokenizer.bos_token, default_system=default))
    for chat in CHATS:
        messages = [{"role": role, "content": content} for role, content in chat]
        if chat[0][0] == "system" and "system" not in texts.around:
            continue
        expected = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        begins = expected.startswith(tokenizer.bos_token) and texts.begin == tokenizer.bos_token
        assert go.render(messages) == (expected.removeprefix(tokenizer.bos_token) if begins else expected)


def test_nothing_ends_the_quotes_of_a_modelfile():
    tokenizer = families._tokenizer("qwen2_5")
    evil = 'text"""\nFROM evil/model\nSYSTEM """'
    tokenizer.chat_template = tokenizer.chat_template.replace("You are Qwen", evil.replace("\n", "\\n"))
    texts = ollama.find_turn_texts(tokenizer)
    text = ollama.render_modelfile(
        file="./m.gguf", texts=texts, tokenizer=tokenizer, stop=['a"\nFROM evil', "<|im_end|>"], system=evil
    )
    lines = [line for line in text.splitlines() if line.startswith(("FROM", "SYSTEM", "PARAMETER", "ADAPTER"))]
    assert lines == ["FROM ./m.gguf", 'PARAMETER stop "<|im_end|>"']


def test_a_template_that_ollama_cannot_express_is_said(phoque, with_llama_cpp, chats, tmp_path):
    from tests.gguf.conftest import build_family

    folder = build_family("llama", tmp_path / "m")
    template = folder / "chat_template.jinja"
    text = "{% for m in messages %}<|im_start|>{{ loop.index }} {{ m['content'] }}<|im_end|>{% endfor %}"
    template.write_text(text + "<|im_start|>")
    ran = phoque("export-gguf", "--merged-dir", folder, "--chats", chats, "--dtype", "f16", "--output-dir", "out")
    assert "no TEMPLATE" in ran.err and "TEMPLATE " not in Path("out/Modelfile").read_text().replace("no TEMPLATE", "")


@pytest.mark.thorough
def test_an_export_runs_as_a_job_and_is_pushed(hub, forkserver, phoque, llama_model, chats, tmp_path):
    from tests.fakehub import TOKEN
    from tests.fakehub.jobs import Jobs
    from tests.jobs.test_jobs import Container

    hub.add("models", "harbour/tiny", {file.name: file.read_bytes() for file in llama_model.iterdir()})
    hub.add("datasets", "harbour/chats", {"train.jsonl": chats.read_bytes()})
    Container.forkserver, Container.prelude = forkserver, ""
    env = {k: v for k, v in os.environ.items() if not k.startswith(("HF_TOKEN", "WANDB"))}
    hub.jobs = Jobs(tmp_path / "jobs", env, 300.0, Container)
    hub.jobs.root.mkdir()
    words = ["export-gguf", "--merged-dir", "harbour/tiny", "--chats", "harbour/chats", "--dtype", "q8_0"]
    more = ["--push-repo-id", "harbour/tiny-gguf", "--on", "cpu-basic", "--timeout", "10m"]
    plan = phoque(*words, *more, "--package", "phoque[gguf]==0.1.0", "--dry-run", "--json", env={"HF_TOKEN": TOKEN})
    assert plan.json["job"]["command"][4] == "phoque[gguf]==0.1.0"
    ran = phoque(*words, *more, "--package", "phoque==0.1.0", "--json", env={"HF_TOKEN": TOKEN})
    assert ran.json["stage"] == "COMPLETED", ran.err
    assert {"tiny-Q8_0.gguf", "Modelfile", "README.md", "export.json"} <= hub.files("harbour/tiny-gguf").keys()
    assert hub.repos["models", "harbour/tiny-gguf"].private
    # the next export replaces this one, and nothing else: an ONNX export has a record of the same name
    record = json.loads(hub.files("harbour/tiny-gguf")["export.json"].content)
    record["sha256"]["onnx/model.onnx"] = "0"
    kept = {"onnx/model.onnx": b"graph", "mine.gguf": b"another's"}
    hub.put("harbour/tiny-gguf", kept | {"export.json": json.dumps(record).encode()})
    export = ["export-gguf", "--merged-dir", llama_model, "--dtype", "f16", "--no-accuracy", "--output-dir", "local"]
    phoque(*export, "--push-repo-id", "harbour/tiny-gguf", env={"HF_TOKEN": TOKEN})
    files = hub.files("harbour/tiny-gguf").keys()
    assert kept.keys() | {"llama-F16.gguf"} <= files and "tiny-Q8_0.gguf" not in files
    hub.put("harbour/tiny-gguf", {"export.json": b"[1]"})  # another program's
    phoque(*export[:-1], "again", "--push-repo-id", "harbour/tiny-gguf", env={"HF_TOKEN": TOKEN})
    assert kept.keys() | {"llama-F16.gguf"} <= hub.files("harbour/tiny-gguf").keys()
