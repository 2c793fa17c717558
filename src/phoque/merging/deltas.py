"""Reads an adapter as a set of changes, one per weight of its base model; each of its tensors has a known effect."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from phoque.errors import PhoqueError, UsageError
from phoque.merging.adapter_config import matches_any, read_adapter_config
from phoque.models.checkpoint_reader import EMBEDDINGS, HEAD, CheckpointReader
from phoque.models.lora import read_adapter_tensors

if TYPE_CHECKING:
    from peft import LoraConfig

# The part of a tensor's name behind its module -> the field of WeightDelta that it fills, for a layer and an embedding
LORA_PARTS = {
    "lora_A.weight": "a",
    "lora_B.weight": "b",
    "lora_B.bias": "addend",
    "lora_embedding_A": "embedding_a",
    "lora_embedding_B": "embedding_b",
    "lora_magnitude_vector": "magnitude",
    "lora_magnitude_vector.weight": "magnitude",
    "token_adapter.trainable_tokens_delta": "rows",
    "token_adapter.base_layer.weight": "replacement",
    "modules_to_save.weight": "replacement",
    "modules_to_save.bias": "replacement",
    "base_layer.weight": "replacement",
    "base_layer.bias": "replacement",
}


@dataclass
class WeightDelta:
    """The changes to one weight, in the order in which they apply.

    1. `replacement`: a new weight instead of the base's; `rows` at `row_indices`: trained tokens.
    2. `a`, `b`, `scale`: LoRA, W + scale * B A; `addend`: LoRA's own bias, times `scale`.
    3. `magnitude`: DoRA's norms of the rows of the result, of its columns if the weight is an embedding.
    """

    replacement: torch.Tensor | None = None
    scale: float = 0.0
    a: torch.Tensor | None = None
    b: torch.Tensor | None = None
    is_embedding: bool = False
    magnitude: torch.Tensor | None = None
    rows: torch.Tensor | None = None
    row_indices: list[int] = field(default_factory=list)
    addend: torch.Tensor | None = None
    names: list[str] = field(default_factory=list)  # of the adapter's tensors

    def apply(self, weight: torch.Tensor) -> torch.Tensor:
        """Return the merged weight in fp32; `weight` (rows, columns) must be fp32 and may be modified in place."""
        if self.replacement is not None:
            weight = self.replacement.float().clone()
        if self.rows is not None:
            weight[self.row_indices] = self.rows.float()
        if self.a is not None and self.b is not None:
            weight.addmm_(self.b.float(), self.a.float(), alpha=self.scale)
        if self.magnitude is not None:  # DoRA, https://arxiv.org/abs/2402.09353, as peft computes it
            dim = 0 if self.is_embedding else 1
            norms = torch.linalg.vector_norm(weight, dim=dim, keepdim=True)
            weight.mul_(self.magnitude.float().reshape(norms.shape) / norms)
        if self.addend is not None:
            weight += self.scale * self.addend.float()
        return weight

    def set_part(self, part: str, tensor: torch.Tensor) -> bool:
        """Fill the field for one of the adapter's tensors; return False if it holds a different tensor already."""
        if part.startswith("embedding_"):  # an embedding's weight is B A, transposed
            self.is_embedding = True
            part, tensor = ("b" if part == "embedding_a" else "a"), tensor.T
        if (earlier := getattr(self, part)) is not None:
            return torch.equal(earlier, tensor)
        setattr(self, part, tensor)
        return True

    def equals(self, other: "WeightDelta") -> bool:
        """Whether both change equal weights to equal weights."""
        if (self.scale, self.row_indices) != (other.scale, other.row_indices):
            return False
        pairs = [(getattr(self, f), getattr(other, f)) for f in ("replacement", "a", "b", "magnitude", "rows")]
        return all(x is y or (x is not None and y is not None and torch.equal(x, y)) for x, y in pairs)


@dataclass(frozen=True)
class Deltas:
    """The changes by stored tensor name.

    - `unties`: whether the base ties its head to its embeddings and the merged model cannot.
    - `new_head`: the change that makes a head from a copy of the embeddings, if the base stores none.
    - `vocabulary`: the new number of tokens, if the adapter changes it.
    """

    by_name: dict[str, WeightDelta]
    unties: bool = False
    new_head: WeightDelta | None = None
    vocabulary: int | None = None


def read_deltas(adapter: Path, reader: CheckpointReader) -> Deltas:
    """The changes to the base; each tensor of the adapter is used exactly once.

    The adapter may have been trained on the full model, on the text model, or under Unsloth's names. Raises UsageError
    for a kind of adapter that phoque does not merge, and naming the first tensor that has no effect or does not fit.
    """
    lora = read_adapter_config(adapter)
    deltas: dict[str, WeightDelta] = {}
    is_tied = bool(reader.text_config.tie_word_embeddings)
    for name, tensor in read_adapter_tensors(adapter).items():
        module, part = _split_name(name)
        if part not in LORA_PARTS and part not in ("weight", "bias"):
            raise _does_not_fit(name, "its effect on the weights is not known", adapter)
        leaf = "bias" if part.endswith("bias") else "weight"
        key = _stored_name(f"{module}.{leaf}", reader)
        if key is None and is_tied and module.endswith("lm_head") and leaf == "weight":
            key = HEAD
        if key is None:
            reason = (
                "it adds a bias to a layer that has none" if part == "lora_B.bias" else "the base has no such weight"
            )
            raise _does_not_fit(name, reason, adapter)
        delta = deltas.setdefault(key, WeightDelta())
        delta.names.append(name)
        if not delta.set_part(LORA_PARTS.get(part, "replacement"), tensor):
            raise _does_not_fit(name, "the adapter holds two different tensors for it", adapter)
        if "lora_" in part:
            delta.scale = _lora_scale(lora, module, delta, name, adapter)
        if delta.rows is not None:
            delta.row_indices = _trained_tokens(lora, module)
    unties, new_head = _separate_head(deltas, reader, lora) if is_tied else (False, None)
    vocabulary = _find_vocabulary(deltas, reader, adapter)
    for key, delta in deltas.items():
        stored = reader.stored[key].shape
        shape = (vocabulary or stored[0], *stored[1:]) if _is_embedding(key) else stored
        _check_delta(key, delta, shape, lora, adapter)
    if new_head:
        if vocabulary and new_head.replacement is None:
            raise _half_resized(adapter, vocabulary, reader.stored[reader.text_weights[EMBEDDINGS]].shape[0])
        stored = reader.stored[reader.text_weights[EMBEDDINGS]].shape
        _check_delta(HEAD, new_head, (vocabulary or stored[0], *stored[1:]), lora, adapter)
    return Deltas(deltas, unties, new_head, vocabulary)


def _split_name(name: str) -> tuple[str, str]:
    """Split an adapter tensor's name into its module, without peft's prefixes, and its part (such as lora_A.weight)."""
    name = name.removeprefix("base_model.").removeprefix("model.") if name.startswith("base_model.") else name
    for part in LORA_PARTS:
        if name.endswith(f".{part}"):
            return name.removesuffix(f".{part}").removesuffix(".base_layer"), part
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


def _lora_scale(lora: "LoraConfig", module: str, delta: WeightDelta, name: str, adapter: Path) -> float:
    from peft.utils.other import get_pattern_key

    options: Any = lora  # its fields are typed wider than they are after loading
    rank = options.rank_pattern.get(get_pattern_key(options.rank_pattern, module), options.r)
    alpha = options.alpha_pattern.get(get_pattern_key(options.alpha_pattern, module), options.lora_alpha)
    if delta.a is not None and delta.a.shape[0] != rank:
        raise _does_not_fit(name, f"its rank is {delta.a.shape[0]}, and the adapter's config says {rank}", adapter)
    return alpha / (rank**0.5 if options.use_rslora else rank)


def _trained_tokens(lora: "LoraConfig", module: str) -> list[int]:
    """The token ids whose rows are trained, from a list for the input embeddings or from a list per module."""
    indices = lora.trainable_token_indices or []
    if isinstance(indices, dict):
        same = [*indices.values()] if len({tuple(ids) for ids in indices.values()}) == 1 else [[]]  # tied modules
        return next((list(ids) for name, ids in indices.items() if matches_any(module, [name])), list(same[0]))
    return list(indices)


def _separate_head(
    deltas: dict[str, WeightDelta], reader: CheckpointReader, lora: "LoraConfig"
) -> tuple[bool, WeightDelta | None]:
    """Find the changes to the head and the embeddings of a base that ties them; return (unties, new_head) of Deltas.

    Trained tokens, and weights that are saved without being in modules_to_save (a resized vocabulary, the base layer of
    a LoRA layer), change the weight that both share. LoRA and modules_to_save change one of them.
    """
    stored, stored_head = reader.text_weights[EMBEDDINGS], reader.text_weights.get(HEAD)
    head_key = stored_head or HEAD
    if head_key not in deltas and stored not in deltas:
        return False, None
    head, embeddings = deltas.pop(head_key, WeightDelta()), deltas.setdefault(stored, WeightDelta())
    for one, other, module in ((embeddings, head, "embed_tokens"), (head, embeddings, "lm_head")):
        if other.replacement is None and not matches_any(module, lora.modules_to_save):
            other.replacement = one.replacement
    if head.rows is None:
        head.rows, head.row_indices = embeddings.rows, embeddings.row_indices
    is_tied = head.equals(embeddings)
    if stored_head:
        deltas[stored_head] = head
    return not is_tied, None if is_tied or stored_head else head


def _find_vocabulary(deltas: dict[str, WeightDelta], reader: CheckpointReader, adapter: Path) -> int | None:
    """The number of tokens after the merge, if it is not the base's."""
    keys = {name: reader.text_weights[name] for name in (EMBEDDINGS, HEAD) if name in reader.text_weights}
    sizes = {}
    for name, key in keys.items():
        delta = deltas.get(key)
        replacement = delta.replacement if delta else None
        sizes[name] = (replacement if replacement is not None else reader.stored[key]).shape[0]
    if len(set(sizes.values())) > 1:
        raise _half_resized(adapter, sizes[EMBEDDINGS], sizes[HEAD])
    size = sizes[EMBEDDINGS]
    return size if size != reader.stored[keys[EMBEDDINGS]].shape[0] else None


def _half_resized(adapter: Path, embeddings: int, head: int) -> UsageError:
    return UsageError(
        what=f"The adapter in {adapter} resizes the vocabulary, but holds only one of the two resized matrices.",
        why=f"{EMBEDDINGS} has {embeddings} tokens, and {HEAD} has {head}.",
        fix="Save it again with save_pretrained(..., save_embedding_layers=True).",
    )


def _is_embedding(key: str) -> bool:
    return key.endswith(("embed_tokens.weight", "lm_head.weight"))


def _check_delta(key: str, delta: WeightDelta, shape: tuple[int, ...], lora: "LoraConfig", adapter: Path) -> None:
    if not delta.names:  # the counterpart of a change to the other of two tied weights
        return
    first = delta.names[0]
    if (delta.a is None) != (delta.b is None):
        raise _does_not_fit(first, "its lora_A or lora_B is missing", adapter)
    if delta.a is not None and (delta.magnitude is not None) != lora.use_dora:
        missing = (
            "its lora_magnitude_vector is missing" if lora.use_dora else "it has DoRA's magnitudes without use_dora"
        )
        raise _does_not_fit(first, missing, adapter)
    shapes = {}
    if delta.replacement is not None:
        shapes["replacement"] = tuple(delta.replacement.shape)
    if delta.a is not None and delta.b is not None:
        shapes["LoRA"] = (delta.b.shape[0], delta.a.shape[1]) if delta.a.shape[0] == delta.b.shape[1] else (0,)
    if delta.rows is not None:
        if len(delta.row_indices) != len(delta.rows) or max(delta.row_indices, default=0) >= shape[0]:
            raise _does_not_fit(first, f"its rows are not those of the tokens {delta.row_indices}", adapter)
        shapes["trained tokens"] = (shape[0], *delta.rows.shape[1:])
    if delta.addend is not None:
        shapes["LoRA's bias"] = tuple(delta.addend.shape)
    if delta.magnitude is not None:
        shapes["DoRA"] = shape if delta.magnitude.numel() == shape[1 if delta.is_embedding else 0] else (0,)
    for kind, result in shapes.items():
        if result != shape:
            raise _does_not_fit(first, f"{key} is {list(shape)}, and this makes {list(result)} ({kind})", adapter)
    for tensor in (delta.a, delta.b, delta.magnitude, delta.replacement, delta.rows, delta.addend):
        if tensor is not None and not bool(torch.isfinite(tensor).all()):
            raise _does_not_fit(first, "it contains NaN or infinity", adapter)


def _does_not_fit(name: str, reason: str, adapter: Path) -> PhoqueError:
    return UsageError(
        what=f"The adapter in {adapter} does not fit the base.",
        why=f"{name}: {reason}.",
        fix="Set --base-model to the model that it was trained on.",
    )
