"""The options of an adapter: which are known to be merged, which have no effect on the merged weights, which refuse."""

import math
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from phoque.errors import UsageError, first_line
from phoque.files import read_json_object
from phoque.models.adapter_source import check_lora

if TYPE_CHECKING:
    from peft import LoraConfig

# Options that choose weights or scale their change; deltas.py accounts for them tensor by tensor.
MERGED = frozenset(
    [
        "r",
        "lora_alpha",
        "rank_pattern",
        "alpha_pattern",
        "use_rslora",
        "use_dora",
        "lora_bias",
        "target_modules",
        "modules_to_save",
        "trainable_token_indices",
        "bias",
    ]
)
# Options of training alone, or names: they do not change what the saved tensors mean.
WITHOUT_EFFECT = frozenset(
    [
        "task_type",
        "peft_type",
        "auto_mapping",
        "peft_version",
        "base_model_name_or_path",
        "revision",
        "inference_mode",
        "exclude_modules",
        "lora_dropout",
        "layers_to_transform",
        "layers_pattern",
        "megatron_config",
        "megatron_core",
        "loftq_config",
        "eva_config",
        "corda_config",
        "lora_ga_config",
        "runtime_config",
        "velora_config",
        "qalora_group_size",
        "ensure_weight_tying",
        "init_lora_weights",
        "fan_in_fan_out",  # peft resets it for linear layers
    ]
)
REFUSED = {
    "alora_invocation_tokens": "An activated LoRA acts only after its invocation tokens; merged, it would always act.",
    "layer_replication": "It repeats layers of the base, so the merged model would have more layers than the base.",
    "target_parameters": "It changes parameters that are not the weights of linear layers.",
    "use_qalora": "QALoRA pools the inputs of a layer; its change is not of the form W + scale * B A.",
    "use_bdlora": "Its matrices are block-diagonal; its change is not of the form W + scale * B A.",
    "kasa_config": "KaSA scales singular values; its change is not of the form W + scale * B A.",
    "monteclora_config": "MonteCLoRA draws its weights at random; there is no single merged model.",
    "arrow_config": "Arrow routes each token to other adapters; there is no single merged model.",
}
# Initializations that leave the base's weights as they are. The others subtract something from the base.
PLAIN_INITIALIZATIONS = ("gaussian", "orthogonal", "eva")


def read_adapter_config(adapter: Path) -> "LoraConfig":
    """The config of a LoRA adapter that can be merged.

    Raises UsageError if it is not a LoRA adapter, or if it uses an option whose effect on the weights is not known.
    """
    from peft import LoraConfig

    file = adapter / "adapter_config.json"
    raw = read_json_object(file)
    if "peft_type" not in raw:
        raise UsageError(
            what=f"{file} is not the config of an adapter.",
            why="It has no peft_type.",
            fix="Name the folder that peft saved.",
        )
    check_lora(adapter, adapter)
    for name, value in raw.items():
        if value and name not in MERGED | WITHOUT_EFFECT:
            why = REFUSED.get(name, f"This version of phoque does not know the option, which is {value!r}.")
            raise _not_merged(f"an adapter with {name}", why)
    initialization = raw.get("init_lora_weights")
    if isinstance(initialization, str) and initialization not in PLAIN_INITIALIZATIONS:
        raise _not_merged(
            f"an adapter with init_lora_weights {initialization}",
            "This initialization subtracts weights from the base, so the adapter belongs to a changed base.",
        )
    try:
        lora = LoraConfig.from_pretrained(str(adapter))
        _check_numbers(lora)
        return lora
    except (TypeError, ValueError, AttributeError, KeyError, RecursionError, re.error) as error:
        raise UsageError(
            what=f"{file} is not a valid config of a LoRA adapter.",
            why=first_line(error),
            fix="Download the adapter again.",
        ) from error


def _check_numbers(lora: Any) -> None:
    """Raise ValueError if the numbers from which LoRA's scale follows are none."""
    for name, value in {"r": lora.r, "lora_alpha": lora.lora_alpha}.items():
        if not _is_positive(value):
            raise ValueError(f"{name} is {value!r}")
    for name, pattern in {"rank_pattern": lora.rank_pattern, "alpha_pattern": lora.alpha_pattern}.items():
        if not isinstance(pattern, dict) or not all(map(_is_positive, pattern.values())):
            raise ValueError(f"{name} is {pattern!r}")
    for key in lora.rank_pattern.keys() | lora.alpha_pattern.keys():
        re.compile(key)
    tokens = lora.trainable_token_indices or []
    for ids in tokens.values() if isinstance(tokens, dict) else [tokens]:
        if not isinstance(ids, list) or not all(type(token) is int and token >= 0 for token in ids):
            raise ValueError(f"trainable_token_indices is {tokens!r}")
    if not all(isinstance(name, str) for name in lora.modules_to_save or ()):
        raise ValueError(f"modules_to_save is {lora.modules_to_save!r}")


def _is_positive(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < math.inf


def matches_any(module: str, names: Any) -> bool:
    """Whether a module's full name ends with one of the names, as peft matches modules_to_save."""
    return any(module == name or module.endswith(f".{name}") for name in names or ())


def _not_merged(kind: str, why: str) -> UsageError:
    return UsageError(
        what=f"phoque does not merge {kind}.",
        why=why,
        fix="Use it unmerged, or merge it with the library that created it.",
    )
