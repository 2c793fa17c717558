"""Train dictionaries with sae-lens's trainers on phoque's own stream of activations; a killed run can resume."""

import json
import math
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy
import torch

from phoque.errors import RunError, UsageError
from phoque.files import atomic_folder
from phoque.probes.sae.activation_store import ActivationStore, ActivationStream
from phoque.probes.sae.dictionary import Dictionary, calibrate_threshold, read_dictionary, write_dictionary

CHECKPOINT_S = 60.0  # seconds between checkpoints
RAW = "raw"  # the autoencoder as sae-lens saves it
CALIBRATION_TOKENS = 65_536  # tokens that the threshold is calibrated on
SCALE_TOKENS = 8192  # tokens that the input scale and the decoder bias are estimated from
ARCHITECTURES = ("batchtopk", "topk", "jumprelu", "matryoshka", "standard")
L1_UPDATE_EXPONENT = 0.02  # exponent of the update per step that moves the L1 weight towards k active features


@dataclass(frozen=True)
class Recipe:
    """The hyperparameters of a dictionary; all of them are part of its fingerprint."""

    architecture: str
    features: int
    k: int
    batch: int
    passes: int
    learning_rate: float
    seed: int


def train_dictionary(
    recipe: Recipe,
    shards: ActivationStore,
    layer: int,
    *,
    metadata: dict[str, Any],
    folder: Path,
    on: torch.device,
    show: Callable[[int, str], None] = lambda done, text: None,
) -> Dictionary:
    """Train a dictionary, calibrate its threshold and save it to `folder`/sae in sae-lens's format.

    A dictionary that `folder` has already is only loaded; training resumes from the last checkpoint in `folder`.
    Raises UsageError if there are too few activations, and (1) if the loss is not finite.
    """
    final = folder / "sae"
    if not final.is_dir():
        dictionary = load_calibrated(_fit(recipe, shards, layer, folder, on, show), recipe, shards, layer, on)
        dictionary.config["metadata"] = metadata | dictionary.config["metadata"]
        with atomic_folder(final) as staging:
            write_dictionary(dictionary, staging)
        for old in (folder / RAW, *folder.glob("step-*")):
            shutil.rmtree(old)
    return read_dictionary(final)


def load_calibrated(raw: Path, recipe: Recipe, shards: ActivationStore, layer: int, on: torch.device) -> Dictionary:
    """Load the trained dictionary from its files; for BatchTopK kinds, calibrate the threshold on activations."""
    dictionary = read_dictionary(raw)
    if recipe.architecture in ("batchtopk", "matryoshka"):
        dictionary = calibrate_threshold(
            dictionary.to(on), _sample_tokens(shards, layer, CALIBRATION_TOKENS).to(on).float(), recipe.k
        )
    return dictionary


def fit_to_rows(recipe: Recipe, rows: torch.Tensor, steps: int, on: torch.device) -> Dictionary:
    """Train a small dictionary on rows (tokens, hidden) in memory; a row of zeros has no active feature.

    Both biases stay zero: for differences, an offset that all rows share is a feature like any other. Raises RunError
    if the loss is not finite.
    """
    rows = rows.to(on).float()
    scale = math.sqrt(rows.shape[1]) / max(float(rows.norm(dim=1).mean()), 1e-12)
    trainer = make_trainer(recipe, rows[:SCALE_TOKENS], scale, steps, on)
    with torch.no_grad():
        for bias in (trainer.sae.b_dec, trainer.sae.b_enc):
            bias.zero_().requires_grad_(False)
    generator = torch.Generator().manual_seed(recipe.seed)
    with _tf32_matmul(on):
        for step in range(1, steps + 1):
            chosen = torch.randint(len(rows), (recipe.batch,), generator=generator).to(on)
            out = trainer.step(rows[chosen] * scale)
            trainer.n_training_steps += 1
            if step % 50 == 0 or step == steps:
                _check_finite_loss(out, step, "the difference SAE", "Pass --difference-features 0 to leave it out.")
    trainer.sae.fold_activation_norm_scaling_factor(scale)
    with tempfile.TemporaryDirectory() as folder:
        trainer.sae.save_inference_model(Path(folder))
        dictionary = read_dictionary(Path(folder)).to(on)
    sample = rows[torch.randperm(len(rows), generator=generator)[:CALIBRATION_TOKENS].to(on)]
    return calibrate_threshold(dictionary, sample, recipe.k)


def _sample_tokens(shards: ActivationStore, layer: int, tokens: int) -> torch.Tensor:
    """Sample about `tokens` activations evenly from all shards: (tokens, hidden)."""
    files = shards.files()
    per_file = -(-tokens // len(files))
    parts = []
    for file in files:
        activations = shards.tensor(file, layer)
        parts.append(
            activations[torch.randperm(len(activations), generator=torch.Generator().manual_seed(0))[:per_file]]
        )
    return torch.cat(parts)


def _fit(
    recipe: Recipe,
    shards: ActivationStore,
    layer: int,
    folder: Path,
    on: torch.device,
    show: Callable[[int, str], None],
) -> Path:
    """Train to the last step; return the folder of the autoencoder as sae-lens saves it."""
    stream = ActivationStream(shards, layer, recipe.batch, recipe.passes, recipe.seed)
    steps = stream.count_batches()
    if steps == 0:
        raise UsageError(
            what="There are too few activations for a dictionary.",
            why=f"{sum(shards.shard_sizes(layer))} tokens do not fill one batch of {recipe.batch}.",
            fix="Use more text (--tokens, --chats, --text) or lower --sae-batch.",
        )
    sample = _sample_tokens(shards, layer, SCALE_TOKENS).to(on).float()
    scale = math.sqrt(sample.shape[1]) / float(sample.norm(dim=1).mean())
    trainer = make_trainer(recipe, sample, scale, steps, on)
    done = _restore_checkpoint(trainer, folder)
    last = time.monotonic()
    with _tf32_matmul(on):
        for batch in stream.iter_batches(on, skip=done):
            out = trainer.step(batch * scale)
            trainer.n_training_steps += 1
            done += 1
            _adjust_l1_weight(trainer, recipe, out)
            if done % 50 == 0 or done == steps:
                _check_finite_loss(out, done, f"block {layer}", "Lower --sae-learning-rate.")
                show(done, f"block {layer}, seed {recipe.seed}")
            if time.monotonic() - last > CHECKPOINT_S and done < steps:
                _save_checkpoint(trainer, folder)
                last = time.monotonic()
    sae: Any = trainer.sae
    sae.fold_activation_norm_scaling_factor(scale)
    raw = folder / RAW
    sae.save_inference_model(raw)
    config = json.loads((raw / "cfg.json").read_text())
    config["metadata"] |= {"recipe": asdict(recipe), "steps": steps, "scale": scale}
    (raw / "cfg.json").write_text(json.dumps(config))
    return raw


def make_trainer(recipe: Recipe, sample: torch.Tensor, scale: float, steps: int, on: torch.device) -> Any:
    """Build sae-lens's trainer for activations that are scaled to a mean norm of sqrt(hidden)."""
    from sae_lens.config import SAETrainerConfig
    from sae_lens.registry import get_sae_training_class
    from sae_lens.training.sae_trainer import SAETrainer

    name = {"matryoshka": "matryoshka_batchtopk"}.get(recipe.architecture, recipe.architecture)
    sae_class, config_class = get_sae_training_class(name)
    options: dict[str, Any] = {
        "batchtopk": {"k": recipe.k, "aux_loss_coefficient": 1 / 32},
        "topk": {"k": recipe.k, "aux_loss_coefficient": 1 / 32},
        "matryoshka": {
            "k": recipe.k,
            "aux_loss_coefficient": 1 / 32,
            "matryoshka_widths": [recipe.features // 8, recipe.features // 2, recipe.features],
        },
        "jumprelu": {
            "jumprelu_sparsity_loss_mode": "quadratic",
            "target_l0": float(recipe.k),
            "l0_coefficient": 0.3,
            "jumprelu_bandwidth": 1.0,
            "jumprelu_ste_to_input": True,
            "l0_warm_up_steps": steps // 10,
        },
        "standard": {"l1_coefficient": 1.0, "l1_warm_up_steps": 0},
    }[recipe.architecture]
    torch.manual_seed(recipe.seed)
    sae = sae_class(config_class(d_in=sample.shape[1], d_sae=recipe.features, device=str(on), **options))
    if on.type == "cpu" and recipe.architecture in ("batchtopk", "matryoshka"):
        sae.activation_fn = CpuBatchTopK(recipe.k)
    with torch.no_grad():
        sae.b_dec.copy_(sample.mean(0) * scale)
        if recipe.architecture == "jumprelu":  # Adam moves it by only about lr per step
            pre_activations = (sample * scale - sae.b_dec) @ sae.W_enc
            sae.get_parameter("threshold").fill_(
                float(pre_activations.flatten().topk(recipe.k * len(sample)).values[-1])
            )
    config = SAETrainerConfig(
        total_training_samples=steps * recipe.batch,
        train_batch_size_samples=recipe.batch,
        lr=recipe.learning_rate,
        lr_end=recipe.learning_rate / 10,
        lr_warm_up_steps=min(100, steps // 10),
        lr_decay_steps=steps // 3,
        device=str(on),
        dead_feature_window=max(10, min(1000, steps // 20)),
    )
    return SAETrainer(config, sae, data_provider=iter(()))


class CpuBatchTopK(torch.nn.Module):
    """sae-lens's BatchTopK for CPUs: finds the k x batch largest values by partition, not by sorting."""

    def __init__(self, k: int) -> None:
        super().__init__()
        self.k = k

    def forward(self, pre_activations: torch.Tensor) -> torch.Tensor:
        active = pre_activations.relu()
        flat = active.detach().flatten().numpy()
        position = len(flat) - self.k * len(pre_activations)
        return active * (active >= float(numpy.partition(flat, position)[position]))


def _adjust_l1_weight(trainer: Any, recipe: Recipe, out: Any) -> None:
    """Move the weight of the L1 penalty slowly so that about k features are active; an L1 penalty has no target L0."""
    if recipe.architecture == "standard":
        active = float((out.feature_acts > 0).sum(-1).float().mean())
        weight = trainer.coefficient_schedulers["l1"]
        weight.final_value *= (max(active, 0.1) / recipe.k) ** L1_UPDATE_EXPONENT


def _check_finite_loss(out: Any, step: int, trained_on: str, fix: str) -> None:
    if not bool(torch.isfinite(out.loss)):
        raise RunError(
            what=f"The autoencoder's loss is not finite at step {step} ({trained_on}).",
            why="The training diverged.",
            fix=fix,
        )


class _tf32_matmul:  # noqa: N801 - used like a function
    """Use TF32 matmuls on a GPU: their rounding error is far below the gradient noise of an autoencoder."""

    def __init__(self, on: torch.device) -> None:
        self.previous = torch.get_float32_matmul_precision()
        self.precision = "high" if on.type == "cuda" else self.previous

    def __enter__(self) -> None:
        torch.set_float32_matmul_precision(self.precision)

    def __exit__(self, *_: Any) -> None:
        torch.set_float32_matmul_precision(self.previous)


def _save_checkpoint(trainer: Any, folder: Path) -> None:
    """Save the trainer's state under a temporary name, rename it when complete, and delete older checkpoints."""
    name = f"step-{trainer.n_training_steps:09}"
    staging = f".{name}"
    trainer.save_checkpoint(staging, base_path=folder)
    weights = {kind: c.final_value for kind, c in trainer.coefficient_schedulers.items()}
    (folder / staging / "weights.json").write_text(json.dumps(weights))
    (folder / staging).rename(folder / name)
    for old in sorted(folder.glob("step-*"))[:-1]:
        shutil.rmtree(old)


def _restore_checkpoint(trainer: Any, folder: Path) -> int:
    """Restore the last checkpoint, if there is one; return the number of steps that are done."""
    folder.mkdir(parents=True, exist_ok=True)
    checkpoints = sorted(folder.glob("step-*"))
    if not checkpoints:
        return 0
    trainer.sae.load_weights_from_checkpoint(checkpoints[-1])
    trainer.load_trainer_state(checkpoints[-1])
    for kind, value in json.loads((checkpoints[-1] / "weights.json").read_text()).items():
        trainer.coefficient_schedulers[kind].final_value = value
    return trainer.n_training_steps
