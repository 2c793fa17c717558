"""The LoRA adapter: its config, its norms, and whether it is fit to be saved."""

from typing import Any

import torch

from phoque.errors import FAILED, PhoqueError
from phoque.models.families import family_of


def with_adapter(model: Any, rank: int, alpha: int, dropout: float, base_name: str, revision: str | None) -> Any:
    """`model` with a fresh fp32 LoRA adapter on the seven projections of every layer (B is zero: a no-op at first)."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=family_of(model.config).lora_targets,
        base_model_name_or_path=base_name,
        revision=revision,
    )
    model = get_peft_model(model, config)
    # peft puts the path of the loaded folder there; a cache path means nothing to whoever gets the adapter
    model.peft_config["default"].base_model_name_or_path = base_name
    return model


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


def refuse_non_finite(model: Any, step: int) -> None:
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
