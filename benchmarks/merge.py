"""Merging an adapter: phoque beside peft's merge_and_unload and mergekit, with a plain copy of the output as the limit.

    uv run python benchmarks/merge.py            a Llama of 2.5 GB in BF16, three shards, on this machine
    python benchmarks/merge.py --ministral       the shape of Ministral 3 3B in FP8 with random weights, phoque alone:
                                                 transformers 5 saves such a base as FP8 again, which is no merge

Each side runs in a process of its own; memory is its peak beyond what the imports take. Files are flushed to the disk.
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
sys.path[:0] = [str(ROOT), str(ROOT / "src")]
PROJECTIONS = r"(?!.*vision).*layers\.\d+\.(?:self_attn|mlp)\.(?:q|k|v|o|gate|up|down)_proj"


def make_llama(folder: Path) -> None:
    """2.5 GB of random BF16 in shards of 1 GB, with a tokenizer."""
    import torch
    from tests import tiny
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.set_default_dtype(torch.bfloat16)
    shape = {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 18,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "vocab_size": 32000,
    }
    model = LlamaForCausalLM(LlamaConfig(**tiny.SIZES | shape))
    model.save_pretrained(folder, max_shard_size="1GB")
    tiny.tokenizer().save_pretrained(folder)


def make_adapter(base: Path, folder: Path) -> None:
    """A random rank-16 adapter on the seven projections of every layer, by the header of the base alone."""
    import torch
    from peft import LoraConfig
    from safetensors.torch import save_file

    from phoque.models.safetensors_files import SafetensorsFiles

    torch.manual_seed(0)
    weights = {}
    for name, stored in SafetensorsFiles(base).tensors.items():
        if name.endswith("_proj.weight") and "layers." in name and "vision" not in name:
            module = "base_model.model.model.layers." + name.split("layers.")[1].removesuffix(".weight")
            weights[f"{module}.lora_A.weight"] = 0.02 * torch.randn(16, stored.shape[1])
            weights[f"{module}.lora_B.weight"] = 0.02 * torch.randn(stored.shape[0], 16)
    folder.mkdir()
    save_file(weights, folder / "adapter_model.safetensors", {"format": "pt"})
    lora = LoraConfig(r=16, lora_alpha=64, target_modules=PROJECTIONS, task_type="CAUSAL_LM")
    lora.base_model_name_or_path = str(base)
    lora.save_pretrained(folder)


def ours(base: Path, adapter: Path, out: Path) -> None:
    from phoque.merging.writer import write_merged
    from phoque.models.checkpoint_reader import CheckpointReader
    from phoque.models.source import Source

    measured(lambda: write_merged(CheckpointReader(Source("base", base, "1", "x")), adapter, out, "bf16"))


def pefts(base: Path, adapter: Path, out: Path) -> None:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    def merge() -> None:
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
        PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(out)
        AutoTokenizer.from_pretrained(base).save_pretrained(out)

    measured(merge)


def measured(action) -> None:
    """Run, flush the disk, and print seconds and the growth of the peak memory."""
    import peft  # noqa: F401
    import transformers.integrations.peft
    import transformers.models.llama.modeling_llama  # noqa: F401

    before = forget_peak()
    begun = time.perf_counter()
    action()
    os.sync()
    seconds = time.perf_counter() - begun
    print(json.dumps({"seconds": seconds, "memory": peak() - before}))


def forget_peak() -> int:
    """Begin the peak of resident memory anew (ru_maxrss cannot, and a child inherits it); what is resident now."""
    Path("/proc/self/clear_refs").write_text("5")
    return peak()


def peak() -> int:
    """The peak of resident memory in bytes."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


def copied(out: Path, into: Path) -> float:
    """Seconds that a plain copy of the merged model takes, flushed."""
    begun = time.perf_counter()
    shutil.copytree(out, into)
    os.sync()
    return time.perf_counter() - begun


def mergekits(base: Path, adapter: Path, out: Path) -> dict | None:
    """mergekit in an environment of its own, which its older transformers needs; None where it cannot be had."""
    config = out.with_suffix(".yml")
    config.write_text(f"models:\n  - model: {base}+{adapter}\nmerge_method: passthrough\ndtype: bfloat16\n")
    command = [
        "uvx",
        "--from",
        "mergekit",
        "--with",
        "torch==2.13.*",
        "mergekit-yaml",
        config,
        out,
        "--lora-merge-cache",
        out.with_suffix(".cache"),
    ]
    begun = time.perf_counter()
    ran = subprocess.run([*map(str, command), "--help"], capture_output=True, text=True)  # installs it, unmeasured
    if ran.returncode:
        print(f"mergekit: {ran.stderr.strip().splitlines()[-1][:100]}", file=sys.stderr)
        return None
    begun = time.perf_counter()
    ran = subprocess.run([*map(str, command)], capture_output=True, text=True)
    os.sync()
    if ran.returncode:
        print(f"mergekit: {ran.stderr.strip().splitlines()[-1][:200]}", file=sys.stderr)
        return None
    return {"seconds": time.perf_counter() - begun, "memory": None}


def in_a_process(side: str, *paths: Path) -> dict:
    command = [sys.executable, __file__, "--side", side, *map(str, paths)]
    ran = subprocess.run(command, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr[-2000:]
    return json.loads(ran.stdout.strip().splitlines()[-1])


def size(folder: Path) -> int:
    return sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())


def same_weights(first: Path, second: Path) -> float:
    """The largest difference between two merged models."""
    from phoque.models.safetensors_files import SafetensorsFiles

    one, other = SafetensorsFiles(first), SafetensorsFiles(second)
    return max((one.read(n).float() - other.read(n).float()).abs().max().item() for n in one.tensors)


def main(ministral: bool, place: Path | None) -> None:
    root = Path(tempfile.mkdtemp(dir=place))
    base, adapter = root / "base", root / "adapter"
    try:
        if ministral:
            from benchmarks.ministral import make

            (root / "made").mkdir()
            make(root / "made", tiny=False)
            base = root / "made" / "fp8"
            shutil.rmtree(root / "made" / "bf16")
        else:
            make_llama(base)
        make_adapter(base, adapter)
        largest = max(f.stat().st_size for f in base.glob("*.safetensors"))
        rows = {"phoque merge": in_a_process("ours", base, adapter, root / "ours") | {"bytes": size(root / "ours")}}
        copy = min(copied(root / "ours", root / f"copy-{n}") for n in range(2))
        rows = {"a plain copy of the output": {"seconds": copy, "memory": None, "bytes": size(root / "ours")}} | rows
        if not ministral:
            rows["peft merge_and_unload"] = in_a_process("pefts", base, adapter, root / "peft")
            rows["peft merge_and_unload"]["bytes"] = size(root / "peft")
            if found := mergekits(base, adapter, root / "mergekit"):
                rows["mergekit (with its start)"] = found | {"bytes": size(root / "mergekit")}
        print("| | seconds | memory beyond the imports, GB | written, GB |\n|---|---|---|---|")
        for name, row in rows.items():
            memory = "" if row["memory"] is None else f"{row['memory'] / 1e9:.2f}"
            print(f"| {name} | {row['seconds']:.1f} | {memory} | {row['bytes'] / 1e9:.2f} |")
        ours_row = rows["phoque merge"]
        allowed = (1.5 * largest + (1 << 30)) / 1e9
        print(f"\ntime: {ours_row['seconds'] / copy:.1f} x the copy (target 2.0)")
        print(f"memory: {ours_row['memory'] / 1e9:.2f} GB (target {allowed:.2f})")
        if not ministral:
            print(f"largest difference to peft's weights: {same_weights(root / 'ours', root / 'peft'):.2g}")
    finally:
        shutil.rmtree(root, ignore_errors=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--ministral", action="store_true")
    parser.add_argument("--place", type=Path, help="where the files are written; default the system's temporary folder")
    parser.add_argument("--side", choices=["ours", "pefts"])
    parser.add_argument("paths", type=Path, nargs="*")
    asked = parser.parse_args()
    if asked.side:
        {"ours": ours, "pefts": pefts}[asked.side](*asked.paths)
    else:
        main(asked.ministral, asked.place)
