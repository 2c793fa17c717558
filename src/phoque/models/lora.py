"""The LoRA adapter: creating, saving, loading, norms, and a check for NaN and infinity."""

import copy
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from phoque.errors import RunError, UsageError, first_line
from phoque.models.adapter_source import WEIGHTS
from phoque.models.architectures import Architecture, architecture_of

PEFT_PREFIX = "base_model.model."
MODULE_KINDS = {  # --target-modules -> what the modules' names contain, in all supported families
    "attention": re.compile(r"\.(?:self_attn|linear_attn|conv)\."),
    "mlp": re.compile(r"\.(?:mlp|shared_mlp|feed_forward)\."),
}
# what torch.compile, FSDP and activation checkpointing put into names, and the adapter's name in a raw state dict
WRAPPERS = re.compile(r"(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.|\.default(?=\.|$)")


@dataclass(frozen=True, kw_only=True)
class LoraOptions:
    """The shape of a new adapter; `targets` is what peft takes as `target_modules`, None for all linear layers."""

    rank: int
    alpha: int
    dropout: float = 0.0
    targets: str | list[str] | None = None
    rslora: bool = False


def add_lora_adapter(model: Any, options: LoraOptions, revision: str | None = None) -> Any:
    """Add a new fp32 LoRA adapter to linear layers of the decoder blocks; B is zero, so it changes nothing."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=options.rank,
        lora_alpha=options.alpha,
        lora_dropout=options.dropout,
        target_modules=options.targets or architecture_of(model.config).lora_targets,
        use_rslora=options.rslora,
        revision=revision,
    )
    return get_peft_model(model, config)


def find_target_modules(model: Any, modules: str) -> str | list[str]:
    """Return peft's `target_modules` for --target-modules: a regular expression, or a list of module names.

    `model` may be on the meta device. The result fits the text model's names and the full model's. Raises UsageError
    if nothing matches, or something outside of the decoder blocks' linear layers does.
    """
    targets = architecture_of(model.config).lora_targets
    linear = [name for name, _ in model.named_modules() if re.fullmatch(targets, name)]
    if modules == "all-linear":
        return targets
    chosen = _choose_modules(model, linear, modules)
    if chosen == linear:
        return targets
    # "model.layers.3.self_attn.q_proj" has the tail "self_attn.q_proj"
    tails = {tail for tail, _ in map(_split_name, chosen)}
    if chosen == [name for name in linear if _split_name(name)[0] in tails]:
        return r"(?:.*\.)?layers\.\d+\.(?:" + "|".join(map(re.escape, sorted(tails))) + ")"
    return [f"layers.{number}.{tail}" for tail, number in map(_split_name, chosen)]


def _choose_modules(model: Any, linear: list[str], modules: str) -> list[str]:
    """The linear layers that --target-modules names, in the model's order."""
    last_parts = {name.rpartition(".")[2] for name in linear}
    parts = {part.strip() for part in modules.split(",")} - {""}
    if parts and parts <= last_parts | MODULE_KINDS.keys():
        kinds = [MODULE_KINDS[part] for part in parts & MODULE_KINDS.keys()]
        chosen = [n for n in linear if n.rpartition(".")[2] in parts or any(kind.search(n) for kind in kinds)]
    else:
        try:
            pattern = re.compile(modules)
        except re.error as error:
            raise UsageError(
                what=f"--target-modules {modules} cannot be read.",
                why=f"It is no module name and no regular expression: {error}.",
                fix=f"Use all-linear, attention, mlp, or some of {', '.join(sorted(last_parts))}.",
            ) from None
        chosen = [name for name in linear if pattern.fullmatch(name)]
        inner = [
            n for n, m in model.named_modules() if pattern.fullmatch(n) and n not in linear and hasattr(m, "weight")
        ]
        if inner:
            raise UsageError(
                what=f"--target-modules {modules} matches {inner[0]}.",
                why="phoque adapts linear layers of the decoder blocks, and this is none.",
                fix=f"Narrow it to {', '.join(sorted(last_parts))}.",
            )
    if not chosen:
        raise UsageError(
            what=f"--target-modules {modules} matches no linear layer.",
            why=f"A whole module name is, for example, {linear[0]}.",
            fix=f"Use all-linear, attention, mlp, or some of {', '.join(sorted(last_parts))}.",
        )
    return chosen


def _split_name(name: str) -> tuple[str, int]:
    """The name of a module within its block, and the number of the block."""
    match = re.search(r"(?:^|\.)layers\.(\d+)\.(.+)$", name)
    assert match, name
    return match[2], int(match[1])


def save_adapter(model: Any, folder: Path, architecture: Architecture) -> None:
    """Save the adapter under the full model's names, so that it can be loaded on the published model."""
    from peft import get_peft_model_state_dict

    folder.mkdir(parents=True, exist_ok=True)
    # the embeddings are frozen here; with them, peft would send a request to the Hub at each save
    weights = get_peft_model_state_dict(model, save_embedding_layers=False)
    named = {_to_full_name(key, architecture): tensor.contiguous() for key, tensor in weights.items()}
    save_file(named, folder / WEIGHTS, {"format": "pt"})
    config = copy.deepcopy(model.peft_config["default"])
    config.inference_mode = True
    config.save_pretrained(folder)


def read_adapter_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """An adapter's tensors by peft's names, without wrappers such as torch.compile's, without unused copies.

    Raises UsageError if the file is damaged or holds empty tensors.
    """
    try:
        tensors = load_file(folder / WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise UsageError(
            what=f"{folder / WEIGHTS} cannot be read.", why=first_line(error), fix="Download the adapter again."
        ) from error
    if empty := [name for name, tensor in tensors.items() if tensor.numel() == 0]:
        raise UsageError(
            what=f"The adapter in {folder} holds empty tensors: {len(empty)} of {len(tensors)}.",
            why=f"The first is {empty[0]}. DeepSpeed ZeRO-3 saves them empty unless they are gathered first.",
            fix="Save it again with stage3_gather_16bit_weights_on_model_save or accelerator.get_state_dict(model).",
        )
    named = {WRAPPERS.sub("", name): tensor for name, tensor in tensors.items() if ".original_module." not in name}
    for copy_name in [name for name in named if ".modules_to_save." in name]:
        name = copy_name.replace(".modules_to_save.", ".")
        if torch.equal(named.setdefault(name, named[copy_name]), named[copy_name]):
            del named[copy_name]
    return named


def load_adapter(model: Any, folder: Path, architecture: Architecture) -> None:
    """Load saved weights, under the names of the full or the text model, into the adapter that `model` already has.

    Raises UsageError naming the first tensor that is missing, unexpected or of the wrong shape: peft itself only
    warns, and an adapter under the wrong names has no effect.
    """
    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    saved = {to_text_name(key, architecture): tensor for key, tensor in read_adapter_tensors(folder).items()}
    expected = {k: tuple(t.shape) for k, t in get_peft_model_state_dict(model, save_embedding_layers=False).items()}
    shapes = {key: tuple(tensor.shape) for key, tensor in saved.items()}
    if differing := sorted(k for k in expected.keys() | shapes.keys() if expected.get(k) != shapes.get(k)):
        first = differing[0]
        raise UsageError(
            what=f"The adapter in {folder} does not fit {model.base_model.model.name_or_path}.",
            why=f"{first}: the model needs {expected.get(first, 'no such tensor')}, the adapter has "
            f"{shapes.get(first, 'none')} ({len(differing)} tensors differ).",
            fix="Use the base model and the rank that the adapter was trained with.",
        )
    set_peft_model_state_dict(model, saved)


def attach_adapter(model: Any, folder: Path, architecture: Architecture, name: str = "default") -> Any:
    """Add a saved adapter to `model` under `name`, with peft, and return the model in evaluation mode.

    `model` is the text model, or one that has adapters already; `architecture` is that of the full model. Raises
    UsageError if the adapter changes modules that the model does not have.
    """
    from peft import LoraConfig, get_peft_model, set_peft_model_state_dict

    config: Any = LoraConfig.from_pretrained(str(folder))
    config.inference_mode = True
    named = {to_text_name(key, architecture): tensor for key, tensor in read_adapter_tensors(folder).items()}
    modules = {key.removeprefix(PEFT_PREFIX).rpartition(".lora_")[0] for key in named if ".lora_" in key}
    bare = model.get_base_model() if hasattr(model, "get_base_model") else model
    _resize_vocabulary(bare, named)
    names = {re.sub(r"\.base_layer$", "", n) for n, _ in bare.named_modules()}
    # full names: the model that the adapter was trained on may have other names, and a vision tower
    config.target_modules = sorted(modules & names)
    if missing := sorted(modules - names):
        raise UsageError(
            what=f"The adapter in {folder} does not fit {bare.name_or_path}.",
            why=f"It changes {missing[0]}, which the model does not have ({len(missing)} such modules).",
            fix="Use the base model that the adapter was trained on.",
        )
    if bare is model:
        model = get_peft_model(model, config, adapter_name=name)
    else:
        model.add_adapter(name, config)
    result = set_peft_model_state_dict(model, named, adapter_name=name)
    if result.unexpected_keys:
        raise UsageError(
            what=f"The adapter in {folder} does not fit {bare.name_or_path}.",
            why=f"{result.unexpected_keys[0]} changes nothing ({len(result.unexpected_keys)} such tensors).",
            fix="Use the base model that the adapter was trained on.",
        )
    return model.eval()


def _resize_vocabulary(model: Any, named: dict[str, torch.Tensor]) -> None:
    """Give the model as many tokens as the embeddings in an adapter have, if it holds embeddings."""
    embeddings = re.compile(r"\bembed_tokens\.(?:token_adapter\.)?(?:base_layer\.)?weight$")
    for tensor in (tensor for key, tensor in named.items() if embeddings.search(key)):
        if len(tensor) != model.get_input_embeddings().num_embeddings:
            model.resize_token_embeddings(len(tensor), mean_resizing=False)


def _to_full_name(key: str, architecture: Architecture) -> str:
    text, full = architecture.full_names
    return key.replace(PEFT_PREFIX + text, PEFT_PREFIX + full, 1)


def to_text_name(key: str, architecture: Architecture) -> str:
    """Return an adapter tensor's name on the text model, from its name on the text model or the full one."""
    if not architecture.full_names[1]:
        return key
    key = re.sub(rf"^({re.escape(PEFT_PREFIX)})(?:model\.)?language_model\.(?:model\.)?", r"\1model.", key)
    return key.replace(f"{PEFT_PREFIX}model.lm_head.", f"{PEFT_PREFIX}lm_head.")


def compute_lora_norms(model: Any) -> dict[str, float]:
    """Compute the Frobenius norms of the adapter: over all A, over all B, and of the largest single B."""
    squares: dict[str, list[torch.Tensor]] = {"A": [], "B": []}
    for name, parameter in model.named_parameters():
        for kind, values in squares.items():
            if f"lora_{kind}." in name:
                values.append(parameter.detach().float().square().sum())
    totals = {kind: torch.stack(values) for kind, values in squares.items()}
    return {
        "lora_norm_A": totals["A"].sum().sqrt().item(),
        "lora_norm_B": totals["B"].sum().sqrt().item(),
        "lora_norm_B_max": totals["B"].max().sqrt().item(),
    }


def check_finite(model: Any, step: int) -> None:
    """Raise RunError if any trained weight is NaN or infinite."""
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    flags = torch.stack([torch.isfinite(p.detach()).all() for _, p in trained])
    if not bool(flags.all()):
        first = next(name for (name, _), is_finite in zip(trained, flags.tolist(), strict=True) if not is_finite)
        raise RunError(
            what=f"The adapter has NaN or infinite weights at step {step}; this step was not saved.",
            why=f"The first such tensor is {first}.",
            fix="Run the same command with a lower --learning-rate; it resumes from the last checkpoint.",
        )
