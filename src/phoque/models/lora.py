"""The LoRA adapter: its config, its norms, and whether it is fit to be saved."""

import copy
import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from phoque.errors import FAILED, PhoqueError
from phoque.models.architectures import Architecture, architecture_of

WEIGHTS = "adapter_model.safetensors"
PEFT_PREFIX = "base_model.model."


def with_adapter(model: Any, rank: int, alpha: int, dropout: float, revision: str | None = None) -> Any:
    """`model` with a fresh fp32 LoRA adapter on the seven projections of every layer (B is zero: a no-op at first)."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=architecture_of(model.config).lora_targets,
        revision=revision,
    )
    return get_peft_model(model, config)


def save_adapter(model: Any, folder: Path, family: Architecture) -> None:
    """Write the adapter under the full model's names, so that it loads on the model that was published."""
    from peft import get_peft_model_state_dict

    folder.mkdir(parents=True, exist_ok=True)
    # no look at the embeddings: peft asks the Hub about them at each save, and they are frozen here
    weights = get_peft_model_state_dict(model, save_embedding_layers=False)
    named = {_full_name(key, family): tensor.contiguous() for key, tensor in weights.items()}
    save_file(named, folder / WEIGHTS, {"format": "pt"})
    config = copy.deepcopy(model.peft_config["default"])
    config.inference_mode = True
    config.save_pretrained(folder)


def load_adapter(model: Any, folder: Path, family: Architecture) -> None:
    """Put saved weights into the adapter that `model` already has, under either model's names.

    Raises PhoqueError (2) naming the first tensor that is missing, left over or of another shape: peft itself only
    warns, and an adapter under the wrong names is a silent no-op.
    """
    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    saved = {text_name(key, family): tensor for key, tensor in load_file(folder / WEIGHTS).items()}
    wanted = {k: tuple(t.shape) for k, t in get_peft_model_state_dict(model, save_embedding_layers=False).items()}
    shapes = {key: tuple(tensor.shape) for key, tensor in saved.items()}
    if differing := sorted(k for k in wanted.keys() | shapes.keys() if wanted.get(k) != shapes.get(k)):
        first = differing[0]
        raise PhoqueError(
            f"The adapter in {folder} does not fit {model.base_model.model.name_or_path}.",
            f"{first}: the model needs {wanted.get(first, 'no such tensor')}, the adapter has "
            f"{shapes.get(first, 'none')} ({len(differing)} tensors differ).",
            "Use the base model and the rank that the adapter was trained with.",
        )
    set_peft_model_state_dict(model, saved)


def attach_adapter(model: Any, folder: Path, family: Architecture, name: str = "default") -> Any:
    """`model` with a saved adapter under `name`, applied by peft on its own modules and from its own file.

    `model` is the text model, or one that has adapters already. `family` is the full model's.
    """
    from peft import LoraConfig, get_peft_model, set_peft_model_state_dict

    config: Any = LoraConfig.from_pretrained(str(folder))
    config.inference_mode = True
    named = {text_name(key, family): tensor for key, tensor in load_file(folder / WEIGHTS).items()}
    modules = {key.removeprefix(PEFT_PREFIX).rpartition(".lora_")[0] for key in named if ".lora_" in key}
    bare = model.get_base_model() if hasattr(model, "get_base_model") else model
    names = {re.sub(r"\.base_layer$", "", n) for n, _ in bare.named_modules()}
    # by name: what the adapter was trained on may have had other names, and a vision tower that is not here
    config.target_modules = sorted(modules & names)
    if missing := sorted(modules - names):
        raise PhoqueError(
            f"The adapter in {folder} does not fit {bare.name_or_path}.",
            f"It changes {missing[0]}, which the model does not have ({len(missing)} such).",
            "Name the base that it was trained on.",
        )
    if bare is model:
        model = get_peft_model(model, config, adapter_name=name)
    else:
        model.add_adapter(name, config)
    set_peft_model_state_dict(model, named, adapter_name=name)
    return model.eval()


def _full_name(key: str, family: Architecture) -> str:
    text, full = family.full_names
    return key.replace(PEFT_PREFIX + text, PEFT_PREFIX + full, 1)


def text_name(key: str, family: Architecture) -> str:
    """An adapter tensor's name on the text model, whichever model it was trained on (the full one, old or new)."""
    if not family.full_names[1]:
        return key
    return re.sub(rf"^({re.escape(PEFT_PREFIX)})(?:model\.)?language_model\.(?:model\.)?", r"\1model.", key)


def lora_norms(model: Any) -> dict[str, float]:
    """Frobenius norms of the adapter: over all A and all B, and the largest single B."""
    squares: dict[str, list[torch.Tensor]] = {"A": [], "B": []}
    for name, parameter in model.named_parameters():
        for kind, found in squares.items():
            if f"lora_{kind}." in name:
                found.append(parameter.detach().float().square().sum())
    totals = {kind: torch.stack(found) for kind, found in squares.items()}
    return {
        "lora_norm_A": totals["A"].sum().sqrt().item(),
        "lora_norm_B": totals["B"].sum().sqrt().item(),
        "lora_norm_B_max": totals["B"].max().sqrt().item(),
    }


def check_finite(model: Any, step: int) -> None:
    """Raise PhoqueError (1) if any trained weight is NaN or infinite."""
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    flags = torch.stack([torch.isfinite(p.detach()).all() for _, p in trained])
    if not bool(flags.all()):
        first = next(name for (name, _), fine in zip(trained, flags.tolist(), strict=True) if not fine)
        raise PhoqueError(
            f"The adapter is not finite at step {step}; nothing of it was saved.",
            f"First bad tensor: {first}.",
            "Run the same command to go on from the last checkpoint, with a lower --learning-rate.",
            FAILED,
        )
