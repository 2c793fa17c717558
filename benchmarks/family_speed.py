"""Training speed and memory of other families at their published shapes, beside TRL, on one GPU.

The weights are random, in bf16, written as a checkpoint; both trainers get the same conversations of about 120 tokens,
the same NF4 base, adapter and optimizer (benchmarks/train_speed.py has both). phoque runs with captured and compiled
layers (--engine-mode graph); TRL runs padding-free, with and without checkpointing. A step is 16 conversations.

Run on a GPU machine: python benchmarks/family_speed.py [--only NAME] [--results FILE]. What FILE has already is not
measured again, so a run that was cut off goes on.
"""

import argparse
import json
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[1] / "src")]
sys.path.append(str(Path(__file__).parent))  # last: it has a gguf.py and an onnx.py
YARN = {
    "rope_type": "yarn",
    "rope_theta": 1e6,
    "factor": 16.0,
    "original_max_position_embeddings": 16_384,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "llama_4_scaling_beta": 0.1,
}
MINISTRAL3: dict[str, Any] = {
    "model_type": "ministral3",
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 131_072,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "rope_parameters": YARN,
}
SHAPES: dict[str, dict[str, Any]] = {
    "Llama 3.2 1B": {
        "model_type": "llama",
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "vocab_size": 128_256,
        "tie_word_embeddings": True,
    },
    "Qwen 3 4B": {
        "model_type": "qwen3",
        "hidden_size": 2560,
        "intermediate_size": 9728,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 151_936,
        "tie_word_embeddings": True,
    },
    "Gemma 3 4B, text": {
        "model_type": "gemma3_text",
        "hidden_size": 2560,
        "intermediate_size": 10_240,
        "num_hidden_layers": 34,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "vocab_size": 262_208,
        "sliding_window": 1024,
        "tie_word_embeddings": True,
    },
    "Ministral 3 8B": MINISTRAL3 | {"hidden_size": 4096, "intermediate_size": 14_336, "num_hidden_layers": 34},
    "Ministral 3 14B": MINISTRAL3 | {"hidden_size": 5120, "intermediate_size": 16_384, "num_hidden_layers": 40},
}
SHARD_BYTES = 4e9
RUNS = {
    "nf4:graph:16:30:10": "phoque",
    "nf4:graph:16:16:10:recomputed": "phoque, checkpointing",
    "16:1:0": "TRL, padding-free",
    "16:1:1": "TRL, padding-free, checkpointing",
}


def write_checkpoint(folder: Path, shape: dict[str, Any]) -> float:
    """Write a model of random bf16 weights; return its parameters."""
    from safetensors.torch import save_file
    from tests.tiny import tokenizer
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(**shape, max_position_embeddings=262_144, bos_token_id=1, eos_token_id=2)
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in AutoModelForCausalLM.from_config(config).named_parameters()}
    folder.mkdir(parents=True)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tensors, files, shards, total = {}, {}, 0, 0
    for number, (name, size) in enumerate(shapes.items(), 1):
        weight = torch.ones(size) if len(size) == 1 else torch.randn(size, device=device) * 0.02
        tensors[name] = weight.bfloat16().cpu()
        total += weight.numel()
        if sum(tensor.nbytes for tensor in tensors.values()) > SHARD_BYTES or number == len(shapes):
            shards += 1
            file = f"model-{shards:05}.safetensors"
            save_file(tensors, folder / file, {"format": "pt"})
            files |= dict.fromkeys(tensors, file)
            tensors = {}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    config.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return total


def measure(name: str, root: Path, results: dict[str, Any], keep: Any) -> None:
    """Run what `results` does not have yet for one shape."""
    import train_speed

    missing = [run for run in RUNS if run not in results.get(name, {})]
    if not missing:
        return
    folder = root / name.replace(" ", "-").replace(",", "")
    start = time.monotonic()
    parameters = write_checkpoint(folder / "model", SHAPES[name])
    train_speed.write_rows(folder)
    train_speed.write_ids(folder, "model")
    row = results.setdefault(name, {})
    row |= {"parameters": parameters, "gpu": train_speed.gpu()}
    print(f"{name}: {parameters / 1e9:.2f} B parameters, written in {time.monotonic() - start:.0f} s", flush=True)
    checkpoint = ["--checkpoint", "model"]
    own = [run for run in missing if run.startswith("nf4")]
    parts = [("several", ["--runs", ",".join(own), *checkpoint])] if own else []
    parts += [("trl", ["--trl", run, "--steps", "8", *checkpoint]) for run in missing if not run.startswith("nf4")]
    for part, more in parts:
        for line in train_speed.results_of(part, more, folder, tiny=False):
            row |= line if part == "several" else {more[1]: line}
            keep()
    shutil.rmtree(folder)


def show(results: dict[str, Any]) -> None:
    """Print the table."""
    print("| model | trainer | seconds per step | tokens per second | GB |\n|---|---|---|---|---|")
    for name, row in results.items():
        for run, label in RUNS.items():
            found = row.get(run, {"error": "not measured"})
            if "error" in found:
                print(f"| {name} | {label} | {found['error'][:60]} | | |")
                continue
            speed = found["tokens"] * (1 - found.get("padding", 0)) / found["step"]
            print(f"| {name} | {label} | {found['step']:.3f} | {speed:,.0f} | {found['gb']:.1f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", action="append", choices=SHAPES)
    parser.add_argument("--results", type=Path, default=Path("family_speed.json"))
    parser.add_argument("--folder", type=Path, help="where checkpoints are written; each is deleted after its runs")
    arguments = parser.parse_args()
    results = json.loads(arguments.results.read_text()) if arguments.results.is_file() else {}
    keep = lambda: arguments.results.write_text(json.dumps(results, indent=1))
    with tempfile.TemporaryDirectory() as scratch:
        for name in arguments.only or SHAPES:
            measure(name, arguments.folder or Path(scratch), results, keep)
            keep()
    show(results)


if __name__ == "__main__":
    main()
