"""One training run: begin (find, read, check, restore), take the steps that are left, finish."""

import gc
import json
import math
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch

from phoque.console import Console
from phoque.data.scan import DatasetScan
from phoque.data.stream import TrainStream
from phoque.errors import FAILED, PhoqueError, Stopped
from phoque.models.architectures import architecture_of
from phoque.models.load import device, load_model
from phoque.models.lora import load_adapter, with_adapter
from phoque.settings.fields import Resolved
from phoque.settings.train import TrainSettings
from phoque.training import checkpoints
from phoque.training.callbacks.stop import StopRequest
from phoque.training.engine import attention
from phoque.training.engine.engine import Engine
from phoque.training.engine.select import choose
from phoque.training.export_merged import export_final, export_passing
from phoque.training.fingerprint import fingerprint
from phoque.training.finish import card_of, finish, out_of_memory, published, stopped_after
from phoque.training.metrics_log import Tracker, forget_after, logged_until, start_wandb
from phoque.training.prepare import Run, hub_repo, packing_of, prepare
from phoque.training.resume import begin
from phoque.training.run_record import check_writable, new_record, write_record
from phoque.training.timer import Timer


def train(
    resolved: Resolved[TrainSettings],
    cache: Path,
    console: Console,
    deadline: float | None = None,
    submission: str = "",
) -> dict[str, Any]:
    """Train to the end, from the newest whole checkpoint if there is one, here or on the Hub; return what was made.

    `deadline` is the time.time() at which this process is going to be killed, `submission` names the Job that it is an
    attempt of. Raises Stopped (75 or 130) after a stop
    that saved, PhoqueError for all that can go wrong.
    """
    stop = StopRequest(console, deadline, resolved.settings.seconds or 0.0)
    try:
        with stop.heeded():
            return _train(_begun(resolved, cache, stop, console, submission))
    except torch.OutOfMemoryError as error:
        raise out_of_memory(resolved.settings) from error


def _begun(resolved: Resolved[TrainSettings], cache: Path, stop: StopRequest, console: Console, submission: str) -> Run:
    s, run = resolved.settings, resolved.settings.folder
    check_writable(run)
    repo = hub_repo(resolved, console)
    if repo:
        repo.open(
            s.public, console.warn
        )  # before anything is spent: without the right to write there nothing could be kept
    ready = prepare(resolved, cache, console, weights=True)
    same = fingerprint(s, ready.source, ready.dataset, ready.chat, ready.scan)
    if same["processes"] > 1:
        raise PhoqueError(
            f"{same['processes']} processes were launched.",
            "phoque trains in one: each of them would learn from the same rows.",
            "Run `phoque train` without accelerate launch.",
        )
    rows = ready.scan.good - len(ready.scan.held_out)
    begun = begin(s, run, repo, same, {"rows": rows, "batch_size": s.batch_size}, console, submission)
    record = begun.record or new_record(resolved, ready, same, begun.run_id, begun.marker)
    write_record(run, record)
    return Run(resolved, ready, run, begun, record, repo, stop, console)


def _train(run: Run) -> dict[str, Any]:
    s, console = run.settings, run.console
    if run.begun.result:
        console.say(f"{run.folder} is complete; nothing to train")
        run.stop.ending()
        return _delivered(run, run.begun.result)
    if run.first > s.max_steps:
        raise PhoqueError(
            f"This run has taken {run.first} steps already.",
            f"--max-steps {s.max_steps} is less, and steps cannot be taken back.",
            "Give at least as many, or another --output-dir.",
        )
    logged = logged_until(run.folder)
    forget_after(run.folder, run.first if run.begun.resume else -1)
    if run.begun.resume:
        console.say(f"going on from step {run.first} of {s.max_steps} ({run.begun.resume})")
    watch = Timer()
    model = _model(run)
    engine = _engine(run, model)
    packing = packing_of(s, run.ready.scan, static=engine is not None)
    run.record["packing"] = {"row_tokens": None if packing.exact else packing.tokens, "filled_up": packing.static}
    write_record(run.folder, run.record)
    stream = TrainStream(run.ready.dataset, run.ready.chat, run.ready.scan.threshold, packing, s.seed, s.max_bad_rows)
    if run.begun.resume:
        state = json.loads((run.begun.resume / checkpoints.DATA_STATE).read_text())
        if stream.load_state_dict(state):
            console.warn("rows are packed in another way now: some of the conversations seen last come once more")
    resumes = "never" if run.begun.anew else "allow"
    wandb_run = start_wandb(
        s, run.resolved.secrets, run.folder, run.record, run.begun.run_id, resumes, console.say, console.warn
    )
    tracker = Tracker(run.folder, wandb_run, console.warn, logged)
    code = FAILED
    try:
        if run.begun.resume and run.first == s.max_steps:  # stopped after the last save, before the end
            load_adapter(model, run.begun.resume, architecture_of(run.ready.config))
            watch.loaded()
        elif stopped := _steps(run, model, engine, stream, tracker, watch):
            code = stopped.code
            raise stopped
        run.stop.ending()
        result = finish(run, model, stream, watch)
        if s.wandb_log_model != "false":
            tracker.artifact(run.folder / "adapter", s.max_steps)
        del model, engine
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        result = _delivered(run, result)
        code = 0
        return result
    finally:
        tracker.finish(code)


def _delivered(run: Run, result: dict[str, Any]) -> dict[str, Any]:
    """The finished run on the Hub, and merged if that was asked for; what is there already stays as it is."""
    result = published(run, result)
    return result | export_final(run) if run.settings.export_merged else result


def _model(run: Run) -> Any:
    """The base with a fresh adapter, on the device."""
    s, source = run.settings, run.ready.source
    if (cards := torch.cuda.device_count()) > 1:
        run.console.warn(f"there are {cards} GPUs here, and phoque trains on one of them")
    torch.manual_seed(s.seed)
    asked = s.engine_mode not in ("auto", "eager")
    tokens = (s.max_steps - run.first) * s.batch_size * run.ready.scan.mean_length
    dtype = torch.float32 if s.quantization == "none" else torch.bfloat16
    name, reason = attention.choose(device(), run.ready.config, dtype, math.inf if asked else tokens, traced=asked)
    run.record["attention"] = reason
    model = load_model(source, s.quantization, name)
    commit = source.revision if source.on_hub else None
    model = with_adapter(model, s.lora_rank, s.lora_alpha, s.lora_dropout, commit)
    trained, held = model.get_nb_trainable_parameters()
    run.record["parameters"] = {"trained": trained, "all": held}
    write_record(run.folder, run.record)
    run.console.say(f"base {source.origin} as {s.quantization}; adapter of {trained / 1e6:.1f} M parameters")
    return model


def _engine(run: Run, model: Any) -> Engine | None:
    """What runs the layers, and none if they run as they are; chosen for the steps that are left."""
    s = run.settings
    packing = packing_of(s, run.ready.scan, static=True)
    chosen = choose(model, s.engine_mode, packing, (s.max_steps - run.first) * s.accumulation, s.gradient_checkpointing)
    run.record["engine"] = chosen.record()
    write_record(run.folder, run.record)
    run.console.say(f"engine {chosen.mode}: {chosen.reason}")
    return chosen.engine


def _steps(
    run: Run, model: Any, engine: Engine | None, stream: TrainStream, tracker: Tracker, watch: Timer
) -> Stopped | None:
    """Take the steps that are left; what stopped them, if they were stopped."""
    from phoque.training.callbacks.metrics import MetricsCallback
    from phoque.training.callbacks.samples import SamplesCallback
    from phoque.training.callbacks.wandb_artifacts import WandbArtifactsCallback
    from phoque.training.hub_push import CheckpointPusher
    from phoque.training.trainer import PersonaTrainer, Saves

    s, chat, found, console, stop = run.settings, run.ready.chat, run.ready.scan, run.console, run.stop
    pusher = None
    if run.repo:
        export = partial(export_passing, run) if s.export_on_save else lambda saved: None
        pusher = CheckpointPusher(run.repo, s.keep_checkpoints, partial(card_of, run), console, s.save_steps, export)
        stop.push_s = lambda: pusher.seconds if pusher else 0.0
    held_out = [encoded for _, encoded in found.held_out]
    with ExitStack() as stack:
        show = stack.enter_context(console.progress(s.max_steps, run.first))
        callbacks: list[Any] = [
            stop,
            MetricsCallback(tracker, stream, held_out, s.norms_every, s.save_steps, show, watch),
        ]
        if s.sample_every and (prompts := s.prompts or _prompts(found)):
            system = found.systems.most_common(1)[0][0]
            callbacks.append(
                SamplesCallback(tracker, chat, prompts, system, s.sample_every, s.sample_tokens, console, watch)
            )
        if s.wandb_log_model == "checkpoint":
            callbacks.append(WandbArtifactsCallback(tracker))
        saves = Saves(s.keep_checkpoints, pusher, stop.saved_in, console.warn, replan=bool(s.allow_change))
        family, arguments = architecture_of(run.ready.config), _arguments(s, run.folder, engine)
        trainer = PersonaTrainer(model, chat.tokenizer, arguments, stream, family, saves, watch, callbacks, engine)
        _silence(trainer)
        if pusher and run.begun.resume:
            if run.begun.on_hub:
                pusher.pushed = run.first
            else:
                pusher.offer(run.begun.resume)
        try:
            trainer.train(resume_from_checkpoint=str(run.begun.resume) if run.begun.resume else None)
        except Exception:  # what was saved before it is still on its way
            if pusher:
                console.say("waiting for the last checkpoint to reach the Hub")
                pusher.drain(min(s.hub_patience, stop.left or s.hub_patience))
            raise
    step = trainer.state.global_step
    if pusher:
        with watch.paused("pushing"):
            if not pusher.drain(stop.left):
                pusher.failure = "the deadline came first"
    return stopped_after(run, step, pusher) if stop.code is not None and step < s.max_steps else None


def _arguments(s: TrainSettings, run: Path, engine: Engine | None) -> Any:
    from trl import SFTConfig

    cuda = torch.cuda.is_available()
    made = SFTConfig(
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
        gradient_checkpointing=s.gradient_checkpointing and engine is None,
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
    if made.n_gpu > 1:  # Trainer would wrap the model for all of them
        made._n_gpu = 1
    return made


def _silence(trainer: Any) -> None:
    """Take out Trainer's own printing: the console is the one place that prints."""
    from transformers import PrinterCallback

    trainer.remove_callback(PrinterCallback)


def _prompts(found: DatasetScan) -> list[str]:
    """The first user messages of three held-out rows: what the data asks, never seen in training."""
    return [next(t["content"] for t in row.messages if t["role"] == "user") for row, _ in found.held_out[:3]]
