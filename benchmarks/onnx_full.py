"""Exporting the 3B shape (FP8, random weights, vision tower included) for Transformers.js: seconds and host memory.

    python benchmarks/onnx_full.py [--tiny] [--cpu] [DTYPE ...]     on the GPU machine; --cpu hides the GPU

The export runs in a process of its own, with the default checks: accuracy on held-out chats, and the levels files,
graph and ort beside the checkpoint in fp32, a position beyond 16,384 and three image sizes included.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:1] = [str(ROOT), str(ROOT / "src")]  # not this folder: it has an onnx.py
ROWS = 60  # short conversations
VISION = {
    "model_type": "pixtral",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "head_dim": 64,
    "image_size": 1540,
    "patch_size": 14,
}
SMALL = {"num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2, "head_dim": 32}


def with_vision(base: Path, tiny: bool) -> None:
    """Add a random Pixtral tower and projector to the checkpoint, as the published one has them, in BF16."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoConfig, AutoModelForImageTextToText

    raw = json.loads((base / "config.json").read_text())
    raw |= {
        "vision_config": VISION | (SMALL if tiny else {}),
        "image_token_index": 10,
        "spatial_merge_size": 2,
        "vision_feature_layer": -1,
        "projector_hidden_act": "gelu",
        "multimodal_projector_bias": False,
    }
    (base / "config.json").write_text(json.dumps(raw))
    config = AutoConfig.from_pretrained(base)
    config.text_config.num_hidden_layers = 1
    del config.quantization_config
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config)
    names = [n for n in model.state_dict() if "vision_tower" in n or "multi_modal_projector" in n]
    shapes = {n.removeprefix("model."): model.state_dict()[n].shape for n in names}
    random = {n: torch.ones(s) if len(s) == 1 else 0.02 * torch.randn(s) for n, s in shapes.items()}
    save_file({n: t.bfloat16() for n, t in random.items()}, base / "vision.safetensors", {"format": "pt"})
    index = json.loads((base / "model.safetensors.index.json").read_text())
    index["weight_map"] |= dict.fromkeys(random, "vision.safetensors")
    (base / "model.safetensors.index.json").write_text(json.dumps(index))


def export(base: str, out: str, *dtypes: str) -> None:
    """Export in this process and print what came of it, with the peak of resident memory."""
    from phoque.console import console, silence_libraries
    from phoque.hub.client import Hub
    from phoque.onnx.export import export_model
    from phoque.services import Services
    from phoque.settings.export_onnx import ExportSettings
    from phoque.settings.presets import PRESETS
    from phoque.settings.resolve import resolve_settings

    silence_libraries()
    given = {
        "merged_dir": base,
        "output_dir": Path(out),
        "dtype": list(dtypes),
        "chats": str(Path(base) / "few.jsonl"),
        "least_agreement": 0.0,
    }  # random weights are sure of no next token
    asked, _ = resolve_settings(ExportSettings, given, PRESETS)
    begun = time.perf_counter()
    result = export_model(
        asked, Services(console, Hub(None, console.say, 20.0), Path(out).parent / "cache", asked.secrets), dry_run=False
    ).to_json()
    peak = int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024
    print(json.dumps(result | {"whole": time.perf_counter() - begun, "peak": peak}))


def main(tiny: bool, cpu: bool, dtypes: list[str]) -> None:
    from benchmarks.ministral import make

    root = Path(tempfile.mkdtemp())
    try:
        made = root / "made"
        made.mkdir()
        make(made, tiny)
        with_vision(made / "fp8", tiny)
        shutil.rmtree(made / "bf16")
        rows = (made / "rows.jsonl").read_text().splitlines()[:ROWS]
        (made / "fp8" / "few.jsonl").write_text("\n".join(rows))
        env = os.environ | ({"CUDA_VISIBLE_DEVICES": ""} if cpu else {})
        command = [sys.executable, __file__, "--export", str(made / "fp8"), str(root / "out"), *dtypes]
        ran = subprocess.run(command, env=env, stdout=subprocess.PIPE, text=True)
        assert ran.returncode == 0, "the export failed"
        found = json.loads(ran.stdout.strip().splitlines()[-1])
        print("| precision | GB | KL, nats a token | next tokens that agree |\n|---|---|---|---|")
        for dtype, row in found["dtypes"].items():
            print(f"| {dtype} | {row['bytes'] / 1e9:.2f} | {row['kl']:.2g} | {row['agreement']:.1%} |")
        print(f"\n{found['verdict']}, {found['whole']:.0f} s in all, peak of host memory {found['peak'] / 1e9:.1f} GB")
    finally:
        shutil.rmtree(root, ignore_errors=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--export", action="store_true")
    parser.add_argument("words", nargs="*")
    asked = parser.parse_args()
    if asked.export:
        export(*asked.words)
    else:
        main(asked.tiny, asked.cpu, asked.words or ["q4f16"])
