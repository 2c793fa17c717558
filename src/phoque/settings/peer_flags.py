"""What transformers, TRL, Unsloth and llama.cpp call a setting, and phoque's flags for it."""

from collections.abc import Container

PEER_FLAGS = {
    "--lr": ("--learning-rate",),
    "--model": ("--base-model", "--model-source", "--reference"),
    "--model-name": ("--base-model",),
    "--model-name-or-path": ("--base-model",),
    "--data": ("--dataset",),
    "--dataset-name": ("--dataset",),
    "--output": ("--output-dir",),
    "--out": ("--output-dir",),
    "--outfile": ("--output-dir",),
    "--adapter": ("--adapter-source", "--updated-adapter"),
    "--adapter-source": ("--updated-adapter",),
    "--lora": ("--adapter-source",),
    "--lora-r": ("--lora-rank",),
    "--rank": ("--lora-rank",),
    "--num-train-epochs": ("--epochs",),
    "--num-epochs": ("--epochs",),
    "--steps": ("--max-steps",),
    "--per-device-train-batch-size": ("--batch-size",),
    "--max-seq-length": ("--max-length",),
    "--eval-strategy": ("--eval-steps",),
    "--logging-steps": ("--log-every",),
    "--save-total-limit": ("--keep-checkpoints",),
    "--gradient-accumulation-steps": ("--micro-batch",),
    "--bf16": ("--quantization",),
    "--fp16": ("--quantization",),
    "--push-to-hub": ("--hub-model-id",),
    "--hub-repo": ("--hub-model-id",),
    "--repo": ("--repo-id",),
    "--outtype": ("--dtype",),
    "--quant": ("--dtype",),
    "--load-in-4bit": ("--quantization",),
    "--system-prompt": ("--system", "--default-system"),
}


def find_flag(name: str, known: Container[str]) -> str | None:
    """The flag of phoque's that another tool's flag means, of those that are `known`, or None."""
    return next((flag for flag in PEER_FLAGS.get(name.replace("_", "-"), ()) if flag in known), None)
