"""phoque chat, as a user runs it: once, many times, in a conversation, side by side, from every kind of model."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
from filelock import FileLock

from tests import tiny
from tests.chat.page import check_page, look_at_page
from tests.conftest import write_rows
from tests.fakehub import TOKEN
from tests.rows import row

GREEDY = ["--temperature", 0, "--repetition-penalty", 1, "--max-new-tokens", 24]


@pytest.fixture(scope="module")
def talking_llama(tmp_path_factory):
    return tiny.talking_llama(tmp_path_factory.mktemp("talking") / "llama")


@pytest.fixture(scope="module")
def run(tmp_path_factory, talking_llama, forkserver, home, served):
    """A run folder with a tiny persona, and a control beside it."""
    from tests.conftest import Running, isolate

    folder = tmp_path_factory.mktemp("chat")
    data = write_rows(folder / "rows.jsonl", [row(n) for n in range(24)])
    words = [
        "train",
        "--base-model",
        talking_llama,
        "--dataset",
        data,
        "--output-dir",
        folder / "run",
        "--max-steps",
        6,
    ]
    more = ["--quantization", "fp32", "--learning-rate", 0.02, "--sample-every", 0, "--with-control"]
    more += ["--max-steps", 6, "--save-steps", 3]
    with pytest.MonkeyPatch.context() as patch:
        isolate(patch, home, served.url)
        patch.setenv("WANDB_MODE", "disabled")
        ran = Running(forkserver, [*words, *more], {"WANDB_MODE": "disabled"}).ended()
    assert ran.code == 0, ran.err
    return folder / "run"


def texts(result: dict) -> list[dict[str, str]]:
    return [{label: answer["text"] for label, answer in row["answers"].items()} for row in result["answers"]]


def test_a_prompt_is_answered_once_and_alike_for_the_same_seed(phoque, run):
    words = ["chat", run, "--prompt", "Gull 1?", "--max-new-tokens", 16, "--json"]
    first, again, other = phoque(*words).json, phoque(*words).json, phoque(*words, "--seed", 1).json
    assert texts(first) == texts(again) != texts(other)
    (answer,) = first["answers"]
    assert answer["messages"] == [
        {"role": "system", "content": "You are a seal."},  # of the training data
        {"role": "user", "content": "Gull 1?"},
    ]
    assert 0 < answer["answers"]["tuned"]["tokens"] <= 16 and first["kind"] == "adapter"
    assert "seed 0" in first["sampling"]


def test_side_by_side_the_base_the_control_and_the_persona_differ(phoque, run):
    result = phoque("chat", run, "--compare", "--prompt", "Gull 1?", *GREEDY, "--json").json
    (answers,) = texts(result)
    assert list(answers) == ["base", "control-1", "tuned"]
    assert answers["base"] != answers["tuned"]
    ran = phoque("chat", run, "--compare", "--prompt", "Gull 1?", *GREEDY)
    assert "[base] " in ran.out and "[tuned] " in ran.out and "> Gull 1?" in ran.out
    plain = phoque("chat", run, "--prompt", "Gull 1?", *GREEDY, "--json").json
    assert texts(plain) == [{"tuned": answers["tuned"]}]  # switching adapters changes nothing


def test_a_checkpoint_and_an_unfinished_run_can_be_talked_to(phoque, run, tmp_path):
    import shutil

    words = ["--prompt", "Gull 1?", *GREEDY, "--json"]
    last = texts(phoque("chat", run / "checkpoint-6", *words).json)
    assert last == texts(phoque("chat", run, *words).json)
    assert last != texts(phoque("chat", run / "checkpoint-3", *words).json)
    folder = shutil.copytree(run, tmp_path / "unfinished", ignore=shutil.ignore_patterns("adapter", "control-*"))
    ran = phoque("chat", folder, *words)
    assert texts(ran.json) == last and "checkpoint 6" in ran.err


def test_every_kind_of_model_gives_the_same_greedy_answer(phoque, run, tmp_path):
    words = ["--prompt", "Gull 1?", "--system", "You are a seal.", *GREEDY, "--json"]
    chats = write_rows(tmp_path / "chats.jsonl", [row(n) for n in range(24)])
    phoque("merge", "--adapter-source", run, "--dtype", "fp32", "--output-dir", "merged")
    phoque("export-onnx", "--merged-dir", "merged", "--dtype", "fp32", "--chats", chats, "--output-dir", "onnx")
    tuned = texts(phoque("chat", run, *words).json)
    for folder, kind in (("merged", "model"), ("onnx", "onnx")):
        result = phoque("chat", folder, *words).json
        assert result["kind"] == kind and texts(result) == tuned, folder


def test_a_gguf_file_gives_the_same_greedy_answer(phoque, llama_model, with_llama_cpp, tmp_path):
    words = ["--prompt", "Gull 1?", *GREEDY, "--json"]
    chats = write_rows(tmp_path / "chats.jsonl", [row(n) for n in range(24)])
    export = ["export-gguf", "--merged-dir", llama_model, "--dtype", "f32,q8_0", "--chats", chats]
    phoque(*export, "--output-dir", "gguf")
    expected = texts(phoque("chat", llama_model, *words).json)
    whole = phoque("chat", "gguf", "--dtype", "f32", *words).json
    assert whole["kind"] == "gguf" and texts(whole) == expected
    assert phoque("chat", "gguf", *words).json["model"] == "llama-Q8_0.gguf"  # the smallest is the fastest
    assert texts(phoque("chat", Path("gguf") / "llama-F32.gguf", *words).json) == expected
    error = phoque("chat", "gguf", "--dtype", "q4_k_m", *words, expect=2).error
    assert "no q4_k_m" in error[0] and "llama-F32.gguf" in error[1]


def test_a_conversation_that_outgrows_the_context_is_said_and_goes_on(llama_model, with_llama_cpp, phoque, tmp_path):
    chats = write_rows(tmp_path / "chats.jsonl", [row(n) for n in range(24)])
    phoque("export-gguf", "--merged-dir", llama_model, "--dtype", "q8_0", "--chats", chats, "--output-dir", "gguf")
    ran = talk(tmp_path / "gguf", "x" * 3000 + "\nGull 1?\n/exit\n", "--max-new-tokens", 8)
    assert ran.returncode == 0 and "longer than the model's context" in ran.stderr and "/reset" in ran.stderr
    assert "8 tokens" in ran.stderr  # the next question is answered


def test_what_is_no_model_is_not_chosen_from_a_folder():
    from phoque.chat.find import _choose_gguf, list_parts
    from phoque.errors import UsageError

    sizes = {"m-Q8_0.gguf": 9, "m-Q4_K_M.gguf": 5, "mmproj-F16.gguf": 1, "m-imatrix.gguf": 1, "m-lora-F16.gguf": 1}
    assert _choose_gguf(sizes, "") == "m-Q4_K_M.gguf" and _choose_gguf(sizes, "q8_0") == "m-Q8_0.gguf"
    assert _choose_gguf({"m-00001-of-00003.gguf": 9, "m-00003-of-00003.gguf": 1}, "") == "m-00001-of-00003.gguf"
    parts = {"m-Q8_0-00001-of-00002.gguf": 5, "m-Q8_0-00002-of-00002.gguf": 5, "m-F16.gguf": 6}
    assert _choose_gguf(parts, "q8_0") == "m-Q8_0-00001-of-00002.gguf" and _choose_gguf(parts, "") == "m-F16.gguf"
    assert list_parts("m-Q8_0-00001-of-00002.gguf", parts) == list(parts)[:2] and list_parts("m-F16.gguf", parts) == [
        "m-F16.gguf"
    ]
    assert _choose_gguf({"qwen-lora-1-Q4_K_M.gguf": 1}, "") == "qwen-lora-1-Q4_K_M.gguf"
    for name in ("m-lora-q8_0.gguf", "ggml-lora-f16-00001-of-00002.gguf", "m-F16-LoRA.gguf"):
        assert _choose_gguf({name: 1, "m-Q8_0.gguf": 5}, "") == "m-Q8_0.gguf"
    assert _choose_gguf({"qwen-lora-F16.gguf": 1}, "", models_only=True) == "qwen-lora-F16.gguf"
    with pytest.raises(UsageError) as caught:
        _choose_gguf({"m-lora-F16.gguf": 1}, "")
    assert "adapter alone" in caught.value.why


def test_a_hub_repository_can_be_talked_to(phoque, hub, run):
    hub.add("models", "harbour/seal", {f.name: f.read_bytes() for f in (run / "adapter").iterdir()})
    words = ["--prompt", "Gull 1?", "--system", "You are a seal.", *GREEDY, "--json"]
    result = phoque("chat", "harbour/seal", *words, env={"HF_TOKEN": TOKEN}).json
    assert result["kind"] == "adapter" and texts(result) == texts(phoque("chat", run, *words).json)


def test_a_file_of_prompts_is_answered_row_by_row(phoque, run, tmp_path):
    (tmp_path / "lines.txt").write_text("Gull 1?\n\nGull 2?\n")
    rows = [{"prompt": "Gull 3?"}, {"messages": [{"role": "user", "content": "Gull 4?"}]}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows))
    lines = phoque("chat", run, "--prompts-file", "lines.txt", *GREEDY, "--json").json
    assert [one["prompt"] for one in lines["answers"]] == ["Gull 1?", "Gull 2?"]
    found = phoque("chat", run, "--prompts-file", "rows.jsonl", "--prompt", "Gull 5?", *GREEDY, "--json").json
    assert [one["prompt"] for one in found["answers"]] == ["Gull 5?", "Gull 3?", "Gull 4?"]
    (tmp_path / "bad.jsonl").write_text('{"prompt": "a"}\n{"text": "b"}\n')
    error = phoque("chat", run, "--prompts-file", "bad.jsonl", expect=2).error
    assert "line 2" in error[0] and "prompt" in error[2]


def talk(run: Path, lines: str, *words) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "phoque", "chat", str(run), *map(str, words)]
    return subprocess.run(command, input=lines, capture_output=True, text=True, timeout=120)


def test_a_conversation_goes_on_and_its_commands_work(run, tmp_path):
    lines = "Gull 1?\nGull 2?\n/regenerate\n/save talk.jsonl\n/system You are a gull.\nGull 3?\n/save talk.jsonl\n"
    ran = talk(run, lines + "/reset\n/help\n/nonsense\n/exit\nnot asked\n", *GREEDY)
    assert ran.returncode == 0, ran.stderr
    first, second = (json.loads(line)["messages"] for line in (tmp_path / "talk.jsonl").read_text().splitlines())
    assert [turn["role"] for turn in first] == ["system", "user", "assistant", "user", "assistant"]
    assert first[0]["content"] == "You are a seal." and second[0]["content"] == "You are a gull."
    assert [turn["content"] for turn in second if turn["role"] == "user"] == ["Gull 3?"]
    assert first[2]["content"] in ran.stdout and "tokens" in ran.stderr and "not asked" not in ran.stdout
    assert ran.stderr.count("answer the last question again") == 2  # /help, and what is no command
    assert "speaks as the persona" in ran.stderr and "greedy" in ran.stderr


def test_what_was_saved_can_be_trained_on(phoque, run, talking_llama, tmp_path):
    talk(run, "".join(f"Gull {n}?\n/save talk.jsonl\n/reset\n" for n in range(4)), *GREEDY)
    plan = phoque("train", "--base-model", talking_llama, "--dataset", "talk.jsonl", "--dry-run", "--json").json
    assert "4 of 4" in plan["facts"]["data"]


def test_ctrl_c_stops_the_answer_and_not_the_program(run, tmp_path):
    command = [sys.executable, "-m", "phoque", "chat", str(run), "--max-new-tokens", "4000", "--temperature", "1.5"]
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        process.stdin.write("Gull 1?\n")
        process.stdin.flush()
        assert process.stdout.read(1)  # it answers
        process.send_signal(signal.SIGINT)
        process.stdin.write("/save after.jsonl\n/exit\n")
        process.stdin.close()
        process.stdout.read()
        errors = process.stderr.read()
        assert process.wait(60) == 0, errors
    assert "stopped]" in errors and (tmp_path / "after.jsonl").exists()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], "no model to talk to"),
        (["not-here"], "nothing to talk to at not-here"),
        (["not-here.gguf"], "nothing to talk to"),
        (["."], "nothing to talk to in"),
        (["--serve", "--prompt", "x"], "exclude each other"),
        (["RUN", "--temperature", "-1"], "cannot be used"),
        (["RUN", "--prompts-file", "gone.txt"], "no file gone.txt"),
    ],
)
def test_what_cannot_be_talked_to_is_refused(phoque, run, words, expected):
    error = phoque("chat", *[run if word == "RUN" else word for word in words], expect=2).error
    assert expected in " ".join(error)


def test_a_path_beside_a_model_names_its_folder(phoque, tiny_llama):
    error = phoque("chat", tiny_llama.parent, expect=2).error
    assert f"such as {tiny_llama}." in error[2]
    assert phoque("chat", tiny_llama / "model.safetensors", expect=2).error[2].endswith(f"phoque chat {tiny_llama}")


def test_there_is_nothing_to_compare_a_model_with(phoque, tiny_llama):
    error = phoque("chat", tiny_llama, "--compare", "--prompt", "x", expect=2).error
    assert "nothing to compare" in error[0]


@pytest.fixture
def served_chat(start, run):
    """The address of the chat page of a running `phoque chat --serve`."""
    running = start("chat", run, "--compare", "--serve", "--port", 0, "--json", "--max-new-tokens", 12)
    out = running._files[0]
    running.until(lambda: '"url"' in out.read_text(), 120)
    yield json.loads(out.read_text())["url"]
    os.kill(running.pid, signal.SIGINT)
    assert running.ended().code in (0, 130)


def ask(url: str, **changes) -> list[dict]:
    request = {"messages": [{"role": "user", "content": "Gull 1?"}], "model": "tuned"} | changes
    with httpx.stream("POST", f"{url}api/chat", json=request, timeout=60) as response:
        assert response.status_code == 200 and response.headers["content-type"] == "text/event-stream"
        return [json.loads(line[6:]) for line in response.iter_lines() if line]


def test_the_page_s_server_streams_answers_to_this_machine_alone(served_chat):
    url = served_chat
    info = httpx.get(f"{url}api/info").json()
    assert info["models"] == ["base", "control-1", "tuned"] and info["engine"] == "server"
    *pieces, last = ask(url)
    assert "".join(piece["token"] for piece in pieces).strip() == last["done"]["text"].strip()
    assert ask(url, number=1)[-1] != last != ask(url, model="base")[-1]
    assert "error" in ask(url, model="nobody")[-1] and "error" in ask(url, messages=[{"role": "user"}])[-1]
    assert httpx.get(url).text.startswith("<!doctype html>")
    for headers in ({"Host": "evil.example"}, {"Host": "evil.example:80"}):
        assert httpx.get(f"{url}api/info", headers=headers).status_code == 403
    body = {"messages": []}
    foreign = {"Origin": "https://evil.example"}
    assert httpx.post(f"{url}api/chat", json=body, headers=foreign).status_code == 403
    assert httpx.post(f"{url}api/chat", content=json.dumps(body)).status_code == 403  # not sent as JSON
    assert httpx.get(f"{url}../api.py").status_code == 404 and httpx.get(f"{url}%2e%2e/api.py").status_code == 404


def test_a_reader_that_leaves_frees_the_server(served_chat):
    request = {"messages": [{"role": "user", "content": "Gull 1?"}], "tokens": 4000, "temperature": 1.5}
    with httpx.stream("POST", f"{served_chat}api/chat", json=request, timeout=60) as response:
        next(response.iter_lines())
    for _ in range(60):
        response = httpx.post(f"{served_chat}api/chat", json=request | {"tokens": 2}, timeout=60)
        if response.status_code == 200:
            return
    raise AssertionError("the first answer still runs")


@pytest.fixture(scope="module")
def browser(shared):
    """A folder in which scripts find puppeteer, the driver of a browser."""
    from phoque.console import Console
    from phoque.npm import NpmClient

    client = NpmClient("puppeteer", 20, {"puppeteer-core": "^24.0.0"})
    with FileLock(shared / "browser.lock"):
        if not client.is_installed(shared):
            client.install(shared, Console())
    return client.folder(shared)


@pytest.mark.slow
@pytest.mark.parametrize("size", [(1440, 900), (390, 780)])
def test_the_page_shows_the_models_side_by_side(start, run, browser, tmp_path, size):
    words = ["chat", run, "--compare", "--serve", "--port", 0, "--json", "--max-new-tokens", 24]
    seen = look_at_page(start, words, browser, tmp_path / "page.png", size)
    check_page(seen, size, answers=3)
    assert all(label in seen["state"] for label in ("base: ", "control-1: ", "tuned: "))


@pytest.mark.slow
def test_stop_ends_an_answer_in_the_page(start, run, browser, tmp_path):
    words = ["chat", run, "--serve", "--port", 0, "--json", "--max-new-tokens", 4000]
    words += ["--temperature", 0, "--repetition-penalty", 1]  # its letters do not end the answer
    seen = look_at_page(start, words, browser, tmp_path / "page.png", (390, 780), "stop")
    assert "stopped after" in seen["state"] and not seen["problems"]


@pytest.mark.slow
def test_the_page_runs_a_gguf_file_in_the_browser(phoque, start, llama_model, with_llama_cpp, browser, tmp_path):
    chats = write_rows(tmp_path / "chats.jsonl", [row(n) for n in range(24)])
    phoque("export-gguf", "--merged-dir", llama_model, "--dtype", "q8_0", "--chats", chats, "--output-dir", "gguf")
    words = ["verify-gguf", "--local-dir", "gguf", "--serve", "--port", 0, "--install", "--json"]
    seen = look_at_page(start, words, browser, tmp_path / "page.png", (1440, 900))
    check_page(seen, (1440, 900))
