"""Where a run begins: anew, from a checkpoint in its folder, from one on the Hub, or at its end."""

import json
import secrets
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from phoque.console import Console
from phoque.errors import FAILED, PhoqueError, first_line
from phoque.hub.client import IntegrityError
from phoque.hub.repo import MARKER, Repo, Snapshot
from phoque.settings.train import TrainSettings
from phoque.training import checkpoints, report
from phoque.training.fingerprint import SAME, refuse_other_run
from phoque.training.metrics_log import METRICS, SAMPLES
from phoque.training.run_record import RUN, derived_id, forget, read_record, write_record

FETCHING = ".fetching"
ADAPTER_FILES = ("adapter_", "tokenizer", "special_tokens", "chat_template", "README.md")


@dataclass
class StartState:
    """`record` is None for a run that has none yet; `result` is set for one that is complete."""

    run_id: str
    record: dict[str, Any] | None = None
    resume: Path | None = None
    marker: dict[str, Any] | None = None  # of the fresh start that the run began with
    anew: bool = False  # that fresh start was made just now
    on_hub: bool = False  # a checkpoint of that name is in the repository already

    @property
    def result(self) -> dict[str, Any] | None:
        return (self.record or {}).get("result")


def begin(
    s: TrainSettings,
    run: Path,
    repo: Repo | None,
    same: dict[str, Any],
    used: dict[str, Any],
    console: Console,
    submission: str = "",
) -> StartState:
    """Find the newest state of this run, here or on the Hub, and bring it into the run folder.

    `same` is the fingerprint, `used` the state of the data for a checkpoint that has none, `submission` names the Job
    that this process is an attempt of. Raises PhoqueError (2) if it is the state of another run, (1) if there are
    checkpoints and none is whole, and the Hub's error if it cannot be asked: an error is never taken for an empty
    repository.
    """
    remote = _Remote(repo, run / FETCHING, console) if repo else None
    local = _readable(run, s)
    marker = remote.marker if remote else (local or {}).get("fresh_start")
    if s.fresh_start:
        complete = remote.final if remote else local
        if not _honoured(marker, complete, submission, s, console):
            marker = _start_anew(s, run, remote, submission, console)
            return StartState(_id(repo, marker), marker=marker, anew=True)
    if remote:
        local = _bring(remote, run, local, same, used, console)
    _adopt_newest(run, used, console)
    begun = StartState(_id(repo, marker), local, checkpoints.newest_whole(run, console.warn), marker)
    if begun.record is None and begun.resume is not None:
        begun.record = checkpoints.record_in(begun.resume)
    begun.on_hub = bool(remote and begun.resume and begun.resume.name in remote.at.folders())
    if begun.record is not None:
        begun.run_id = begun.record["run_id"]
        refuse_other_run(begun.record["fingerprint"], same, s.allow_change)
        if begun.record["fingerprint"] != same:  # a change that was allowed: there is more to do
            begun.record = {k: v for k, v in begun.record.items() if k != "result"} | {"fingerprint": same}
    return begun


class _Remote:
    """What the repository holds: its pinned files, the fresh-start marker, and the record of a finished run."""

    def __init__(self, repo: Repo, staging: Path, console: Console) -> None:
        shutil.rmtree(staging, ignore_errors=True)
        self.repo, self.staging, self._console = repo, staging, console
        self.at: Snapshot = repo.snapshot()
        repo.pin(self.at)
        self.marker = self._json(MARKER)
        # an adapter that lies there from before the last fresh start is not this run's
        self.final = final if (final := self._json(RUN)) and _start_of(final) == _marked(self.marker) else None

    def _json(self, path: str) -> dict[str, Any] | None:
        if path not in self.at.files:
            return None
        return json.loads(self.repo.fetch(self.at, path, self.staging).read_text())

    def bring_final(self, run: Path) -> dict[str, Any]:
        """Put the finished run into the folder, as if it had been made here; return its record."""
        for path in self.at.files:
            if "/" not in path and path.startswith(ADAPTER_FILES):
                self.repo.fetch(self.at, path, self.staging / "adapter")
            elif path in (METRICS, SAMPLES, report.NAME):
                (self.repo.fetch(self.at, path, self.staging)).replace(run / path)
        shutil.rmtree(self.staging / "adapter" / ".cache", ignore_errors=True)
        shutil.rmtree(run / "adapter", ignore_errors=True)
        (self.staging / "adapter").replace(run / "adapter")
        final: Any = self.final
        final["result"] |= {"run": str(run), "adapter": str(run / "adapter"), "report": str(run / report.NAME)}
        write_record(run, final)
        return final

    def newest(self, above: int, used: dict[str, Any]) -> Path | None:
        """The newest checkpoint beyond step `above`, fetched and verified, or an older one if that is damaged.

        None only if there is none. Raises PhoqueError (1) if none is whole and none is here either.
        """
        folders = {
            name: [path for path in self.at.files if path.startswith(f"{name}/")]
            for name in checkpoints.in_order(self.at.folders())
            if checkpoints.step_of(Path(name)) > above
        }
        ours = any(path.endswith(checkpoints.OURS) for path in self.at.files)
        reason: str | None = None
        for name, paths in folders.items():
            reason = "it has no manifest"
            if not ours or f"{name}/{checkpoints.MANIFEST}" in paths:
                reason = self._fetched(paths) or (
                    checkpoints.find_defect(self.staging / name)
                    if ours
                    else checkpoints.find_trainer_defect(self.staging / name)
                )
            record = checkpoints.record_in(self.staging / name) if reason is None else None
            if record and _start_of(record) != _marked(self.marker):
                reason = "it is of the run before the last fresh start"
            if reason is None:
                return (
                    self.staging / name
                    if ours
                    else checkpoints.import_trainer_checkpoint(self.staging / name, used, self._console.warn)
                )
            self._console.warn(f"{name} in {self.repo.name} is left out: {reason}")
            shutil.rmtree(self.staging / name, ignore_errors=True)
        if folders and above < 0:
            raise PhoqueError(
                f"None of the {len(folders)} checkpoints in {self.repo.name} is whole.",
                f"The last one tried: {reason}.",
                "Restore one from the repository's history, or begin anew with --fresh-start.",
                FAILED,
            )
        return None

    def _fetched(self, paths: list[str]) -> str | None:
        """Fetch a checkpoint's files; what keeps it from being whole if one is damaged or gone for good."""
        from huggingface_hub.errors import EntryNotFoundError

        wanted = [path for path in paths if not path.endswith(checkpoints.PICKLED)]
        size = sum(self.at.files[path].size for path in wanted) / 1e6
        self._console.say(f"fetching {Path(paths[0]).parent} from {self.repo.name} ({size:,.1f} MB)")
        for path in wanted:
            try:
                self.repo.fetch(self.at, path, self.staging)
            except (IntegrityError, EntryNotFoundError) as error:
                return first_line(error)
        return None


def _bring(
    remote: _Remote,
    run: Path,
    local: dict[str, Any] | None,
    same: dict[str, Any],
    used: dict[str, Any],
    console: Console,
) -> dict[str, Any] | None:
    """Bring what is newer on the Hub into the run folder; return the record of what then lies there."""
    try:
        if remote.marker and local and _start_of(local) != _marked(remote.marker):
            raise _two_runs(run, remote.repo.name, local["started"], remote.marker["at"])
        if remote.final and local and local["run_id"] != remote.final["run_id"]:
            raise _two_runs(run, remote.repo.name, local["started"], remote.final["started"])
        if remote.final and remote.final["fingerprint"] == same:
            return local if local and "result" in local else remote.bring_final(run)
        here = [checkpoints.step_of(c) for c in checkpoints.checkpoints(run) if checkpoints.find_defect(c) is None]
        found = remote.newest(max(here, default=-1), used)
        if found is None:
            if remote.final and not local and not here:  # finished by another command, and its checkpoints are gone
                refuse_other_run(remote.final["fingerprint"], same, [])
            return local
        record = checkpoints.record_in(found)
        if local and record and record["run_id"] != local["run_id"]:
            raise _two_runs(run, remote.repo.name, local["started"], record["started"])
        place = run / found.name
        shutil.rmtree(place, ignore_errors=True)
        found.replace(place)
        for name in (METRICS, SAMPLES):
            if (place / name).is_file():
                shutil.copyfile(place / name, run / name)
        return record or local
    finally:
        shutil.rmtree(remote.staging, ignore_errors=True)


def _adopt_newest(run: Path, used: dict[str, Any], console: Console) -> None:
    """Make the newest checkpoint of plain Trainer in the folder one of ours, if there are none but such."""
    found = checkpoints.in_order(p.name for p in run.glob("*checkpoint*"))
    if not found or any(checkpoints.is_ours(run / name) for name in found):
        return
    for name in found:
        reason = checkpoints.find_trainer_defect(run / name)
        if reason is None:
            checkpoints.import_trainer_checkpoint(run / name, used, console.warn)
            return


def _start_anew(
    s: TrainSettings, run: Path, remote: _Remote | None, submission: str, console: Console
) -> dict[str, Any]:
    """Delete every checkpoint, here and on the Hub, after asking on a terminal; return the marker of the new run."""
    here = {path.name for path in run.glob("*checkpoint*")}
    there = set(remote.at.folders()) if remote else set()
    if names := checkpoints.in_order(here | there):
        where = " and ".join([str(run)] * bool(here) + ([remote.repo.name] if there and remote else []))
        console.say(f"a fresh start deletes {', '.join(names)} in {where}")
        if not s.yes and console.can_ask() and not console.confirmed("Delete them and begin at step 0?"):
            raise PhoqueError(
                "Nothing was begun.", "The fresh start was declined.", "Leave --fresh-start out to go on."
            )
    now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    marker = {"id": secrets.token_hex(6), "at": now, "asked": _asked(s), "submission": submission}
    forget(run)  # first: what is here must not outlive what is there
    if remote:
        remote.repo.clear(marker, remote.staging)
    return marker


def _honoured(
    marker: dict[str, Any] | None, latest: dict[str, Any] | None, submission: str, s: TrainSettings, console: Console
) -> bool:
    """Whether this very command has made its fresh start before, and the run that began with it is not done.

    A job that is submitted again has the variable still set; it must go on, and not wipe its own progress for ever. A
    finished run is begun again, but not by a later attempt of the submission that finished it.
    """
    if marker is None or marker["asked"] != _asked(s):
        return False
    if "result" in (latest or {}):
        return bool(submission) and submission == marker["submission"]
    if console.can_ask() and not s.yes:
        return not console.confirmed(f"The run begun afresh at {marker['at']} is not finished. Begin again?")
    console.say(f"the fresh start was made at {marker['at']} and its run is not finished: going on with it")
    return True


def _asked(s: TrainSettings) -> dict[str, Any]:
    """What the command itself says about what is learnt: data that has changed since is no other command."""
    return s.model_dump(mode="json", include={*SAME, "base_model", "revision", "dataset", "dataset_revision", "split"})


def _readable(run: Path, s: TrainSettings) -> dict[str, Any] | None:
    """run.json, where a fresh start may also replace one that cannot be read."""
    try:
        return read_record(run)
    except PhoqueError:
        if not s.fresh_start:
            raise
        return None


def _two_runs(run: Path, repo: str, here: str, there: str) -> PhoqueError:
    return PhoqueError(
        f"{run} and {repo} hold two different runs.",
        f"The one here began {here}, the one on the Hub {there}.",
        "Choose another --output-dir to go on with the one on the Hub, or another --hub-model-id.",
    )


def _id(repo: Repo | None, marker: dict[str, Any] | None) -> str:
    """A run's id: for a repository the same on every machine, until the next fresh start."""
    return derived_id(repo.name, _marked(marker)) if repo else secrets.token_hex(6)


def _marked(marker: dict[str, Any] | None) -> str:
    return (marker or {}).get("id", "")


def _start_of(record: dict[str, Any]) -> str:
    return _marked(record.get("fresh_start"))
