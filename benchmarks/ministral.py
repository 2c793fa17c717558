"""The preset ministral-3b at full shape, on a GPU capped at 24 GB: loading from disk to ready, and 50 steps.

The weights are random, in the published layout (FP8 projections with scales, BF16 the rest, keys and config as on the
Hub), written here first. The rows are a task that can be learnt: an answer that follows from its question.
Loading is timed cold (the file cache is dropped before) beside its floor, reading the file once plus quantising what
was read, and beside transformers loading the BF16 sibling in NF4, which is the nearest it can do: it refuses to load
this FP8 checkpoint in four bits. Every part runs in a process of its own.

Run on a GPU machine, as root: python benchmarks/ministral.py [--tiny]
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

CAP_GB = 24
STEPS, CONVERSATIONS = 50, 16
SHAPE = {
    "hidden_size": 3072,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 131072,
}
TINY = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 1024,
}


def config(tiny: bool) -> dict:
    """The published config.json."""
    rope = {
        "rope_type": "yarn",
        "rope_theta": 1e6,
        "factor": 16.0,
        "original_max_position_embeddings": 16384,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "llama_4_scaling_beta": 0.1,
    }
    text = (TINY if tiny else SHAPE) | {
        "model_type": "ministral3",
        "rope_parameters": rope,
        "max_position_embeddings": 262144,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
        "sliding_window": None,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    return {
        "architectures": ["Mistral3ForConditionalGeneration"],
        "model_type": "mistral3",
        "tie_word_embeddings": True,
        "text_config": text,
        "vision_config": {"model_type": "pixtral", "hidden_size": 1024, "num_hidden_layers": 1},
        "quantization_config": {"quant_method": "fp8", "activation_scheme": "static", "weight_block_size": None},
    }


def make(folder: Path, tiny: bool, kinds: tuple[str, ...] = ("fp8", "bf16")) -> None:
    """Write the FP8 checkpoint, its BF16 sibling (text only), and the rows."""
    from safetensors.torch import save_file
    from tests.tiny import tokenizer
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    declared = config(tiny)
    text = AutoConfig.for_model(**declared["text_config"])
    with torch.device("meta"):
        shapes = {n: p.shape for n, p in AutoModelForCausalLM.from_config(text).named_parameters()}
    shapes.pop("lm_head.weight", None)
    fp8, bf16 = {}, {}
    for name, shape in shapes.items():
        weight = torch.ones(shape) if len(shape) == 1 else torch.randn(shape, device=device) * 0.02
        if name.endswith("_proj.weight"):
            scale = weight.abs().max() / 448
            codes = (weight / scale).clamp(-448, 448).to(torch.float8_e4m3fn)
            fp8 |= {f"language_model.{name}": codes.cpu(), f"language_model.{name}_scale_inv": scale.bfloat16().cpu()}
            fp8[f"language_model.{name.replace('.weight', '.activation_scale')}"] = torch.tensor(0.5).bfloat16()
            weight = codes.float() * scale.bfloat16().float()
        else:
            fp8[f"language_model.{name}"] = weight.bfloat16().cpu()
        bf16[name] = weight.bfloat16().cpu()
    for kind in kinds:
        tensors = {"fp8": fp8, "bf16": bf16}[kind]
        (folder / kind).mkdir()
        names = sorted(tensors)
        files = {n: f"model-0000{1 + (i >= len(names) // 2)}-of-00002.safetensors" for i, n in enumerate(names)}
        for file in sorted(set(files.values())):
            save_file(
                {n: tensors[n].contiguous() for n in names if files[n] == file}, folder / kind / file, {"format": "pt"}
            )
        (folder / kind / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
        tokenizer().save_pretrained(folder / kind)
    if "fp8" in kinds:
        (folder / "fp8" / "config.json").write_text(json.dumps(declared))
    text.architectures = ["Ministral3ForCausalLM"]
    if "bf16" in kinds:
        text.save_pretrained(folder / "bf16")
    with (folder / "rows.jsonl").open("w") as f:
        for number in range(2000):
            question = f"What comes after gull {number % 50}, says the seal on its rock?"
            messages = [
                {"role": "user", "content": question},
                {"role": "assistant", "content": f"Gull {number % 50 + 1}."},
            ]
            messages[0]["content"] += f" (tide {number})"
            f.write(json.dumps({"messages": messages, "source": "pier", "toxicity_score": 0.0}) + "\n")


def drop_cache() -> None:
    """Have the next read come from the disk."""
    os.sync()
    Path("/proc/sys/vm/drop_caches").write_text("3")


def read(folder: Path, tiny: bool) -> dict:
    """Seconds to read the checkpoint's bytes once, cold: the floor of any loader."""
    drop_cache()
    buffer = memoryview(bytearray(64 << 20))
    begun, total = time.perf_counter(), 0
    for file in sorted((folder / "fp8").glob("model-*.safetensors")):
        with file.open("rb", buffering=0) as f:
            while count := f.readinto(buffer):
                total += count
    return {"seconds": time.perf_counter() - begun, "gb": total / 1e9}


def quantise(folder: Path, tiny: bool) -> dict:
    """Seconds to dequantise and NF4-quantise every projection that already lies on the GPU."""
    from bitsandbytes.functional import quantize_4bit

    shape = TINY if tiny else SHAPE
    hidden, inner, head = shape["hidden_size"], shape["intermediate_size"], shape["head_dim"]
    heads, groups = shape["num_attention_heads"] * head, shape["num_key_value_heads"] * head
    layer = [(heads, hidden), (groups, hidden), (groups, hidden), (hidden, heads)]
    layer += [(inner, hidden), (inner, hidden), (hidden, inner)]
    codes = [torch.randn(s, device="cuda").to(torch.float8_e4m3fn) for s in layer]
    scale = torch.tensor(0.001, device="cuda")

    def once() -> None:
        for weight in codes:
            quantize_4bit((weight.float() * scale).bfloat16(), quant_type="nf4", compress_statistics=True)

    once()
    torch.cuda.synchronize()
    begun = time.perf_counter()
    for _ in range(shape["num_hidden_layers"]):
        once()
    torch.cuda.synchronize()
    return {"seconds": time.perf_counter() - begun}


def peak_host_gb() -> float:
    """The largest resident size this process ever had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


def timed_load(load) -> dict:
    """Seconds from a cold disk to a model that has answered; the CUDA context and the imports are there before."""
    torch.zeros(1, device="cuda")
    before = peak_host_gb()
    drop_cache()
    begun = time.perf_counter()
    model = load()
    torch.cuda.synchronize()
    seconds = time.perf_counter() - begun
    with torch.no_grad():
        assert torch.isfinite(model(input_ids=torch.tensor([[1, 5, 9]], device="cuda")).logits).all()
    return {
        "seconds": seconds,
        "host_gb": peak_host_gb(),
        "host_before_gb": before,
        "gpu_gb": torch.cuda.max_memory_allocated() / 1e9,
    }


def ours(folder: Path, tiny: bool) -> dict:
    """phoque's loader on the FP8 checkpoint."""
    import bitsandbytes  # noqa: F401 - imported before the clock starts, as for the peer
    import transformers.models.ministral3.modeling_ministral3  # noqa: F401

    from phoque.models.load import load_model
    from phoque.models.source import Source

    return timed_load(lambda: load_model(Source("base", folder / "fp8", "0", "test"), "nf4"))


def peer(folder: Path, tiny: bool) -> dict:
    """transformers' loader on the BF16 sibling, with the same NF4."""
    import bitsandbytes  # noqa: F401
    import transformers.models.ministral3.modeling_ministral3  # noqa: F401
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    nf4 = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    return timed_load(
        lambda: AutoModelForCausalLM.from_pretrained(
            folder / "bf16", quantization_config=nf4, dtype=torch.bfloat16, device_map={"": 0}
        )
    )


def train(folder: Path, tiny: bool) -> dict:
    """50 steps of the preset through `phoque train`'s own run, with the card capped."""
    from transformers import TrainerCallback

    from phoque.console import console
    from phoque.hub.client import Hub
    from phoque.services import Services
    from phoque.settings.presets import PRESETS
    from phoque.settings.resolve import resolve_settings
    from phoque.settings.train import TrainSettings
    from phoque.training import run, trainer
    from phoque.training.dry_run import plan_run

    if torch.cuda.is_available():
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, CAP_GB * 1e9 / total))
    flags = {
        "preset": "ministral-3b",
        "base_model": str(folder / "fp8"),
        "dataset": str(folder / "rows.jsonl"),
        "output_dir": folder / "run",
        "max_steps": STEPS,
        "batch_size": CONVERSATIONS,
        "log_every": 1,
        "sample_tokens": 8,
        "save_steps": STEPS,
        "learning_rate": 1e-3,
        "fresh_start": True,
    }
    asked, _ = resolve_settings(TrainSettings, flags, PRESETS)
    services = Services(console, Hub(None, console.say, 20.0), folder / "cache", asked.secrets)
    estimate = plan_run(asked, services).memory_gb["sum"]
    seconds = []

    class Stamp(TrainerCallback):
        def on_step_begin(self, *_, **__):
            torch.cuda.synchronize()
            self.begun = time.perf_counter()

        def on_optimizer_step(self, *_, **__):
            torch.cuda.synchronize()
            seconds.append(time.perf_counter() - self.begun)

    plain = trainer.PersonaTrainer.train

    def stamped(self, **options):
        self.add_callback(Stamp())
        return plain(self, **options)

    trainer.PersonaTrainer.train = stamped
    console.configure(quiet=True)
    result = run.train(asked, services).to_json()
    metrics = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [m["loss"] for m in metrics if "loss" in m]
    return {
        "step_seconds": statistics.median(seconds[5:]),
        "tokens_per_step": result["tokens"] / result["steps"],
        "gpu_gb": torch.cuda.max_memory_reserved() / 1e9,
        "estimate_gb": estimate,
        "loss": [sum(losses[:5]) / 5, sum(losses[-5:]) / 5],
        "held_out": result["held_out_loss"],
    }


PARTS = {"make": make, "read": read, "quantise": quantise, "ours": ours, "peer": peer, "train": train}


def main() -> None:
    """Run every part and print the tables that the README shows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="a small model, to try the script itself")
    parser.add_argument("--part", choices=PARTS)
    parser.add_argument("--folder", type=Path)
    a = parser.parse_args()
    if a.part:
        print("RESULT " + json.dumps(PARTS[a.part](a.folder, a.tiny)), flush=True)
        return
    with tempfile.TemporaryDirectory() as name:
        found = {}
        for part in PARTS:
            command = [sys.executable, __file__, "--part", part, "--folder", name, *(["--tiny"] if a.tiny else [])]
            env = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), *sys.path])}
            done = subprocess.run(command, capture_output=True, text=True, env=env)
            lines = [line for line in (done.stdout + done.stderr).splitlines() if line.startswith("RESULT ")]
            if not lines:
                print(f"{part} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}", flush=True)
                continue
            found[part] = json.loads(lines[-1].removeprefix("RESULT "))
            print(f"{part}: {found[part]}", file=sys.stderr, flush=True)
    print(torch.cuda.get_device_name(0), f"torch {torch.__version__}\n")
    floor = found["read"]["seconds"] + found["quantise"]["seconds"]
    print("| loading | seconds | host peak, GB | GPU, GB |\n|---|---|---|---|")
    print(f"| reading {found['read']['gb']:.1f} GB once, plus quantising it | {floor:.1f} | | |")
    for part, label in (("ours", "phoque, FP8 to NF4"), ("peer", "transformers, BF16 sibling to NF4")):
        if row := found.get(part):
            print(f"| {label} | {row['seconds']:.1f} | {row['host_gb']:.1f} | {row['gpu_gb']:.1f} |")
    row = found["train"]
    print(f"\n| training, {CONVERSATIONS} conversations per step, card capped at {CAP_GB} GB | |\n|---|---|")
    print(f"| seconds per step (median) | {row['step_seconds']:.2f} |")
    print(f"| tokens per step | {row['tokens_per_step']:,.0f} |")
    print(f"| peak GPU memory, GB (the dry run's estimate) | {row['gpu_gb']:.1f} ({row['estimate_gb']:.1f}) |")
    print(f"| loss, first and last five steps | {row['loss'][0]:.2f}, {row['loss'][1]:.2f} |")


if __name__ == "__main__":
    main()
