"""The peer of scaling.py: TRL's trainer on as many tokens, in one process per GPU; started by accelerate launch.

All rows have about 220 tokens, so a padded batch has next to no padding. The base is loaded in NF4 by bitsandbytes.
Process 0 prints one line of JSON: tokens per second of all processes together, and the peak memory of its GPU.
"""

import argparse
import json
import os
import statistics
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from train_speed import ADAPTER
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, TrainerCallback
from trl import SFTConfig, SFTTrainer

WARM = 4  # steps that are left out of the speed


class StepEnds(TrainerCallback):
    """The time at the end of each step, after the GPU has finished it."""

    def __init__(self) -> None:
        """Start with no step."""
        self.times: list[float] = []

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """Wait for the GPU and note the time."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.times.append(time.perf_counter())


def read_ids(path: Path, tokenizer: Any, count: int) -> Dataset:
    """The ids of the first `count` conversations; every token is trained."""
    rows = []
    with path.open() as file:
        for _, line in zip(range(count), file, strict=False):
            text = " ".join(turn["content"] for turn in json.loads(line)["messages"])
            rows.append({"input_ids": tokenizer(text)["input_ids"]})
    return Dataset.from_list(rows)


def main(model: Path, rows: Path, batch: int, steps: int, *, checkpointing: bool) -> None:
    """Train `steps` steps of `batch` conversations per process."""
    cuda, process = torch.cuda.is_available(), int(os.environ.get("LOCAL_RANK", "0"))
    tokenizer = AutoTokenizer.from_pretrained(model)
    base = AutoModelForCausalLM.from_pretrained(
        model,
        quantization_config=BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
        ),
        dtype=torch.bfloat16,
        device_map={"": process if cuda else "cpu"},
        attn_implementation="sdpa",
    )
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    data = read_ids(rows, tokenizer, batch * steps * processes)
    ends = StepEnds()
    trainer = SFTTrainer(
        model=base,
        args=SFTConfig(
            output_dir=str(rows.parent / "trl"),
            max_steps=steps,
            per_device_train_batch_size=batch,
            gradient_checkpointing=checkpointing,
            optim="adamw_torch_fused",
            bf16=cuda,
            use_cpu=not cuda,
            logging_steps=steps,
            save_strategy="no",
            report_to=[],
            max_length=None,
            dataset_kwargs={"skip_prepare_dataset": True},
            disable_tqdm=True,
            ddp_find_unused_parameters=False,
        ),
        train_dataset=data,
        callbacks=[ends],
        processing_class=tokenizer,
        peft_config=LoraConfig(task_type="CAUSAL_LM", **ADAPTER),
    )
    trainer.train()
    if process == 0:
        seconds = statistics.median(end - begin for begin, end in pairwise(ends.times[WARM:]))
        tokens = sum(map(len, data["input_ids"])) / steps
        memory = torch.cuda.max_memory_reserved() / 1e9 if cuda else None
        print(json.dumps({"tokens_per_s": tokens / seconds, "gpu_memory_gb": memory}), flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--rows", type=Path, required=True)
    parser.add_argument("--batch", type=int, required=True)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--checkpointing", action="store_true")
    given = parser.parse_args()
    main(given.model, given.rows, given.batch, given.steps, checkpointing=given.checkpointing)
