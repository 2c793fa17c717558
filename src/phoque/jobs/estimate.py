"""What a training Job will take: minutes, dollars and GPU memory, before it is submitted.

A step of LoRA training multiplies each frozen weight twice, forward and backward, so the seconds of a token grow with
the parameters; attention, the adapter and the head add about as much for every model. Both numbers were fitted to the
speeds that docs/benchmarks/training.md has of six models on an H100 and an H200, which they give within 15%. Other GPUs
are taken to be slower in proportion to what a large matrix product reaches on them; that was not measured. A run that
is resumed on the same GPU is estimated by its own speed.
"""

import json
import statistics
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

from phoque.errors import UsageError
from phoque.gpus import GPUS, find_generation
from phoque.hub.store import Snapshot, Store
from phoque.jobs.flavors import Flavor
from phoque.models.lora import LoraOptions
from phoque.services import Services
from phoque.settings.fields import Resolved
from phoque.settings.train import TrainSettings
from phoque.training.checkpoints import RECORD, get_step, sort_checkpoints
from phoque.training.dry_run import count_parameters
from phoque.training.memory import estimate_memory
from phoque.training.metrics_log import read_lines
from phoque.training.prepare import (
    choose_micro_batch,
    conversations_per_step,
    find_store,
    lora_options,
    prepare,
    with_steps,
)
from phoque.training.run_files import METRICS

MEASURED_TFLOPS = 790
SECONDS_PER_TOKEN = 10.2e-6  # on the measured cards, in rows of about 2,100 tokens, for a model without parameters
SECONDS_PER_TOKEN_AND_BILLION = 7.15e-6  # and for each billion parameters beside the embeddings
TIME_FACTOR = {"nf4": 1.0, "bf16": 1.0, "fp8": 0.76, "fp32": 8.0}  # relative to NF4
RECOMPUTING = 0.55  # more time if all layers are recomputed
LAST_LINES = 20  # of the metrics, from which the speed of a run is taken
START_MINUTES = 4.0  # installing phoque and torch, downloading and loading a 3B model


@dataclass(frozen=True)
class JobEstimate:
    """The expected minutes of a Job, of which `training_minutes` train; None if the GPU's speed is not known.

    `memory_gb` is the estimate of a run in which no layer is recomputed, `least_memory_gb` with all of them recomputed.
    """

    tokens: int
    training_minutes: float | None
    memory_gb: float
    least_memory_gb: float
    beside: str = ""  # what is part of it, or is not

    @property
    def minutes(self) -> float | None:
        """Minutes from the start of the container to its end."""
        return None if self.training_minutes is None else START_MINUTES + self.training_minutes

    def describe(self, flavor: Flavor) -> dict[str, str]:
        """Facts for a dry run."""
        facts = {}
        if flavor.gpus:
            card = f"the GPU has {flavor.gpu_memory_gb:g} GB"
            facts["GPU memory"] = (
                f"about {self.memory_gb:.1f} GB without recomputing; {card}, so blocks are recomputed"
                if self.memory_gb > flavor.gpu_memory_gb
                else f"about {self.memory_gb:.1f} GB; {card}"
            )
        if self.minutes is None:
            return facts | {"time": f"not known for {flavor.gpu_model or 'a CPU'}{self.beside}"}
        dollars = self.minutes / 60 * flavor.dollars_per_hour
        return facts | {
            "time": f"about {self.minutes:.0f} minutes for {self.tokens / 1e6:,.2f} M tokens, "
            f"including {START_MINUTES:.0f} minutes to start{self.beside}",
            "cost": f"about ${dollars:.2f}",
        }


def estimate_job(resolved: Resolved[TrainSettings], services: Services, flavor: Flavor) -> JobEstimate:
    """Read config and data here, and estimate the Job from them.

    Raises UsageError for data that cannot be trained on, and for a model that does not fit the card in any way.
    """
    ready = prepare(resolved, services, weights=False)
    s = resolved.settings
    gpus = int(s.gpus) if s.gpus and s.gpus.isdigit() else 1
    s = s.model_copy(update={"micro_batch": choose_micro_batch(s, gpus)})
    s = with_steps(replace(resolved, settings=s), ready.scan, gpus).settings
    options: LoraOptions = lora_options(s, ready)
    counts = count_parameters(ready.config, options)
    memory = estimate_memory(ready, s, counts, gpus).on_device
    frugal = s.model_copy(update={"gradient_checkpointing": True})
    least = estimate_memory(ready, frugal, counts, gpus).on_device
    if flavor.gpus and least > flavor.gpu_memory_gb:
        raise UsageError(
            what=f"The run does not fit {flavor.name}.",
            why=f"It needs {least:.0f} GB even with all decoder blocks recomputed, and a card has "
            f"{flavor.gpu_memory_gb:g} GB.",
            fix="Choose a larger flavor, or several GPUs with --fsdp; or --quantization nf4, --micro-batch, or a lower "
            "--max-length.",
        )
    so_far = Progress() if s.run_dir else find_progress(find_store(s, services), flavor)
    if s.fresh_start:
        so_far = replace(so_far, steps=0)
    per_step = conversations_per_step(s, ready.scan, gpus) * ready.scan.mean_length
    tokens = round(max(0, s.max_steps - so_far.steps) * per_step)
    minutes = None
    controls = s.control_seeds if s.with_control else 0  # each takes as many steps; its answers are left out
    all_tokens = (tokens + controls * s.max_steps * per_step) / gpus
    if so_far.tokens_per_s:
        minutes = all_tokens / so_far.tokens_per_s / 60
    elif (gpu := GPUS.get(find_generation(flavor.gpu_model))) and gpu.tflops and not s.fsdp:
        billions = (counts["base"] - counts["embedding"]) / 1e9
        recomputed = min(1.0, max(0.0, memory - flavor.gpu_memory_gb) / max(1e-9, memory - least))
        per_token = estimate_seconds_per_token(billions, s.quantization, gpu.tflops) * (1 + RECOMPUTING * recomputed)
        minutes = all_tokens * per_token / 60
    left_out = [text for text, is_asked in (("merging", s.export_merged), ("early stops", s.early_stop)) if is_asked]
    beside = f"; {s.control_seeds} control runs included" if s.with_control else ""
    beside += so_far.describe() + (", with --fsdp" if s.fsdp else "")
    beside += f"; without {' and '.join(left_out)}" if left_out else ""
    return JobEstimate(tokens, minutes, memory, least, beside)


@dataclass(frozen=True)
class Progress:
    """What a run has done before: its steps, and the tokens per second of one GPU if that was the flavor's."""

    steps: int = 0
    tokens_per_s: float | None = None

    def describe(self) -> str:
        """For the estimate: what it rests on; empty for a new run."""
        speed = f" at its own {self.tokens_per_s:,.0f} tokens per second and GPU" if self.tokens_per_s else ""
        return f"; from step {self.steps} on{speed}" if self.steps else ""


def find_progress(store: Store | None, flavor: Flavor) -> Progress:
    """Read how far the run in a store has come, from its newest checkpoint."""
    snapshot = _find_snapshot(store)
    names = sort_checkpoints(snapshot.checkpoint_folders()) if snapshot else []
    newest = next((name for name in names if f"{name}/{METRICS}" in snapshot.files), None) if snapshot else None
    if store is None or snapshot is None or newest is None:
        return Progress()
    with TemporaryDirectory() as folder:
        fetched = [store.fetch(snapshot, f"{newest}/{name}", Path(folder)) for name in (METRICS, RECORD)]
        rows, record = read_lines(fetched[0]), json.loads(fetched[1].read_text())
    speeds = [row["tokens_per_s"] for row in rows if row.get("tokens_per_s")][-LAST_LINES:]
    generation = find_generation(flavor.gpu_model)
    is_same_gpu = bool(generation) and generation == find_generation(record.get("device", ""))
    speed = statistics.median(speeds) / record.get("processes", 1) if speeds and is_same_gpu else None
    return Progress(get_step(Path(newest)), speed)


def _find_snapshot(store: Store | None) -> Snapshot | None:
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        return store.snapshot() if store else None
    except RepositoryNotFoundError:
        return None


def estimate_seconds_per_token(billions: float, quantization: str, tflops: float) -> float:
    """Seconds that a trained token takes for a model of so many parameters beside its embeddings, on such a GPU."""
    seconds = SECONDS_PER_TOKEN + SECONDS_PER_TOKEN_AND_BILLION * billions
    return seconds * TIME_FACTOR[quantization] * MEASURED_TFLOPS / tflops
