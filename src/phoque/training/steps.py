"""What takes the steps of a run: the model with its adapter, the engine, the stream of rows, and the trainer."""

import json
import math
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainerCallback

from phoque.data.scan import DatasetScan
from phoque.data.stream import BadRowLimit, TrainStream
from phoque.distributed.processes import current, is_connection_error
from phoque.errors import Resumable, RunError
from phoque.models.architectures import architecture_of
from phoque.models.load import default_device, default_device_name, load_model
from phoque.models.lora import add_lora_adapter
from phoque.models.stop_tokens import stop_at_template
from phoque.settings.environment import in_job
from phoque.training import checkpoints
from phoque.training.best import keep_if_best
from phoque.training.callbacks.stop import SaveWithoutLimit
from phoque.training.callbacks.wandb_artifacts import WandbArtifactsCallback
from phoque.training.dealt_rows import DealtStream
from phoque.training.engine import attention
from phoque.training.engine.determinism import make_deterministic
from phoque.training.engine.engine import Engine
from phoque.training.engine.select import EngineChoice, select_engine
from phoque.training.export_merged import merge_checkpoint
from phoque.training.finish import stop_error, write_card_for_checkpoint
from phoque.training.fsdp import NO_SAMPLES, WITHOUT_ENGINE, shard_base
from phoque.training.metrics_log import Tracker
from phoque.training.prepare import lora_options, packing_for
from phoque.training.run_record import write_record
from phoque.training.run_state import Run
from phoque.training.timer import Timer

if TYPE_CHECKING:
    from phoque.training.callbacks.samples import SamplesCallback
    from phoque.training.push import CheckpointPusher


def load_model_with_adapter(run: Run) -> Any:
    """The base model with a fresh adapter, on the training device."""
    s, source = run.settings, run.prepared.source
    if (gpus := torch.cuda.device_count()) > 1 and s.gpus is None:
        run.console.warn(f"this machine has {gpus} GPUs, and this run uses one; --gpus all uses them")
    make_deterministic(s.deterministic)
    run.record["deterministic"] = s.deterministic
    torch.manual_seed(s.seed)
    is_compiled = s.engine_mode not in ("auto", "eager")
    # of the whole run, so that a resumed run chooses the same kernels
    mean_length = run.prepared.scan.mean_length
    tokens = s.max_steps * s.batch_size * mean_length
    dtype = torch.float32 if s.quantization == "fp32" else torch.bfloat16
    name, reason = attention.select_attention(
        default_device(),
        run.prepared.config,
        dtype,
        math.inf if is_compiled else tokens,
        mean_length,
        compiled=is_compiled,
    )
    if (main_reason := current().broadcast_from_main(lambda: reason)) != reason:
        raise RunError(
            what=f"Process {current().rank} chose another attention kernel than process 0: {reason}.",
            why=f"Process 0 chose {main_reason}.",
            fix="Use equal GPUs and one environment for all processes.",
        )
    run.record["attention"] = reason
    run.console.stage(f"loading {source.name} as {s.quantization}")
    trainer = "phoque.training.trainer"
    model = load_model(source, s.quantization, name, projections_on_host=s.fsdp, import_meanwhile=trainer)
    stop_at_template(model, run.prepared.chat.tokenizer)
    commit = source.revision if source.on_hub else None
    model = add_lora_adapter(model, lora_options(s, run.prepared), commit)
    trained, total = model.get_nb_trainable_parameters()
    if s.fsdp:
        sizes = run.record["fsdp"] = shard_base(model, current(), default_device())
        run.console.say(f"base model sharded: {sizes['gb_per_process']:.1f} of {sizes['gb']:.1f} GB per process")
    run.record["parameters"] = {"trained": trained, "all": total}
    write_record(run.folder, run.record)
    run.console.say(f"base {source.origin} as {s.quantization}; adapter of {trained / 1e6:.1f} M parameters")
    return model


def build_engine(run: Run, model: Any) -> Engine | None:
    """The engine that runs the decoder layers, or None for transformers' own layers."""
    s = run.settings
    packing = packing_for(s, run.prepared.scan, static=True)
    recorded, device = run.record.get("engine") or {}, default_device_name()
    # measured anew, the choice could be another, and so could the last bits of the adapter
    is_comparable = recorded.get("device") == device and "fsdp" not in run.record
    previous = recorded["mode"] if run.start.resume and is_comparable else ""
    if s.fsdp:
        choice = EngineChoice("eager", WITHOUT_ENGINE)
    else:
        run.record.pop("fsdp", None)
        if torch.cuda.is_available() or s.engine_mode not in ("auto", "eager"):
            run.console.stage("trying the engine on one row")
        choice = select_engine(
            model,
            s.engine_mode,
            packing,
            s.max_steps * run.record["rows_per_step"] // current().size,
            recompute=s.gradient_checkpointing,
            previous=previous,
            decide=current().broadcast_from_main,
        )
    if (kernels := current().broadcast_from_main(lambda: choice.kernels)) != choice.kernels:
        raise RunError(
            what=f"Process {current().rank} chose another engine than process 0: {choice.kernels}, and not {kernels}.",
            why=choice.reason,
            fix="Use equal GPUs, or set --engine-mode.",
        )
    run.record["engine"] = choice.record() | {"device": device}
    current().broadcast_parameters([parameter for parameter in model.parameters() if parameter.requires_grad])
    write_record(run.folder, run.record)
    run.console.say(f"engine {choice.mode}: {choice.reason}")
    return choice.engine


def open_stream(run: Run, static: bool) -> TrainStream:
    """The stream of packed rows, at the position that the checkpoint recorded; this process's share of several."""
    s, prepared = run.settings, run.prepared
    packing = packing_for(s, prepared.scan, static)
    run.record["packing"] = {"row_tokens": None if packing.exact else packing.tokens, "filled_up": packing.static}
    write_record(run.folder, run.record)
    make_stream: Callable[..., TrainStream] = TrainStream
    if run.record.get("seeded_by_row") or current().size > 1:
        make_stream = partial(DealtStream, rows_per_step=run.record["rows_per_step"], processes=current())
    stream = make_stream(
        prepared.dataset,
        prepared.chat,
        held_out=prepared.scan.rule,
        packing=packing,
        seed=s.seed,
        limit=None if prepared.scan.complete else BadRowLimit(s.max_bad_rows, prepared.scan.last),
        sizes=prepared.sizes if current().size > 1 else None,
    )
    if current().is_main:  # all processes read the same rows
        run.stop.find_problem = lambda: stream.problem
    if run.start.resume:
        state = json.loads((run.start.resume / checkpoints.DATA_STATE).read_text())
        if stream.load_state_dict(state):
            run.console.warn("rows are packed differently now: some of the latest conversations are trained on again")
    return stream


def make_samples(run: Run, tracker: Tracker, timer: Timer) -> "SamplesCallback | None":
    """What generates samples, or None if there are to be none."""
    from phoque.training.callbacks.samples import SamplesCallback

    s, scan = run.settings, run.prepared.scan
    if s.fsdp and s.sample_every:
        run.console.say(NO_SAMPLES)
        return None
    prompts = s.prompts or _held_out_questions(scan)
    if not s.sample_every or not prompts:
        return None
    return SamplesCallback(
        tracker,
        run.prepared.chat,
        prompts=prompts,
        system=scan.systems.most_common(1)[0][0],
        every=s.sample_every,
        tokens=s.sample_tokens,
        console=run.console,
        timer=timer,
    )


def take_steps(
    run: Run,
    model: Any,
    *,
    engine: Engine | None,
    stream: TrainStream,
    tracker: Tracker | None,
    samples: "SamplesCallback | None",
    timer: Timer,
) -> tuple[int, Resumable | None]:
    """Take the steps that are left; return the last one, and the error to raise if it is not the end of the run."""
    from phoque.training.trainer import CheckpointPolicy, PersonaTrainer

    s, console, stop, processes = run.settings, run.console, run.stop, current()
    pusher = _make_pusher(run)
    with console.progress(s.max_steps, run.first_step) as show:
        callbacks: list[Any] = [stop, *_make_metrics_callback(run, model, stream, tracker, show, timer)]
        if in_job() and stop.deadline is None:
            callbacks.append(SaveWithoutLimit())
        if samples:
            callbacks.append(samples)
        if tracker and s.wandb_log_model == "checkpoint":
            callbacks.append(WandbArtifactsCallback(tracker))
        policy = CheckpointPolicy(
            keep=s.keep_checkpoints,
            pusher=pusher,
            report_duration=stop.record_save,
            warn=console.warn,
            replan=bool(s.allow_change),
        )
        trainer = PersonaTrainer(
            model,
            run.prepared.chat.shipped_tokenizer,
            _training_arguments(run, engine),
            stream=stream,
            architecture=architecture_of(run.prepared.config),
            policy=policy,
            timer=timer,
            callbacks=callbacks,
            engine=engine,
            processes=processes,
        )
        if pusher and run.start.resume:
            if run.start.on_hub:
                pusher.pushed = run.first_step
            else:
                pusher.offer(run.start.resume)
        try:
            with processes.name_lost_connections(is_connection_error):
                trainer.train(resume_from_checkpoint=str(run.start.resume) if run.start.resume else None)
        except Exception:
            if pusher:  # the last checkpoint is still on its way
                console.stage("waiting for the last checkpoint to be pushed")
                pusher.drain(min(s.hub_patience, stop.seconds_left or s.hub_patience))
            raise
    step = trainer.state.global_step
    is_over = step == trainer.state.max_steps  # which an early stop lowers
    if pusher:
        with timer.measure("pushing"):
            if not pusher.drain(stop.seconds_left):
                pusher.failure = "the deadline came first"
    if stop.problem and not is_over:
        raise stop.problem
    return step, stop_error(run, step, pusher) if stop.code is not None and not is_over else None


def _make_pusher(run: Run) -> "CheckpointPusher | None":
    """What pushes the run's checkpoints, or None for a run without a store."""
    from phoque.training.push import CheckpointPusher

    s = run.settings
    if not run.store:
        return None
    pusher = CheckpointPusher(
        run.store,
        keep=s.keep_checkpoints,
        card=partial(write_card_for_checkpoint, run),
        console=run.console,
        every=s.save_steps,
        export=partial(merge_checkpoint, run) if s.export_on_save else lambda folder: None,
    )
    run.stop.push_s = lambda: pusher.seconds
    return pusher


def _make_metrics_callback(
    run: Run,
    model: Any,
    stream: TrainStream,
    tracker: Tracker | None,
    show: Callable[[int, str], None],
    timer: Timer,
) -> list[TrainerCallback]:
    """What logs and measures in process 0, what follows it in the others; none where there is nothing to follow."""
    from phoque.training.callbacks.metrics import FollowCallback, MetricsCallback

    s, agree = run.settings, current().max_over_processes
    held_out = [encoded for _, encoded in run.prepared.scan.held_out]
    if tracker:
        callback = MetricsCallback(
            tracker,
            stream,
            held_out=held_out,
            norms_every=s.norms_every,
            eval_every=s.measured_every,
            early_stop=s.early_stop,
            comparable_since=run.record.get("held_out_since", 0),
            keep_best=partial(keep_if_best, run, model),
            show=show,
            timer=timer,
            agree=agree,
        )
        return [callback]
    if s.early_stop or s.fsdp:
        return [FollowCallback(s.measured_every, agree if s.early_stop else None, held_out if s.fsdp else [])]
    return []


def _training_arguments(run: Run, engine: Engine | None) -> Any:
    from transformers import TrainingArguments

    s, cuda = run.settings, torch.cuda.is_available()
    arguments = TrainingArguments(
        output_dir=str(run.folder),
        max_steps=s.max_steps,
        per_device_train_batch_size=s.batch_size // s.accumulation,
        gradient_accumulation_steps=run.record["rows_per_step"] // current().size,
        learning_rate=s.learning_rate,
        lr_scheduler_type="constant_with_warmup" if s.lr_scheduler == "constant" else s.lr_scheduler,
        warmup_steps=round(s.warmup_ratio * s.max_steps),
        weight_decay=s.weight_decay,
        max_grad_norm=s.max_grad_norm,
        optim="adamw_torch_fused" if cuda else "adamw_torch",
        bf16=cuda and s.quantization != "fp32",
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
        remove_unused_columns=False,
        ignore_data_skip=True,  # the stream's own state says where to continue
        push_to_hub=False,
    )
    if arguments.n_gpu > 1:  # Trainer would wrap the model in DataParallel
        arguments._n_gpu = 1
    return arguments


def _held_out_questions(scan: DatasetScan) -> list[str]:
    """The first user messages of three held-out rows: typical questions that training never sees."""
    return [row.first_question for row, _ in scan.held_out[:3]]
