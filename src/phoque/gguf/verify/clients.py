"""Levels `node` and `browser`: node-llama-cpp in Node and wllama in Chromium load the file and answer as llama.cpp."""

from pathlib import Path
from typing import Any

from phoque.checks import CheckFailed, Verdict
from phoque.gguf.llama_cpp import NODE_LLAMA_CPP, binaries
from phoque.gguf.llama_cpp_model import idle_cores, shared_length
from phoque.gguf.reader import GgufFile
from phoque.gguf.verify.files import QUESTION, render
from phoque.npm import NpmClient, find_chromium
from phoque.page_server import PageServer
from phoque.services import Services

SCRIPTS = Path(__file__).with_name("client")
WLLAMA = "3.13.0"
NEW_TOKENS = 12  # generated per answer
MIN_EQUAL = 3  # tokens or characters that must be equal before rounding may part the answers
MODEL_URL = "/models/model.gguf"
CONTEXT = 512  # tokens
TIMEOUT_S = 900.0
MAX_BROWSER_BYTES = 2**31 - 1  # of one file; the limit of an ArrayBuffer


def client() -> NpmClient:
    """node-llama-cpp with the binary for this machine, wllama and the browser's driver."""
    packages = {
        "node-llama-cpp": NODE_LLAMA_CPP,
        **binaries().packages,
        "@wllama/wllama": WLLAMA,
        "puppeteer-core": "^24.0.0",
    }
    return NpmClient("node-llama-cpp (with wllama)", 150, packages, SCRIPTS, all_platforms=False)


def check_node(file: GgufFile, answer: dict[str, Any], s: Any, services: Services, verdict: Verdict) -> None:
    """Run the file in Node; `answer` is what llama.cpp gave for the same prompt: `prompt` and `answer` (token ids)."""
    asks = f"{file.path.name}: node-llama-cpp loads it, and answers as llama.cpp does"
    npm = client()
    if why := npm.find_problem(services, install=s.install):
        verdict.skip("node", asks, why)
        return
    with verdict.check("node", asks) as notes:
        services.console.stage(f"running {file.path.name} in Node")
        request = {"file": str(file.path.absolute()), "text": answer["text"], **_common()}
        reply = npm.run("node.mjs", request, services.cache, TIMEOUT_S)
        if reply["prompt"] != answer["prompt"]:
            raise CheckFailed(f"it splits the prompt into other tokens: {reply['prompt'][:8]}")
        notes.append(_compare(reply["answer"], answer["answer"][:NEW_TOKENS], "tokens"))
        notes.append(f"{reply['tokens_per_s']:.3g} tokens per second, loaded in {reply['load_s']:.1f} s")


def check_browser(file: GgufFile, answer: dict[str, Any], s: Any, services: Services, verdict: Verdict) -> None:
    """Run the file in headless Chromium with wllama, which renders the file's template with llama.cpp's own engine."""
    asks = f"{file.path.name}: a page loads it with wllama, and answers as llama.cpp does"
    npm = client()
    if why := npm.find_problem(services, install=s.install, chromium=True):
        verdict.skip("browser", asks, why)
        return
    if (size := file.path.stat().st_size) > MAX_BROWSER_BYTES:
        verdict.skip("browser", asks, f"it has {size / 1e9:.1f} GB, and a page can load files of 2 GB at most")
        return
    with verdict.check("browser", asks) as notes:
        services.console.stage(f"running {file.path.name} in a browser")
        request = {
            "path": MODEL_URL,
            "messages": QUESTION,
            "chromium": find_chromium(),
            "seconds": TIMEOUT_S,
            **_common(),
        }
        folders = {"/modules/": npm.modules(services.cache)}
        with PageServer(0, folders, files={MODEL_URL: file.path}) as server:
            reply = npm.run("browser.mjs", request | {"url": server.url}, services.cache, TIMEOUT_S)
        if not reply["text"].strip():
            raise CheckFailed("it generated no text")
        notes.append(_compare(_readable(reply["text"]), _readable(answer["said"]), "characters"))
        notes.append(
            f"{reply['tokens_per_s']:.3g} tokens per second, loaded in {reply['load_s']:.1f} s, the first token after "
            f"{reply['first_s']:.1f} s"
        )


def prompt_text(file: GgufFile) -> str:
    """The conversation that the clients are asked to go on with."""
    return render(file, QUESTION, add_generation_prompt=True)


def _common() -> dict[str, Any]:
    return {"tokens": NEW_TOKENS, "length": CONTEXT, "threads": idle_cores()}


def _compare(answered: list[Any], expected: list[Any], unit: str) -> str:
    """How many items are equal; rounding may part the answers later. Raises CheckFailed if they are too few."""
    equal = shared_length(answered, expected)
    if equal < min(MIN_EQUAL, len(expected), len(answered)):
        raise CheckFailed(f"it answers {answered[:6]}, and llama.cpp {expected[:6]}")
    return f"{equal} of {len(answered)} {unit} equal"


def _readable(text: str) -> list[str]:
    """The characters of an answer up to the first broken one, which clients write in different ways."""
    return list(text.strip().partition("\ufffd")[0])
