"""Where a run starts: at step 0, from a checkpoint in its folder, from one in its store, or at its end."""

import secrets
import shutil
import time
from pathlib import Path
from typing import Any

from phoque.console import Console
from phoque.errors import IntegrityError, PhoqueError, RunError, UsageError, first_line
from phoque.files import sha256
from phoque.hub.store import MARKER, Snapshot, Store
from phoque.models.adapter_source import WEIGHTS
from phoque.settings.train import TrainSettings
from phoque.training import checkpoints
from phoque.training.fingerprint import (
    FINGERPRINT_SETTINGS,
    RunIdentity,
    check_same_run,
    update_record,
    use_current_values,
)
from phoque.training.run_files import METRICS, REPORT, SAMPLES
from phoque.training.run_record import RECORD, delete_run, derive_run_id, list_run_files, read_record, write_record
from phoque.training.run_state import StartState

DOWNLOADS = ".fetching"
HELD_OUT = (
    "dataset_digest",
    "eval_split",
    "eval_digest",
    "held_out_rows",
    "keep_best",
)  # what losses can be compared by
BATCH_SETTINGS = ("batch_size", "micro_batch", "packing", "max_length")  # what rows_per_step follows from
ADAPTER_FILES = ("adapter_", "tokenizer", "special_tokens", "chat_template", "README.md")


def find_start(
    s: TrainSettings,
    run: Path,
    store: Store | None,
    *,
    identity: RunIdentity,
    epoch: dict[str, Any],
    console: Console,
    submission: str = "",
) -> StartState:
    """Find the newest state of this run, here or in its store, and bring it into the run folder.

    `identity` is what this run would be, `epoch` holds the rows and batch size that give plain Trainer's
    checkpoints a position in the data, `submission` is shared by all attempts of one Job. Raises UsageError if the
    newest state is another run's, RunError if there are checkpoints and none is whole, and the Hub's error if it cannot
    be reached: an error is never taken for an empty repository.
    """
    remote = _Remote(store, run / DOWNLOADS, console) if store else None
    local = read_record_or_none(run, s)
    marker = remote.marker if remote else (local or {}).get("fresh_start")
    if s.fresh_start:
        newest_record = remote.final if remote else local
        if not _is_fresh_start_done(marker, newest_record, submission, s, console):
            marker = _start_fresh(s, run, remote, submission, console)
            return StartState(_run_id(store, marker), marker=marker, is_fresh=True)
    if remote:
        local = _download_newer(remote, run, local, identity=identity, epoch=epoch, other_places=s.other_places)
    _import_newest_trainer_checkpoint(run, epoch, console)
    start = StartState(_run_id(store, marker), local, checkpoints.find_newest_valid(run, console.warn), marker)
    if start.record is None and start.resume is not None:
        start.record = checkpoints.read_record_in(start.resume)
    start.on_hub = bool(remote and start.resume and start.resume.name in remote.snapshot.checkpoint_folders())
    if start.record is not None:
        start.run_id = start.record["run_id"]
        recorded = start.record["fingerprint"]
        current = identity.for_record(recorded)
        check_same_run(recorded, current, s.allow_change, str(run), s.other_places)
        if recorded != current:  # a change that was allowed: the run is not complete any more
            if any(recorded.get(name) != current.get(name) for name in HELD_OUT):
                start.record["held_out_since"] = checkpoints.get_step(start.resume) if start.resume else 0
            start.record = {k: v for k, v in start.record.items() if k not in ("result", "controls")} | {
                "fingerprint": current
            }
            if any(recorded.get(name) != current.get(name) for name in BATCH_SETTINGS):
                start.record["rows_per_step"] = None
    return start


class _Remote:
    """The run's store at one time: its files, the fresh-start marker, and the record of a finished run."""

    def __init__(self, store: Store, staging: Path, console: Console) -> None:
        shutil.rmtree(staging, ignore_errors=True)
        self.store, self.staging, self._console = store, staging, console
        self.snapshot: Snapshot = store.snapshot()
        store.pin(self.snapshot)
        self.marker = self._read_json(MARKER)
        if self.marker:
            self.marker["asked"] = use_current_values(self.marker["asked"])
        # an adapter from before the last fresh start is not this run's
        final = self._read_json(RECORD)
        self.final = update_record(final) if final and _fresh_start_id(final) == _marker_id(self.marker) else None
        if self.final and not store.is_atomic and not self._has_adapter_of(self.final):
            console.warn(f"the adapter in {store.name} was cut off while it was written: it is written again")
            self.final = None

    def _read_json(self, path: str) -> dict[str, Any] | None:
        if path not in self.snapshot.files:
            return None
        if (content := self.store.read_json(self.snapshot, path, self.staging)) is None:
            self._console.warn(f"{path} in {self.store.name} was cut off while it was written, and is left out")
        return content

    def _has_adapter_of(self, record: dict[str, Any]) -> bool:
        if "result" not in record or WEIGHTS not in self.snapshot.files:
            return False
        fetched = self.store.fetch(self.snapshot, WEIGHTS, self.staging)
        return record["result"].get("adapter_sha256") in (None, sha256(fetched))

    def newest_run_id(self) -> str | None:
        """The id of the run that the newest checkpoint belongs to; None if there is none of the last fresh start."""
        for name in checkpoints.sort_checkpoints(self.snapshot.checkpoint_folders()):
            record = self._read_json(f"{name}/{RECORD}")
            if record and _fresh_start_id(record) == _marker_id(self.marker):
                return record["run_id"]
        return None

    def adapter_files(self) -> list[str]:
        """The files of the finished adapter, at the root of the repository."""
        return [path for path in self.snapshot.files if "/" not in path and path.startswith(ADAPTER_FILES)]

    def final_files(self) -> list[str]:
        """The files of a finished run at the root of the repository; none if phoque has not written a run there."""
        if RECORD not in self.snapshot.files:
            return []
        return [*self.adapter_files(), RECORD, METRICS, SAMPLES, REPORT]

    def download_final(self, run: Path) -> dict[str, Any]:
        """Download the finished run into the folder, as if it had been trained here; return its record."""
        for path in self.adapter_files():
            self.store.fetch(self.snapshot, path, self.staging / "adapter")
        others = [path for path in (METRICS, SAMPLES, REPORT) if path in self.snapshot.files]
        fetched = [self.store.fetch(self.snapshot, path, self.staging) for path in others]
        for file in fetched:  # only when all is here: the folder is not yet known as a run's
            file.replace(run / file.name)
        shutil.rmtree(self.staging / "adapter" / ".cache", ignore_errors=True)
        shutil.rmtree(run / "adapter", ignore_errors=True)
        (self.staging / "adapter").replace(run / "adapter")
        final: Any = self.final
        final["result"] |= {"run": str(run), "adapter": str(run / "adapter"), "report": str(run / REPORT)}
        write_record(run, final)
        return final

    def download_newest(self, above: int, epoch: dict[str, Any]) -> Path | None:
        """The newest checkpoint after step `above`, downloaded and verified, or an older one if that is damaged.

        Returns None only if there is none. Raises RunError if none is whole and none is on this machine either.
        """
        folders = {
            name: [path for path in self.snapshot.files if path.startswith(f"{name}/")]
            for name in checkpoints.sort_checkpoints(self.snapshot.checkpoint_folders())
            if checkpoints.get_step(Path(name)) > above
        }
        ours = any(path.endswith(checkpoints.PHOQUE_FILES) for path in self.snapshot.files)
        reason: str | None = None
        damaged = 0
        for name, paths in folders.items():
            reason = "it has no manifest"
            if not ours or f"{name}/{checkpoints.MANIFEST}" in paths:
                reason = self._download(paths) or (
                    checkpoints.find_defect(self.staging / name)
                    if ours
                    else checkpoints.find_trainer_defect(self.staging / name)
                )
            record = checkpoints.read_record_in(self.staging / name) if reason is None else None
            is_earlier = bool(record) and _fresh_start_id(record or {}) != _marker_id(self.marker)
            if is_earlier:
                reason = "it belongs to the run before the last fresh start"
            damaged += not is_earlier
            if reason is None:
                return (
                    self.staging / name
                    if ours
                    else checkpoints.import_trainer_checkpoint(self.staging / name, epoch, self._console.warn)
                )
            self._console.warn(f"{name} in {self.store.name} is left out: {reason}")
            shutil.rmtree(self.staging / name, ignore_errors=True)
        if damaged and above < 0:
            history = " from the repository's history" if self.store.is_atomic else ""
            raise RunError(
                what=f"None of the {damaged} checkpoints in {self.store.name} is whole.",
                why=f"The last one tried: {reason}.",
                fix=f"Restore one{history}, or start again with --fresh-start.",
            )
        return None

    def _download(self, paths: list[str]) -> str | None:
        """Download a checkpoint's files; return the reason if one is damaged or missing for good."""
        from huggingface_hub.errors import EntryNotFoundError

        paths = [path for path in paths if not path.endswith(checkpoints.TRAINING_ARGS)]
        size = sum(self.snapshot.files[path].size for path in paths) / 1e6
        self._console.stage(f"downloading {Path(paths[0]).parent} from {self.store.name} ({size:,.1f} MB)")
        for path in paths:
            try:
                self.store.fetch(self.snapshot, path, self.staging)
            except (IntegrityError, EntryNotFoundError) as error:
                return first_line(error)
        return None


def _download_newer(
    remote: _Remote,
    run: Path,
    local: dict[str, Any] | None,
    *,
    identity: RunIdentity,
    epoch: dict[str, Any],
    other_places: str,
) -> dict[str, Any] | None:
    """Download what is newer in the store into the run folder; return the record of what the folder then holds."""
    try:
        if remote.marker and local and _fresh_start_id(local) != _marker_id(remote.marker):
            raise _two_runs_error(run, remote.store, local["started"], remote.marker["at"])
        if remote.final and local and local["run_id"] != remote.final["run_id"]:
            raise _two_runs_error(run, remote.store, local["started"], remote.final["started"])
        # also where the local run is ahead: its pushes would delete the other's checkpoints
        if local and (other := remote.newest_run_id()) and other != local["run_id"]:
            raise _two_runs_error(run, remote.store, local["started"], f"another time, as {other}")
        if remote.final and remote.final["fingerprint"] == identity.for_record(remote.final["fingerprint"]):
            return local if local and "result" in local else remote.download_final(run)
        steps = [
            checkpoints.get_step(c) for c in checkpoints.list_checkpoints(run) if checkpoints.find_defect(c) is None
        ]
        newest = remote.download_newest(max(steps, default=-1), epoch)
        if newest is None:
            if remote.final and not local and not steps:  # finished by another command, and its checkpoints are gone
                recorded = remote.final["fingerprint"]
                check_same_run(recorded, identity.for_record(recorded), [], remote.store.name, other_places)
            return local
        record = checkpoints.read_record_in(newest)
        if local and record and record["run_id"] != local["run_id"]:
            raise _two_runs_error(run, remote.store, local["started"], record["started"])
        checkpoint = run / newest.name
        shutil.rmtree(checkpoint, ignore_errors=True)
        newest.replace(checkpoint)
        for name in (METRICS, SAMPLES):
            if (checkpoint / name).is_file():
                shutil.copyfile(checkpoint / name, run / name)
        return record or local
    finally:
        shutil.rmtree(remote.staging, ignore_errors=True)


def _import_newest_trainer_checkpoint(run: Path, epoch: dict[str, Any], console: Console) -> None:
    """Import the newest whole checkpoint of plain Trainer in the folder, unless phoque has made any there.

    Raises RunError if none can be resumed: it has another optimizer, or a part is missing.
    """
    names = checkpoints.sort_checkpoints(p.name for p in run.glob("*checkpoint*"))
    if not names or any(checkpoints.is_phoque_checkpoint(run / name) for name in names):
        return
    reasons = {name: checkpoints.find_trainer_defect(run / name) for name in names}
    whole = next((name for name, reason in reasons.items() if reason is None), None)
    if whole is None:
        raise RunError(
            what=f"{run} holds checkpoints of plain Trainer, and none can be resumed.",
            why=f"{names[0]}: {reasons[names[0]]}.",
            fix="Choose another --output-dir, or start over with --fresh-start, which deletes them.",
        )
    checkpoints.import_trainer_checkpoint(run / whole, epoch, console.warn)


def _start_fresh(
    s: TrainSettings, run: Path, remote: _Remote | None, submission: str, console: Console
) -> dict[str, Any]:
    """Delete the run, here and in the store, after asking on a terminal; return the marker of the new run."""
    local = list_run_files(run)
    on_hub, final_files = set(), []
    if remote:
        on_hub, final_files = set(remote.snapshot.checkpoint_folders()), remote.final_files()
    places = {str(run): local}
    if remote:
        places[remote.store.name] = [
            *checkpoints.sort_checkpoints(on_hub),
            *["the finished adapter"] * bool(final_files),
        ]
    deleted = [f"{', '.join(names)} in {place}" for place, names in places.items() if names]
    if deleted:
        console.say(f"a fresh start deletes {'; '.join(deleted)}")
        if not s.yes and console.can_ask() and not console.confirm("Delete them and start at step 0?"):
            raise UsageError(
                what="Nothing was started.",
                why="The fresh start was declined.",
                fix="Leave out --fresh-start to continue the run.",
            )
    now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    marker = {"id": secrets.token_hex(6), "at": now, "asked": _learning_settings(s), "submission": submission}
    delete_run(run)  # first: local checkpoints must not outlive those in the store
    if remote:
        remote.store.clear(marker, remote.staging, final_files)
    return marker


def _is_fresh_start_done(
    marker: dict[str, Any] | None, latest: dict[str, Any] | None, submission: str, s: TrainSettings, console: Console
) -> bool:
    """Whether this very command has made its fresh start before, and the run that began with it is not complete.

    A Job that is submitted again still has FORCE_FRESH_START set; it must continue, and not delete its own progress at
    every attempt. A complete run is started again, but not by a later attempt of the submission that completed it.
    """
    if marker is None or not _continues_fresh_start(marker, latest, s, submission):
        return False
    if "result" in (latest or {}):
        return True
    if console.can_ask() and not s.yes:
        return not console.confirm(f"The run that was started afresh at {marker['at']} is not finished. Start again?")
    console.say(
        f"the fresh start was made at {marker['at']} and its run is not finished: continuing it "
        "(outside of a Job, --yes starts again)"
    )
    return True


def is_fresh_start_continued(record: dict[str, Any], s: TrainSettings, submission: str) -> bool:
    """Whether --fresh-start goes on with the run of a record; on a terminal the user may still choose otherwise."""
    marker = record.get("fresh_start")
    return marker is not None and _continues_fresh_start(marker, record, s, submission)


def _continues_fresh_start(
    marker: dict[str, Any], latest: dict[str, Any] | None, s: TrainSettings, submission: str
) -> bool:
    """Whether the command that made a fresh start goes on with its run, by the rules that need no question."""
    if marker["asked"] != _learning_settings(s):
        return False
    if s.with_control and "result" in (latest or {}) and "controls" not in (latest or {}):
        return True  # the run itself is finished, and its controls are not: starting again would delete it
    if not submission:  # on this machine, --yes is the answer to the question whether to start again
        return not s.yes and "result" not in (latest or {})
    return "result" not in (latest or {}) or submission == marker["submission"]


def _learning_settings(s: TrainSettings) -> dict[str, Any]:
    """The settings that decide what is learned. New rows in the same dataset do not make it another command."""
    names = {*FINGERPRINT_SETTINGS, "base_model", "revision", "dataset", "dataset_revision", "split"}
    if s.epochs is not None:  # the steps follow from the rows
        names = names - {"max_steps"} | {"epochs"}
    return s.model_dump(mode="json", include=names)


def read_record_or_none(run: Path, s: TrainSettings) -> dict[str, Any] | None:
    """The record in run.json; None if there is none, or if it cannot be read and a fresh start will replace it."""
    try:
        return read_record(run)
    except PhoqueError:
        if not s.fresh_start:
            raise
        return None


def _two_runs_error(run: Path, store: Store, here: str, there: str) -> PhoqueError:
    return UsageError(
        what=f"{run} and {store.name} hold two different runs.",
        why=f"The one here started at {here}, the one {store.place} at {there}.",
        fix=f"Choose another --output-dir to continue the one {store.place}, or another {store.flag}.",
    )


def _run_id(store: Store | None, marker: dict[str, Any] | None) -> str:
    """A run's id: for a repository it is the same on every machine, until the next fresh start.

    A folder may be mounted under one path in the Jobs of several runs, so its path names none of them.
    """
    return derive_run_id(store.name, _marker_id(marker)) if store and store.has_own_name else secrets.token_hex(6)


def _marker_id(marker: dict[str, Any] | None) -> str:
    return (marker or {}).get("id", "")


def _fresh_start_id(record: dict[str, Any]) -> str:
    return _marker_id(record.get("fresh_start"))
