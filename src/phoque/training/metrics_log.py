"""Logs metrics and samples to metrics.jsonl and samples.jsonl, and to W&B if a key or offline mode is set."""

import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from phoque.errors import PhoqueError, first_line
from phoque.files import write_atomically
from phoque.settings.fields import Secrets
from phoque.settings.train import TrainSettings

METRICS, SAMPLES = "metrics.jsonl", "samples.jsonl"
SAMPLE_COLUMNS = ("step", "prompt", "response", "n_tokens", "latency_s")


class Tracker:
    """Appends to the run folder and, if enabled, to W&B; a W&B failure never stops a run.

    A resumed run repeats some steps, but W&B keeps what it has: steps up to `logged` are not sent again.
    """

    def __init__(self, run: Path, wandb_run: Any, warn: Callable[[str], None], logged: int) -> None:
        self.run, self._wandb, self._warn = run, wandb_run, warn
        self._logged = max(logged, _last_wandb_step(wandb_run))
        self._samples = read_lines(run / SAMPLES)

    def log_metrics(self, step: int, values: dict[str, float]) -> None:
        """Log one line of metrics for a step. Non-finite values are written as null, because JSON has no NaN."""
        finite = {k: v if math.isfinite(v) else None for k, v in values.items()}
        _append(self.run / METRICS, {"step": step, **finite})
        named = {"train/global_step": step} | {_wandb_name(k): v for k, v in values.items()}
        if step > self._logged:
            self._to_wandb(lambda run: run.log(named))

    def log_samples(self, step: int, rows: list[dict[str, Any]]) -> None:
        """Log samples, each with SAMPLE_COLUMNS; W&B gets the whole table so far, as `sample_outputs`."""
        for row in rows:
            _append(self.run / SAMPLES, row)
        self._samples += rows
        if step > self._logged:
            self._to_wandb(lambda run: self._log_table(run, step))

    def log_artifact(self, folder: Path, step: int) -> None:
        """Log the adapter in `folder` as a new version of the run's W&B model artifact."""

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
        except Exception as error:  # no W&B error may stop a run
            self._warn(f"W&B: {first_line(error)}; the run continues without it")
            self._wandb = None


def start_wandb(
    s: TrainSettings,
    secrets: Secrets,
    *,
    run: Path,
    config: dict[str, Any],
    run_id: str,
    resume: Literal["allow", "never"],
    say: Callable[[str], None],
    warn: Callable[[str], None],
) -> Any:
    """Start a W&B run with a fixed id; an existing one is resumed ("allow") or refused ("never").

    Returns None if W&B is off or cannot be reached.
    """
    mode = s.wandb_mode or ("online" if secrets.wandb_api_key else "disabled")
    if mode == "disabled":
        if s.wandb_mode is None:
            say("W&B: WANDB_API_KEY is not set, so metrics are only written to the run folder")
        return None
    os.environ.setdefault("WANDB_SILENT", "true")  # its banner would appear between phoque's log lines
    import wandb

    key = secrets.wandb_api_key.get_secret_value() if secrets.wandb_api_key else None
    try:
        settings = wandb.Settings(api_key=key, silent=True, console="off", init_timeout=30)
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
    except PhoqueError:  # a signal arrived meanwhile
        raise
    except Exception as error:  # no network, a bad key or a broken installation must not stop the run
        warn(f"W&B: {first_line(error)}; the run continues without it")
        return None
    return wandb_run


def _wandb_name(name: str) -> str:
    return f"eval/{name}" if name.startswith("held_out") else f"train/{name}"


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Read the rows of a JSONL file; an absent file has none."""
    return [json.loads(line) for line in _split_lines(path)]


def find_last_step(run: Path) -> int:
    """Return the last step in the folder's metrics, or -1 if there is none."""
    return max((row["step"] for row in _read_complete(run / METRICS)), default=-1)


def _last_wandb_step(wandb_run: Any) -> int:
    """Return the last step that the W&B server has of a resumed run, or -1 for a new one."""
    if wandb_run is None or not wandb_run.resumed:
        return -1
    return int(wandb_run.summary.get("train/global_step", -1))


def delete_after(run: Path, step: int) -> None:
    """Delete the lines after `step`, which a resumed run will write again."""
    for name in (METRICS, SAMPLES):
        path = run / name
        rows = [row for row in _read_complete(path) if row["step"] <= step]
        write_atomically(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def _read_complete(path: Path) -> list[dict[str, Any]]:
    """Read like `read_lines`, but skip a last line that a kill left incomplete."""
    lines = _split_lines(path)
    try:
        return [json.loads(line) for line in lines]
    except json.JSONDecodeError:
        return [json.loads(line) for line in lines[:-1]]


def _split_lines(path: Path) -> list[str]:
    """Split a file at newlines only: splitlines() also splits at U+2028, which texts may contain."""
    return [line for line in path.read_text(encoding="utf-8").split("\n") if line] if path.is_file() else []


def _append(path: Path, row: dict[str, Any]) -> None:
    with path.open("a", encoding="utf-8") as f:
        f.write(json.dumps(row, ensure_ascii=False) + "\n")
