"""The fast path of the decoder layers: fused LoRA linear layers, torch.compile and CUDA graphs.

The engine changes how the layers run during training, not what they compute: tests compare every mode with the plain
model. Evaluation and generation use the plain modules, which share the same weights.
"""

import inspect
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from math import ceil
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from phoque.errors import PhoqueError, UsageError
from phoque.models.architectures import architecture_of
from phoque.training.engine.cuda_graphs import CudaGraphs, PackedRow
from phoque.training.engine.flat_params import FlatParams
from phoque.training.engine.gated_mlp import find_activation, fuse_gated_mlp
from phoque.training.engine.lora_linear import AdaptedWeight, fuse_group, group_by_input

Angles = tuple[Tensor, Tensor] | None  # cos and sin of the rotary embedding
USABLE_SHARE = 0.92  # share of the free GPU memory that a step may use
HEAD_BYTES = 3 * 2**28  # memory of the logit chunks in training/engine/loss.py
POINTWISE_RECOMPUTED = "normed and gated activations are recomputed"


@dataclass
class Engine:
    """Runs the decoder layers of one model on rows of static shape.

    `compiled`: the layers are compiled by torch.compile, with a `dynamic` row length if rows differ in length.
    `captured`: passes are captured as CUDA graphs, one pair per row length. The first `recomputed_layers` layers are
    checkpointed: they keep no activations. `recompute_pointwise`: compiled layers do not keep normed and gated
    activations but recompute them in the backward pass. `fused_mlps`: gated MLPs run as one operator.
    """

    model: Any
    compiled: bool = False
    captured: bool = False
    dynamic: bool = False
    recomputed_layers: int = 0
    recompute_pointwise: bool = False
    fused_mlps: bool = False
    _graphs: CudaGraphs = field(default_factory=CudaGraphs)
    _out: Tensor | None = None

    def __post_init__(self) -> None:
        base = self.model.get_base_model()
        self._core, self.layers = base.model, base.model.layers
        self.dtype = self._core.embed_tokens.weight.dtype
        rotary = self._core.rotary_emb
        self._has_rotary_by_type = rotary is not None and "layer_type" in inspect.signature(rotary.forward).parameters
        separate = self.has_dropout  # each adapter drops out its own copy of the input, so layers cannot be fused
        linear_groups = architecture_of(base.config).linear_groups
        by_layer = [group_by_input(layer, linear_groups, separate) for layer in self.layers]
        self.groups = [group for groups in by_layer for group in groups]
        self._activation = _find_common_activation(self.layers, by_layer)
        self.flat = FlatParams(self.groups, self.dtype)
        self._patched: list[Any] = []  # modules whose forward method is replaced
        self._anchor = torch.zeros((), device=self.flat.weights.device, requires_grad=True)
        self._compiled: Any = None  # run_layer compiled, once it is needed
        self.set_weight_cache(enabled=False)

    def set_weight_cache(self, enabled: bool) -> None:
        """Turn the cache of ready-to-use weights on or off; it takes `weight_cache_bytes` more memory."""
        self.weight_cache = enabled
        self._restore_forwards()
        self._weights: list[AdaptedWeight] = []  # the old ones are freed one by one as the new ones are built
        for group, a, b in zip(self.groups, self.flat.a, self.flat.b, strict=True):
            self._weights.append(fuse_group(group, a, b, enabled))
        self._patched = [module for group in self.groups for module in group]
        self._fuse_mlps()

    def set_fused_mlps(self, enabled: bool) -> bool:
        """Run gated MLPs as one operator, or no longer; return whether it is possible.

        It needs a GPU, Triton, bf16 as the compute dtype, and MLPs of a kind that `find_activation` knows.
        """
        has_triton = self.flat.weights.is_cuda and find_spec("triton") is not None
        is_possible = bool(self._activation) and self.dtype == torch.bfloat16 and has_triton
        self.fused_mlps = enabled and is_possible
        self._fuse_mlps()
        return is_possible

    def _fuse_mlps(self) -> None:
        """Replace the forward methods of MLPs that run as one operator, or restore them."""
        mlps = [layer.mlp for layer in self.layers] if self._activation else []
        for mlp in mlps:
            if mlp in self._patched:
                self._patched.remove(mlp)
                del mlp.forward
        if not self.fused_mlps:
            return
        groups_per_layer = len(self._weights) // len(mlps)  # gate and up, and down, are the last two
        for number, mlp in enumerate(mlps, 1):
            gate_up, down = self._weights[number * groups_per_layer - 2 : number * groups_per_layer]
            fuse_gated_mlp(mlp, gate_up, down, self._activation, not self.recompute_pointwise)
        self._patched += mlps

    def enable_pointwise_recompute(self) -> None:
        """Keep fewer activations from now on; the layers are compiled again."""
        self.recompute_pointwise = True
        self._fuse_mlps()
        self.discard_compiled()

    @property
    def is_fp8(self) -> bool:
        """Whether the linear layers compute in FP8."""
        return type(self.groups[0][0].base_layer).__name__ == "Fp8Linear"

    @property
    def weight_cache_bytes(self) -> int:
        """Bytes that the weight cache takes: NF4 weights in bf16, FP8 weights transposed; others need none."""
        size = {"Linear4bit": 2, "Fp8Linear": 1}
        bases = [module.base_layer for group in self.groups for module in group]
        return sum(base.in_features * base.out_features * size.get(type(base).__name__, 0) for base in bases)

    @property
    def mode(self) -> str:
        """How this engine runs the layers, as in run.json."""
        parts = ["compiled"] * self.compiled + ["captured"] * self.captured
        return " and ".join(parts) or "fused linear layers"

    def compute_hidden(self, row: PackedRow) -> Tensor:
        """Return the hidden states (1, T, d) after the last norm; their backward pass fills the adapter's gradients."""
        self.flat.refresh()
        return _Layers.apply(self._anchor, self, row)

    def forward(self, row: PackedRow) -> Tensor:
        """Return the hidden states, detached from autograd."""
        if not self.captured:
            self._out = self._run(row)
            return self._out.detach()
        return self._graphs.forward(row, self._run, self._backward, self.flat.gradients)

    def take_uncaptured_output(self) -> Tensor:
        """Return the hidden states of the row of the last capture, from its run without graphs."""
        return self._graphs.take_uncaptured_output()

    def backward(self, grad: Tensor) -> None:
        """Add to the adapter's gradients, given the gradient of the hidden states."""
        if self.captured:
            return self._graphs.backward(grad)
        out, self._out = self._out, None
        return self._backward(out, grad)

    def _backward(self, out: Any, grad: Tensor) -> None:
        self.flat.add_gradients(torch.autograd.grad(out, self.flat.leaves, grad))

    @contextmanager
    def plain_modules(self) -> Generator[None]:
        """Run the layers as transformers and peft run them inside the `with` block."""
        forwards = [module.__dict__.pop("forward") for module in self._patched]
        try:
            yield
        finally:
            for module, forward in zip(self._patched, forwards, strict=True):
                module.forward = forward  # the same object: compiled code stays valid

    @contextmanager
    def without_dropout(self) -> Generator[None]:
        """Run fused linear layers alone, without dropout: compiled layers and captured graphs have dropout built in."""
        dropouts = [m for m in self.model.modules() if isinstance(m, torch.nn.Dropout) and m.training]
        previous = self.compiled, self.captured
        self.compiled, self.captured = False, False
        for dropout in dropouts:
            dropout.eval()
        try:
            yield
        finally:
            self.compiled, self.captured = previous
            for dropout in dropouts:
                dropout.train()

    def time_layer(self, row: PackedRow) -> float:
        """Return the seconds of one layer's forward and backward pass, launch overhead included: the best of four."""
        best = float("inf")
        for _ in range(4):
            torch.cuda.synchronize()
            start = time.monotonic()
            self._run_first_layer(row)[1].sum().backward()
            torch.cuda.synchronize()
            best = min(best, time.monotonic() - start)
        self.flat.clear()
        return best

    def count_layers_to_recompute(self, row: PackedRow, reserved: int = 0) -> int:
        """Return how many layers must be checkpointed for a row to fit the memory, with `reserved` bytes left free.

        The estimate extrapolates from one layer. Raises UsageError if a row does not fit with all of them
        checkpointed.
        """
        free = measure_free_memory() - HEAD_BYTES - 2 * self.flat.weights.nbytes - reserved  # Adam's two moments
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        hidden, out = self._run_first_layer(row)
        kept_per_layer = torch.cuda.memory_allocated() - before - hidden.nbytes
        out.sum().backward()
        self.flat.clear()
        peak = torch.cuda.max_memory_allocated() - before
        count, hidden_bytes = len(self.layers), out.nbytes
        excess = peak + 4 * hidden_bytes + count * kept_per_layer - USABLE_SHARE * free
        recomputed = max(0, ceil(excess / max(1, kept_per_layer - hidden_bytes)))
        if recomputed > count:
            needed = peak + 4 * hidden_bytes + count * hidden_bytes
            raise UsageError(
                what="A row of this run does not fit the GPU memory.",
                why=f"{row.ids.shape[1]:,} tokens need {needed / 1e9:.1f} GB with every layer recomputed, and "
                f"{free / 1e9:.1f} GB are free.",
                fix="Set --micro-batch (for example to half of --batch-size), or lower --max-length.",
            )
        return recomputed

    def has_room_for_weight_cache(self, row: PackedRow) -> bool:
        """Whether the weight cache fits the memory together with the activations of every layer."""
        try:
            return bool(self.weight_cache_bytes) and not self.count_layers_to_recompute(row, self.weight_cache_bytes)
        except PhoqueError:
            return False

    def reduce_memory(self) -> str:
        """Use less memory after it ran out; return what was changed, or "" if nothing is left to change."""
        self._release_graphs()
        if self.weight_cache:
            self.set_weight_cache(enabled=False)
            return "the weight cache is dropped"
        if self.compiled and not self.recompute_pointwise:
            self.enable_pointwise_recompute()
            return POINTWISE_RECOMPUTED
        if self.recomputed_layers < len(self.layers):
            self.recomputed_layers = min(len(self.layers), self.recomputed_layers + ceil(len(self.layers) / 4))
            return "more blocks are recomputed"
        return ""

    def discard_compiled(self) -> None:
        """Delete the captured graphs and the compiled code."""
        self._release_graphs()
        self._compiled = None
        torch.compiler.reset()

    def restore_modules(self) -> None:
        """Give the modules their original forward methods back."""
        self._restore_forwards()

    def _restore_forwards(self) -> None:
        for module in self._patched:
            del module.forward
        self._patched = []

    def _compile(self) -> Any:
        """Return run_layer compiled; only now, because torch.compile imports inductor, which takes a second."""
        from torch._functorch import config

        # the partitioner never recomputes the inputs of a custom operator unless this is off
        patched = config.patch(ban_recompute_materialized_backward=not self.recompute_pointwise)
        return patched(torch.compile(run_layer, dynamic=self.dynamic))

    def _release_graphs(self) -> None:
        """Delete the captured graphs, and the output and gradients that an interrupted pass left behind."""
        self._graphs.clear()
        self._out = None
        self.model.zero_grad()

    def _run_first_layer(self, row: PackedRow) -> tuple[Tensor, Tensor]:
        """Run the first layer; return its input and output."""
        hidden, angles, *rest = self.prepare_inputs(row)
        with torch.enable_grad():
            return hidden, self.layer_function(self.layers[0], hidden, angles[0], *rest)

    def prepare_inputs(self, row: PackedRow) -> tuple[Any, ...]:
        """Return the arguments of the first layer."""
        with torch.no_grad():
            hidden = self._core.embed_tokens(row.ids)
            if (scale := getattr(self._core, "embedding_multiplier", 1.0)) != 1.0:  # Granite has one
                hidden = hidden * scale
            angles = self._compute_rotary(hidden, row.positions)
        # its gradient is not used, but without one the first layer would be compiled separately
        return hidden.detach().requires_grad_(True), angles, row.positions, row.cu_seq_lens, row.longest

    def _compute_rotary(self, hidden: Tensor, positions: Tensor) -> list[Angles]:
        """Return (cos, sin) for each layer, or None for a model without rotary embeddings.

        Some models have other angles in layers with a sliding window: their rotary embedding takes the layer's type.
        """
        rotary = self._core.rotary_emb
        if rotary is None:
            return [None] * len(self.layers)
        if not self._has_rotary_by_type:
            return [rotary(hidden, position_ids=positions)] * len(self.layers)
        types = self._core.config.layer_types
        by_type = {kind: rotary(hidden, positions, kind) for kind in dict.fromkeys(types)}
        return [by_type[kind] for kind in types]

    def _run(self, row: PackedRow) -> Tensor:
        hidden, angles, *rest = self.prepare_inputs(row)
        with torch.enable_grad(), torch.autocast(hidden.device.type, enabled=False):
            for number, layer in enumerate(self.layers):
                inputs = (layer, hidden, angles[number], *rest)
                if number < self.recomputed_layers:
                    hidden = checkpoint(
                        self.layer_function, *inputs, use_reentrant=False, preserve_rng_state=self.has_dropout
                    )
                else:
                    hidden = self.layer_function(*inputs)
            return self._core.norm(hidden)

    @property
    def layer_function(self) -> Callable[..., Tensor]:
        """How a layer runs: compiled or not."""
        if not self.compiled:
            return run_layer
        self._compiled = self._compiled or self._compile()
        return self._compiled

    @property
    def has_dropout(self) -> bool:
        """Whether the adapter drops out some of its inputs."""
        return any(config.lora_dropout > 0 for config in self.model.peft_config.values())


class _Layers(torch.autograd.Function):
    """Connects the layers to the autograd graph of the loss; their gradients are added to the adapter directly."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, engine: Engine, row: PackedRow) -> Tensor:
        ctx.engine = engine
        return engine.forward(row)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, None, None]:
        ctx.engine.backward(grads[0])
        return None, None, None


def _find_common_activation(layers: Any, groups_by_layer: list[list[list[Any]]]) -> str:
    """Return the activation of the gated MLP that all layers have, or ""."""
    found = {
        find_activation(getattr(layer, "mlp", None), *groups[-2:]) if len(groups) > 1 else ""
        for layer, groups in zip(layers, groups_by_layer, strict=True)
    }
    return found.pop() if len(found) == 1 else ""


def measure_free_memory() -> int:
    """Return the bytes that this process may still allocate within its share of the GPU."""
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info()
    get_fraction = getattr(torch.cuda, "get_per_process_memory_fraction", None)
    fraction = get_fraction() if get_fraction else 1.0
    return min(free, int(fraction * total) - torch.cuda.memory_reserved())


def run_layer(
    layer: Any, hidden: Tensor, angles: Angles, positions: Tensor, cu_seq_lens: Tensor, longest: int
) -> Tensor:
    """Return the output of a decoder layer for hidden states (1, T, d) of a packed row."""
    out = layer.forward(
        hidden,
        attention_mask=None,
        position_ids=positions,
        past_key_values=None,
        use_cache=False,
        position_embeddings=angles,
        cu_seq_lens_q=cu_seq_lens,
        max_length_q=longest,
    )
    return out[0] if isinstance(out, tuple) else out
