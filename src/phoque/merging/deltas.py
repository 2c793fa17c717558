"""Reads an adapter as a set of changes, one per weight of its base model."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from phoque.errors import PhoqueError, UsageError
from phoque.models.adapter_source import WEIGHTS
from phoque.models.checkpoint_reader import CheckpointReader


@dataclass
class WeightDelta:
    """The change to one weight: W + scale * B A, rescaled by DoRA's magnitudes if there are any; or a new weight."""

    scale: float = 0.0
    a: torch.Tensor | None = None
    b: torch.Tensor | None = None
    magnitude: torch.Tensor | None = None
    replacement: torch.Tensor | None = None
    names: list[str] = field(default_factory=list)  # of the adapter's tensors

    def apply(self, weight: torch.Tensor) -> torch.Tensor:
        """Return the merged weight in fp32; `weight` (rows, columns) must be fp32 and may be modified in place."""
        if self.replacement is not None:
            return self.replacement.float()
        assert self.a is not None and self.b is not None
        weight.addmm_(self.b.float(), self.a.float(), alpha=self.scale)
        if self.magnitude is not None:  # DoRA, https://arxiv.org/abs/2402.09353, as peft computes it
            weight.mul_((self.magnitude.float() / torch.linalg.vector_norm(weight, dim=1)).unsqueeze(1))
        return weight


def read_deltas(adapter: Path, reader: CheckpointReader) -> dict[str, WeightDelta]:
    """The changes to the base by stored tensor name; each tensor of the adapter is used exactly once.

    The adapter may have been trained on the full model, on the text model, or under Unsloth's names. Raises UsageError
    for a kind of adapter that phoque does not merge, and naming the first tensor that does not fit.
    """
    from peft import LoraConfig

    lora: Any = LoraConfig.from_pretrained(str(adapter))  # its fields are typed wider than they are after loading
    _check_kind(lora)
    deltas: dict[str, WeightDelta] = {}
    weights = load_file(adapter / WEIGHTS)
    for name, tensor in weights.items():
        module, part = _split_name(name)
        leaf = "bias" if part == "bias" else "weight"
        key = _stored_name(f"{module}.{leaf}", reader)
        if key is None:
            raise _does_not_fit(name, "the base has no such weight", adapter)
        delta = deltas.setdefault(key, WeightDelta())
        delta.names.append(name)
        if part in ("weight", "bias"):
            delta.replacement = tensor
        elif part == "lora_magnitude_vector":
            delta.magnitude = tensor.reshape(-1)
        else:
            setattr(delta, part.removeprefix("lora_").lower(), tensor)
        delta.scale = _lora_scale(lora, module)
    for key, delta in deltas.items():
        _check_delta(key, delta, reader.stored[key].shape, adapter)
    if reader.text_config.tie_word_embeddings and any("embed_tokens" in key or "lm_head" in key for key in deltas):
        raise _does_not_fit(
            "modules_to_save",
            "the base ties its input and output embeddings, and the merged model would need two matrices",
            adapter,
        )
    assert sum(len(delta.names) for delta in deltas.values()) == len(weights)
    return deltas


def _check_kind(lora: Any) -> None:
    unsupported = {
        f"a {lora.peft_type.value} adapter": lora.peft_type.value != "LORA",
        "lora_bias": lora.lora_bias,
        "fan_in_fan_out": lora.fan_in_fan_out,
        "target_parameters": bool(lora.target_parameters),
        f"init_lora_weights {lora.init_lora_weights}": isinstance(lora.init_lora_weights, str)
        and lora.init_lora_weights not in ("gaussian", "orthogonal", "eva"),
    }
    for kind, is_used in unsupported.items():
        if is_used:
            raise UsageError(
                what=f"phoque does not merge {kind}.",
                why="It is not of the form W + scale * B A on the published base model.",
                fix="Merge it with the library that created it.",
            )


def _split_name(name: str) -> tuple[str, str]:
    """Split an adapter tensor's name into its module, without peft's prefixes, and its part (such as lora_A)."""
    name = name.removeprefix("base_model.").removeprefix("model.") if name.startswith("base_model.") else name
    name = name.replace(".base_layer.", ".").replace(".default.", ".")
    for part in ("lora_A", "lora_B", "lora_magnitude_vector"):
        for ending in (f".{part}.weight", f".{part}"):
            if name.endswith(ending):
                return name.removesuffix(ending), part
    module, _, leaf = name.rpartition(".")
    return module, leaf


def _stored_name(name: str, reader: CheckpointReader) -> str | None:
    """The stored name of a weight that an adapter names as the full model or as the text-only model does."""
    forms = [name]
    for prefix in ("model.language_model.model.", "language_model.model.", "model.language_model.", "language_model."):
        if name.startswith(prefix):
            forms += ["model." + name.removeprefix(prefix), name.removeprefix(prefix)]
            break
    for form in forms:
        if form in reader.text_weights:
            return reader.text_weights[form]
    return next((form for form in (name, name.removeprefix("model.")) if form in reader.stored), None)


def _lora_scale(lora: Any, module: str) -> float:
    from peft.utils.other import get_pattern_key

    rank = lora.rank_pattern.get(get_pattern_key(lora.rank_pattern, module), lora.r)
    alpha = lora.alpha_pattern.get(get_pattern_key(lora.alpha_pattern, module), lora.lora_alpha)
    return alpha / (rank**0.5 if lora.use_rslora else rank)


def _check_delta(key: str, delta: WeightDelta, shape: tuple[int, ...], adapter: Path) -> None:
    if delta.replacement is not None:
        result_shape = tuple(delta.replacement.shape)
    elif delta.a is None or delta.b is None:
        raise _does_not_fit(delta.names[0], "its lora_A or lora_B is missing", adapter)
    else:
        result_shape = (delta.b.shape[0], delta.a.shape[1]) if delta.a.shape[0] == delta.b.shape[1] else (0,)
    if result_shape != shape:
        raise _does_not_fit(delta.names[0], f"{key} is {list(shape)}, and this makes {list(result_shape)}", adapter)
    for tensor in (delta.a, delta.b, delta.magnitude, delta.replacement):
        if tensor is not None and not bool(torch.isfinite(tensor).all()):
            raise _does_not_fit(delta.names[0], "it contains NaN or infinity", adapter)


def _does_not_fit(name: str, reason: str, adapter: Path) -> PhoqueError:
    return UsageError(
        what=f"The adapter in {adapter} does not fit the base.",
        why=f"{name}: {reason}.",
        fix="Set --base-model to the model that it was trained on.",
    )
