"""A sparse autoencoder to read with: sae-lens's files, its encode and decode, without its twelve seconds of imports."""

import json
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from phoque.errors import PhoqueError, first_line

CONFIG, WEIGHTS = "cfg.json", "sae_weights.safetensors"
READABLE = ("standard", "jumprelu", "topk")
AT_ONCE = 4096  # tokens whose activations of all features are held at a time


@dataclass
class Dictionary:
    """Encoder (hidden, features) and decoder (features, hidden) in fp32; a threshold a feature, or the k that are kept.

    `config` is what sae-lens wrote. `encode` and `decode` equal those of `sae_lens.SAE.load_from_disk` to rounding.
    """

    encoder: torch.Tensor
    encoder_bias: torch.Tensor
    decoder: torch.Tensor
    bias: torch.Tensor
    threshold: torch.Tensor
    k: int | None
    centred: bool
    config: dict[str, Any]

    @property
    def features(self) -> int:
        """How many there are."""
        return len(self.decoder)

    def to(self, on: torch.device) -> "Dictionary":
        """The same on another device."""
        names = ("encoder", "encoder_bias", "decoder", "bias", "threshold")
        return replace(self, **{name: getattr(self, name).to(on) for name in names})

    def drives(self, x: torch.Tensor) -> torch.Tensor:
        """What the encoder gives before it is cut: (tokens, hidden) -> (tokens, features)."""
        x = x.float()
        return (x - self.bias if self.centred else x) @ self.encoder + self.encoder_bias

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        """Feature activations: (tokens, hidden) -> (tokens, features)."""
        drives = self.drives(x)
        if self.k is not None:
            values, places = drives.topk(self.k, dim=-1, sorted=False)
            return torch.zeros_like(drives).scatter_(-1, places, values.relu())
        return drives.relu() * (drives > self.threshold)

    def decode(self, z: torch.Tensor) -> torch.Tensor:
        """What the features say of the residual stream: (tokens, features) -> (tokens, hidden)."""
        return z @ self.decoder + self.bias

    def block(self) -> int | None:
        """The block whose output this dictionary was made for, counted from 0; None if its files do not say."""
        name = str((self.config.get("metadata") or {}).get("hook_name") or self.config.get("hook_name") or "")
        if found := re.fullmatch(r"blocks\.(\d+)\.hook_resid_(post|pre)", name):
            return int(found[1]) - (found[2] == "pre")
        found = re.fullmatch(r"(?:[\w]+\.)*layers\.(\d+)", name)
        return int(found[1]) if found else None

    def model(self) -> str:
        """The model that it says it was made for."""
        return str((self.config.get("metadata") or {}).get("model_name") or self.config.get("model_name") or "")


def read_dictionary(folder: Path) -> Dictionary:
    """A dictionary from sae-lens's two files. Raises PhoqueError (2) for one that cannot be read as it was meant."""
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise PhoqueError(
                f"{folder} is no sparse autoencoder.", f"It has no {name}.", "Name a folder that sae-lens has saved."
            )
    try:
        config = json.loads((folder / CONFIG).read_text("utf-8"))
        weights = load_file(folder / WEIGHTS)
    except Exception as error:
        raise PhoqueError(f"{folder} cannot be read.", first_line(error), "Save it anew.") from error
    kind, k = config.get("architecture", "standard"), None
    if config.get("activation_fn_str", "relu") == "topk":  # as sae-lens wrote it before its version 6
        kind, config["k"] = "topk", config.get("activation_fn_kwargs", {}).get("k")
    if kind == "topk":
        k = int(config["k"])
    normalized = config.get("normalize_activations") or "none"
    odd = {
        "architecture": kind not in READABLE and kind,
        "normalize_activations": normalized not in ("none", "expected_average_only_in") and normalized,
        "reshape_activations": (config.get("reshape_activations") or "none") != "none" and "hook_z",
        "weights": not {"W_enc", "b_enc", "W_dec", "b_dec"} <= weights.keys() and sorted(weights),
    }
    for name, value in odd.items():
        if value:
            raise PhoqueError(
                f"{folder} is an autoencoder of a kind that phoque does not read.",
                f"Its {name} is {value}.",
                f"Use one of {', '.join(READABLE)}, saved for inference.",
            )
    found = Dictionary(
        weights["W_enc"].float(),
        weights["b_enc"].float(),
        weights["W_dec"].float(),
        weights["b_dec"].float(),
        weights.get("threshold", torch.zeros(1)).float(),
        k,
        bool(config.get("apply_b_dec_to_input", True)),
        config,
    )
    if config.get("rescale_acts_by_decoder_norm"):
        norms = found.decoder.norm(dim=1)
        found.encoder, found.encoder_bias = found.encoder * norms, found.encoder_bias * norms
        found.decoder = found.decoder / norms[:, None]
    return found


def write_dictionary(found: Dictionary, folder: Path) -> None:
    """sae-lens's two files, which its `SAE.load_from_disk` reads."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = {"W_enc": found.encoder, "b_enc": found.encoder_bias, "W_dec": found.decoder, "b_dec": found.bias}
    if found.config["architecture"] == "jumprelu":
        weights["threshold"] = found.threshold.expand(found.features)
    save_file({name: tensor.contiguous().cpu() for name, tensor in weights.items()}, folder / WEIGHTS)
    (folder / CONFIG).write_text(json.dumps(found.config, indent=1))


def calibrated(found: Dictionary, sample: torch.Tensor, k: int) -> Dictionary:
    """A dictionary whose one threshold lets k features a token through, on average, on a sample (tokens, hidden).

    BatchTopK trains with the k x batch largest and keeps a moving average of their least for a threshold: after few
    steps that is far too low (an L0 of 670 where 32 was asked for was seen).
    """
    wanted = k * len(sample)
    largest = torch.empty(0, device=sample.device)
    for part in sample.split(AT_ONCE):
        drives = found.drives(part).flatten()
        largest = torch.cat([largest, drives[drives > 0]])
        if len(largest) > 4 * wanted:
            largest = largest.topk(wanted, sorted=False).values
    level = largest.topk(min(wanted, len(largest)), sorted=False).values.min()
    return replace(found, threshold=level.expand(found.features).clone())
