"""A sparse autoencoder for inference: reads and writes sae-lens's files without its 12 seconds of imports."""

import json
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from phoque.errors import UsageError, first_line

CONFIG, WEIGHTS = "cfg.json", "sae_weights.safetensors"
DIFFERENCES = "the difference between two models"  # what a difference SAE reads, in its metadata
SUPPORTED_ARCHITECTURES = ("standard", "jumprelu", "topk")
ENCODE_CHUNK = 4096  # tokens that are encoded at a time, to bound the memory of all feature activations


@dataclass
class Dictionary:
    """Encoder (hidden, features) and decoder (features, hidden) in fp32, with one threshold per feature or a top-k.

    `bias` is the decoder's; `centered` says that it is subtracted from the encoder's input. `config` is sae-lens's
    cfg.json. `encode` and `decode` equal those of `sae_lens.SAE.load_from_disk` up to rounding.
    """

    encoder: torch.Tensor
    encoder_bias: torch.Tensor
    decoder: torch.Tensor
    bias: torch.Tensor
    threshold: torch.Tensor
    k: int | None
    centered: bool
    config: dict[str, Any]

    @property
    def features(self) -> int:
        """The number of features."""
        return len(self.decoder)

    def to(self, device: torch.device) -> "Dictionary":
        """Copy the dictionary to another device."""
        names = ("encoder", "encoder_bias", "decoder", "bias", "threshold")
        return replace(self, **{name: getattr(self, name).to(device) for name in names})

    def compute_pre_activations(self, x: torch.Tensor) -> torch.Tensor:
        """Compute the encoder's output before its activation function: (tokens, hidden) -> (tokens, features)."""
        x = x.float()
        return (x - self.bias if self.centered else x) @ self.encoder + self.encoder_bias

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        """Compute the feature activations: (tokens, hidden) -> (tokens, features)."""
        pre_activations = self.compute_pre_activations(x)
        if self.k is not None:
            values, indices = pre_activations.topk(self.k, dim=-1, sorted=False)
            return torch.zeros_like(pre_activations).scatter_(-1, indices, values.relu())
        return pre_activations.relu() * (pre_activations > self.threshold)

    def decode(self, z: torch.Tensor) -> torch.Tensor:
        """Reconstruct the residual stream from feature activations: (tokens, features) -> (tokens, hidden)."""
        return z @ self.decoder + self.bias

    def block_index(self) -> int | None:
        """Find the block whose output this dictionary encodes, counted from 0; None if its config does not say."""
        name = str((self.config.get("metadata") or {}).get("hook_name") or self.config.get("hook_name") or "")
        if match := re.fullmatch(r"blocks\.(\d+)\.hook_resid_(post|pre)", name):
            return int(match[1]) - (match[2] == "pre")
        match = re.fullmatch(r"(?:[\w]+\.)*layers\.(\d+)", name)
        return int(match[1]) if match else None

    def model_name(self) -> str:
        """Find the model that this dictionary was trained on; empty if its config does not say."""
        return str((self.config.get("metadata") or {}).get("model_name") or self.config.get("model_name") or "")


def read_dictionary(folder: Path) -> Dictionary:
    """Read a dictionary from sae-lens's files. Raises UsageError if they are missing, broken or unsupported."""
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise UsageError(
                what=f"{folder} is not a sparse autoencoder.",
                why=f"It has no {name}.",
                fix="Name a folder that sae-lens has saved.",
            )
    try:
        config = json.loads((folder / CONFIG).read_text("utf-8"))
        weights = load_file(folder / WEIGHTS)
    except Exception as error:
        raise UsageError(
            what=f"{folder} cannot be read.", why=first_line(error), fix="Save it again with sae-lens."
        ) from error
    kind, k = config.get("architecture", "standard"), None
    if config.get("activation_fn_str", "relu") == "topk":  # the format of sae-lens before version 6
        kind, config["k"] = "topk", config.get("activation_fn_kwargs", {}).get("k")
    if kind == "topk":
        k = int(config["k"])
    normalized = config.get("normalize_activations") or "none"
    unsupported = {
        "architecture": kind not in SUPPORTED_ARCHITECTURES and kind,
        "normalize_activations": normalized not in ("none", "expected_average_only_in") and normalized,
        "reshape_activations": (config.get("reshape_activations") or "none") != "none" and "hook_z",
        "weights": not {"W_enc", "b_enc", "W_dec", "b_dec"} <= weights.keys() and sorted(weights),
    }
    for name, value in unsupported.items():
        if value:
            raise UsageError(
                what=f"{folder} is an autoencoder of a kind that phoque does not support.",
                why=f"Its {name} is {value}.",
                fix=f"Use one of {', '.join(SUPPORTED_ARCHITECTURES)}, saved for inference.",
            )
    dictionary = Dictionary(
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
        norms = dictionary.decoder.norm(dim=1)
        dictionary.encoder, dictionary.encoder_bias = dictionary.encoder * norms, dictionary.encoder_bias * norms
        dictionary.decoder = dictionary.decoder / norms[:, None]
    return dictionary


def write_dictionary(dictionary: Dictionary, folder: Path) -> None:
    """Write the two files that sae-lens's `SAE.load_from_disk` reads."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = {
        "W_enc": dictionary.encoder,
        "b_enc": dictionary.encoder_bias,
        "W_dec": dictionary.decoder,
        "b_dec": dictionary.bias,
    }
    if dictionary.config["architecture"] == "jumprelu":
        weights["threshold"] = dictionary.threshold.expand(dictionary.features)
    save_file({name: tensor.contiguous().cpu() for name, tensor in weights.items()}, folder / WEIGHTS)
    (folder / CONFIG).write_text(json.dumps(dictionary.config, indent=1))


def calibrate_threshold(dictionary: Dictionary, sample: torch.Tensor, k: int) -> Dictionary:
    """Set one threshold for all features such that k are active per token, on average, on a sample (tokens, hidden).

    BatchTopK trains with the k x batch largest activations and keeps a moving average of the smallest of them as its
    threshold. After few steps that average is far too low (an L0 of 670 was seen where 32 was asked for).
    """
    target = k * len(sample)
    largest = torch.empty(0, device=sample.device)
    for part in sample.split(ENCODE_CHUNK):
        pre_activations = dictionary.compute_pre_activations(part).flatten()
        largest = torch.cat([largest, pre_activations[pre_activations > 0]])
        if len(largest) > 4 * target:
            largest = largest.topk(target, sorted=False).values
    threshold = largest.topk(min(target, len(largest)), sorted=False).values.min()
    return replace(dictionary, threshold=threshold.expand(dictionary.features).clone())
