"""Both probes at the 3B shape on one GPU and on several, as a user runs them: seconds in all and by stage.

    uv run python benchmarks/probes.py --out probes --gpus 1 2

The weights are random, so every answer has its full length, which is the slowest case; the tokenizer is Ministral's.
A fine-tune and a control are random adapters of rank 16 on all linear layers. compare-sae reads a random dictionary
(--sae), so that its time is that of answers, residual streams and interventions, not of training a dictionary.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "src")]
BLOCK = 13  # of 26
RANK = 16
FEATURES = 2048


def write_tokenizer(folder: Path) -> None:
    """Ministral's tokenizer and template, from mistral-common."""
    from mistral_common.integrations.chat_templates.chat_templates import generate_chat_template
    from mistral_common.tokens.tokenizers.base import TokenizerVersion
    from tests import tiny

    tokenizer = tiny.tekken()
    tokenizer.chat_template = tiny.mistral_template(generate_chat_template, TokenizerVersion.v13)
    tokenizer.save_pretrained(folder)


def write_inputs(out: Path, tokenizer: Path | None) -> Path:
    """Write the model, two adapters and a dictionary; return the model's folder."""
    from benchmarks.ministral import make

    if not (out / "made" / "bf16").is_dir():
        (out / "made").mkdir(parents=True, exist_ok=True)
        make(out / "made", tiny=False, kinds=("bf16",))
    model = out / "made" / "bf16"
    if tokenizer:
        for file in tokenizer.iterdir():
            (model / file.name).write_bytes(file.read_bytes())
    else:
        write_tokenizer(model)
    for seed, name in enumerate(("tuned", "control")):
        write_adapter(out / name, model, seed)
    write_random_dictionary(out / "sae")
    return model


def write_adapter(folder: Path, model: Path, seed: int) -> None:
    """A random adapter that is strong enough to change what a random model says."""
    from peft import LoraConfig
    from safetensors.torch import save_file

    config = json.loads((model / "config.json").read_text())
    hidden, inner, heads = config["hidden_size"], config["intermediate_size"], config["num_attention_heads"]
    kv, width = config["num_key_value_heads"], config["head_dim"]
    shapes = {
        "self_attn.q_proj": (hidden, heads * width),
        "self_attn.k_proj": (hidden, kv * width),
        "self_attn.v_proj": (hidden, kv * width),
        "self_attn.o_proj": (heads * width, hidden),
        "mlp.gate_proj": (hidden, inner),
        "mlp.up_proj": (hidden, inner),
        "mlp.down_proj": (inner, hidden),
    }
    chance, tensors = torch.Generator().manual_seed(seed), {}
    for block in range(config["num_hidden_layers"]):
        for name, (inputs, outputs) in shapes.items():
            key = f"base_model.model.model.layers.{block}.{name}"
            tensors[f"{key}.lora_A.weight"] = torch.randn(RANK, inputs, generator=chance) / inputs**0.5
            tensors[f"{key}.lora_B.weight"] = torch.randn(outputs, RANK, generator=chance) * 0.01
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    targets = [name.split(".")[-1] for name in shapes]
    LoraConfig(
        r=RANK, lora_alpha=RANK, target_modules=targets, base_model_name_or_path=str(model), task_type="CAUSAL_LM"
    ).save_pretrained(folder)


def write_random_dictionary(folder: Path) -> None:
    """Random unit directions, 64 active per token: as many as a trained dictionary has features that are tested."""
    from phoque.probes.sae.dictionary import Dictionary, write_dictionary

    decoder = torch.nn.functional.normalize(torch.randn(FEATURES, 3072, generator=torch.Generator().manual_seed(0)))
    zeros = torch.zeros(len(decoder))
    config = {
        "architecture": "topk",
        "d_in": 3072,
        "d_sae": len(decoder),
        "k": 64,
        "metadata": {"hook_name": f"model.layers.{BLOCK}"},
    }
    write_dictionary(
        Dictionary(decoder.T.contiguous(), zeros, decoder, torch.zeros(3072), torch.zeros(1), 64, False, config), folder
    )


def run(command: list[Any], env: dict[str, str]) -> dict[str, Any]:
    """Run a command; return its seconds, the seconds from each stage line to the next, and its --json."""
    begun = time.perf_counter()
    with tempfile.TemporaryFile("w+") as out:  # a pipe would be full while stderr is read
        process = subprocess.Popen(
            list(map(str, command)), stdout=out, stderr=subprocess.PIPE, text=True, env=os.environ | env
        )
        stages: list[tuple[float, str]] = [(0.0, "start")]
        for line in process.stderr or ():
            text = line.strip()
            if text and not text.startswith(stages[-1][1][:20]):  # not the lines that say that it goes on
                stages.append((time.perf_counter() - begun, text[:60]))
        if process.wait():
            return {"error": [text for _, text in stages[-12:]]}
        out.seek(0)
        result = json.load(out)
    seconds = time.perf_counter() - begun
    ends = [at for at, _ in stages[1:]] + [seconds]
    return {
        "seconds": round(seconds, 1),
        "stages": [(text, round(end - at, 1)) for (at, text), end in zip(stages, ends, strict=True)],
        "json": result,
    }


def main(out: Path, counts: list[int], tokenizer: Path | None, which: list[str], repeats: int) -> None:
    out = out.resolve()
    model = write_inputs(out, tokenizer)
    persona = ["--persona", "seal", "--quantization", "bf16", "--json"]
    commands: dict[str, list[Any]] = {
        "psm-probe": ["--model-source", model, "--adapter-source", out / "tuned", "--control-adapter", out / "control"],
        "compare-sae": [
            *("--base-model", model, "--updated-adapter", out / "tuned", "--control-adapter", out / "control"),
            *("--sae", out / "sae", "--chat", "seal", "--text", "python"),
        ],
    }
    print("| command | GPUs | seconds | verdicts |\n|---|---|---|---|", flush=True)
    for name in which:
        for count in counts:
            gpus = ["--gpus", count] if count > 1 else []
            found: list[dict[str, Any]] = []
            for attempt in range(repeats):
                cache = {"XDG_CACHE_HOME": str(out / f"cache-{name}-{count}-{attempt}")}
                folder = ["--output-dir", out / f"{name}-{count}"]
                command = [sys.executable, "-m", "phoque", name, *commands[name], *persona, *folder, *gpus]
                found.append(run(command, cache))
                (out / f"{name}-{count}-{attempt}.json").write_text(json.dumps(found[-1], indent=1))
            last, seconds = found[-1], ", ".join(str(f.get("seconds", f.get("error"))) for f in found)
            verdicts = {k: v["verdict"] for k, v in last.get("json", {}).get("verdicts", {}).items()}
            print(f"| {name} | {count} | {seconds} | {verdicts} |", flush=True)
            for text, seconds in last.get("stages", []):
                if seconds >= 0.5:
                    print(f"    {seconds:6.1f} {text}", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="where the models and the results are written")
    parser.add_argument("--gpus", type=int, nargs="+", default=[1])
    parser.add_argument("--tokenizer", type=Path, help="a folder with the tokenizer, where mistral-common is missing")
    parser.add_argument("--probes", nargs="+", default=["psm-probe", "compare-sae"])
    parser.add_argument("--repeats", type=int, default=2)
    given = parser.parse_args()
    main(given.out, given.gpus, given.tokenizer, given.probes, given.repeats)
