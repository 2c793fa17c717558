"""One training run: start (find, scan, check, restore), take the steps that are left, finish."""

import gc
import json
import math
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from phoque.data.scan import DatasetScan
from phoque.data.stream import BadRowLimit, TrainStream
from phoque.errors import FAILED, PhoqueError, Resumable, RunError, UsageError
from phoque.models.architectures import architecture_of
from phoque.models.load import default_device, default_device_name, load_model
from phoque.models.lora import add_lora_adapter, load_adapter
from phoque.services import Services
from phoque.settings.config_file import REVISIONS
from phoque.settings.environment import in_job
from phoque.settings.fields import Resolved
from phoque.settings.train import TrainSettings
from phoque.training import checkpoints
from phoque.training.best import copy_best, has_ended, keep_if_best, measure_what_a_stop_skipped, use_best
from phoque.training.callbacks.stop import SaveWithoutLimit, StopRequest
from phoque.training.control import plan_controls, record_controls, with_dataset, write_control_rows
from phoque.training.data_summary import report_scan
from phoque.training.engine import attention
from phoque.training.engine.determinism import make_deterministic
from phoque.training.engine.engine import Engine
from phoque.training.engine.select import select_engine
from phoque.training.export_merged import merge_checkpoint, merge_final
from phoque.training.fingerprint import DATA_RULES, compute_identity
from phoque.training.finish import (
    TrainResult,
    finish,
    out_of_memory_error,
    publish,
    stop_error,
    write_card_for_checkpoint,
)
from phoque.training.metrics_log import Tracker, delete_after, find_last_step
from phoque.training.pinned import pin_recorded
from phoque.training.prepare import (
    Prepared,
    check_rows_divisible,
    choose_micro_batch,
    find_store,
    lora_options,
    packing_for,
    prepare,
    rows_per_step,
    with_steps,
)
from phoque.training.processes import DealtStream, LostProcess, current
from phoque.training.report_to import Report, check_services, start_services
from phoque.training.resume import find_start
from phoque.training.run_record import check_own_folder, check_writable, create_record, lock_run, write_record
from phoque.training.run_state import Run
from phoque.training.timer import Timer

if TYPE_CHECKING:
    from phoque.training.callbacks.samples import SamplesCallback


def train(
    resolved: Resolved[TrainSettings],
    services: Services,
    *,
    deadline: float | None = None,
    submission: str = "",
) -> TrainResult | None:
    """Train to the last step, continuing from the newest whole checkpoint if there is one, here or in its store.

    `deadline` is the time.time() at which this process will be killed; `submission` is shared by all attempts of one
    Job. Where several processes train together, each calls this, and process 0 alone returns a result. Raises Resumable
    (75, or 130 after Ctrl-C) after a stop that saved everything, PhoqueError for what failed.
    """
    s, console, processes = resolved.settings, services.console, current()
    if processes.is_main:
        check_own_folder(s.folder)
        check_services(s)
    if s.with_control and processes.is_main:  # before time is spent: a store that cannot be used stops the run now
        for planned in (s, *plan_controls(s, s.max_steps)):
            if store := find_store(planned, services):
                store.open(planned.public, console.warn)
    agree = processes.max_over_processes if processes.size > 1 else None
    stop = StopRequest(console, deadline, s.seconds or 0.0, agree)
    try:
        # the other processes keep their handlers while process 0 writes the control's rows
        with lock_run(s.folder) if processes.is_main else stop.handle_signals():
            with stop.handle_signals():
                run = _start(resolved, services, stop, submission)
                result = _train(run)
            if s.with_control:
                s = run.settings
                rows = processes.broadcast_from_main(lambda: write_control_rows(s, run.prepared, services, deadline))
                processes.broadcast_files(rows)
                steps = processes.broadcast_from_main(lambda: result.adapter_step or result.steps if result else 0)
                controls = plan_controls(s, steps)
                for number, control in enumerate(controls, 1):
                    console.say(f"control {number} of {len(controls)}, seed {control.seed}")
                    train(with_dataset(resolved, control, rows), services, deadline=deadline, submission=submission)
                if result:
                    record_controls(s, controls, services)
                    result = replace(result, controls=[str(control.folder) for control in controls])
            return result
    except torch.OutOfMemoryError as error:
        raise out_of_memory_error(s) from error


def _start(resolved: Resolved[TrainSettings], services: Services, stop: StopRequest, submission: str) -> Run:
    """Find out where the run starts, in process 0, and prepare the same in the others."""
    processes = current()
    if processes.size == 1:
        return _open(resolved, services, stop, submission)[0]
    opened = _open(resolved, services, stop, submission) if processes.is_main else None

    def tell() -> dict[str, Any]:
        run, pinned = opened if opened else (None, None)
        if run is None or pinned is None:
            raise AssertionError("only process 0 is asked")
        told = {"pinned": pinned, "planned": run.settings, "start": run.start, "record": run.record}
        return told | {"digest": run.prepared.scan.digest}

    told = processes.broadcast_from_main(tell)
    processes.broadcast_files(told["start"].resume)
    if opened:
        return opened[0]
    prepared = prepare(replace(resolved, settings=told["pinned"]), services, weights=True)
    if prepared.scan.digest != told["digest"]:
        raise RunError(
            what=f"Process {processes.rank} reads other data than process 0.",
            why=f"{resolved.settings.dataset} is not the same on both machines.",
            fix="Put the same files on every machine, or use a dataset on the Hub.",
        )
    return Run(
        resolved=replace(resolved, settings=told["planned"]),
        services=services,
        prepared=prepared,
        folder=resolved.settings.folder,
        start=told["start"],
        record=told["record"],
        store=None,
        stop=stop,
    )


def _open(
    resolved: Resolved[TrainSettings], services: Services, stop: StopRequest, submission: str
) -> tuple[Run, TrainSettings]:
    """The run as it starts, and the settings with pinned revisions by which its data was read."""
    s, folder = resolved.settings, resolved.settings.folder
    check_writable(folder)
    store = find_store(s, services)
    if store:  # before time is spent: a run that may not write to its store could keep nothing there
        store.open(s.public, services.console.warn)
    services.console.stage(f"reading {s.dataset}")
    pinned, rows_so_far = pin_recorded(resolved, folder, store, services, submission)
    prepared = prepare(pinned, services, weights=True)
    planned = _plan(resolved, pinned, prepared, rows_so_far)
    s = planned.settings
    report_scan(prepared.scan, prepared.dataset, s, services.console)
    identity = compute_identity(s, prepared.source, prepared.dataset, prepared.chat, prepared.scan, services)
    rows = prepared.scan.trained_rows
    epoch = {"rows": rows, "batch_size": s.batch_size}
    start = find_start(
        s, folder, store, identity=identity, epoch=epoch, console=services.console, submission=submission
    )
    if start.is_fresh and pinned is not resolved:  # the user chose to start again, with what the repositories hold now
        if any(getattr(pinned.settings, name) != getattr(resolved.settings, name) for name, _ in REVISIONS.values()):
            prepared = prepare(resolved, services, weights=True)
        pinned = resolved
        planned = _plan(resolved, pinned, prepared, None)
        s = planned.settings
        identity = compute_identity(s, prepared.source, prepared.dataset, prepared.chat, prepared.scan, services)
    if (
        start.record and start.record["fingerprint"]["data_rules"] != DATA_RULES
    ):  # its rows were held out by another rule
        if current().size > 1:
            raise UsageError(
                what="This run goes on with one process only.",
                why="It was begun by an older version, which held rows out by another rule.",
                fix="Run it without --gpus, or begin another run with another --output-dir.",
            )
        if s.eval_split:
            raise UsageError(
                what="This run cannot get an --eval-split.",
                why="It was begun by an older version, which held rows of the training split out.",
                fix="Leave --eval-split out, or begin another run with another --output-dir.",
            )
        prepared.scan = identity.old_scan
    record = start.record or create_record(planned, prepared, identity.fingerprint, start.run_id, start.marker)
    if start.record is None or start.record.get("rows_per_step", 0) is None:  # None: an allowed change of the batch
        record["rows_per_step"] = rows_per_step(s, packing_for(s, prepared.scan, static=True), current().size)
    record.setdefault("rows_per_step", s.accumulation)  # a run of an older version goes on with its batch
    check_rows_divisible(record["rows_per_step"], current().size, has_begun=start.record is not None)
    record |= {"device": default_device_name(), "processes": current().size}
    if start.record is None:
        record["seeded_by_row"] = current().size > 1
    write_record(folder, record)
    run = Run(
        resolved=planned,
        services=services,
        prepared=prepared,
        folder=folder,
        start=start,
        record=record,
        store=store,
        stop=stop,
    )
    return run, pinned.settings


def _plan(
    resolved: Resolved[TrainSettings], pinned: Resolved[TrainSettings], prepared: Prepared, rows_so_far: int | None
) -> Resolved[TrainSettings]:
    """The settings with the steps of --epochs, and with rows that the processes can share."""
    planned = with_steps(resolved, prepared.scan)
    micro_batch = choose_micro_batch(pinned.settings, current().size, rows_so_far)
    return replace(planned, settings=planned.settings.model_copy(update={"micro_batch": micro_batch}))


def _train(run: Run) -> TrainResult | None:
    s, console, processes = run.settings, run.console, current()
    if run.start.result:
        console.say(f"{run.folder} is complete; nothing to train")
        run.stop.mark_finishing()
        return _deliver(run, TrainResult.from_json(run.start.result)) if processes.is_main else None
    if not processes.is_main:
        return _follow(run)
    if run.first_step > s.max_steps:
        raise UsageError(
            what=f"This run has taken {run.first_step} steps already.",
            why=f"--max-steps {s.max_steps} is less, and steps cannot be taken back.",
            fix="Give at least as many, or another --output-dir.",
        )
    logged = find_last_step(run.folder)
    delete_after(run.folder, run.first_step if run.start.resume else -1)
    # after a change of what is measured, earlier losses cannot be compared
    copy_best(None if run.record.get("held_out_since") == run.first_step else run.start.resume, run.folder)
    if run.start.resume:
        console.say(f"continuing from step {run.first_step} of {s.max_steps} ({run.start.resume})")
    timer = Timer()
    model = _load_model_with_adapter(run)
    engine = _build_engine(run, model)
    stream = _open_stream(run, static=engine is not None)
    is_over = processes.broadcast_from_main(
        lambda: bool(run.start.resume) and has_ended(run)
    )  # stopped after its last save
    report = Report(
        settings=s,
        secrets=run.services.secrets,
        run=run.folder,
        record=run.record,
        run_id=run.start.run_id,
        is_fresh=run.start.is_fresh,
        say=console.say,
    )
    tracker = Tracker(run.folder, start_services(report, console.warn), console.warn, logged)
    samples = _make_samples(run, tracker, timer)
    code = FAILED
    try:
        if run.start.resume:
            measure_what_a_stop_skipped(run, model, tracker)
        if is_over:
            load_adapter(model, Path(str(run.start.resume)), architecture_of(run.prepared.config))
            timer.mark_loaded()
            steps = run.first_step
        else:
            steps, stopped = _take_steps(
                run, model, engine=engine, stream=stream, tracker=tracker, samples=samples, timer=timer
            )
            if stopped:
                code = stopped.code
                raise stopped
        run.stop.mark_finishing()
        if steps < s.max_steps:
            console.say(
                f"the held-out loss has not fallen for {s.early_stop} measurements: the run ends at step {steps}"
            )
        adapter_step = use_best(run, model, steps, samples)
        result = finish(run, model, stream, timer, steps=steps, adapter_step=adapter_step)
        if s.wandb_log_model != "false":
            tracker.log_adapter(run.folder / "adapter", adapter_step)
        del model, engine
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        result = _deliver(run, result)
        code = 0
        return result
    finally:
        tracker.finish(code)


def _follow(run: Run) -> None:
    """Take the steps that process 0 takes, and leave everything else to it."""
    processes, timer = current(), Timer()
    model = _load_model_with_adapter(run)
    engine = _build_engine(run, model)
    stream = _open_stream(run, static=engine is not None)
    if processes.broadcast_from_main(lambda: False):
        return
    try:
        _, stopped = _take_steps(run, model, engine=engine, stream=stream, tracker=None, samples=None, timer=timer)
    except LostProcess:
        raise
    except PhoqueError as error:  # process 0 meets the same, and says it
        raise SystemExit(error.code) from None
    if stopped:
        processes.wait_for_main()  # which saves and pushes
        raise SystemExit(stopped.code)


def _deliver(run: Run, result: TrainResult) -> TrainResult:
    """Push the finished run, and merge it if --export-merged says so; what exists already is not made again."""
    result = publish(run, result)
    return merge_final(run, result) if run.settings.export_merged else result


def _load_model_with_adapter(run: Run) -> Any:
    """The base model with a fresh adapter, on the training device."""
    s, source = run.settings, run.prepared.source
    if (gpus := torch.cuda.device_count()) > 1 and s.gpus is None:
        run.console.warn(f"this machine has {gpus} GPUs, and this run uses one; --gpus all uses them")
    make_deterministic(s.deterministic)
    run.record["deterministic"] = s.deterministic
    torch.manual_seed(s.seed)
    is_compiled = s.engine_mode not in ("auto", "eager")
    # of the whole run, so that a resumed run chooses the same kernels
    tokens = s.max_steps * s.batch_size * run.prepared.scan.mean_length
    dtype = torch.float32 if s.quantization == "fp32" else torch.bfloat16
    name, reason = attention.select_attention(
        default_device(), run.prepared.config, dtype, math.inf if is_compiled else tokens, compiled=is_compiled
    )
    run.record["attention"] = reason
    run.console.stage(f"loading {source.name} as {s.quantization}")
    model = load_model(source, s.quantization, name)
    commit = source.revision if source.on_hub else None
    model = add_lora_adapter(model, lora_options(s, run.prepared), commit)
    trained, total = model.get_nb_trainable_parameters()
    run.record["parameters"] = {"trained": trained, "all": total}
    write_record(run.folder, run.record)
    run.console.say(f"base {source.origin} as {s.quantization}; adapter of {trained / 1e6:.1f} M parameters")
    return model


def _build_engine(run: Run, model: Any) -> Engine | None:
    """The engine that runs the decoder layers, or None for transformers' own layers."""
    s = run.settings
    packing = packing_for(s, run.prepared.scan, static=True)
    recorded, device = run.record.get("engine") or {}, default_device_name()
    # measured anew, the choice could be another, and so could the last bits of the adapter
    previous = recorded["mode"] if run.start.resume and recorded.get("device") == device else ""
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
    if (mode := current().broadcast_from_main(lambda: choice.mode)) != choice.mode:
        raise RunError(
            what=f"Process {current().rank} chose another engine than process 0: {choice.mode}, and not {mode}.",
            why=choice.reason,
            fix="Use equal GPUs, or set --engine-mode.",
        )
    run.record["engine"] = choice.record() | {"device": device}
    current().broadcast_parameters([parameter for parameter in model.parameters() if parameter.requires_grad])
    write_record(run.folder, run.record)
    run.console.say(f"engine {choice.mode}: {choice.reason}")
    return choice.engine


def _open_stream(run: Run, static: bool) -> TrainStream | DealtStream:
    """The stream of packed rows, at the position that the checkpoint recorded; this process's share of several."""
    s, prepared = run.settings, run.prepared
    packing = packing_for(s, prepared.scan, static)
    run.record["packing"] = {"row_tokens": None if packing.exact else packing.tokens, "filled_up": packing.static}
    write_record(run.folder, run.record)
    stream = TrainStream(
        prepared.dataset,
        prepared.chat,
        held_out=prepared.scan.rule,
        packing=packing,
        seed=s.seed,
        limit=None if prepared.scan.complete else BadRowLimit(s.max_bad_rows, prepared.scan.last),
    )
    if current().is_main:  # all processes read the same rows
        run.stop.find_problem = lambda: stream.problem
    if run.start.resume:
        state = json.loads((run.start.resume / checkpoints.DATA_STATE).read_text())
        if stream.load_state_dict(state):
            run.console.warn("rows are packed differently now: some of the latest conversations are trained on again")
    if run.record.get("seeded_by_row") or current().size > 1:
        return DealtStream(stream, run.record["rows_per_step"], current())
    return stream


def _make_samples(run: Run, tracker: Tracker, timer: Timer) -> "SamplesCallback | None":
    """What generates samples, or None if there are to be none."""
    from phoque.training.callbacks.samples import SamplesCallback

    s, scan = run.settings, run.prepared.scan
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


def _take_steps(
    run: Run,
    model: Any,
    *,
    engine: Engine | None,
    stream: TrainStream | DealtStream,
    tracker: Tracker | None,
    samples: "SamplesCallback | None",
    timer: Timer,
) -> tuple[int, Resumable | None]:
    """Take the steps that are left; return the last one, and the error to raise if it is not the end of the run."""
    from phoque.training.callbacks.metrics import FollowCallback, MetricsCallback
    from phoque.training.callbacks.wandb_artifacts import WandbArtifactsCallback
    from phoque.training.push import CheckpointPusher
    from phoque.training.trainer import CheckpointPolicy, PersonaTrainer

    s, chat, scan, console, stop = run.settings, run.prepared.chat, run.prepared.scan, run.console, run.stop
    pusher, processes = None, current()
    if run.store:
        export = partial(merge_checkpoint, run) if s.export_on_save else lambda folder: None
        card = partial(write_card_for_checkpoint, run)
        pusher = CheckpointPusher(
            run.store, keep=s.keep_checkpoints, card=card, console=console, every=s.save_steps, export=export
        )
        stop.push_s = lambda: pusher.seconds if pusher else 0.0
    held_out = [encoded for _, encoded in scan.held_out]
    with ExitStack() as stack:
        show = stack.enter_context(console.progress(s.max_steps, run.first_step))
        callbacks: list[Any] = [stop]
        if tracker:
            callbacks.append(
                MetricsCallback(
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
                    agree=processes.max_over_processes,
                )
            )
        elif s.early_stop:
            callbacks.append(FollowCallback(s.measured_every, processes.max_over_processes))
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
            chat.shipped_tokenizer,
            _training_arguments(run, engine),
            stream=stream,
            architecture=architecture_of(run.prepared.config),
            policy=policy,
            timer=timer,
            callbacks=callbacks,
            engine=engine,
            processes=processes,
        )
        processes.watch(console)
        if pusher and run.start.resume:
            if run.start.on_hub:
                pusher.pushed = run.first_step
            else:
                pusher.offer(run.start.resume)
        try:
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
