"""A checkpoint, opened once: its config, architecture, tensors and scales. Load, merge and export use it."""

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from functools import cached_property
from typing import TYPE_CHECKING

import torch

from phoque.errors import UsageError
from phoque.models.architectures import architecture_of
from phoque.models.config import load_config
from phoque.models.fp8 import declares_fp8, dequantize, find_scales, group_size_of, is_scale
from phoque.models.safetensors_files import SafetensorsFiles, StoredTensor
from phoque.models.source import Source

if TYPE_CHECKING:
    from transformers import PretrainedConfig

LARGEST_WEIGHT = 100.0  # in a matrix; raw FP8 codes that are mistaken for weights reach 448 in every one
HEAD = "lm_head.weight"
EMBEDDINGS = "model.embed_tokens.weight"


class CheckpointReader:
    """What a checkpoint holds, from its config and headers; tensors are read one by one.

    - `stored`: every tensor by its stored name.
    - `weights`: the stored names of all tensors that are not scales, in the order in which they are stored.
    - `text_weights`: the text-only model's name of each of its weights -> the stored name.
    - `unties`: the config ties the head to the embeddings, but the checkpoint stores another head. As in transformers,
      the stored head counts, and `text_config` says so.
    """

    def __init__(self, source: Source) -> None:
        self.source = source
        self.config: PretrainedConfig = load_config(source)
        self.architecture = architecture_of(self.config)
        self.text_config: PretrainedConfig = self.config.get_text_config()
        self.group_size = group_size_of(self.config)
        self._files = SafetensorsFiles(source.folder)
        self.stored: dict[str, StoredTensor] = self._files.tensors
        self.weights = self._files.in_disk_order(name for name in self.stored if not is_scale(name))
        self.text_weights = {
            text_name: name
            for name in self.weights
            if (text_name := self.architecture.text_key(name))
            and not name.endswith("rotary_emb.inv_freq")  # old checkpoints store it, but it is not a weight
        }
        head, embeddings = self.text_weights.get(HEAD), self.text_weights.get(EMBEDDINGS)
        is_tied = self.text_config.tie_word_embeddings
        self.unties = bool(is_tied and head and embeddings and not self._files.are_equal(head, embeddings))
        if self.unties:
            self.text_config.tie_word_embeddings = False

    @cached_property
    def scales(self) -> dict[str, str]:
        """The stored name of the scale of each FP8 weight. Raises UsageError for one without the other."""
        return find_scales(self.stored, self.weights, declares_fp8(self.config))

    def read(self, name: str) -> torch.Tensor:
        """A tensor as it is stored."""
        return self._files.read(name)

    def stream(
        self, names: Iterable[str], on: torch.device
    ) -> AbstractContextManager[Iterator[tuple[str, torch.Tensor]]]:
        """Stored tensors as (name, tensor on the device), read ahead in the order in which they are stored."""
        return self._files.stream(names, on)

    def dequantize(self, name: str, stored: torch.Tensor) -> torch.Tensor:
        """A stored tensor times its scale in fp32, if it has a scale; any other tensor as it is.

        Raises UsageError if the result has magnitudes that no trained weight has.
        """
        if name not in self.scales:
            return stored
        full = dequantize(stored, self.read(self.scales[name]), self.group_size)
        check_magnitudes({name: full.abs().max()})
        return full

    def read_full(self, name: str) -> torch.Tensor:
        """A tensor in fp32, dequantized. Raises UsageError for NaN, or magnitudes that no trained weight has."""
        full = self.dequantize(name, self.read(name)).float()
        check_magnitudes({name: largest_magnitude(full)})
        return full


def largest_magnitude(tensor: torch.Tensor) -> torch.Tensor:
    """The largest magnitude in a matrix; for a vector 0, or NaN if it is not finite.

    A vector may have large values (Qwen 2's key biases do), so there only NaN and infinity count.
    """
    return tensor.abs().max() if tensor.dim() > 1 else tensor.sum() * 0


def check_magnitudes(largest: dict[str, torch.Tensor]) -> None:
    """Raise UsageError for a weight whose largest magnitude is NaN, or one that no trained weight has."""
    for name, value in zip(largest, torch.stack([*largest.values()]).tolist(), strict=True):
        if not value < LARGEST_WEIGHT:
            raise UsageError(
                what=f"Weight {name} has values above {LARGEST_WEIGHT:g} or NaN.",
                why="No trained weight has such values.",
                fix="The checkpoint is damaged, or its scales were not applied: download it again.",
            )
