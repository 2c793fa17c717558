"""Levels `node` and `browser`: a real Transformers.js loads the export and says what ONNX Runtime says."""

import hashlib
import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np

from phoque.console import Console
from phoque.errors import FAILED, PhoqueError
from phoque.onnx.session import OnnxChatModel
from phoque.onnx.verify.checks import CheckFailed, Verdict
from phoque.settings.verify_onnx import VerifySettings

HERE = Path(__file__).with_name("client")
CHROMIUM = ("chromium", "chromium-browser", "google-chrome", "chrome")
# onnxruntime-node fetches a GPU library when it is installed, which nothing here uses
INSTALL_ENV = {
    "ONNXRUNTIME_NODE_INSTALL": "skip",
    "ONNXRUNTIME_NODE_INSTALL_CUDA": "skip",
    "PUPPETEER_SKIP_DOWNLOAD": "1",
}
MESSAGES = [{"role": "user", "content": "What do the gulls want from you today?"}]
TOKENS = 8
SIDE = 112  # pixels of the image that is shown
SECONDS = 900  # for one question; a browser on a slow machine takes a minute for a small model
APART = 0.05  # of the largest logit, between two builds of ONNX Runtime
APART_IN_BITS = (
    0.15  # in 16, or where one of them rounds activations to 8 (native kernels) and the other does not (wasm)
)
# measured: with plain operators SwiftShader's logits are right to 0.001, with GroupQueryAttention off by 0.1 to 0.4
SOFTWARE = (
    "The software adapter of headless Chromium computes fused attention wrongly, and a GPU's driver may: look at it "
    "with --serve on that GPU, or export with --no-fuse"
)


def check_node(
    folder: Path, layout: str, dtypes: list[str], s: VerifySettings, cache: Path, console: Console, verdict: Verdict
) -> None:
    """Ask the export in Node, in each precision."""
    if why := missing(s, cache, console, ("node",)):
        verdict.leave_out("node", "Transformers.js loads it and answers", why)
        return
    for dtype in dtypes:
        with verdict.check("node", f"{dtype}: Transformers.js loads it and says the same") as said:
            console.say(f"asking {dtype} in Node")
            found = _asked("node.mjs", folder, layout, dtype, "cpu", cache)
            said.append(_same(found, folder, layout, dtype))


def check_browser(
    folder: Path, layout: str, dtypes: list[str], s: VerifySettings, cache: Path, console: Console, verdict: Verdict
) -> None:
    """Ask the export in headless Chromium, on wasm in each precision, and on WebGPU if asked."""
    why = missing(s, cache, console, ("node", "chromium"))
    if why:
        verdict.leave_out("browser", "a page loads it and answers", why)
    for dtype in dtypes if not why else []:
        with verdict.check("browser", f"{dtype}: a page loads it on wasm and says the same") as said:
            console.say(f"asking {dtype} in a browser on wasm")
            found = _asked("browser.mjs", folder, layout, dtype, "wasm", cache)
            said.append(_same(found, folder, layout, dtype))
    for dtype in dtypes:
        asks = f"{dtype}: WebGPU's logits are wasm's"
        if why or not s.webgpu:
            verdict.leave_out("browser", asks, why or "only with --webgpu")
        elif dtype in ("fp16", "q4f16"):
            verdict.leave_out("browser", asks, "the software adapter of headless Chromium has no shader-f16")
        else:
            with verdict.check("browser", asks) as said:
                console.say(f"asking {dtype} in a browser on WebGPU; without a GPU that takes minutes")
                found = _asked("browser.mjs", folder, layout, dtype, "webgpu", cache, tokens=1)
                try:
                    said.append(_same(found, folder, layout, dtype))
                except CheckFailed as problem:
                    raise CheckFailed(f"{problem} on WebGPU. {SOFTWARE}") from problem


def modules(cache: Path) -> Path:
    """Where Transformers.js lies, or will: one folder for each set of versions."""
    key = hashlib.sha256((HERE / "package.json").read_bytes()).hexdigest()[:12]
    return cache / "client" / key


def installed(cache: Path) -> bool:
    """Whether Transformers.js lies there, whole."""
    return (modules(cache) / ".whole").is_file()


def install(cache: Path, console: Console) -> None:
    """Install Transformers.js from npm into phoque's cache. Raises PhoqueError (1) if npm fails."""
    folder = modules(cache)
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(HERE / "package.json", folder / "package.json")
    console.say(f"installing Transformers.js into {folder}")
    command = ["npm", "install", "--no-audit", "--no-fund", "--no-package-lock"]
    ran = subprocess.run(command, cwd=folder, env=os.environ | INSTALL_ENV, capture_output=True, text=True)
    if ran.returncode:
        raise PhoqueError(
            "Transformers.js cannot be installed.",
            (ran.stderr.strip().splitlines() or ["npm says no more"])[0],
            "Check the network and npm, or stop at an earlier level: --level ort.",
            FAILED,
        )
    (folder / ".whole").touch()


def missing(s: VerifySettings, cache: Path, console: Console, programs: tuple[str, ...]) -> str:
    """What keeps these levels from running, in words; Transformers.js is installed if the user agrees."""
    if not shutil.which("node") or not shutil.which("npm"):
        return "there is no Node.js on PATH (node and npm)"
    if "chromium" in programs and not chromium():
        return f"there is no Chromium on PATH ({', '.join(CHROMIUM)})"
    if installed(cache):
        return ""
    question = f"Transformers.js (about 500 MB from npm) goes into {modules(cache)}. Install it?"
    if s.install or (console.can_ask() and console.confirmed(question)):
        install(cache, console)
        return ""
    return "Transformers.js is not installed: run it once with --install"


def chromium() -> str | None:
    """The browser on PATH."""
    return next((found for name in CHROMIUM if (found := shutil.which(name))), None)


def copied(cache: Path) -> Path:
    """Where the scripts run: beside the modules, since a module is looked for beside the file that imports it."""
    where = modules(cache)
    for file in HERE.glob("*.mjs"):
        shutil.copyfile(file, where / file.name)
    return where


def _asked(
    script: str, folder: Path, layout: str, dtype: str | None, device: str, cache: Path, tokens: int = TOKENS
) -> dict[str, Any]:
    """What the client answers; `dtype` None leaves the choice to the config. Raises Fails with its own words."""
    folder = folder.absolute()
    question = {
        "root": str(folder.parent),
        "name": folder.name,
        "layout": layout,
        "dtype": dtype,
        "device": device,
        "messages": MESSAGES,
        "tokens": tokens,
        "side": SIDE,
        "client": str(HERE),
        "chromium": chromium(),
        "modules": str(modules(cache) / "node_modules"),
        "seconds": SECONDS,
    }
    where = copied(cache)
    try:
        ran = subprocess.run(
            ["node", script], cwd=where, input=json.dumps(question), capture_output=True, text=True, timeout=SECONDS
        )
    except subprocess.TimeoutExpired as error:
        raise CheckFailed(f"no answer within {SECONDS} s") from error
    lines = [line for line in ran.stdout.splitlines() if line.startswith("{")]
    if not lines:
        raise CheckFailed(
            f"it crashed with exit code {ran.returncode}: {(ran.stderr.strip().splitlines() or [''])[-1][:300]}"
        )
    found = json.loads(lines[-1])
    if "error" in found:
        raise CheckFailed(f"Transformers.js says: {' '.join(found['error'].split())[:400]}")
    return found


def _same(found: dict[str, Any], folder: Path, layout: str, dtype: str) -> str:
    chat = OnnxChatModel(folder, dtype)
    ids = np.array([found["prompt"]], np.int64)
    off = _apart(chat.run(ids, None, 1)[0][0, -1], found["last"], dtype, "to a text")
    if layout == "multimodal" and "image" in found:
        _apart(_shown(chat, folder, dtype, found["image"]), found["image"]["last"], dtype, "to an image")
    if len(found["said"]) == 0 or not isinstance(found["text"], str):
        raise CheckFailed("it generates nothing")
    speed = f"{found['tokens_per_s']:.3g} tokens/s, loaded in {found['load_s']:.1f} s"
    return f"off by {off:.1g} of the largest logit; {speed}"


def _apart(ours: np.ndarray, theirs: list[float], dtype: str, what: str) -> float:
    first, second = ours.astype(np.float32), np.array(theirs, np.float32)
    if first.shape != second.shape or not np.isfinite(second).all():
        raise CheckFailed(f"its answer {what} is NaN, or of another size")
    off = float(np.abs(first - second).max() / np.abs(first).max())
    if off > (APART if dtype == "fp32" else APART_IN_BITS):
        raise CheckFailed(f"its answer {what} is off by {off:.2g} of the largest logit from ONNX Runtime's")
    return off


def _shown(chat: OnnxChatModel, folder: Path, dtype: str, image: dict[str, Any]) -> np.ndarray:
    """ONNX Runtime's logits after the client's own pixels and tokens."""
    from phoque.onnx.session import SUFFIXES, open_session

    config = json.loads((folder / "config.json").read_text())
    token = config.get("image_token_index", config.get("image_token_id"))
    encoder = open_session(folder / "onnx" / f"vision_encoder{SUFFIXES[dtype]}.onnx")
    pixels = np.array(image["pixel_values"], np.float32).reshape(image["pixels"])
    (features,) = encoder.run(None, {"pixel_values": pixels})
    ids = np.array([image["prompt"]], np.int64)
    embeds = chat.embed_tokens(ids).copy()
    places = np.flatnonzero(ids[0] == token)
    if len(places) != len(features):
        raise CheckFailed(f"the processor writes {len(places)} image tokens for {len(features)} features")
    embeds[0, places] = features
    return chat.run(ids, None, 1, embeds=embeds)[0][0, -1]
