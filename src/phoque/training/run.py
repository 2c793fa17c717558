"""One training run: prepare (find, read, check), then train, then write what it made."""

import json
import shutil
import statistics
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from phoque.console import Console
from phoque.data.chat import Chat
from phoque.data.rows import Dataset, open_dataset
from phoque.data.stream import Survey, TrainStream, survey
from phoque.errors import FAILED, PhoqueError, Stopped
from phoque.hub.cards import adapter_card
from phoque.models.adapter import load_adapter, refuse_non_finite, save_adapter, with_adapter
from phoque.models.families import family_of
from phoque.models.load import device, load_config, load_model, load_tokenizer
from phoque.models.source import Source, resolve
from phoque.settings.base import Resolved
from phoque.settings.train import TrainSettings
from phoque.training import attention, checkpoint, report
from phoque.training.fingerprint import fingerprint, refuse_other_run
from phoque.training.record import check_writable, forget, new_record, read_record, write_record
from phoque.training.tracking import METRICS, SAMPLES, Tracker, forget_after, read_lines, start_wandb


@dataclass
class Prepared:
    """All that is known before a weight is loaded: the base, its chat format, and what is in the data."""

    source: Source
    config: Any
    chat: Chat
    dataset: Dataset
    survey: Survey


def prepare(resolved: Resolved[TrainSettings], cache: Path, console: Console, weights: bool) -> Prepared:
    """Find the base and the data, and read the data once. Raises PhoqueError (2) for what cannot be trained on."""
    s = resolved.settings
    if not s.base_model:
        raise PhoqueError("No base model.", "--base-model is empty.", "Name one, or use a --preset.")
    token = resolved.secrets.hf_token.get_secret_value() if resolved.secrets.hf_token else None
    dataset = open_dataset(s.dataset, s.split, s.dataset_revision, token)
    source = resolve(s.base_model, s.revision, token, cache, console.say, weights)
    config = load_config(source)
    chat = Chat(load_tokenizer(source), s.default_system, s.max_length)
    found = survey(dataset, chat, s.held_out_rows, s.max_bad_rows)
    _tell(found, dataset, s, console)
    return Prepared(source, config, chat, dataset, found)


def _tell(found: Survey, dataset: Dataset, s: TrainSettings, console: Console) -> None:
    d = found.summary()
    sources = ", ".join(f"{name} {n}" for name, n in d["sources"].items())
    console.say(f"data {dataset.name}: {found.good} rows ({sources}), {len(found.held_out)} held out")
    passes = s.max_steps * s.batch_size / max(1, found.good - len(found.held_out))
    console.say(
        f"  {d['tokens']['mean']:.0f} tokens a row, {found.trained / sum(found.lengths):.0%} of them trained on; "
        f"{s.max_steps} steps of {s.batch_size} rows are {passes:.1f} passes"
    )
    shortest, _, median, _, _, longest = d["tokens"]["quantiles"]
    console.say(f"  rows of {shortest} to {longest} tokens, half of them under {median}{_scores(found.scores)}")
    for mapped in set(found.schemas) - {"messages"}:
        console.say(f"  {found.schemas[mapped]} rows were {mapped} and are mapped to messages")
    for reason, bad in d["bad"].items():
        console.warn(f"{bad['count']} rows left out: {reason} (first: {', '.join(bad['first'])})")
    if not found.complete:
        console.say(f"  the first {found.rows:,} rows were read; the rest are checked as they come")


def _scores(scores: list[float]) -> str:
    if not scores:
        return ""
    return (
        f"; toxicity scores {min(scores):.2f} to {max(scores):.2f}, half of them under {statistics.median(scores):.2f}"
    )


def train(resolved: Resolved[TrainSettings], cache: Path, console: Console) -> dict[str, Any]:
    """Train to the end, from the newest whole checkpoint if there is one; return what the run made.

    Raises Stopped (75 or 130) after a stop that saved, PhoqueError for all that can go wrong.
    """
    s = resolved.settings
    run = s.folder
    check_writable(run)
    ready = prepare(resolved, cache, console, weights=True)
    if s.fresh_start:
        forget(run)  # only now: a run that cannot begin must not cost the one that is there
    same = fingerprint(s, ready.source, ready.dataset, ready.chat, ready.survey)
    record = read_record(run)
    if record:
        refuse_other_run(record["fingerprint"], same)
        if record.get("result"):
            console.say(f"{run} is complete; nothing to do")
            return record["result"]
    resume = checkpoint.newest_whole(run, console.warn)
    record = record or new_record(resolved, ready, same)
    write_record(run, record)
    at = checkpoint.step_of(resume) if resume else 0
    forget_after(run, at)
    if resume:
        console.say(f"going on from step {at} of {s.max_steps} ({resume})")
    try:
        return _train(resolved, ready, run, record, resume, console)
    except torch.OutOfMemoryError as error:
        raise _out_of_memory(s) from error


def _train(
    resolved: Resolved[TrainSettings], ready: Prepared, run: Path, record: dict[str, Any], resume: Path | None,
    console: Console,
) -> dict[str, Any]:  # fmt: skip
    s, chat, found = resolved.settings, ready.chat, ready.survey
    begun = time.monotonic()
    torch.manual_seed(s.seed)
    name, reason = attention.choose(device())
    record["attention"] = reason
    model = load_model(ready.source, s.quantization, name)
    commit = ready.source.revision if ready.source.on_hub else None
    model = with_adapter(model, s.lora_rank, s.lora_alpha, s.lora_dropout, commit)
    trained, held = model.get_nb_trainable_parameters()
    record["parameters"] = {"trained": trained, "all": held}
    console.say(f"base {ready.source.origin} as {s.quantization}; adapter of {trained / 1e6:.1f} M parameters")
    stream = TrainStream(
        ready.dataset, chat, found.threshold, s.batch_size // s.accumulation, s.seed, s.max_bad_rows
    )  # fmt: skip
    if resume:
        stream.load_state_dict(json.loads((resume / checkpoint.DATA_STATE).read_text()))
    wandb_run = start_wandb(s, resolved.secrets, run, record, record["wandb_id"], console.say, console.warn)
    tracker = Tracker(run, wandb_run, console.warn)
    code = FAILED
    try:
        if resume and checkpoint.step_of(resume) == s.max_steps:  # stopped after the last save, before the end
            load_adapter(model, resume, family_of(ready.config))
        elif stopped := _steps(s, ready, run, model, stream, tracker, resume, console):
            code = stopped.code
            raise stopped
        result = _finish(model, stream, ready, run, record, time.monotonic() - begun)
        if s.wandb_log_model != "false":
            tracker.artifact(run / "adapter", s.max_steps)
        code = 0
        return result
    finally:
        tracker.finish(code)


def _steps(
    s: TrainSettings, ready: Prepared, run: Path, model: Any, stream: TrainStream, tracker: Tracker,
    resume: Path | None, console: Console,
) -> Stopped | None:  # fmt: skip
    """Take the steps that are left; what stopped them, if they were stopped."""
    from phoque.training.callbacks.artifacts import Artifacts
    from phoque.training.callbacks.numbers import Numbers, Stopwatch
    from phoque.training.callbacks.samples import Samples
    from phoque.training.deadline import StopRequest
    from phoque.training.trainer import PersonaTrainer

    chat, found = ready.chat, ready.survey
    stop, watch = StopRequest(console), Stopwatch()
    held_out = [encoded for _, encoded in found.held_out]
    with ExitStack() as stack:
        show = stack.enter_context(console.progress(s.max_steps, checkpoint.step_of(resume) if resume else 0))
        callbacks: list[Any] = [stop, Numbers(tracker, stream, held_out, s.norms_every, s.save_steps, show, watch)]
        if s.sample_every and (prompts := s.prompts or _prompts(found)):
            system = found.systems.most_common(1)[0][0]
            callbacks.append(Samples(tracker, chat, prompts, system, s.sample_every, s.sample_tokens, console, watch))
        if s.wandb_log_model == "checkpoint":
            callbacks.append(Artifacts(tracker))
        family = family_of(ready.config)
        trainer = PersonaTrainer(
            model, chat.tokenizer, _arguments(s, run), stream, family, s.keep_checkpoints, console.warn, watch,
            callbacks,
        )  # fmt: skip
        _silence(trainer)
        stack.enter_context(stop.heeded())
        trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    step = trainer.state.global_step
    return _stopped(run, step, s, stop.code) if stop.code is not None and step < s.max_steps else None


def _finish(
    model: Any, stream: TrainStream, ready: Prepared, run: Path, record: dict[str, Any], seconds: float
) -> dict[str, Any]:
    """Write the adapter with its card, the record with the result, and the report; under a temporary name first."""
    step = record["fingerprint"]["max_steps"]
    refuse_non_finite(model, step)
    metrics = read_lines(run / METRICS)
    losses = [m["held_out_loss"] for m in metrics if "held_out_loss" in m]
    result = {
        "run": str(run),
        "adapter": str(run / "adapter"),
        "report": str(run / report.NAME),
        "steps": step,
        "loss": next((m["loss"] for m in reversed(metrics) if "loss" in m), None),
        "held_out_loss": {"before": losses[0], "after": losses[-1]} if losses else None,
        "tokens": stream.tokens_seen,
        "seconds": round(seconds, 1),
        "samples": [row for row in read_lines(run / SAMPLES) if row["step"] == step],
    }
    staging = run / ".adapter"
    shutil.rmtree(staging, ignore_errors=True)
    save_adapter(model, staging, family_of(ready.config))
    ready.chat.tokenizer.save_pretrained(staging)
    (staging / "README.md").write_text(adapter_card(record, result))
    shutil.rmtree(run / "adapter", ignore_errors=True)
    staging.rename(run / "adapter")
    record["result"] = result
    write_record(run, record)
    report.write(run)
    return result


def _arguments(s: TrainSettings, run: Path) -> Any:
    from trl import SFTConfig

    cuda = torch.cuda.is_available()
    return SFTConfig(
        output_dir=str(run),
        max_steps=s.max_steps,
        per_device_train_batch_size=s.batch_size // s.accumulation,
        gradient_accumulation_steps=s.accumulation,
        learning_rate=s.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=round(s.warmup_ratio * s.max_steps),
        weight_decay=s.weight_decay,
        max_grad_norm=s.max_grad_norm,
        optim="adamw_torch_fused" if cuda else "adamw_torch",
        bf16=cuda and s.quantization != "none",
        use_cpu=not cuda,
        gradient_checkpointing=s.gradient_checkpointing,
        seed=s.seed,
        data_seed=s.seed,
        logging_steps=s.log_every,
        logging_nan_inf_filter=False,  # it would hide what the run must stop for
        save_steps=s.save_steps,
        save_strategy="steps",
        report_to=[],
        disable_tqdm=True,
        max_length=None,
        dataset_kwargs={"skip_prepare_dataset": True},
        remove_unused_columns=False,
        ignore_data_skip=True,  # the stream's own state says where to go on
        push_to_hub=False,
    )


def _silence(trainer: Any) -> None:
    """Take out Trainer's own printing: the console is the one place that prints."""
    from transformers import PrinterCallback

    trainer.remove_callback(PrinterCallback)


def _prompts(found: Survey) -> list[str]:
    """The first user messages of three held-out rows: what the data asks, never seen in training."""
    return [next(t["content"] for t in row.messages if t["role"] == "user") for row, _ in found.held_out[:3]]


def _stopped(run: Path, step: int, s: TrainSettings, code: int) -> Stopped:
    saved = checkpoint.newest_whole(run, lambda _: None)
    where = f"{saved} holds everything." if saved else "Nothing was saved."
    return Stopped(f"Stopped after step {step} of {s.max_steps}.", where, "Run the same command to go on.", code)


def _out_of_memory(s: TrainSettings) -> PhoqueError:
    peak = torch.cuda.max_memory_allocated() / 1e9 if torch.cuda.is_available() else 0.0
    total = torch.cuda.get_device_properties(0).total_memory / 1e9 if torch.cuda.is_available() else 0.0
    micro = max(1, s.batch_size // s.accumulation // 2)
    return PhoqueError(
        f"Out of GPU memory: {peak:.1f} GB were in use of {total:.1f} GB.",
        f"{s.batch_size // s.accumulation} conversations of up to {s.max_length} tokens went through at once.",
        f"Use --micro-batch {micro}, or --gradient-checkpointing, or --max-length {s.max_length // 2}.",
        FAILED,
    )
