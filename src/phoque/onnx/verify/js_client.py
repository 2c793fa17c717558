"""Levels `node` and `browser`: Transformers.js loads the export, and its logits must match ONNX Runtime's."""

import hashlib
import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np

from phoque.console import Console
from phoque.errors import RunError
from phoque.onnx.session import OnnxChatModel
from phoque.onnx.verify.checks import CheckFailed, Verdict
from phoque.services import Services
from phoque.settings.environment import environment_without_secrets
from phoque.settings.verify_onnx import VerifySettings

CLIENT_FILES = Path(__file__).with_name("client")
CHROMIUM = ("chromium", "chromium-browser", "google-chrome", "chrome")
# onnxruntime-node would download a GPU library when it is installed; nothing here uses it
INSTALL_ENV = {
    "ONNXRUNTIME_NODE_INSTALL": "skip",
    "ONNXRUNTIME_NODE_INSTALL_CUDA": "skip",
    "PUPPETEER_SKIP_DOWNLOAD": "1",
}
MESSAGES = [{"role": "user", "content": "What do the gulls want from you today?"}]
NEW_TOKENS = 8  # generated per answer
IMAGE_SIZE = 112  # width and height of the test image, in pixels
TIMEOUT_S = 900  # timeout for one answer; a browser on a slow machine takes a minute for a small model
MAX_DIFFERENCE = 0.05  # between two builds of ONNX Runtime, as a fraction of the largest logit
MAX_DIFFERENCE_ROUNDED = (
    0.15  # for other precisions: fp16, or native kernels that round activations to 8 bits where wasm does not
)
# measured on SwiftShader: logits differ by 0.001 with plain operators and by 0.1 to 0.4 with GroupQueryAttention
WEBGPU_HINT = (
    "The software adapter of headless Chromium computes fused attention wrongly, and some GPU drivers may too. Check "
    "with --serve on the target GPU, or export with --no-fuse"
)


def check_node(
    folder: Path, layout: str, dtypes: list[str], s: VerifySettings, services: Services, verdict: Verdict
) -> None:
    """Run the export in Node, in each precision."""
    if why := prepare_client(s, services, ("node",)):
        verdict.skip("node", "Transformers.js loads it and answers", why)
        return
    for dtype in dtypes:
        with verdict.check("node", f"{dtype}: Transformers.js loads it, and its logits match ONNX Runtime's") as notes:
            services.console.say(f"running {dtype} in Node")
            answer = _ask_client("node.mjs", folder, layout=layout, dtype=dtype, device="cpu", cache=services.cache)
            notes.append(_compare_logits(answer, folder, layout, dtype))


def check_browser(
    folder: Path, layout: str, dtypes: list[str], s: VerifySettings, services: Services, verdict: Verdict
) -> None:
    """Run the export in headless Chromium: on wasm in each precision, and on WebGPU with --webgpu."""
    why = prepare_client(s, services, ("node", "chromium"))
    if why:
        verdict.skip("browser", "a page loads it and answers", why)
    for dtype in dtypes if not why else []:
        with verdict.check(
            "browser", f"{dtype}: a page loads it on wasm, and its logits match ONNX Runtime's"
        ) as notes:
            services.console.say(f"running {dtype} in a browser on wasm")
            answer = _ask_client("browser.mjs", folder, layout=layout, dtype=dtype, device="wasm", cache=services.cache)
            notes.append(_compare_logits(answer, folder, layout, dtype))
    for dtype in dtypes:
        asks = f"{dtype}: WebGPU's logits match ONNX Runtime's"
        if why or not s.webgpu:
            verdict.skip("browser", asks, why or "runs only with --webgpu")
        elif dtype in ("fp16", "q4f16"):
            verdict.skip("browser", asks, "the software adapter of headless Chromium has no shader-f16")
        else:
            with verdict.check("browser", asks) as notes:
                services.console.say(f"running {dtype} in a browser on WebGPU; without a GPU this takes minutes")
                answer = _ask_client(
                    "browser.mjs", folder, layout=layout, dtype=dtype, device="webgpu", cache=services.cache, tokens=1
                )
                try:
                    notes.append(_compare_logits(answer, folder, layout, dtype))
                except CheckFailed as problem:
                    raise CheckFailed(f"{problem} on WebGPU. {WEBGPU_HINT}") from problem


def locate_client(cache: Path) -> Path:
    """Return the folder that Transformers.js is or will be installed in: one folder per package.json."""
    key = hashlib.sha256((CLIENT_FILES / "package.json").read_bytes()).hexdigest()[:12]
    return cache / "client" / key


def is_installed(cache: Path) -> bool:
    """Whether Transformers.js is completely installed in the cache."""
    return (locate_client(cache) / ".whole").is_file()


def install_client(cache: Path, console: Console) -> None:
    """Install Transformers.js from npm into phoque's cache. Raises RunError if npm fails."""
    folder = locate_client(cache)
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(CLIENT_FILES / "package.json", folder / "package.json")
    console.say(f"installing Transformers.js into {folder}")
    command = ["npm", "install", "--no-audit", "--no-fund", "--no-package-lock"]
    environment = environment_without_secrets(**INSTALL_ENV)  # packages may run scripts of their own
    process = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    if process.returncode:
        raise RunError(
            what="Transformers.js cannot be installed.",
            why=(process.stderr.strip().splitlines() or ["npm gave no reason"])[0],
            fix="Check the network and npm, or stop at an earlier level: --level ort.",
        )
    (folder / ".whole").touch()


def prepare_client(s: VerifySettings, services: Services, programs: tuple[str, ...]) -> str:
    """Return why the client cannot run, or "" if it can; install Transformers.js first if the user agrees."""
    if not shutil.which("node") or not shutil.which("npm"):
        return "there is no Node.js on PATH (node and npm)"
    if "chromium" in programs and not find_chromium():
        return f"there is no Chromium on PATH ({', '.join(CHROMIUM)})"
    cache, console = services.cache, services.console
    if is_installed(cache):
        return ""
    question = f"Install Transformers.js (about 500 MB from npm) into {locate_client(cache)}?"
    if s.install or (console.can_ask() and console.confirm(question)):
        install_client(cache, console)
        return ""
    return "Transformers.js is not installed: run it once with --install"


def find_chromium() -> str | None:
    """Return the path of the first Chromium or Chrome on PATH."""
    return next((path for name in CHROMIUM if (path := shutil.which(name))), None)


def copy_scripts(cache: Path) -> Path:
    """Copy the client scripts next to node_modules, since Node resolves imports from a script's folder; return it."""
    target = locate_client(cache)
    for file in CLIENT_FILES.glob("*.mjs"):
        shutil.copyfile(file, target / file.name)
    return target


def _ask_client(
    script: str, folder: Path, *, layout: str, dtype: str | None, device: str, cache: Path, tokens: int = NEW_TOKENS
) -> dict[str, Any]:
    """Run one client script and return its answer; `dtype` None leaves the precision to config.json.

    Raises CheckFailed with the client's error message.
    """
    folder = folder.absolute()
    request = {
        "root": str(folder.parent),
        "name": folder.name,
        "layout": layout,
        "dtype": dtype,
        "device": device,
        "messages": MESSAGES,
        "tokens": tokens,
        "side": IMAGE_SIZE,
        "client": str(CLIENT_FILES),
        "chromium": find_chromium(),
        "modules": str(locate_client(cache) / "node_modules"),
        "seconds": TIMEOUT_S,
    }
    scripts = copy_scripts(cache)
    try:
        proc = subprocess.run(
            ["node", script],
            cwd=scripts,
            input=json.dumps(request),
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
            env=environment_without_secrets(),
        )
    except subprocess.TimeoutExpired as error:
        raise CheckFailed(f"the client did not answer within {TIMEOUT_S} s") from error
    lines = [line for line in proc.stdout.splitlines() if line.startswith("{")]
    if not lines:
        raise CheckFailed(
            f"the client exited with code {proc.returncode}: {(proc.stderr.strip().splitlines() or [''])[-1][:300]}"
        )
    answer = json.loads(lines[-1])
    if "error" in answer:
        raise CheckFailed(f"Transformers.js raised: {' '.join(answer['error'].split())[:400]}")
    return answer


def _compare_logits(answer: dict[str, Any], folder: Path, layout: str, dtype: str) -> str:
    """Compare the client's logits with ONNX Runtime's; return their difference and the client's speed in words."""
    chat = OnnxChatModel(folder, dtype)
    ids = np.array([answer["prompt"]], np.int64)
    difference = _check_difference(chat.run(ids, None, 1)[0][0, -1], answer["last"], dtype, "for text")
    if layout == "multimodal" and "image" in answer:
        _check_difference(
            _compute_image_logits(chat, folder, dtype, answer["image"]), answer["image"]["last"], dtype, "for an image"
        )
    if len(answer["said"]) == 0 or not isinstance(answer["text"], str):
        raise CheckFailed("the client generated no token")
    speed = f"{answer['tokens_per_s']:.3g} tokens/s, loaded in {answer['load_s']:.1f} s"
    return f"logits differ by {difference:.1g} of the largest logit; {speed}"


def _check_difference(ours: np.ndarray, theirs: list[float], dtype: str, what: str) -> float:
    """Return the largest difference as a fraction of the largest logit. Raises CheckFailed above the limit."""
    expected, actual = ours.astype(np.float32), np.array(theirs, np.float32)
    if expected.shape != actual.shape or not np.isfinite(actual).all():
        raise CheckFailed(f"its logits {what} contain NaN or infinity, or have another size than ONNX Runtime's")
    difference = float(np.abs(expected - actual).max() / np.abs(expected).max())
    if difference > (MAX_DIFFERENCE if dtype == "fp32" else MAX_DIFFERENCE_ROUNDED):
        raise CheckFailed(f"its logits {what} differ from ONNX Runtime's by {difference:.2g} of the largest logit")
    return difference


def _compute_image_logits(chat: OnnxChatModel, folder: Path, dtype: str, image: dict[str, Any]) -> np.ndarray:
    """Compute ONNX Runtime's last logits for the pixels and token ids that the client's processor made."""
    from phoque.onnx.session import SUFFIXES, open_session

    config = json.loads((folder / "config.json").read_text())
    image_token = config.get("image_token_index", config.get("image_token_id"))
    encoder = open_session(folder / "onnx" / f"vision_encoder{SUFFIXES[dtype]}.onnx")
    pixels = np.array(image["pixel_values"], np.float32).reshape(image["pixels"])
    (features,) = encoder.run(None, {"pixel_values": pixels})
    ids = np.array([image["prompt"]], np.int64)
    embeds = chat.embed_tokens(ids).copy()
    image_positions = np.flatnonzero(ids[0] == image_token)
    if len(image_positions) != len(features):
        raise CheckFailed(f"the processor wrote {len(image_positions)} image tokens for {len(features)} features")
    embeds[0, image_positions] = features
    return chat.run(ids, None, 1, embeds=embeds)[0][0, -1]
