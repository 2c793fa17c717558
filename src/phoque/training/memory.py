"""Estimate the memory of a training run before it starts, from its shapes.

benchmarks/memory.py compares the estimate with what runs take.
"""

import statistics
from dataclasses import dataclass, replace
from math import ceil
from typing import Any

import torch

from phoque.settings.train import TrainSettings
from phoque.training.engine.engine import USABLE_SHARE, measure_free_memory
from phoque.training.engine.loss import LOGITS_AT_ONCE
from phoque.training.prepare import Prepared, packing_for

GB = 1e9
LOGITS_COPIES = 3  # logits in fp32, their softmax, and the gradient
BYTES = {"nf4": 0.516, "fp8": 1.0, "bf16": 2.0, "fp32": 4.0}  # per projection weight; nf4 with double quantization
PACKED_BYTES = BYTES | {"nf4": 0.5}  # without the constants of NF4
CACHE_BYTES = {"nf4": 2.0, "fp8": 1.0}  # of the engine's weight cache: nf4 weights in bf16, fp8 weights transposed
ADAPTER_BYTES = 16  # per adapter weight in fp32, with its gradient and Adam's two moments


@dataclass(frozen=True)
class MemoryEstimate:
    """The GB of one run by part; `recomputed_layers` of `layers` are recomputed in the backward pass.

    `per_layer` is what one layer keeps for its backward pass, and `usable` what is free on the GPU, if there is one.
    `libraries` is the resident memory of this process on a CPU, where it counts; 0 for a GPU.
    """

    weights: float
    adapter_and_optimizer: float
    activations: float
    logits: float
    weight_cache: float
    libraries: float
    per_layer: float
    layers: int
    recomputed_layers: int
    usable: float | None = None

    @property
    def on_device(self) -> float:
        """GB without the libraries."""
        return self.weights + self.adapter_and_optimizer + self.activations + self.logits + self.weight_cache

    def to_json(self) -> dict[str, float]:
        """{part: GB, sum}; parts that are 0 are left out."""
        names = ("weights", "adapter_and_optimizer", "activations", "logits", "weight_cache", "libraries")
        parts = {name: getattr(self, name) for name in names}
        return {name: round(value, 2) for name, value in (parts | {"sum": sum(parts.values())}).items() if value}

    def describe(self) -> str:
        """One line for the dry run."""
        labels = {"adapter_and_optimizer": "adapter and its Adam states", "weight_cache": "weight cache"}
        gigabytes = self.to_json()
        total = gigabytes.pop("sum")
        parts = ", ".join(f"{labels.get(name, name)} {value:.1f}" for name, value in gigabytes.items())
        recomputed = (
            f"; {self.recomputed_layers} of {self.layers} decoder blocks recomputed" if self.recomputed_layers else ""
        )
        short = ""
        if self.usable is not None and self.on_device > self.usable:
            short = f"; more than the {self.usable:.1f} GB that a run may use of this GPU now"
        return f"about {total:.1f} GB: {parts}{recomputed}{short} (an estimate)"


def estimate_memory(ready: Prepared, s: TrainSettings, counts: dict[str, int], processes: int = 1) -> MemoryEstimate:
    """Estimate the memory of one process of a run that caches no weights and recomputes no layer unless asked to.

    With exact packing, the fullest of some hundred rows is about three standard deviations above the mean.
    """
    config = ready.config.get_text_config()
    rows = packing_for(s, ready.scan, static=False)
    spread = statistics.pstdev(ready.scan.lengths) * rows.count**0.5
    tokens = rows.count * rows.mean + 3 * spread if rows.exact else rows.tokens
    labeled = tokens * ready.scan.trained_tokens / sum(ready.scan.lengths)
    width = BYTES["fp32" if s.quantization == "fp32" else "bf16"]
    per_weight, packed = BYTES[s.quantization], PACKED_BYTES[s.quantization]
    if s.fsdp:  # a process gathers the layer that runs and the next one; the constants of NF4 are not sharded
        per_weight += packed * (1 / processes + 2 / config.num_hidden_layers - 1)
    libraries = 0.0
    if not torch.cuda.is_available():  # there, memory is what the process has, with everything that it imported
        import psutil

        libraries = psutil.Process().memory_info().rss / GB
    activations = _count_activations(config, tokens, width)
    layers, recomputed = config.num_hidden_layers, config.num_hidden_layers if s.gradient_checkpointing else 0
    return MemoryEstimate(
        weights=(counts["projections"] * per_weight + (counts["base"] - counts["projections"]) * width) / GB,
        adapter_and_optimizer=counts["adapter"] * ADAPTER_BYTES / GB,
        activations=activations.sum(layers, recomputed) / GB,
        logits=LOGITS_COPIES * 4 * min(labeled * config.vocab_size, LOGITS_AT_ONCE) / GB,
        weight_cache=0.0,
        libraries=libraries,
        per_layer=activations.per_layer / GB,
        layers=layers,
        recomputed_layers=recomputed,
    )


def fit_to_gpu(estimate: MemoryEstimate, s: TrainSettings, counts: dict[str, int]) -> MemoryEstimate:
    """The estimate as the engine would run on this machine's GPU, if it has one.

    The engine caches weights if the cache fits together with the activations of all layers. Otherwise it recomputes as
    many layers as needed.
    """
    if not torch.cuda.is_available():
        return estimate
    usable = _measure_usable() / GB
    if s.gradient_checkpointing or s.engine_mode == "eager" or s.fsdp:
        return replace(estimate, usable=usable)
    cache = counts["projections"] * CACHE_BYTES.get(s.quantization, 0.0) / GB
    if estimate.on_device + cache <= usable:
        return replace(estimate, weight_cache=cache, usable=usable)
    missing = max(0, ceil((estimate.on_device - usable) / estimate.per_layer))
    saved = min(missing, estimate.layers - 1) * estimate.per_layer  # the layer whose backward pass runs keeps its own
    return replace(
        estimate,
        activations=estimate.activations - saved,
        recomputed_layers=min(missing, estimate.layers),
        usable=usable,
    )


def _measure_usable() -> float:
    """The bytes that a run may use of this GPU; 0 if other programs leave no room for CUDA itself."""
    try:
        return USABLE_SHARE * measure_free_memory()
    except RuntimeError:
        return 0.0


@dataclass(frozen=True)
class Activations:
    """The bytes that a row keeps for its backward pass.

    `per_layer` is what a layer keeps, `inputs` what a recomputed layer keeps, and `working` what the layer whose
    backward pass runs holds.
    """

    per_layer: float
    inputs: float
    working: float

    def sum(self, layers: int, recomputed: int) -> float:
        """The bytes of all layers."""
        return max(0, layers - 1 - recomputed) * self.per_layer + layers * self.inputs + self.working


def _count_activations(config: Any, tokens: float, width: float) -> Activations:
    """The activations of a row of so many tokens.

    A layer keeps the inputs of its two norms in fp32 and, in the compute dtype, the inputs of its linear layers, the
    rotated queries, keys and values, and what the gated activation needs. A recomputed layer keeps only its input. The
    layer whose backward pass runs also holds its gradients, so it counts as 14 hidden and 4 intermediate activations.
    """
    hidden, intermediate = config.hidden_size, config.intermediate_size
    head = getattr(config, "head_dim", None) or hidden // config.num_attention_heads
    queries, keys = config.num_attention_heads * head, config.num_key_value_heads * head
    per_layer = 2 * 4 * hidden + width * (2 * hidden + 2 * queries + 2 * keys + 4 * intermediate)
    working = width * (14 * hidden + 4 * intermediate)
    return Activations(tokens * per_layer, tokens * width * hidden, tokens * working)
