"""One training run: prepare (find, read, check), then train, then write what it made."""

import json
import shutil
import statistics
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from phoque.console import Console
from phoque.data.chat import Chat
from phoque.data.rows import Dataset, open_dataset
from phoque.data.stream import Survey, TrainStream, survey
from phoque.errors import FAILED, PhoqueError, Stopped
from phoque.hub.cards import adapter_card
from phoque.hub.checkpoints import CARD, ModelRepo
from phoque.hub.client import Hub
from phoque.hub.client import reason as why
from phoque.models.adapter import load_adapter, refuse_non_finite, save_adapter, with_adapter
from phoque.models.families import family_of
from phoque.models.load import device, load_config, load_model, load_tokenizer
from phoque.models.source import Source, resolve
from phoque.settings.base import Resolved
from phoque.settings.train import TrainSettings
from phoque.training import attention, checkpoint, report
from phoque.training.deadline import StopRequest
from phoque.training.fingerprint import fingerprint
from phoque.training.record import check_writable, new_record, write_record
from phoque.training.resume import Beginning, begin
from phoque.training.tracking import METRICS, SAMPLES, Tracker, forget_after, logged_until, read_lines, start_wandb

if TYPE_CHECKING:
    from phoque.training.pushing import Pusher


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


@dataclass
class _Run:
    """A run that has begun: what was asked, what is known, where it lies and where it goes on from."""

    resolved: Resolved[TrainSettings]
    ready: Prepared
    folder: Path
    begun: Beginning
    record: dict[str, Any]
    repo: ModelRepo | None
    stop: StopRequest
    console: Console

    @property
    def settings(self) -> TrainSettings:
        return self.resolved.settings

    @property
    def first(self) -> int:
        """The step that the run goes on from."""
        return checkpoint.step_of(self.begun.resume) if self.begun.resume else 0


def train(
    resolved: Resolved[TrainSettings], cache: Path, console: Console, deadline: float | None = None
) -> dict[str, Any]:
    """Train to the end, from the newest whole checkpoint if there is one, here or on the Hub; return what was made.

    `deadline` is the time.time() at which this process is going to be killed. Raises Stopped (75 or 130) after a stop
    that saved, PhoqueError for all that can go wrong.
    """
    stop = StopRequest(console, deadline, resolved.settings.seconds or 0.0)
    try:
        with stop.heeded():
            return _train(_begun(resolved, cache, stop, console))
    except torch.OutOfMemoryError as error:
        raise _out_of_memory(resolved.settings) from error


def _begun(resolved: Resolved[TrainSettings], cache: Path, stop: StopRequest, console: Console) -> _Run:
    s, run = resolved.settings, resolved.settings.folder
    check_writable(run)
    repo = hub_repo(resolved, console)
    if repo:
        repo.open(
            s.public, console.warn
        )  # before anything is spent: without the right to write there nothing could be kept
    ready = prepare(resolved, cache, console, weights=True)
    same = fingerprint(s, ready.source, ready.dataset, ready.chat, ready.survey)
    rows = ready.survey.good - len(ready.survey.held_out)
    begun = begin(s, run, repo, same, {"rows": rows, "batch_size": s.batch_size}, console)
    record = begun.record or new_record(resolved, ready, same, begun.run_id, begun.marker)
    write_record(run, record)
    return _Run(resolved, ready, run, begun, record, repo, stop, console)


def hub_repo(resolved: Resolved[TrainSettings], console: Console) -> ModelRepo | None:
    """The repository that the run is kept in, if one is named."""
    s, token = resolved.settings, resolved.secrets.hf_token
    if not s.hub_model_id:
        return None
    if token is None:
        raise PhoqueError(
            "There is no Hub token.", f"{s.hub_model_id} cannot be written without one.",
            "Set HF_TOKEN, or run `hf auth login`.",
        )  # fmt: skip
    return ModelRepo(Hub(token.get_secret_value(), console.say, s.hub_patience), s.hub_model_id)


def _train(run: _Run) -> dict[str, Any]:
    s, console = run.settings, run.console
    if run.begun.result:
        console.say(f"{run.folder} is complete; nothing to train")
        return _published(run, run.begun.result)
    logged = logged_until(run.folder)
    forget_after(run.folder, run.first)
    if run.begun.resume:
        console.say(f"going on from step {run.first} of {s.max_steps} ({run.begun.resume})")
    begun = time.monotonic()
    model = _model(run)
    stream = TrainStream(
        run.ready.dataset, run.ready.chat, run.ready.survey.threshold, s.batch_size // s.accumulation, s.seed,
        s.max_bad_rows,
    )  # fmt: skip
    if run.begun.resume:
        stream.load_state_dict(json.loads((run.begun.resume / checkpoint.DATA_STATE).read_text()))
    resumes = "never" if run.begun.anew else "allow"
    wandb_run = start_wandb(
        s, run.resolved.secrets, run.folder, run.record, run.begun.run_id, resumes, console.say, console.warn
    )  # fmt: skip
    tracker = Tracker(run.folder, wandb_run, console.warn, logged)
    code = FAILED
    try:
        if run.begun.resume and run.first == s.max_steps:  # stopped after the last save, before the end
            load_adapter(model, run.begun.resume, family_of(run.ready.config))
        elif stopped := _steps(run, model, stream, tracker):
            code = stopped.code
            raise stopped
        run.stop.ending()
        result = _finish(run, model, stream, time.monotonic() - begun)
        if s.wandb_log_model != "false":
            tracker.artifact(run.folder / "adapter", s.max_steps)
        result = _published(run, result)
        code = 0
        return result
    finally:
        tracker.finish(code)


def _model(run: _Run) -> Any:
    """The base with a fresh adapter, on the device."""
    s, source = run.settings, run.ready.source
    torch.manual_seed(s.seed)
    name, reason = attention.choose(device())
    run.record["attention"] = reason
    model = load_model(source, s.quantization, name)
    commit = source.revision if source.on_hub else None
    model = with_adapter(model, s.lora_rank, s.lora_alpha, s.lora_dropout, commit)
    trained, held = model.get_nb_trainable_parameters()
    run.record["parameters"] = {"trained": trained, "all": held}
    write_record(run.folder, run.record)
    run.console.say(f"base {source.origin} as {s.quantization}; adapter of {trained / 1e6:.1f} M parameters")
    return model


def _steps(run: _Run, model: Any, stream: TrainStream, tracker: Tracker) -> Stopped | None:
    """Take the steps that are left; what stopped them, if they were stopped."""
    from phoque.training.callbacks.artifacts import Artifacts
    from phoque.training.callbacks.numbers import Numbers, Stopwatch
    from phoque.training.callbacks.samples import Samples
    from phoque.training.pushing import Pusher
    from phoque.training.trainer import PersonaTrainer, Saves

    s, chat, found, console, stop = run.settings, run.ready.chat, run.ready.survey, run.console, run.stop
    watch, pusher = Stopwatch(), None
    if run.repo:
        pusher = Pusher(run.repo, s.keep_checkpoints, lambda saved: _card_of(run, saved), console, s.save_steps)
        stop.push_s = lambda: pusher.seconds if pusher else 0.0
    held_out = [encoded for _, encoded in found.held_out]
    with ExitStack() as stack:
        show = stack.enter_context(console.progress(s.max_steps, run.first))
        callbacks: list[Any] = [stop, Numbers(tracker, stream, held_out, s.norms_every, s.save_steps, show, watch)]
        if s.sample_every and (prompts := s.prompts or _prompts(found)):
            system = found.systems.most_common(1)[0][0]
            callbacks.append(Samples(tracker, chat, prompts, system, s.sample_every, s.sample_tokens, console, watch))
        if s.wandb_log_model == "checkpoint":
            callbacks.append(Artifacts(tracker))
        saves = Saves(s.keep_checkpoints, pusher, stop.saved_in, console.warn, replan=bool(s.allow_change))
        family, arguments = family_of(run.ready.config), _arguments(s, run.folder)
        trainer = PersonaTrainer(model, chat.tokenizer, arguments, stream, family, saves, watch, callbacks)
        _silence(trainer)
        if pusher and run.begun.resume:
            pusher.offer(run.begun.resume)  # a no-op, unless it never got there
        trainer.train(resume_from_checkpoint=str(run.begun.resume) if run.begun.resume else None)
    step = trainer.state.global_step
    if pusher and not pusher.drain(stop.left):
        pusher.failure = "the deadline came first"
    return _stopped(run, step, pusher) if stop.code is not None and step < s.max_steps else None


def _finish(run: _Run, model: Any, stream: TrainStream, seconds: float) -> dict[str, Any]:
    """Write the adapter with its card, the record with the result, and the report; under a temporary name first."""
    folder, record = run.folder, run.record
    step = record["fingerprint"]["max_steps"]
    refuse_non_finite(model, step)
    metrics = read_lines(folder / METRICS)
    result = {
        "run": str(folder),
        "adapter": str(folder / "adapter"),
        "report": str(folder / report.NAME),
        "steps": step,
        "loss": next((m["loss"] for m in reversed(metrics) if "loss" in m), None),
        "held_out_loss": _held_out(metrics),
        "tokens": stream.tokens_seen,
        "seconds": round(seconds, 1),
        "samples": [row for row in read_lines(folder / SAMPLES) if row["step"] == step],
    }
    staging = folder / ".adapter"
    shutil.rmtree(staging, ignore_errors=True)
    save_adapter(model, staging, family_of(run.ready.config))
    run.ready.chat.tokenizer.save_pretrained(staging)
    (staging / CARD).write_text(adapter_card(record, result, run.settings.hub_model_id))
    shutil.rmtree(folder / "adapter", ignore_errors=True)
    staging.rename(folder / "adapter")
    record["result"] = result
    write_record(folder, record)
    report.write(folder)
    return result


def _held_out(metrics: list[dict[str, Any]]) -> dict[str, float] | None:
    losses = [m["held_out_loss"] for m in metrics if "held_out_loss" in m]
    return {"before": losses[0], "after": losses[-1]} if losses else None


def _card_of(run: _Run, saved: Path) -> Path:
    """The card that goes with a checkpoint, in the run folder: the repository has one from its first push on."""
    state = json.loads((saved / checkpoint.DATA_STATE).read_text())
    so_far = {
        "steps": checkpoint.step_of(saved),
        "tokens": state["tokens_seen"],
        "held_out_loss": _held_out(read_lines(saved / METRICS)),
    }
    card = run.folder / f".{CARD}"
    card.write_text(adapter_card(run.record, so_far, run.settings.hub_model_id))
    return card


def _published(run: _Run, result: dict[str, Any]) -> dict[str, Any]:
    """Bring the final adapter and the run's record to the Hub, if there is a repository; nothing if it is there.

    Raises PhoqueError (1) saying what is where, if that cannot be done.
    """
    if run.repo is None:
        return result
    folder = run.folder
    files = {file.name: file for file in (folder / "adapter").iterdir() if file.is_file()}
    files |= {name: folder / name for name in (checkpoint.RECORD, METRICS, SAMPLES, report.NAME)}
    result = result | {"repo": run.repo.name}
    run.record["result"] = result
    write_record(folder, run.record)
    try:
        commit = run.repo.push({name: f for name, f in files.items() if f.is_file()}, "Adapter", lambda _: [])
    except Exception as error:
        raise PhoqueError(
            f"The adapter is made, but it is not in {run.repo.name}.",
            f"{why(error)}. It is in {folder / 'adapter'}.",
            "Run the same command again: it only pushes. On a Job, whose disk is gone by then, it goes on from the "
            "newest checkpoint on the Hub.",
            FAILED,
        ) from error
    return result | {"commit": commit}


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


def _stopped(run: _Run, step: int, pusher: "Pusher | None") -> Stopped:
    saved = checkpoint.newest_whole(run.folder, lambda _: None)
    where = f"{saved} holds everything." if saved else "Nothing was saved."
    if pusher and run.repo:
        there = f"checkpoint-{pusher.pushed}" if pusher.pushed is not None else "nothing of this run yet"
        where += f" {run.repo.name} has {there}" + (f": {pusher.failure}." if pusher.failure else ".")
    of = f"Stopped after step {step} of {run.settings.max_steps}."
    return Stopped(of, where, "Run the same command to go on.", run.stop.code or FAILED)


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
