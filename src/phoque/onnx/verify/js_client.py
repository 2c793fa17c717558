"""Levels `node` and `browser`: Transformers.js loads the export, and its logits must match ONNX Runtime's."""

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from phoque.checks import CheckFailed, Verdict
from phoque.npm import NpmClient, find_chromium
from phoque.onnx.session import OnnxChatModel
from phoque.page_server import PageServer
from phoque.services import Services
from phoque.settings.verify_onnx import VerifySettings

CLIENT_FILES = Path(__file__).with_name("client")
CLIENT = NpmClient(
    "Transformers.js", 500, {"@huggingface/transformers": "4.3.1", "puppeteer-core": "^24.0.0"}, CLIENT_FILES
)
MODEL_NAME = "export"  # whatever the folder is called: Transformers.js loads nothing from a name such as a--b
MESSAGES = [{"role": "user", "content": "What do the gulls want from you today?"}]
SLOW = 4.0  # tokens per second; about as fast as one reads
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
    if why := CLIENT.find_problem(services, install=s.install):
        verdict.skip("node", "Transformers.js loads it and answers", why)
        return
    for dtype in dtypes:
        with verdict.check("node", f"{dtype}: Transformers.js loads it, and its logits match ONNX Runtime's") as notes:
            services.console.stage(f"running {dtype} in Node")
            answer = _ask_client("node.mjs", folder, layout=layout, dtype=dtype, device="cpu", cache=services.cache)
            notes.append(_compare_logits(answer, folder, layout, dtype))


def check_browser(
    folder: Path, layout: str, dtypes: list[str], s: VerifySettings, services: Services, verdict: Verdict
) -> None:
    """Run the export in headless Chromium: on wasm in each precision, and on WebGPU with --webgpu."""
    why = CLIENT.find_problem(services, install=s.install, chromium=True)
    if why:
        verdict.skip("browser", "a page loads it and answers", why)
    for dtype in dtypes if not why else []:
        with verdict.check(
            "browser", f"{dtype}: a page loads it on wasm, and its logits match ONNX Runtime's"
        ) as notes:
            services.console.stage(f"running {dtype} in a browser on wasm")
            answer = _ask_client("browser.mjs", folder, layout=layout, dtype=dtype, device="wasm", cache=services.cache)
            notes.append(_compare_logits(answer, folder, layout, dtype))
            if (speed := answer["tokens_per_s"]) < SLOW:
                verdict.remarks.append(
                    f"{dtype} generates {speed:.2g} tokens per second on wasm here: {_advise(dtype)}"
                )
    for dtype in dtypes:
        asks = f"{dtype}: WebGPU's logits match ONNX Runtime's"
        if why or not s.webgpu:
            verdict.skip("browser", asks, why or "runs only with --webgpu")
        elif dtype in ("fp16", "q4f16"):
            verdict.skip("browser", asks, "the software adapter of headless Chromium has no shader-f16")
        else:
            with verdict.check("browser", asks) as notes:
                services.console.stage(f"running {dtype} in a browser on WebGPU; without a GPU this takes minutes")
                answer = _ask_client(
                    "browser.mjs", folder, layout=layout, dtype=dtype, device="webgpu", cache=services.cache, tokens=1
                )
                try:
                    notes.append(_compare_logits(answer, folder, layout, dtype))
                except CheckFailed as problem:
                    raise CheckFailed(f"{problem} on WebGPU. {WEBGPU_HINT}") from problem


def list_urls(folder: Path) -> dict[str, Path]:
    """The files of an export by the paths of their URLs; a download's files are links to elsewhere."""
    return {f"/models/{MODEL_NAME}/{f.relative_to(folder).as_posix()}": f for f in folder.rglob("*") if f.is_file()}


def _advise(dtype: str) -> str:
    if dtype == "int8":
        return "a page needs WebGPU, or a smaller model."
    return "for pages without WebGPU export int8, or a GGUF file (export-gguf)."


def _ask_client(
    script: str, folder: Path, *, layout: str, dtype: str | None, device: str, cache: Path, tokens: int = NEW_TOKENS
) -> dict[str, Any]:
    """Run one client script and return its answer; `dtype` None leaves the precision to config.json.

    Raises CheckFailed with the client's error message.
    """
    request = {
        "name": MODEL_NAME,
        "layout": layout,
        "dtype": dtype,
        "device": device,
        "messages": MESSAGES,
        "tokens": tokens,
        "side": IMAGE_SIZE,
        "chromium": find_chromium(),
        "seconds": TIMEOUT_S,
    }
    modules = CLIENT.modules(cache)
    folders = {"/modules/": modules, "/scripts/": CLIENT_FILES}
    with TemporaryDirectory() as root, PageServer(0, folders, files=list_urls(folder)) as server:
        (Path(root) / MODEL_NAME).symlink_to(folder.absolute(), target_is_directory=True)
        return CLIENT.run(script, request | {"url": server.url, "root": root}, cache, TIMEOUT_S)


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
