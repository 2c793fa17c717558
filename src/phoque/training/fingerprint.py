"""The fingerprint of a run: what must stay the same for a run to be resumed."""

import difflib
import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

from phoque.data.chat_template import ChatTemplate
from phoque.data.readers import Dataset
from phoque.data.scan import DatasetScan, scan_dataset
from phoque.errors import UsageError
from phoque.models.source import Source, hash_weights
from phoque.services import Services
from phoque.settings.train import TrainSettings

FINGERPRINT_SETTINGS = (
    "seed",
    "batch_size",
    "micro_batch",
    "packing",
    "max_length",
    "max_steps",
    "learning_rate",
    "lr_scheduler",
    "warmup_ratio",
    "weight_decay",
    "max_grad_norm",
    "lora_rank",
    "lora_alpha",
    "lora_dropout",
    "target_modules",
    "rslora",
    "quantization",
    "default_system",
    "held_out_rows",
    "greeting",
    "eval_split",
    "keep_best",
    "early_stop",
)
DATA_RULES = 2  # how rows are read and held out; 1 compared messages as they are, and knew fewer schemas
OLD_SETTINGS = {  # the values in runs that are older than the setting
    "packing": "exact",
    "greeting": "context",
    "eval_split": None,
    "lr_scheduler": "cosine",
    "target_modules": "all-linear",
    "rslora": False,
    "keep_best": False,
    "early_stop": None,
}
OLD_VALUES = {"quantization": {"none": "fp32"}}  # what values of older records are called now
DIGESTS = {  # what is recorded as a digest or commit, and what it means that it differs
    "dataset_digest": "the rows of the dataset differ",
    "dataset_revision": "the dataset has another revision",
    "base_revision": "the base model has another revision",
    "base_weights": "the base model has other weights",
    "eval_digest": "the held-out rows of --eval-split differ",
    "template": "the chat template differs",
}
UNCHANGEABLE = (
    "base_model",
    "lora_rank",
    "target_modules",
    "data_rules",
)  # with another value the checkpoint cannot be loaded


def use_current_values(settings: dict[str, Any]) -> dict[str, Any]:
    """The same settings, or fingerprint, with settings that are newer, and values that were renamed since.

    The order of what is there stays, so that the record of a finished run is not written again.
    """
    current = {
        name: OLD_VALUES.get(name, {}).get(value, value) if isinstance(value, str) else value
        for name, value in settings.items()
    }
    return current | {name: value for name, value in OLD_SETTINGS.items() if name not in current}


def update_record(record: dict[str, Any]) -> dict[str, Any]:
    """A run.json of any version with the current values in its fingerprint and in its fresh-start marker."""
    fingerprint = use_current_values(record["fingerprint"])
    fingerprint.setdefault("data_rules", 1)
    fingerprint.setdefault("measured_every", None)
    fingerprint.pop("processes", None)  # was always 1, and is no part of a run any more
    record = record | {"fingerprint": fingerprint}
    if marker := record.get("fresh_start"):
        record["fresh_start"] = marker | {"asked": use_current_values(marker["asked"])}
    return record


@dataclass(frozen=True)
class RunIdentity:
    """The fingerprint of a run under the current rules; `scan_by_old_rules` scans the data as older runs did."""

    fingerprint: dict[str, Any]
    scan_by_old_rules: Callable[[], DatasetScan]

    @cached_property
    def old_scan(self) -> DatasetScan:
        """The scan under the rules of older runs, made only if there is such a run."""
        return self.scan_by_old_rules()

    def for_record(self, recorded: dict[str, Any]) -> dict[str, Any]:
        """The fingerprint that a run of these settings has under the rules by which `recorded` was written."""
        current = self.fingerprint
        newer = {"base_weights", "eval_digest"} - recorded.keys()  # than the run
        current = {name: value for name, value in current.items() if name not in newer}
        if recorded["data_rules"] == DATA_RULES:
            return current
        # the digest of the template was of a text with marks in it; the revision of the base identifies the template
        old = {"dataset_digest": self.old_scan.digest, "data_rules": 1, "template": recorded.get("template")}
        return current | old


def compute_identity(
    s: TrainSettings, source: Source, dataset: Dataset, chat: ChatTemplate, scan: DatasetScan, services: Services
) -> RunIdentity:
    """Everything that determines what is learned: data, base, template, schedule, adapter."""
    fingerprint = {
        "base_model": source.name,
        "base_revision": source.revision,
        "base_weights": hash_weights(source, services),
        "dataset_revision": dataset.revision,
        "dataset_digest": scan.digest,
        "eval_digest": hashlib.sha256(str(sorted(scan.rule.keys)).encode()).hexdigest()[:16] if s.eval_split else None,
        "data_rules": DATA_RULES,
        "template": hashlib.sha256(chat.template.encode()).hexdigest()[:16],
        **{name: getattr(s, name) for name in FINGERPRINT_SETTINGS},
        # it decides which adapter is the best, and when the run ends
        "measured_every": s.measured_every if s.keep_best or s.early_stop else None,
    }
    old_rules = partial(scan_dataset, dataset, chat, s.held_out_rows, s.max_bad_rows, exact_keys=True)
    return RunIdentity(fingerprint, old_rules)


def check_same_run(old: dict[str, Any], new: dict[str, Any], allowed: list[str], place: str, other_places: str) -> None:
    """Raise UsageError if the run in `place` differs from this one in any part that is not `allowed`.

    The error lists them: settings with both values, and what is recorded as a digest in words. `other_places`
    are flags that name another folder, and another repository if the run has one.
    """
    for name in allowed:
        if name not in new or name in UNCHANGEABLE:
            matches = difflib.get_close_matches(name, new, 1, 0.6)
            raise UsageError(
                what=f"--allow-change {name} is not possible.",
                why="A run cannot be resumed with another value."
                if name in UNCHANGEABLE
                else "Nothing that is recorded of a run has that name.",
                fix=f"Did you mean {matches[0]}?"
                if matches and name not in UNCHANGEABLE
                else f"The names are {', '.join(sorted(new))}.",
            )
    if {"keep_best", "early_stop"} & set(allowed):
        allowed = [*allowed, "measured_every"]  # which is part of the run only with one of the two
    if {"eval_split", "held_out_rows"} & set(allowed):
        allowed = [*allowed, "eval_digest"]
    differing = [name for name in new if old.get(name) != new[name] and name not in allowed]
    if differing:
        settings = [f"{name} was {old.get(name)}, is {new[name]}" for name in differing if name not in DIGESTS]
        digests = [f"{DIGESTS[name]} ({name})" for name in differing if name in DIGESTS]
        raise UsageError(
            what=f"{place} holds a different run.",
            why="; ".join([*settings, *digests]),
            fix="--allow-change NAME continues it with the change, --fresh-start deletes it. To keep it, give other "
            f"places: {other_places}",
        )
