"""An adapter, read as what it changes in each weight of its base."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from phoque.errors import PhoqueError
from phoque.models.architectures import Architecture
from phoque.models.checkpoint_reader import Shards
from phoque.models.fp8 import is_scale
from phoque.models.lora import WEIGHTS


@dataclass
class Change:
    """What an adapter does to one weight: W + scale * B A, with DoRA's magnitude over the rows' norms; or another W."""

    scale: float = 0.0
    a: torch.Tensor | None = None
    b: torch.Tensor | None = None
    magnitude: torch.Tensor | None = None
    replacement: torch.Tensor | None = None
    names: list[str] = field(default_factory=list)  # of the adapter's tensors that it is made of

    def applied(self, weight: torch.Tensor) -> torch.Tensor:
        """The merged weight, in fp32; `weight` (rows, columns) is fp32 and is changed in place."""
        if self.replacement is not None:
            return self.replacement.float()
        assert self.a is not None and self.b is not None
        weight.addmm_(self.b.float(), self.a.float(), alpha=self.scale)
        if self.magnitude is not None:  # https://arxiv.org/abs/2402.09353, as peft computes it
            weight.mul_((self.magnitude.float() / torch.linalg.vector_norm(weight, dim=1)).unsqueeze(1))
        return weight


def read_changes(adapter: Path, config: Any, family: Architecture, shards: Shards) -> dict[str, Change]:
    """What an adapter changes, by the checkpoint's own tensor names; each of its tensors is used exactly once.

    It may have been trained on the full model, on the text model alone, or under Unsloth's names. Raises PhoqueError
    (2) for a kind of adapter that phoque does not merge, and naming the first tensor that does not fit.
    """
    from peft import LoraConfig

    lora: Any = LoraConfig.from_pretrained(str(adapter))
    _refuse_kinds(lora)
    by_text_name = {text: key for key in shards.tensors if (text := family.text_key(key)) and not is_scale(key)}
    changes: dict[str, Change] = {}
    weights = load_file(adapter / WEIGHTS)
    for name, tensor in weights.items():
        module, part = _split(name)
        leaf = "bias" if part == "bias" else "weight"
        key = _key_of(f"{module}.{leaf}", by_text_name, shards)
        if key is None:
            raise _unfit(name, "the base has no such weight", adapter)
        change = changes.setdefault(key, Change())
        change.names.append(name)
        if part in ("weight", "bias"):
            change.replacement = tensor
        elif part == "lora_magnitude_vector":
            change.magnitude = tensor.reshape(-1)
        else:
            setattr(change, part.removeprefix("lora_").lower(), tensor)
        change.scale = _scale(lora, module)
    for key, change in changes.items():
        _check_fit(key, change, shards.tensors[key].shape, adapter)
    tied = config.get_text_config().tie_word_embeddings
    if tied and any("embed_tokens" in key or "lm_head" in key for key in changes):
        raise _unfit("modules_to_save", "the base uses one matrix for input and output, and it would need two", adapter)
    assert sum(len(change.names) for change in changes.values()) == len(weights)
    return changes


def _refuse_kinds(lora: Any) -> None:
    refused = {
        f"a {lora.peft_type.value} adapter": lora.peft_type.value != "LORA",
        "lora_bias": lora.lora_bias,
        "fan_in_fan_out": lora.fan_in_fan_out,
        "target_parameters": bool(lora.target_parameters),
        f"init_lora_weights {lora.init_lora_weights}": isinstance(lora.init_lora_weights, str)
        and lora.init_lora_weights not in ("gaussian", "orthogonal", "eva"),
    }
    for kind, found in refused.items():
        if found:
            raise PhoqueError(
                f"phoque does not merge {kind}.",
                "It is not W + scale * B A on the base that was published.",
                "Merge it with the library that made it.",
            )


def _split(name: str) -> tuple[str, str]:
    """An adapter tensor's module, without peft's prefixes, and which part it is."""
    name = name.removeprefix("base_model.").removeprefix("model.") if name.startswith("base_model.") else name
    name = name.replace(".base_layer.", ".").replace(".default.", ".")
    for part in ("lora_A", "lora_B", "lora_magnitude_vector"):
        for ending in (f".{part}.weight", f".{part}"):
            if name.endswith(ending):
                return name.removesuffix(ending), part
    module, _, leaf = name.rpartition(".")
    return module, leaf


def _key_of(name: str, by_text_name: dict[str, str], shards: Shards) -> str | None:
    """The checkpoint's key of a weight that an adapter names as the full or as the text-only model does."""
    forms = [name]
    for prefix in ("model.language_model.model.", "language_model.model.", "model.language_model.", "language_model."):
        if name.startswith(prefix):
            forms += ["model." + name.removeprefix(prefix), name.removeprefix(prefix)]
            break
    for form in forms:
        if form in by_text_name:
            return by_text_name[form]
    return next((form for form in (name, name.removeprefix("model.")) if form in shards.tensors), None)


def _scale(lora: Any, module: str) -> float:
    from peft.utils.other import get_pattern_key

    rank = lora.rank_pattern.get(get_pattern_key(lora.rank_pattern, module), lora.r)
    alpha = lora.alpha_pattern.get(get_pattern_key(lora.alpha_pattern, module), lora.lora_alpha)
    return alpha / (rank**0.5 if lora.use_rslora else rank)


def _check_fit(key: str, change: Change, shape: tuple[int, ...], adapter: Path) -> None:
    if change.replacement is not None:
        made = tuple(change.replacement.shape)
    elif change.a is None or change.b is None:
        raise _unfit(change.names[0], "its other half is missing", adapter)
    else:
        made = (change.b.shape[0], change.a.shape[1]) if change.a.shape[0] == change.b.shape[1] else (0,)
    if made != shape:
        raise _unfit(change.names[0], f"{key} is {list(shape)}, and this makes {list(made)}", adapter)
    for tensor in (change.a, change.b, change.magnitude, change.replacement):
        if tensor is not None and not bool(torch.isfinite(tensor).all()):
            raise _unfit(change.names[0], "it holds NaN or infinity", adapter)


def _unfit(name: str, reason: str, adapter: Path) -> PhoqueError:
    return PhoqueError(
        f"The adapter in {adapter} does not fit the base.",
        f"{name}: {reason}.",
        "Name the base that it was trained on with --base-model.",
    )
