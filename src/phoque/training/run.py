"""One training run: start (find, scan, check, restore), take the steps that are left, finish."""

import gc
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import torch

from phoque.distributed.launch import check_sharded
from phoque.distributed.processes import current
from phoque.errors import FAILED, UsageError
from phoque.models.architectures import architecture_of
from phoque.models.lora import load_adapter
from phoque.services import Services
from phoque.settings.fields import Resolved
from phoque.settings.train import TrainSettings
from phoque.training.best import copy_best, has_ended, measure_missed_held_out_loss, use_best
from phoque.training.callbacks.stop import StopRequest
from phoque.training.control import make_control_rows, plan_controls, record_controls, with_dataset
from phoque.training.export_merged import merge_final
from phoque.training.finish import TrainResult, finish, out_of_memory_error, publish
from phoque.training.metrics_log import Tracker, delete_after, find_last_step
from phoque.training.prepare import find_store
from phoque.training.report_to import Report, check_services, start_services
from phoque.training.run_files import check_own_folder
from phoque.training.run_record import lock_run, remove_new_folder_on_error
from phoque.training.run_state import Run
from phoque.training.start import start_run
from phoque.training.steps import build_engine, load_model_with_adapter, make_samples, open_stream, take_steps
from phoque.training.timer import Timer


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
    check_sharded(s.fsdp, processes.size)
    if processes.is_main:
        check_own_folder(s.folder)
        check_services(s)
    if s.with_control and processes.is_main:  # before time is spent: a store that cannot be used stops the run now
        for planned in (s, *plan_controls(s, s.max_steps)):
            if store := find_store(planned, services):
                store.open(planned.access, console.warn)
    agree = processes.max_over_processes if processes.size > 1 else None
    stop = StopRequest(console, deadline, s.seconds or 0.0, agree)
    try:
        # the other processes keep their handlers while process 0 writes the control's rows
        with (
            remove_new_folder_on_error(s.folder) if processes.is_main else nullcontext(),
            lock_run(s.folder) if processes.is_main else stop.handle_signals(),
        ):
            with stop.handle_signals():
                run = start_run(resolved, services, stop, submission)
                result = _train(run)
            if s.with_control:
                s = run.settings
                rows = make_control_rows(s, run.prepared, services, deadline)
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
    model = load_model_with_adapter(run)
    engine = build_engine(run, model)
    stream = open_stream(run, static=engine is not None)
    # it may have been stopped after its last save
    is_over = processes.broadcast_from_main(lambda: bool(run.start.resume) and has_ended(run))
    report = Report(
        settings=s,
        secrets=run.services.secrets,
        run=run.folder,
        record=run.record,
        run_id=run.start.run_id,
        is_fresh=run.start.is_fresh,
        say=console.say,
    )
    processes.watch(console)
    tracker = Tracker(run.folder, start_services(report, console.warn), console.warn, logged)
    samples = make_samples(run, tracker, timer)
    code = FAILED
    try:
        if run.start.resume:
            measure_missed_held_out_loss(run, model, tracker)
        if is_over:
            load_adapter(model, Path(str(run.start.resume)), architecture_of(run.prepared.config))
            timer.mark_loaded()
            steps = run.first_step
        else:
            steps, stopped = take_steps(
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
    model = load_model_with_adapter(run)
    engine = build_engine(run, model)
    stream = open_stream(run, static=engine is not None)
    is_over = processes.broadcast_from_main(bool)  # whether process 0 finds that
    processes.watch(run.console)
    if run.start.resume:
        measure_missed_held_out_loss(run, model, None)
    if is_over:
        return
    _, stopped = take_steps(run, model, engine=engine, stream=stream, tracker=None, samples=None, timer=timer)
    if stopped:
        processes.wait_for_main()  # which saves and pushes
        raise SystemExit(stopped.code)


def _deliver(run: Run, result: TrainResult) -> TrainResult:
    """Push the finished run, and merge it if --export-merged says so; what exists already is not made again."""
    result = publish(run, result)
    return merge_final(run, result) if run.settings.export_merged else result
