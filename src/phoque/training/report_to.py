"""Services that a run is reported to: Weights & Biases, and Trackio (https://github.com/gradio-app/trackio)."""

import contextlib
import importlib.util
import io
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from phoque.errors import PhoqueError, UsageError, first_line
from phoque.extras import install_command
from phoque.settings.fields import Secrets
from phoque.settings.train import TrainSettings

SAMPLE_TABLE = "sample_outputs"
STEP = "train/global_step"


class Service(Protocol):
    """A service that has the metrics of a run; any of its methods may raise. `last_step` is the last step it has."""

    name: str
    last_step: int

    def log_metrics(self, step: int, values: dict[str, float]) -> None:
        """Log the metrics of a step."""
        ...

    def log_samples(self, step: int, columns: list[str], rows: list[Any]) -> None:
        """Log the table of all samples so far."""
        ...

    def log_adapter(self, folder: Path, step: int) -> None:
        """Log an adapter as a version of the run's model."""
        ...

    def finish(self, code: int) -> None:
        """End the run with its exit code."""
        ...


class Wandb:
    """A run on Weights & Biases, or on disk for it."""

    name = "W&B"

    def __init__(self, run: Any) -> None:
        self._run = run
        self.last_step = int(run.summary.get(STEP, -1)) if run.resumed else -1

    def log_metrics(self, step: int, values: dict[str, float]) -> None:
        self._run.log({STEP: step} | _group_names(values))

    def log_samples(self, step: int, columns: list[str], rows: list[Any]) -> None:
        import wandb

        self._run.log({SAMPLE_TABLE: wandb.Table([*columns], rows), STEP: step})

    def log_adapter(self, folder: Path, step: int) -> None:
        import wandb

        model = wandb.Artifact(f"model-{self._run.id}", type="model", metadata={"step": step})
        for name in ("adapter_model.safetensors", "adapter_config.json"):
            model.add_file(str(folder / name), name=name)
        self._run.log_artifact(model, aliases=[f"step-{step}", "latest"])

    def finish(self, code: int) -> None:
        self._run.finish(exit_code=code)


class Trackio:
    """A run in Trackio's database on this machine, or in a Space."""

    name = "Trackio"
    last_step = -1  # a database on another machine does not have the run: the run folder says what was logged

    def __init__(self, run: Any) -> None:
        self._run = run

    def log_metrics(self, step: int, values: dict[str, float]) -> None:
        self._run.log(_group_names(values), step=step)

    def log_samples(self, step: int, columns: list[str], rows: list[Any]) -> None:
        import trackio

        self._run.log({SAMPLE_TABLE: trackio.Table(columns, rows)}, step=step)

    def log_adapter(self, folder: Path, step: int) -> None:
        pass  # --wandb-log-model asks for an artifact of W&B

    def finish(self, code: int) -> None:
        with contextlib.redirect_stdout(io.StringIO()):
            self._run.finish()


@dataclass(frozen=True, kw_only=True)
class Report:
    """A run as services know it: its folder, the record that they show, and its id, by which it is continued."""

    settings: TrainSettings
    secrets: Secrets
    run: Path
    record: dict[str, Any]
    run_id: str
    is_fresh: bool
    say: Callable[[str], None]

    @property
    def resume(self) -> Literal["never", "allow"]:
        """Whether an existing run of this id may be continued, as both services call it."""
        return "never" if self.is_fresh else "allow"


def start_services(report: Report, warn: Callable[[str], None]) -> list[Service]:
    """Start a run, or continue the one of the same id, in each service of --report-to that can be reached."""
    starts = {"wandb": (Wandb.name, _start_wandb), "trackio": (Trackio.name, _start_trackio)}
    services: list[Service] = []
    for choice, (name, start) in starts.items():
        if choice not in report.settings.report_to:
            continue
        try:
            service = start(report)
        except PhoqueError:  # a signal arrived meanwhile
            raise
        except Exception as error:  # no network, a bad key or a broken installation must not stop the run
            warn(f"{name}: {first_line(error)}; the run continues without it")
            continue
        services += [service] if service else []
    return services


def check_services(s: TrainSettings) -> None:
    """Raise UsageError if a service of --report-to is not installed."""
    if "trackio" in s.report_to and importlib.util.find_spec("trackio") is None:
        raise UsageError(
            what="--report-to trackio needs Trackio.",
            why="It comes with the extra `trackio`.",
            fix=f"Install it with: {install_command('trackio')}",
        )


def _start_wandb(report: Report) -> Service | None:
    s, secrets = report.settings, report.secrets
    mode = s.wandb_mode or ("online" if secrets.wandb_api_key else "disabled")
    if mode == "disabled":
        if s.wandb_mode is None:
            report.say("W&B: WANDB_API_KEY is not set, so metrics are only written to the run folder")
        return None
    os.environ.setdefault("WANDB_SILENT", "true")  # its banner would appear between phoque's log lines
    import wandb

    key = secrets.wandb_api_key.get_secret_value() if secrets.wandb_api_key else None
    settings = wandb.Settings(api_key=key, silent=True, console="off", init_timeout=30)
    wandb_run = wandb.init(
        project=s.wandb_project,
        name=report.run.name,
        id=report.run_id,
        mode=mode,
        dir=str(report.run),
        config=report.record,
        resume=report.resume,
        settings=settings,
    )
    wandb_run.define_metric(STEP)
    wandb_run.define_metric("*", step_metric=STEP)
    return Wandb(wandb_run)


def _start_trackio(report: Report) -> Service:
    s = report.settings
    name = f"{report.run.name}-{report.run_id[:6]}"  # Trackio finds the run to continue by its name
    with contextlib.redirect_stdout(io.StringIO()):  # it prints its own banner, and --json has stdout
        import trackio

        trackio_run = trackio.init(
            project=s.wandb_project,
            name=name,
            config=_flatten(report.record),
            resume=report.resume,
            private=not s.public,  # of a Space, if TRACKIO_SPACE_ID names one; without this it would be public
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
        )
    report.say(f"Trackio: `trackio show --project {s.wandb_project}` shows the run {name}")
    return Trackio(trackio_run)


def _group_names(values: dict[str, float]) -> dict[str, float]:
    """The metrics under the names that charts are grouped by: train/loss, eval/held_out_loss."""
    return {f"{'eval' if name.startswith('held_out') else 'train'}/{name}": value for name, value in values.items()}


def _flatten(record: dict[str, Any]) -> dict[str, Any]:
    """The settings of a record by name, for a table of settings."""
    return {name: row["value"] for name, row in record["settings"].items() if "flag" in row}
