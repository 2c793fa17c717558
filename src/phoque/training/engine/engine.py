"""The fast path of the decoder layers: fused LoRA linear layers, torch.compile and CUDA graphs.

The engine changes how the layers run during training, not what they compute: tests compare every mode with the plain
model. Evaluation and generation use the plain modules, which share the same weights.
"""

import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import ceil
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from phoque.errors import PhoqueError, UsageError
from phoque.models.architectures import architecture_of
from phoque.training.engine.cuda_graphs import CudaGraphs, PackedRow
from phoque.training.engine.flat_params import FlatParams
from phoque.training.engine.lora_linear import fuse_group, group_by_input

USABLE_SHARE = 0.92  # share of the free GPU memory that a step may use
HEAD_BYTES = 3 * 2**28  # memory of the logit chunks in training/engine/loss.py
POINTWISE_RECOMPUTED = "normed and gated activations are recomputed"
TRIAL_NOISE = (
    0.05  # standard deviation of B during the trial: the adapter then contributes at least as much as a trained one
)


@dataclass
class Engine:
    """Runs the decoder layers of one model on rows of static shape.

    `compiled`: the layers are compiled by torch.compile, with a `dynamic` row length if rows differ in length.
    `captured`: passes are captured as CUDA graphs, one pair per row length. The first `recomputed_layers` layers are
    checkpointed: they keep no activations. `recompute_pointwise`: compiled layers do not keep normed and gated
    activations but recompute them in the backward pass.
    """

    model: Any
    compiled: bool = False
    captured: bool = False
    dynamic: bool = False
    recomputed_layers: int = 0
    recompute_pointwise: bool = False
    _graphs: CudaGraphs = field(default_factory=CudaGraphs)
    _out: Tensor | None = None

    def __post_init__(self) -> None:
        base = self.model.get_base_model()
        self._core, self.layers = base.model, base.model.layers
        self.dtype = self._core.embed_tokens.weight.dtype
        separate = self._has_dropout  # each adapter drops out its own copy of the input, so layers cannot be fused
        linear_groups = architecture_of(base.config).linear_groups
        self._groups = [group for layer in self.layers for group in group_by_input(layer, linear_groups, separate)]
        self.flat = FlatParams(self._groups, self.dtype)
        self._anchor = torch.zeros((), device=self.flat.weights.device, requires_grad=True)
        self.set_weight_cache(enabled=False)
        self._compile()

    def set_weight_cache(self, enabled: bool) -> None:
        """Turn the cache of ready-to-use weights on or off; it takes `weight_cache_bytes` more memory."""
        self.weight_cache = enabled
        for group, a, b in zip(self._groups, self.flat.a, self.flat.b, strict=True):
            fuse_group(group, a, b, enabled)

    def enable_pointwise_recompute(self) -> None:
        """Keep fewer activations from now on; the layers are compiled again."""
        self.recompute_pointwise = True
        self.discard_compiled()
        self._compile()

    @property
    def is_fp8(self) -> bool:
        """Whether the linear layers compute in FP8."""
        return type(self._groups[0][0].base_layer).__name__ == "Fp8Linear"

    @property
    def weight_cache_bytes(self) -> int:
        """Bytes that the weight cache takes: NF4 weights in bf16, FP8 weights transposed; others need none."""
        size = {"Linear4bit": 2, "Fp8Linear": 1}
        bases = [module.base_layer for group in self._groups for module in group]
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

    def backward(self, grad: Tensor) -> None:
        """Add to the adapter's gradients, given the gradient of the hidden states."""
        if self.captured:
            return self._graphs.backward(grad)
        out, self._out = self._out, None
        return self._backward(out, grad)

    def _backward(self, out: Any, grad: Tensor) -> None:
        self.flat.add_gradients(torch.autograd.grad(out, self.flat.leaves, grad))

    def measure_difference(self, row: PackedRow, n_real: int) -> float:
        """Return the relative difference between the engine's and the plain layers' hidden states.

        Only the first `real` positions are compared; the rest is padding. B is random during the trial, because a new
        adapter contributes nothing; weights and gradients are restored. With dropout no two passes agree: the engine
        then runs once with it, to see that it works, and the comparison uses fused linear layers without dropout.
        Raises RuntimeError if gradients are not finite.
        """
        with self.flat.randomize_b(TRIAL_NOISE):
            difference = self._compare_hidden(row, n_real)
            if self._has_dropout:
                with self._without_dropout():
                    difference = self._compare_hidden(row, n_real)
            return difference

    @contextmanager
    def _without_dropout(self) -> Generator[None]:
        """Run fused linear layers alone, without dropout: compiled layers and captured graphs have dropout built in."""
        dropouts = [m for m in self.model.modules() if isinstance(m, torch.nn.Dropout) and m.training]
        previous = self.compiled, self.captured, self.recomputed_layers
        self.compiled, self.captured, self.recomputed_layers = False, False, len(self.layers)
        for dropout in dropouts:
            dropout.eval()
        try:
            yield
        finally:
            self.compiled, self.captured, self.recomputed_layers = previous
            for dropout in dropouts:
                dropout.train()

    def _compare_hidden(self, row: PackedRow, n_real: int) -> float:
        with torch.no_grad(), torch.autocast(row.ids.device.type, torch.bfloat16, self.dtype == torch.bfloat16):
            plain = self._core(
                input_ids=row.ids,
                position_ids=row.positions,
                cu_seq_lens_q=row.cu_seq_lens,
                max_length_q=row.longest,
                use_cache=False,
            ).last_hidden_state[0, :n_real]
        out = self.compute_hidden(row)
        out.backward(torch.ones_like(out))
        are_finite = self.flat.gradients.isfinite().all()
        self.flat.gradients.zero_()
        self.model.zero_grad()
        if not bool(are_finite):
            raise RuntimeError("gradients are not finite")
        return float((out.detach()[0, :n_real] - plain).float().norm() / plain.float().norm())

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
        free = _free_memory() - HEAD_BYTES - 2 * self.flat.weights.nbytes - reserved  # Adam's two moments
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
            return "more layers are recomputed"
        return ""

    def discard_compiled(self) -> None:
        """Delete the captured graphs and the compiled code."""
        self._release_graphs()
        torch.compiler.reset()

    def restore_modules(self) -> None:
        """Give the modules their original forward methods back."""
        for module in (module for group in self._groups for module in group):
            del module.forward

    def _compile(self) -> None:
        from torch._functorch import config

        # the partitioner never recomputes the inputs of a custom operator unless this is off
        patched = config.patch(ban_recompute_materialized_backward=not self.recompute_pointwise)
        self._compiled = patched(torch.compile(_layer, dynamic=self.dynamic))

    def _release_graphs(self) -> None:
        """Delete the captured graphs, and the output and gradients that an interrupted pass left behind."""
        self._graphs.clear()
        self._out = None
        self.model.zero_grad()

    def _run_first_layer(self, row: PackedRow) -> tuple[Tensor, Tensor]:
        """Run the first layer; return its input and output."""
        hidden, *rest = self._prepare_inputs(row)
        with torch.enable_grad():
            return hidden, self._layer_function(self.layers[0], hidden, *rest)

    def _prepare_inputs(self, row: PackedRow) -> tuple[Any, ...]:
        """Return the arguments of the first layer."""
        with torch.no_grad():
            hidden = self._core.embed_tokens(row.ids)
            cos, sin = self._core.rotary_emb(hidden, position_ids=row.positions)
        # its gradient is not used, but without one the first layer would be compiled separately
        return hidden.detach().requires_grad_(True), cos, sin, row.positions, row.cu_seq_lens, row.longest

    def _run(self, row: PackedRow) -> Tensor:
        hidden, *rest = self._prepare_inputs(row)
        with torch.enable_grad(), torch.autocast(hidden.device.type, enabled=False):
            for number, layer in enumerate(self.layers):
                inputs = (layer, hidden, *rest)
                if number < self.recomputed_layers:
                    hidden = checkpoint(
                        self._layer_function, *inputs, use_reentrant=False, preserve_rng_state=self._has_dropout
                    )
                else:
                    hidden = self._layer_function(*inputs)
            return self._core.norm(hidden)

    @property
    def _layer_function(self) -> Callable[..., Tensor]:
        return self._compiled if self.compiled else _layer

    @property
    def _has_dropout(self) -> bool:
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


def _free_memory() -> int:
    """Return the bytes that this process may still allocate within its share of the GPU."""
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info()
    get_fraction = getattr(torch.cuda, "get_per_process_memory_fraction", None)
    fraction = get_fraction() if get_fraction else 1.0
    return min(free, int(fraction * total) - torch.cuda.memory_reserved())


def _layer(
    layer: Any, hidden: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, cu_seq_lens: Tensor, longest: int
) -> Tensor:
    out = layer.forward(
        hidden,
        attention_mask=None,
        position_ids=positions,
        past_key_values=None,
        use_cache=False,
        position_embeddings=(cos, sin),
        cu_seq_lens_q=cu_seq_lens,
        max_length_q=longest,
    )
    return out[0] if isinstance(out, tuple) else out
