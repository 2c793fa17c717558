"""Seconds per step of QLoRA on the 3B shape, in phoque's own trainer and its peers', on the same conversations.

The weights are random, in the published layout. Conversations are short (log-normal around 120 tokens), and every
trainer gets the same ids, labels, adapter and optimizer. Each part runs in a process of its own. Times are between
CUDA events at the ends of steps, so the CPU does not wait for the GPU. The limit is what a bf16 matrix product reaches
on this GPU, at 4 FLOPs per parameter and token (LoRA: forward pass, and backward pass to the inputs).

The losses of 32 steps are compared as well: plain layers twice, the second time with another setting of the matrix
products' reductions, whose difference is the noise of kernels; then phoque's. They are plotted in train_speed.html.

Run on a GPU machine: python benchmarks/train_speed.py [--results FILE --folder FOLDER]. What FILE has already is not
measured again, so an interrupted run continues.
"""

import argparse
import json
import math
import os
import random
import shutil
import site
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, cast

import torch

sys.path.insert(0, str(Path(__file__).parent))
PARAMETERS = 3.429e9
MEAN, LONGEST = 111, 1024
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
ADAPTER: dict[str, Any] = {"r": 16, "lora_alpha": 64, "target_modules": TARGETS}
WARM = 6
LONGEST_PACKED = 4096, 1024  # as in phoque
BUDGET = 2176  # tokens of a row of ours for 16 conversations


def make(folder: Path, a: argparse.Namespace) -> dict:
    """Write the FP8 checkpoint, its BF16 sibling for Unsloth, and 6,000 conversations."""
    import ministral

    folder.mkdir(parents=True, exist_ok=True)
    for kind in ("fp8", "bf16"):
        shutil.rmtree(folder / kind, ignore_errors=True)
    ministral.make(folder, a.tiny, ("fp8", "bf16") if a.unsloth_path else ("fp8",))
    write_rows(folder)
    write_ids(folder, "fp8")
    return {}


def write_rows(folder: Path) -> None:
    """6,000 short conversations about gulls."""
    rng = random.Random(7)
    words = ["gull", "tide", "rock", "fish", "harbour", "seal", "nap", "buoy", "pier", "wave"]

    def text(length: int) -> str:
        parts: list[str] = []
        while sum(len(p) + 1 for p in parts) < length:
            parts.append(rng.choice(words))
        return " ".join(parts)[: max(1, length)]

    with (folder / "rows.jsonl").open("w") as f:
        for number in range(6000):
            length = max(60, min(LONGEST - 40, int(rng.lognormvariate(math.log(MEAN), 0.7)))) - 50
            asked, answer = text(max(4, length // 4)), text(max(6, 3 * length // 4))
            turns = [{"role": "user", "content": f"{number} {asked}"}, {"role": "assistant", "content": answer}]
            f.write(json.dumps({"messages": turns, "source": "pier", "toxicity_score": 0.0}) + "\n")


def write_ids(folder: Path, checkpoint: str) -> None:
    """The first conversations that phoque's stream gives, one a row, for the peers to batch."""
    from phoque.data.chat_template import ChatTemplate
    from phoque.data.held_out import HeldOut
    from phoque.data.packing import Packing
    from phoque.data.readers import open_dataset
    from phoque.data.stream import TrainStream
    from phoque.models.config import load_tokenizer
    from phoque.models.source import Source

    chat = ChatTemplate(load_tokenizer(Source("base", folder / checkpoint, "0", "test")), "", LONGEST)
    data = open_dataset(str(folder / "rows.jsonl"), "train", None, None)
    stream = TrainStream(data, chat, held_out=HeldOut(), packing=Packing(1, float(MEAN), LONGEST, exact=True), seed=0)
    rows = [{k: b[k][0].tolist() for k in ("input_ids", "labels")} for _, b in zip(range(800), stream, strict=False)]
    (folder / "ids.json").write_text(json.dumps(rows))


def limit(folder: Path, a: argparse.Namespace) -> dict:
    """FLOPs per second of a large bf16 matrix product."""
    x, w = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    for _ in range(3):
        x @ w
    torch.cuda.synchronize()
    begun = time.perf_counter()
    for _ in range(20):
        x @ w
    torch.cuda.synchronize()
    seconds = time.perf_counter() - begun
    return {"flops": 20 * 2 * 8192**3 / seconds, "gpu": gpu()}


def gpu() -> str:
    """The name of this GPU."""
    return torch.cuda.get_device_name(0)


class Clock:
    """A callback that records a CUDA event at the end of each step, and the moment of the first."""

    def __init__(self, begun: float, profile: Path | None = None, at: int = 0) -> None:
        from transformers import TrainerCallback

        clock = self

        class Recorder(TrainerCallback):
            def on_step_begin(self, args, state, *_, **__):
                if profile and state.global_step == at:
                    torch.cuda.synchronize()
                    clock.profiler = torch.profiler.profile()
                    clock.profiler.__enter__()

            def on_step_end(self, args, state, *_, **__):
                event = torch.cuda.Event(enable_timing=True)
                event.record()
                clock.events.append(event)
                if clock.first is None:
                    torch.cuda.synchronize()
                    clock.first = time.perf_counter() - begun
                if profile and state.global_step == at + 2:
                    torch.cuda.synchronize()
                    clock.profiler.__exit__(None, None, None)
                    table = clock.profiler.key_averages().table(
                        sort_by="self_device_time_total", row_limit=45, max_name_column_width=90
                    )
                    clock.profiler.export_chrome_trace(str(profile.with_suffix(".json.gz")))
                    profile.write_text(busy(clock.profiler) + table)

        self.callback, self.events, self.first = Recorder(), [], None

    def seconds(self) -> list[float]:
        """Seconds of each step but the first."""
        torch.cuda.synchronize()
        return [a.elapsed_time(b) / 1e3 for a, b in zip(self.events, self.events[1:], strict=False)]


def busy(profiler: Any) -> str:
    """How long the GPU worked, of how long, from the first kernel to the last."""
    kernels = [
        e for e in profiler.events() if e.device_type == torch.autograd.DeviceType.CUDA and not e.is_user_annotation
    ]
    spans = sorted((e.time_range.start, e.time_range.end) for e in kernels)
    worked, reached = 0.0, spans[0][0]
    for begun, ended in spans:
        worked += max(0.0, ended - max(begun, reached))
        reached = max(reached, ended)
    return f"GPU busy {worked / 1e3:.1f} of {(reached - spans[0][0]) / 1e3:.1f} ms, {len(spans)} kernels\n"


def ours(folder: Path, a: argparse.Namespace) -> dict:
    """`phoque train`'s own run, with its callbacks."""
    from phoque.console import console
    from phoque.settings.presets import PRESETS
    from phoque.settings.resolve import resolve_settings
    from phoque.settings.train import TrainSettings
    from phoque.training import run, steps, trainer
    from phoque.training.engine import attention

    if a.flash:
        site.addsitedir(a.flash)
    attention.LONGEST_PACKED_MEAN, attention.LONGEST_PACKED_MEAN_BESIDE_FLASH_4 = (0, 0) if a.varlen else LONGEST_PACKED
    if a.cap:
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(a.cap * 1e9 / total)
    flags = {
        "preset": "ministral-3b",
        "base_model": str(folder / a.checkpoint),
        "dataset": str(folder / "rows.jsonl"),
        "output_dir": folder / f"run{time.time()}",
        "max_steps": a.steps,
        "batch_size": a.count,
        "gradient_checkpointing": a.recompute,
        "log_every": a.log_every,
        "quantization": a.quantization,
        "engine_mode": a.mode,
        "deterministic": not a.any_order,
        "lora_dropout": 0.0,
    }
    if not a.whole:
        flags |= {"sample_every": 0, "save_steps": 10**6, "held_out_rows": 0}
    from phoque.hub.client import Hub
    from phoque.services import Services

    asked, _ = resolve_settings(TrainSettings, flags, PRESETS)
    found = {}
    plain = trainer.PersonaTrainer.train

    def timed(self, **options):
        found["clock"] = clock = Clock(found["loaded"], a.profile and Path(a.profile), a.steps - 4)
        found["stream"] = self.stream
        self.add_callback(clock.callback)
        torch.cuda.reset_peak_memory_stats()
        return plain(self, **options)

    look, waits = trainer.PersonaTrainer._check_pending_norm, []

    def looked(self):
        begun = time.perf_counter()
        look(self)
        waits.append(time.perf_counter() - begun)

    choose = steps.select_engine

    def loaded(*args, **options):
        torch.cuda.synchronize()
        found["loaded"] = time.perf_counter()
        chosen = choose(*args, **options)
        print(chosen.record(), file=sys.stderr, flush=True)
        return chosen

    trainer.PersonaTrainer.train, trainer.PersonaTrainer._check_pending_norm, steps.select_engine = (
        timed,
        looked,
        loaded,
    )
    console.configure(quiet=True)
    try:
        result = run.train(
            asked, Services(console, Hub(None, console.say, 20.0), folder / "cache", asked.secrets)
        ).to_json()
    finally:
        trainer.PersonaTrainer.train, trainer.PersonaTrainer._check_pending_norm, steps.select_engine = (
            plain,
            look,
            choose,
        )
    seconds = found["clock"].seconds()
    metrics = [json.loads(line) for line in (Path(result["run"]) / "metrics.jsonl").read_text().splitlines()]
    return {
        "step": statistics.median(seconds[WARM : a.steps - 6 if a.profile else None]) if len(seconds) > WARM else None,
        "tokens": found["stream"].tokens_seen / a.steps,
        "padding": found["stream"].padding,
        "waited": metrics[-1]["waiting_for_data"],
        "gb": torch.cuda.max_memory_reserved() / 1e9,
        "idle_cpu": statistics.median(waits[WARM:]),
        "first": found["clock"].first,
        "losses": [m["loss"] for m in metrics if "loss" in m],
        "engine": json.loads((Path(result["run"]) / "run.json").read_text())["engine"],
        "seconds_of": result["seconds_of"],
    }


def several(folder: Path, a: argparse.Namespace) -> dict:
    """Several runs of `ours` in one process, which spares the imports: QUANTIZATION:MODE:COUNT:STEPS:LOG_EVERY,..."""
    import gc

    from phoque.models.load import default_device

    default_device()  # sets torch's allocator options before the first allocation, as the command does
    found = {}
    for asked in a.runs.split(","):
        quantization, mode, count, steps, log_every, *rest = asked.split(":")
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = "other" not in rest
        given = vars(a) | {"quantization": quantization, "mode": mode, "count": int(count), "steps": int(steps)}
        caps = [float(word.removeprefix("capped")) for word in rest if word.startswith("capped")]
        given |= {"log_every": int(log_every), "cap": sum(caps), "recompute": "recomputed" in rest}
        given |= {"flash": a.flash if "flash4" in rest else "", "whole": "whole" in rest}
        given |= {"any_order": a.any_order or "any_order" in rest}  # --no-deterministic
        given |= {
            "varlen": a.varlen or bool({"varlen", "flash4"} & set(rest))
        }  # without phoque's kernels for short conversations
        torch.cuda.set_per_process_memory_fraction(1.0)
        try:
            found[asked] = ours(folder, argparse.Namespace(**given))
        except Exception as error:  # the other runs continue
            found[asked] = {"error": repr(error)[:300]}
        gc.collect()
        torch.compiler.reset()
        torch.cuda.empty_cache()
        tell({asked: found[asked]})
    return {}


def tell(found: dict) -> None:
    """Print a part's results for the process that started it; phoque's console has replaced `sys.stdout`."""
    print("RESULT " + json.dumps(found), file=sys.__stdout__, flush=True)


def trl(folder: Path, a: argparse.Namespace) -> dict:
    """TRL's trainer on the same ids: `--trl` BATCH:PADDING_FREE:CHECKPOINTING, 16 conversations per step."""
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    from phoque.models.load import load_model
    from phoque.models.source import Source

    batch, free, recompute = (int(part) for part in a.trl.split(":"))
    rows = json.loads((folder / "ids.json").read_text())
    model = load_model(Source("base", folder / a.checkpoint, "0", "test"), "nf4", "sdpa")
    torch.cuda.synchronize()
    clock = Clock(time.perf_counter())
    cuda = torch.cuda.is_available()
    arguments = SFTConfig(
        output_dir=str(folder / "trl"),
        max_steps=a.steps,
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=16 // batch,
        gradient_checkpointing=bool(recompute),
        optim="adamw_torch_fused",
        learning_rate=2e-4,
        bf16=cuda,
        use_cpu=not cuda,
        logging_steps=10,
        save_strategy="no",
        report_to=[],
        max_length=None,
        padding_free=bool(free),
        dataset_kwargs={"skip_prepare_dataset": True},
        disable_tqdm=True,
        remove_unused_columns=False,
    )
    data = Dataset.from_list(rows)
    trainer = SFTTrainer(
        model=model,
        args=arguments,
        train_dataset=data,
        callbacks=[clock.callback],
        processing_class=AutoTokenizer.from_pretrained(folder / a.checkpoint),
        peft_config=LoraConfig(task_type="CAUSAL_LM", lora_dropout=0.0, **ADAPTER),
    )
    return peer(trainer, data, clock, a.steps)


def unsloth(folder: Path, a: argparse.Namespace) -> dict:
    """Unsloth on the same ids: `--unsloth` ROWS:CHECKPOINTING, with rows padded, free of padding or packed by it."""
    sys.path.insert(0, a.unsloth_path)
    os.chdir(folder)  # where it writes what it compiles
    from unsloth import FastModel  # isort: skip  # it wants to come before transformers
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    shape, recompute = a.unsloth.split(":")
    packs = shape == "packed"
    rows = json.loads((folder / "ids.json").read_text())
    model, _ = FastModel.from_pretrained(
        str(folder / "bf16"), max_seq_length=BUDGET if packs else LONGEST, load_in_4bit=True, dtype=torch.bfloat16
    )
    model = FastModel.get_peft_model(
        model,
        use_gradient_checkpointing="unsloth" if recompute == "1" else False,
        lora_dropout=0,
        bias="none",
        random_state=0,
        **ADAPTER,
    )
    torch.cuda.synchronize()
    clock = Clock(time.perf_counter())
    arguments = SFTConfig(
        output_dir=str(folder / "unsloth"),
        max_steps=a.steps,
        per_device_train_batch_size=1 if packs else 16,
        gradient_accumulation_steps=1,
        gradient_checkpointing=recompute == "1",
        optim="adamw_torch_fused",
        learning_rate=2e-4,
        bf16=True,
        logging_steps=10,
        save_strategy="no",
        report_to=[],
        max_length=BUDGET if packs else None,
        packing=packs,
        padding_free=shape == "free",
        dataset_kwargs={"skip_prepare_dataset": not packs},
        disable_tqdm=True,
        remove_unused_columns=packs,
    )
    data = Dataset.from_list(rows)
    trainer = SFTTrainer(
        model=model,
        args=arguments,
        train_dataset=data,
        callbacks=[clock.callback],
        processing_class=AutoTokenizer.from_pretrained(folder / "bf16"),
    )
    return peer(trainer, trainer.train_dataset, clock, a.steps)


def peer(trainer: Any, data: Any, clock: Clock, steps: int) -> dict:
    """What a peer's trainer shows over its first `steps` steps, on its rows in their order."""
    trainer._get_train_sampler = lambda dataset=None: torch.utils.data.SequentialSampler(data)
    torch.cuda.reset_peak_memory_stats()
    trainer.train()
    seconds, a_step = (
        clock.seconds(),
        trainer.args.per_device_train_batch_size * trainer.args.gradient_accumulation_steps,
    )
    rows = data.select(range(min(len(data), a_step * steps)))
    return {
        "step": statistics.median(seconds[len(seconds) // 2 :]),
        "tokens": sum(len(row["input_ids"]) for row in rows) / steps,
        "gb": torch.cuda.max_memory_reserved() / 1e9,
        "first": clock.first,
    }


PARTS = {"make": make, "limit": limit, "ours": ours, "several": several, "trl": trl, "unsloth": unsloth}
WHOLE = "nf4:auto:16:200:10:whole"
SPEED = {
    "nf4:graph:16:40:10": "phoque, NF4",
    "nf4:graph:16:20:10:recomputed": "phoque, NF4, checkpointing",
    "fp8:graph:16:40:10": "phoque, FP8",
    "nf4:graph:16:20:10:capped12": "phoque, NF4, on a card capped at 12 GB",
    "nf4:auto:16:20:10:capped24": "phoque, NF4, 20 steps on a card capped at 24 GB",
    "nf4:graph:62:16:10": "phoque, NF4",
    "fp8:graph:62:16:10": "phoque, FP8",
    "nf4:graph:124:10:10": "phoque, NF4",
    WHOLE: "phoque, NF4, with its samples, held-out loss and checkpoints",
}
FLASH_LEARNING = "nf4:graph:16:32:1:flash4"
FLASH = {
    "nf4:graph:16:40:10:flash4": "phoque, NF4, flash-attn-4",
    "fp8:graph:16:40:10:flash4": "phoque, FP8, flash-attn-4",
    "nf4:graph:62:16:10:flash4": "phoque, NF4, flash-attn-4",
    "fp8:graph:62:16:10:flash4": "phoque, FP8, flash-attn-4",
    FLASH_LEARNING: "phoque, NF4, flash-attn-4, 32 steps",
}
LEARNING = {
    "nf4:eager:16:32:1": "plain layers",
    "nf4:eager:16:32:1:other": "plain layers, other kernels",
    "nf4:graph:16:32:1": "phoque, NF4",
    "bf16:eager:16:32:1": "plain layers, BF16",
    "fp8:graph:16:32:1": "phoque, FP8",
}
UNSLOTH = {
    "free:1": "Unsloth, padding-free, its checkpointing",
    "padded:0": "Unsloth, padded, no checkpointing",
    "packed:0": "Unsloth, packing, no checkpointing",
}
PEERS = {
    "16:1:1": "TRL, padding-free, checkpointing",
    "16:0:1": "TRL, padded, checkpointing",
    "1:0:1": "the baseline script's recipe: TRL, 1 x 16, checkpointing",
}


def measured(folder: Path, a: argparse.Namespace) -> dict[str, dict]:
    """Every part in a process of its own; what each run of it found, under its name."""
    found: dict[str, dict] = json.loads(a.results.read_text()) if a.results and a.results.is_file() else {}
    done = {name for name, row in found.items() if "error" not in row}
    runs = [name for name in SPEED | LEARNING | (FLASH if a.flash else {}) if name not in done]
    there = ["--unsloth-path", a.unsloth_path]
    made = (folder / "ids.json").is_file() and (not a.unsloth_path or (folder / "bf16").is_dir())
    calls = [
        *([["make", *there]] if not made else []),
        *([["limit"]] if "limit" not in done else []),
        *([["several", "--runs", ",".join(runs), "--flash", a.flash]] if runs else []),
        *(["trl", "--trl", n, "--steps", "3" if n.startswith("1:") else "8"] for n in PEERS if n not in done),
        *(["unsloth", "--unsloth", n, "--steps", "12", *there] for n in UNSLOTH if a.unsloth_path and n not in done),
    ]
    if calls and found.get("limit", {}).get("gpu", gpu()) != gpu():
        sys.exit(f"{a.results} holds numbers of {found['limit']['gpu']}; this is {gpu()}")
    for part, *more in calls:
        for line in results_of(part, more, folder, a.tiny):
            found |= {part if part == "limit" else more[1]: line} if part in ("limit", "trl", "unsloth") else line
            if a.results:
                a.results.write_text(json.dumps(found, indent=1))
    return found


def results_of(part: str, more: list[str], folder: Path, tiny: bool) -> Iterator[dict]:
    """What a part tells, as it tells it."""
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), *sys.path])}
    command = [sys.executable, __file__, "--part", part, "--folder", str(folder), *more, *["--tiny"] * tiny]
    with tempfile.TemporaryFile("w+") as log:
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True, env=env) as process:
            lines = (line[7:] for line in cast(IO[str], process.stdout) if line.startswith("RESULT "))
            yield from map(json.loads, lines)
        if process.returncode:
            log.seek(0)
            print(f"{part} failed:\n{log.read()[-3000:]}", file=sys.stderr, flush=True)


def several_lines(name: str) -> bool:
    """Whether a run takes more steps than there are between two lines of its log."""
    _, _, _, steps, log_every, *_ = name.split(":")
    return int(steps) > int(log_every)


def show(found: dict[str, dict]) -> None:
    """Print the tables of the README, and draw the losses."""
    from phoque.reports.charts import Series, line_chart
    from phoque.reports.page import render_page

    most = found["limit"]["flops"]
    print(f"{found['limit']['gpu']}, {most / 1e12:.0f} TFLOP/s in bf16\n")
    print("| | tokens per step | seconds | tokens/s | of the limit | memory, GB | first step after, s |")
    print("|---|---|---|---|---|---|---|")
    plain = {"nf4:eager:16:32:1": "plain layers, packed, NF4"}
    for name, label in (PEERS | UNSLOTH | plain | SPEED | FLASH).items():
        row = found.get(name, {})
        if "step" in row and name != FLASH_LEARNING:
            speed = row["tokens"] / row["step"]
            share = 4 * PARAMETERS * speed / most
            print(
                f"| {label} | {row['tokens']:,.0f} | {row['step']:.3f} | {speed:,.0f} | "
                f"{share:{'.0%' if share > 0.01 else '.1%'}} | {row['gb']:.1f} | {row['first']:.1f} |"
            )
    # of the steps between the last two lines of the log; where there is one, the first rows were waited for
    waited = [found[name]["waited"] for name in (*SPEED, *FLASH) if name in found and several_lines(name)]
    print(f"\nwaiting for data: at most {max(waited):.2%} of the time")
    if shares := found.get(WHOLE, {}).get("seconds_of"):
        parts = ", ".join(f"{seconds:.1f} s {name}" for name, seconds in shares.items())
        print(f"200 steps with samples, held-out loss and checkpoints: {parts}")
    learnt = LEARNING | {FLASH_LEARNING: "phoque, NF4, flash-attn-4"}
    curves = {label: found[name]["losses"] for name, label in learnt.items() if "losses" in found.get(name, {})}

    def apart(one: str, other: str) -> float:
        squares = [(x - y) ** 2 for x, y in zip(curves[one], curves[other], strict=True)]
        return (sum(squares) / len(squares)) ** 0.5

    print("\n| losses of 32 steps | root mean square difference | mean of the last 8 |\n|---|---|---|")
    for one, other in (
        ("plain layers, other kernels", "plain layers"),
        ("phoque, NF4", "plain layers"),
        ("phoque, NF4", "plain layers, other kernels"),
        ("phoque, FP8", "plain layers, BF16"),
        ("plain layers, BF16", "plain layers"),
        ("phoque, NF4, flash-attn-4", "plain layers"),
    ):
        if not {one, other} <= curves.keys():
            continue
        ends = [f"{statistics.mean(curves[name][-8:]):.4f}" for name in (one, other)]
        print(f"| {one} beside {other} | {apart(one, other):.4f} | {', '.join(ends)} |")
    series = [Series(label, [*enumerate(losses, 1)]) for label, losses in curves.items()]
    against = {"plain layers, other kernels": "plain layers", "phoque, NF4": "plain layers"}
    less = [
        Series(one, [*enumerate([x - y for x, y in zip(curves[one], curves[other], strict=True)], 1)])
        for one, other in against.items()
        if {one, other} <= curves.keys()
    ]
    charts = [
        ("loss per trained token", line_chart(series, "step", "nats")),
        ("difference to the loss of plain layers in NF4", line_chart(less, "step", "nats")),
    ]
    page = render_page("charts", title="Losses of phoque and of plain layers", charts=charts)
    Path(__file__).with_suffix(".html").write_text(page, encoding="utf-8")


def main() -> None:
    """Run every part and print the tables that the README shows, or one part."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="a small model, to try the script itself")
    parser.add_argument("--part", choices=PARTS)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--checkpoint", default="fp8", help="the model's folder in --folder")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--count", type=int, default=16)
    parser.add_argument("--quantization", default="nf4")
    parser.add_argument("--mode", default="auto")
    parser.add_argument("--cap", type=float, default=0)
    parser.add_argument("--log-every", type=int, default=10)
    parser.add_argument("--profile", default="")
    parser.add_argument("--runs", default="")
    parser.add_argument("--trl", default="16:1:1")
    parser.add_argument("--whole", action="store_true", help="with samples, held-out loss and checkpoints")
    parser.add_argument("--varlen", action="store_true", help="with torch's attention kernel")
    parser.add_argument("--any-order", action="store_true", help="with --no-deterministic")
    parser.add_argument("--recompute", action="store_true", help="every layer")
    parser.add_argument("--unsloth", default="free:1")
    parser.add_argument("--unsloth-path", default="", help="a folder with Unsloth and the TRL that it wants")
    parser.add_argument("--flash", default="", help="a folder with flash-attn-4, to measure it as well")
    parser.add_argument("--results", type=Path, help="where the numbers are kept; what is there is not measured again")
    a = parser.parse_args()
    if a.part:
        tell(PARTS[a.part](a.folder, a))
        return
    with tempfile.TemporaryDirectory() as name:
        show(measured(a.folder or Path(name), a))


if __name__ == "__main__":
    main()
