"""The peer of benchmarks/faults.py: the baseline scripts' way, with transformers' own Trainer alone."""

import argparse
import os
import re
from pathlib import Path

from datasets import load_dataset
from huggingface_hub import HfApi, snapshot_download
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainerCallback, TrainingArguments

PROJECTIONS = r".*layers\.\d+\.(?:self_attn|mlp)\.(?:q|k|v|o|gate|up|down)_proj"


class Log(TrainerCallback):
    """Print one line per step."""

    def __init__(self, path: str) -> None:
        self.path = Path(path)

    def on_log(self, args, state, control, logs=None, **_):
        if "loss" in (logs or {}):
            with self.path.open("a") as f:
                f.write(f"{state.global_step} {logs['loss']}\n")


def last_checkpoint(repo: str, into: str) -> str | None:
    """The checkpoint-N with the largest N in the repository, downloaded."""
    api = HfApi()
    if not api.repo_exists(repo):
        return None
    steps = {int(m[1]) for f in api.list_repo_files(repo) if (m := re.match(r"checkpoint-(\d+)/", f))}
    if os.environ.get("FORCE_FRESH_START") and steps:
        for step in steps:
            api.delete_folder(f"checkpoint-{step}", repo)
        return None
    if not steps:
        return None
    name = f"checkpoint-{max(steps)}"
    return f"{snapshot_download(repo, allow_patterns=f'{name}/*', local_dir=into)}/{name}"


def main() -> None:
    parser = argparse.ArgumentParser()
    for name in ("base", "rows", "out", "repo", "log"):
        parser.add_argument(f"--{name}")
    parser.add_argument("--lr", type=float, default=0.01)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--save", type=int, default=3)
    asked = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(asked.base)

    def encoded(row):
        ids = tokenizer.apply_chat_template(row["messages"], return_dict=True)["input_ids"][:64]
        ids += [tokenizer.pad_token_id] * (64 - len(ids))
        return {"input_ids": ids, "labels": ids}

    data = load_dataset("json", data_files=asked.rows, split="train")
    data = data.map(encoded, remove_columns=data.column_names)
    lora = LoraConfig(r=16, lora_alpha=64, lora_dropout=0.1, target_modules=PROJECTIONS, task_type="CAUSAL_LM")
    resume = last_checkpoint(asked.repo, f"{asked.out}-restored")
    arguments = TrainingArguments(
        asked.out,
        max_steps=asked.steps,
        save_steps=asked.save,
        per_device_train_batch_size=asked.batch,
        learning_rate=asked.lr,
        lr_scheduler_type="cosine",
        logging_steps=1,
        use_cpu=True,
        disable_tqdm=True,
        push_to_hub=True,
        hub_model_id=asked.repo,
        hub_strategy="all_checkpoints",
        hub_private_repo=True,
        save_total_limit=2,
        report_to=["wandb"] if os.environ.get("WANDB_BASE_URL") else [],
        seed=0,
    )
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(asked.base), lora)
    trainer = Trainer(model, arguments, train_dataset=data, processing_class=tokenizer, callbacks=[Log(asked.log)])
    trainer.train(resume_from_checkpoint=resume)
    trainer.save_model()
    trainer.push_to_hub()


main()
