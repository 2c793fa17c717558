"""What must stay the same for a run to be the same run."""

import hashlib
from typing import Any

from phoque.data.chat import Chat
from phoque.data.rows import Dataset
from phoque.data.stream import Survey
from phoque.errors import PhoqueError
from phoque.models.source import Source
from phoque.settings.train import TrainSettings

SAME = (
    "seed", "batch_size", "micro_batch", "max_length", "max_steps", "learning_rate", "warmup_ratio", "weight_decay",
    "max_grad_norm", "lora_rank", "lora_alpha", "lora_dropout", "quantization", "default_system", "held_out_rows",
)  # fmt: skip


def fingerprint(s: TrainSettings, source: Source, dataset: Dataset, chat: Chat, found: Survey) -> dict[str, Any]:
    """Everything that decides what is learnt: data, base, template, schedule, adapter."""
    return {
        "base_model": source.name,
        "base_revision": source.revision,
        "dataset_revision": dataset.revision,
        "dataset_digest": found.digest,
        "template": hashlib.sha256(chat.template.encode()).hexdigest()[:16],
        **{name: getattr(s, name) for name in SAME},
    }


def refuse_other_run(old: dict[str, Any], new: dict[str, Any]) -> None:
    """Raise PhoqueError (2) listing each part in which the run on disk differs from the one asked for."""
    differing = [name for name in new if old.get(name) != new[name]]
    if differing:
        raise PhoqueError(
            "This run folder holds another run.",
            "; ".join(f"{name} was {old.get(name)}, is {new[name]}" for name in differing),
            "Use the old values, another --output-dir, or --fresh-start to forget the old run.",
        )
