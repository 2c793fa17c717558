"""What must stay the same for a run to be the same run."""

import difflib
import hashlib
from typing import Any

from phoque.data.chat_template import ChatTemplate
from phoque.data.rows import Dataset
from phoque.data.scan import DatasetScan
from phoque.errors import PhoqueError
from phoque.models.source import Source
from phoque.settings.train import TrainSettings

SAME = (
    "seed",
    "batch_size",
    "micro_batch",
    "packing",
    "max_length",
    "max_steps",
    "learning_rate",
    "warmup_ratio",
    "weight_decay",
    "max_grad_norm",
    "lora_rank",
    "lora_alpha",
    "lora_dropout",
    "quantization",
    "default_system",
    "held_out_rows",
)
BEFORE = {"packing": "exact"}  # what runs did that were begun before there was a choice
NEVER = ("base_model", "lora_rank", "processes")  # other tensors: there is nothing to go on from


def fingerprint(
    s: TrainSettings, source: Source, dataset: Dataset, chat: ChatTemplate, found: DatasetScan
) -> dict[str, Any]:
    """Everything that decides what is learnt: data, base, template, schedule, adapter."""
    from accelerate import PartialState

    return {
        "base_model": source.name,
        "base_revision": source.revision,
        "dataset_revision": dataset.revision,
        "dataset_digest": found.digest,
        "processes": PartialState().num_processes,
        "template": hashlib.sha256(chat.template.encode()).hexdigest()[:16],
        **{name: getattr(s, name) for name in SAME},
    }


def refuse_other_run(old: dict[str, Any], new: dict[str, Any], allowed: list[str]) -> None:
    """Raise PhoqueError (2) listing each part, but those `allowed`, in which the run on disk differs from this one."""
    for name in allowed:
        if name not in new or name in NEVER:
            near = difflib.get_close_matches(name, new, 1, 0.6)
            raise PhoqueError(
                f"--allow-change {name} is not possible.",
                "A run cannot go on with another." if name in NEVER else "No part of a run has that name.",
                f"Did you mean {near[0]}?" if near and name not in NEVER else f"Parts: {', '.join(sorted(new))}.",
            )
    old = BEFORE | old
    differing = [name for name in new if old.get(name) != new[name] and name not in allowed]
    if differing:
        raise PhoqueError(
            "This is another run than the one that is there.",
            "; ".join(f"{name} was {old.get(name)}, is {new[name]}" for name in differing),
            "Use the old values, or allow one with --allow-change NAME, or another --output-dir and --hub-model-id, "
            "or forget the old run with --fresh-start.",
        )
