"""Where a run's numbers go: metrics.jsonl and samples.jsonl, and W&B where there is a key or offline mode."""

import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from phoque.errors import first_line
from phoque.settings.fields import Secrets
from phoque.settings.train import TrainSettings

METRICS, SAMPLES = "metrics.jsonl", "samples.jsonl"
SAMPLE_COLUMNS = ("step", "prompt", "response", "n_tokens", "latency_s")


class Tracker:
    """Appends to the run folder and, if it is on, to W&B; W&B failing never stops a run.

    A run that goes on takes some steps again, and W&B keeps what it was sent: nothing up to step `logged` goes twice.
    """

    def __init__(self, run: Path, wandb_run: Any, warn: Callable[[str], None], logged: int) -> None:
        self.run, self._wandb, self._warn = run, wandb_run, warn
        self._logged = max(logged, _logged_there(wandb_run))
        self._samples = read_lines(run / SAMPLES)

    def metrics(self, step: int, values: dict[str, float]) -> None:
        """One line of numbers after a step. A number that is not finite is written as null: NaN is no JSON."""
        finite = {k: v if math.isfinite(v) else None for k, v in values.items()}
        _append(self.run / METRICS, {"step": step, **finite})
        named = {"train/global_step": step} | {_wandb_name(k): v for k, v in values.items()}
        if step > self._logged:
            self._to_wandb(lambda run: run.log(named))

    def samples(self, step: int, rows: list[dict[str, Any]]) -> None:
        """Generated samples, each with SAMPLE_COLUMNS; W&B gets the whole table so far, as `sample_outputs`."""
        for row in rows:
            _append(self.run / SAMPLES, row)
        self._samples += rows
        if step > self._logged:
            self._to_wandb(lambda run: self._log_table(run, step))

    def artifact(self, folder: Path, step: int) -> None:
        """The adapter in `folder` as a version of the W&B model artifact of this run."""

        def log(run: Any) -> None:
            import wandb

            model = wandb.Artifact(f"model-{run.id}", type="model", metadata={"step": step})
            for name in ("adapter_model.safetensors", "adapter_config.json"):
                model.add_file(str(folder / name), name=name)
            run.log_artifact(model, aliases=[f"step-{step}", "latest"])

        self._to_wandb(log)

    def finish(self, code: int) -> None:
        """Close W&B with the exit code of the run."""
        self._to_wandb(lambda run: run.finish(exit_code=code))

    def _log_table(self, run: Any, step: int) -> None:
        import wandb

        rows: list[Any] = [[row[column] for column in SAMPLE_COLUMNS] for row in self._samples]
        run.log({"sample_outputs": wandb.Table(list(SAMPLE_COLUMNS), rows), "train/global_step": step})

    def _to_wandb(self, send: Callable[[Any], None]) -> None:
        if self._wandb is None:
            return
        try:
            send(self._wandb)
        except Exception as error:  # whatever goes wrong there, a run that costs money here goes on
            self._warn(f"W&B: {first_line(error)}; the run goes on without it")
            self._wandb = None


def start_wandb(
    s: TrainSettings,
    secrets: Secrets,
    run: Path,
    config: dict[str, Any],
    run_id: str,
    resume: Literal["allow", "never"],
    say: Callable[[str], None],
    warn: Callable[[str], None],
) -> Any:
    """A W&B run under a fixed id, resumed if it exists ("allow") or only begun if it does not ("never").

    None if W&B is off or cannot be reached.
    """
    mode = s.wandb_mode or ("online" if secrets.wandb_api_key else "disabled")
    if mode == "disabled":
        if s.wandb_mode is None:
            say("W&B: no WANDB_API_KEY, so numbers go to the run folder alone")
        return None
    os.environ.setdefault("WANDB_SILENT", "true")  # its banner would land between our lines
    import wandb

    key = secrets.wandb_api_key.get_secret_value() if secrets.wandb_api_key else None
    settings = wandb.Settings(api_key=key, silent=True, console="off", init_timeout=30)
    try:
        wandb_run = wandb.init(
            project=s.wandb_project,
            name=run.name,
            id=run_id,
            mode=mode,
            dir=str(run),
            config=config,
            resume=resume,
            settings=settings,
        )
        wandb_run.define_metric("train/global_step")
        wandb_run.define_metric("*", step_metric="train/global_step")
    except Exception as error:  # no network, a bad key, a broken installation: none of them is worth the run
        warn(f"W&B: {first_line(error)}; the run goes on without it")
        return None
    return wandb_run


def _wandb_name(name: str) -> str:
    return f"eval/{name}" if name.startswith("held_out") else f"train/{name}"


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The rows of a JSONL file; none if there is no such file."""
    return [json.loads(line) for line in _lines(path)]


def logged_until(run: Path) -> int:
    """The last step in the folder's metrics, -1 if there is none."""
    return max((row["step"] for row in _readable(run / METRICS)), default=-1)


def _logged_there(wandb_run: Any) -> int:
    """The last step that a resumed W&B run has, as its server says; -1 for a new one."""
    if wandb_run is None or not wandb_run.resumed:
        return -1
    return int(wandb_run.summary.get("train/global_step", -1))


def forget_after(run: Path, step: int) -> None:
    """Drop the lines of steps that a resumed run is going to take again."""
    for name in (METRICS, SAMPLES):
        path = run / name
        kept = [row for row in _readable(path) if row["step"] <= step]
        staging = path.with_name(f".{name}")
        staging.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in kept), encoding="utf-8")
        staging.replace(path)


def _readable(path: Path) -> list[dict[str, Any]]:
    """As read_lines, less a last line that a kill cut short."""
    lines = _lines(path)
    try:
        return [json.loads(line) for line in lines]
    except json.JSONDecodeError:
        return [json.loads(line) for line in lines[:-1]]


def _lines(path: Path) -> list[str]:
    """The lines of a file, by the newline alone: splitlines() also cuts at U+2028, which a text may well hold."""
    return [line for line in path.read_text(encoding="utf-8").split("\n") if line] if path.is_file() else []


def _append(path: Path, row: dict[str, Any]) -> None:
    with path.open("a", encoding="utf-8") as f:
        f.write(json.dumps(row, ensure_ascii=False) + "\n")
