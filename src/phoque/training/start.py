"""How a run starts: where its state is, what it was begun with, and the same in every process."""

import re
from dataclasses import replace
from typing import Any

from phoque.data.row_sizes import SIZES_FOLDER
from phoque.distributed.processes import current
from phoque.errors import RunError, UsageError
from phoque.hub.repo import Repo
from phoque.models.adapter_source import WEIGHTS
from phoque.models.load import default_device_name
from phoque.services import Services
from phoque.settings.config_file import REVISIONS
from phoque.settings.fields import Resolved
from phoque.settings.train import TrainSettings
from phoque.training.callbacks.stop import StopRequest
from phoque.training.data_summary import report_scan
from phoque.training.fingerprint import DATA_RULES, compute_identity
from phoque.training.pinned import pin_recorded
from phoque.training.prepare import (
    Prepared,
    check_rows_divisible,
    choose_micro_batch,
    find_store,
    packing_for,
    prepare,
    rows_per_step,
    with_steps,
)
from phoque.training.resume import find_start
from phoque.training.run_record import RECORD, check_writable, create_record, write_record
from phoque.training.run_state import Run


def start_run(resolved: Resolved[TrainSettings], services: Services, stop: StopRequest, submission: str) -> Run:
    """Determine the start state in process 0, and prepare the run by it in the others."""
    processes = current()
    if processes.is_main:
        run, pinned = _open(resolved, services, stop, submission)
        main_state = {"pinned": pinned, "planned": run.settings, "start": run.start, "record": run.record}
        prepared = run.prepared
        read = {"digest": prepared.scan.digest, "encoded": prepared.encoding_digest(), "today": prepared.chat.today}
        processes.broadcast_from_main(lambda: main_state | read)
        processes.broadcast_files(run.start.resume)
        return run
    main_state = processes.broadcast_from_main(dict[str, Any])
    processes.broadcast_files(main_state["start"].resume)
    pinned = replace(resolved, settings=main_state["pinned"])
    prepared = prepare(pinned, services, weights=True, today=main_state["today"])
    if prepared.scan.digest != main_state["digest"]:
        raise RunError(
            what=f"Process {processes.rank} reads other data than process 0.",
            why=f"{resolved.settings.dataset} is not the same on both machines.",
            fix="Put the same files on every machine, or use a dataset on the Hub.",
        )
    if prepared.encoding_digest() != main_state["encoded"]:  # they would deal other rows to the processes
        raise RunError(
            what=f"Process {processes.rank} encodes the data otherwise than process 0.",
            why="Its template, tokenizer, packages or the sizes of rows that phoque has kept are not the same.",
            fix=f"Use equal environments, and delete {services.cache / SIZES_FOLDER} on every machine.",
        )
    return Run(
        resolved=replace(resolved, settings=main_state["planned"]),
        services=services,
        prepared=prepared,
        folder=resolved.settings.folder,
        start=main_state["start"],
        record=main_state["record"],
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
        store.open(s.access, services.console.warn)
        if isinstance(store, Repo):
            store.warn_of_foreign(re.escape(WEIGHTS), RECORD, services.console.warn)
    services.console.stage(f"reading {s.dataset}")
    begun = pin_recorded(resolved, folder, store, services, submission)
    pinned = begun.resolved
    prepared = prepare(pinned, services, weights=True, today=begun.today)
    planned = _plan(resolved, pinned, prepared, begun.rows)
    s = planned.settings
    report_scan(prepared.scan, prepared.dataset, s, services.console)
    identity = compute_identity(s, prepared.source, prepared.dataset, prepared.chat, prepared.scan, services)
    rows = prepared.scan.trained_rows
    epoch = {"rows": rows, "batch_size": s.batch_size}
    start = find_start(
        s, folder, store, identity=identity, epoch=epoch, console=services.console, submission=submission
    )
    if start.is_fresh and begun.today:  # the user chose to start again, with what the repositories hold now
        settings = pinned.settings, resolved.settings
        has_moved = any(len({getattr(s, name) for s in settings}) > 1 for name, _ in REVISIONS.values())
        if has_moved or prepared.chat.writes_date:
            prepared = prepare(resolved, services, weights=True)
        pinned = resolved
        planned = _plan(resolved, pinned, prepared, None)
        s = planned.settings
        identity = compute_identity(s, prepared.source, prepared.dataset, prepared.chat, prepared.scan, services)
    # its rows were held out by another rule
    if start.record and start.record["fingerprint"]["data_rules"] != DATA_RULES:
        if current().size > 1:
            raise UsageError(
                what="This run can only be resumed with one process.",
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
    processes = current().size
    micro_batch = choose_micro_batch(pinned.settings, processes, rows_so_far)
    dealt = replace(resolved, settings=resolved.settings.model_copy(update={"micro_batch": micro_batch}))
    return with_steps(dealt, prepared.scan, processes, rows_so_far)
