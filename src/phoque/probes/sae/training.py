"""Training dictionaries with sae-lens's trainers on phoque's own stream of activations; killed runs go on."""

import json
import math
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy
import torch

from phoque.errors import FAILED, PhoqueError
from phoque.probes.sae.activation_store import Shards, Stream
from phoque.probes.sae.dictionary import Dictionary, calibrated, read_dictionary, write_dictionary

CHECKPOINT_S = 60.0
RAW = "raw"  # the autoencoder as sae-lens saves it
SAMPLE = 65_536  # tokens that the threshold is set on
LOOKED_AT = 8192  # tokens that scale and centre are taken from
ARCHITECTURES = ("batchtopk", "topk", "jumprelu", "matryoshka", "standard")
L0_PATIENCE = 0.02  # how fast the weight of an L1 penalty follows the number of active features


@dataclass(frozen=True)
class Recipe:
    """What decides how a dictionary comes out, beside the activations: all of it is in its fingerprint."""

    architecture: str
    features: int
    k: int
    batch: int
    passes: int
    learning_rate: float
    seed: int


def trained(
    recipe: Recipe,
    shards: Shards,
    layer: int,
    about: dict[str, Any],
    folder: Path,
    on: torch.device,
    show: Callable[[int, str], None] = lambda done, text: None,
) -> Dictionary:
    """A dictionary of this recipe, from `folder` if it is there already, with its threshold set and sae-lens's files.

    Goes on from the last checkpoint in `folder`. Raises PhoqueError (1) if the loss is not finite.
    """
    final = folder / "sae"
    if not final.is_dir():
        made = calibrated_after(_fitted(recipe, shards, layer, folder, on, show), recipe, shards, layer, on)
        made.config["metadata"] = about | made.config["metadata"]
        staging = folder / ".sae.partial"
        shutil.rmtree(staging, ignore_errors=True)
        write_dictionary(made, staging)
        staging.rename(final)
        for old in (folder / RAW, *folder.glob("step-*")):
            shutil.rmtree(old)
    return read_dictionary(final)


def calibrated_after(raw: Path, recipe: Recipe, shards: Shards, layer: int, on: torch.device) -> Dictionary:
    """What was trained, read as anyone would read it; BatchTopK's threshold is set on activations."""
    found = read_dictionary(raw)
    if recipe.architecture in ("batchtopk", "matryoshka"):
        found = calibrated(found.to(on), _sample(shards, layer, SAMPLE).to(on).float(), recipe.k)
    return found


def _sample(shards: Shards, layer: int, tokens: int) -> torch.Tensor:
    """Tokens from all over the shards."""
    files = shards.files()
    share = -(-tokens // len(files))
    parts = []
    for file in files:
        own = shards.tensor(file, layer)
        parts.append(own[torch.randperm(len(own), generator=torch.Generator().manual_seed(0))[:share]])
    return torch.cat(parts)


def _fitted(
    recipe: Recipe, shards: Shards, layer: int, folder: Path, on: torch.device, show: Callable[[int, str], None]
) -> Path:
    """Train to the end; the folder of the autoencoder as sae-lens saves it."""
    stream = Stream(shards, layer, recipe.batch, recipe.passes, recipe.seed)
    steps = stream.steps()
    if steps == 0:
        raise PhoqueError(
            "There are too few activations for a dictionary.",
            f"{sum(shards.counts(layer))} tokens do not fill one batch of {recipe.batch}.",
            "Give it more text: --tokens, --chat, --text; or lower --sae-batch.",
        )
    sample = _sample(shards, layer, LOOKED_AT).to(on).float()
    scale = math.sqrt(sample.shape[1]) / float(sample.norm(dim=1).mean())
    trainer = made_trainer(recipe, sample, scale, steps, on)
    done = _restored(trainer, folder)
    last = time.monotonic()
    with _fast_products(on):
        for batch in stream.batches(on, skip=done):
            out = trainer.step(batch * scale)
            trainer.n_training_steps += 1
            done += 1
            _steer_sparsity(trainer, recipe, out)
            if done % 50 == 0 or done == steps:
                _refuse_diverged(out, done, layer)
                show(done, f"block {layer}, seed {recipe.seed}")
            if time.monotonic() - last > CHECKPOINT_S and done < steps:
                _checkpoint(trainer, folder)
                last = time.monotonic()
    sae: Any = trainer.sae
    sae.fold_activation_norm_scaling_factor(scale)
    raw = folder / RAW
    sae.save_inference_model(raw)
    config = json.loads((raw / "cfg.json").read_text())
    config["metadata"] |= {"recipe": asdict(recipe), "steps": steps, "scale": scale}
    (raw / "cfg.json").write_text(json.dumps(config))
    return raw


def made_trainer(recipe: Recipe, sample: torch.Tensor, scale: float, steps: int, on: torch.device) -> Any:
    """sae-lens's trainer for activations that are scaled to a mean norm of sqrt(hidden)."""
    from sae_lens.config import SAETrainerConfig
    from sae_lens.registry import get_sae_training_class
    from sae_lens.training.sae_trainer import SAETrainer

    name = {"matryoshka": "matryoshka_batchtopk"}.get(recipe.architecture, recipe.architecture)
    sae_class, config_class = get_sae_training_class(name)
    own: dict[str, Any] = {
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
    sae = sae_class(config_class(d_in=sample.shape[1], d_sae=recipe.features, device=str(on), **own))
    if on.type == "cpu" and recipe.architecture in ("batchtopk", "matryoshka"):
        sae.activation_fn = Selected(recipe.k)
    with torch.no_grad():
        sae.b_dec.copy_(sample.mean(0) * scale)
        if recipe.architecture == "jumprelu":  # Adam moves a threshold by its rate a step: it has to begin in place
            drives = (sample * scale - sae.b_dec) @ sae.W_enc
            sae.get_parameter("threshold").fill_(float(drives.flatten().topk(recipe.k * len(sample)).values[-1]))
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


class Selected(torch.nn.Module):
    """sae-lens's BatchTopK on a CPU: the k x batch largest by their least, found without sorting the rest."""

    def __init__(self, k: int) -> None:
        super().__init__()
        self.k = k

    def forward(self, drives: torch.Tensor) -> torch.Tensor:
        active = drives.relu()
        flat = active.detach().flatten().numpy()
        place = len(flat) - self.k * len(drives)
        return active * (active >= float(numpy.partition(flat, place)[place]))


def _steer_sparsity(trainer: Any, recipe: Recipe, out: Any) -> None:
    """An L1 penalty has no number of features to hit: its weight follows it there, slowly."""
    if recipe.architecture == "standard":
        active = float((out.feature_acts > 0).sum(-1).float().mean())
        weight = trainer.coefficient_schedulers["l1"]
        weight.final_value *= (max(active, 0.1) / recipe.k) ** L0_PATIENCE


def _refuse_diverged(out: Any, step: int, layer: int) -> None:
    if not bool(torch.isfinite(out.loss)):
        raise PhoqueError(
            f"The autoencoder's loss is not finite at step {step} (block {layer}).",
            "It diverged.",
            "Lower --sae-learning-rate.",
            FAILED,
        )


class _fast_products:  # noqa: N801 - used like a function
    """TF32 products on a GPU: an autoencoder's noise is far above their rounding."""

    def __init__(self, on: torch.device) -> None:
        self.before = torch.get_float32_matmul_precision()
        self.wanted = "high" if on.type == "cuda" else self.before

    def __enter__(self) -> None:
        torch.set_float32_matmul_precision(self.wanted)

    def __exit__(self, *_: Any) -> None:
        torch.set_float32_matmul_precision(self.before)


def _checkpoint(trainer: Any, folder: Path) -> None:
    """The trainer's whole state, under a temporary name until it is whole; older ones go then."""
    name = f"step-{trainer.n_training_steps:09}"
    staging = f".{name}"
    trainer.save_checkpoint(staging, base_path=folder)
    weights = {kind: c.final_value for kind, c in trainer.coefficient_schedulers.items()}
    (folder / staging / "weights.json").write_text(json.dumps(weights))
    (folder / staging).rename(folder / name)
    for old in sorted(folder.glob("step-*"))[:-1]:
        shutil.rmtree(old)


def _restored(trainer: Any, folder: Path) -> int:
    """Go on where the last checkpoint stopped; the steps that were done."""
    folder.mkdir(parents=True, exist_ok=True)
    found = sorted(folder.glob("step-*"))
    if not found:
        return 0
    trainer.sae.load_weights_from_checkpoint(found[-1])
    trainer.load_trainer_state(found[-1])
    for kind, value in json.loads((found[-1] / "weights.json").read_text()).items():
        trainer.coefficient_schedulers[kind].final_value = value
    return trainer.n_training_steps
