"""The fast path of the decoder layers: fused LoRA linear layers, torch.compile and CUDA graphs.

The engine changes how the layers run during training, not what they compute: tests compare every mode with the plain
model. Evaluation and generation use the plain modules, which share the same weights.
"""

import inspect
import math
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager, nullcontext
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
from phoque.training.engine.lora_linear import fuse_group, group_by_input

Angles = tuple[Tensor, Tensor] | None  # cos and sin of the rotary embedding
USABLE_SHARE = 0.92  # share of the free GPU memory that a step may use
HEAD_BYTES = 3 * 2**28  # memory of the logit chunks in training/engine/loss.py
POINTWISE_RECOMPUTED = "normed and gated activations are recomputed"
# standard deviation of B during the trial: the adapter then contributes at least as much as a trained one
TRIAL_NOISE = 0.05
# largest relative difference of one layer that rounding explains: in bf16, and with FP8 products
MAX_DIFFERENCE, MAX_DIFFERENCE_FP8 = 0.05, 0.2
RESIDUAL_ROUNDING = 2**-8  # of the sum of a residual stream and what a layer adds to it, in bf16
MAX_DIFFERENCE_CAPTURED = 0.5  # a graph replays the same kernels; if it reads other memory, nothing agrees


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
        separate = self._has_dropout  # each adapter drops out its own copy of the input, so layers cannot be fused
        linear_groups = architecture_of(base.config).linear_groups
        by_layer = [group_by_input(layer, linear_groups, separate) for layer in self.layers]
        self._groups = [group for groups in by_layer for group in groups]
        self._activation = _find_common_activation(self.layers, by_layer)
        self.flat = FlatParams(self._groups, self.dtype)
        self._patched: list[Any] = []  # modules whose forward method is replaced
        self._anchor = torch.zeros((), device=self.flat.weights.device, requires_grad=True)
        self.set_weight_cache(enabled=False)
        self._compile()

    def set_weight_cache(self, enabled: bool) -> None:
        """Turn the cache of ready-to-use weights on or off; it takes `weight_cache_bytes` more memory."""
        self.weight_cache = enabled
        self._restore_forwards()
        self._weights = [
            fuse_group(group, a, b, enabled) for group, a, b in zip(self._groups, self.flat.a, self.flat.b, strict=True)
        ]
        self._patched = [module for group in self._groups for module in group]
        self._fuse_mlps()

    def set_fused_mlps(self, enabled: bool) -> bool:
        """Run gated MLPs as one operator, or no longer; return False if the model has other MLPs.

        It needs a GPU, 16-bit weights and Triton.
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

    def check_against_plain(self, row: PackedRow, n_real: int) -> str:
        """Compare the engine with the plain layers on one row; return what differs too much, or "".

        Each layer gets the input that the plain layers give it, so rounding does not add up over the depth: its output,
        the gradient of its input and those of its adapter must agree. Then the whole row runs, forward and backward, as
        in a step; captured graphs are compared with the same pass uncaptured. Only the first `n_real` positions are
        compared; the rest is padding. B is random during the trial, because a new adapter contributes nothing; weights
        and gradients are restored. With dropout no two passes agree: layers are then compared without dropout, as fused
        linear layers, and the row runs with it once, to see that it works.
        """
        with self.flat.randomize_b(TRIAL_NOISE):
            with self._without_dropout() if self._has_dropout else nullcontext():
                number, difference = self._compare_layers(row, n_real)
            if not difference <= self.max_difference:
                return f"layer {number} differs by {difference:.1%} from the plain layer"
            if not self.captured:
                self._run_trial_step(row, n_real)
                return ""
            self.captured = False
            try:
                uncaptured = self._run_trial_step(row, n_real)
            finally:
                self.captured = True
            captured = self._run_trial_step(row, n_real)
            if not self._has_dropout and not _relative(captured - uncaptured, uncaptured) <= MAX_DIFFERENCE_CAPTURED:
                return "the captured graphs compute something else"
            return ""

    @property
    def max_difference(self) -> float:
        """The largest difference of one layer from the plain one that rounding explains."""
        return MAX_DIFFERENCE_FP8 if self.is_fp8 else MAX_DIFFERENCE

    def _run_trial_step(self, row: PackedRow, n_real: int) -> Tensor:
        """Run a row forward and backward; return its hidden states. Raises RuntimeError if gradients are not finite.

        As in a step, the padding has no gradient: where a model embeds its padding token as zeros, each norm would
        multiply the gradient by up to 1,000.
        """
        out = self.compute_hidden(row)
        grad = torch.ones_like(out)
        grad[:, n_real:] = 0
        out.backward(grad)
        are_finite = self.flat.gradients.isfinite().all()
        self.flat.gradients.zero_()
        self.model.zero_grad()
        if not bool(are_finite):
            raise RuntimeError("gradients are not finite")
        return out.detach().clone()

    def _compare_layers(self, row: PackedRow, n_real: int) -> tuple[int, float]:
        """Return the number of the layer that differs most from the plain one, and its difference.

        Differences are relative to what the layer adds to its input, or to its gradient; what the residual stream's own
        rounding explains is left out.
        """
        self.flat.refresh()
        hidden, angles, *rest = self._prepare_inputs(row)
        rng = torch.Generator(hidden.device).manual_seed(0)
        upstream = torch.zeros_like(hidden)
        upstream[:, :n_real] = torch.randn(
            hidden[:, :n_real].shape, generator=rng, device=hidden.device, dtype=hidden.dtype
        )
        groups_per_layer = len(self._groups) // len(self.layers)
        differences = []
        for number, layer in enumerate(self.layers):
            numbers = range(number * groups_per_layer, (number + 1) * groups_per_layer)
            groups = [self._groups[n] for n in numbers]
            weights = [
                getattr(module, name)[module.active_adapters[0]].weight
                for name in ("lora_A", "lora_B")
                for group in groups
                for module in group
            ]
            leaves = [self.flat.a[n] for n in numbers] + [self.flat.b[n] for n in numbers]
            inputs = hidden.detach().requires_grad_(True)
            # as the plain layers run in the trainer
            autocast = torch.autocast(hidden.device.type, torch.bfloat16, self.dtype == torch.bfloat16)
            with self._plain_modules(), torch.enable_grad(), autocast:
                plain = _layer(layer, inputs, angles[number], *rest)
                expected, *expected_adapter = torch.autograd.grad(plain, [inputs, *weights], upstream)
            own_inputs = hidden.detach().requires_grad_(True)
            with torch.enable_grad(), torch.autocast(hidden.device.type, enabled=False):
                own_output = self._layer_function(layer, own_inputs, angles[number], *rest)
                gradient, *own_adapter = torch.autograd.grad(own_output, [own_inputs, *leaves], upstream)
            added, added_gradient = plain - inputs, expected - upstream
            rounding = RESIDUAL_ROUNDING if self.dtype == torch.bfloat16 else 0.0
            differences.append(
                max(
                    _relative((own_output - plain)[:, :n_real], added[:, :n_real], rounding * plain[:, :n_real]),
                    _relative(gradient - expected, added_gradient, rounding * expected),
                    _relative(*self._adapter_difference(own_adapter, expected_adapter)),
                )
            )
            hidden = plain.detach().to(hidden.dtype)
        worst = max(range(len(differences)), key=differences.__getitem__)
        return worst, differences[worst]

    def _adapter_difference(self, gradients: list[Tensor], expected: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Return the difference of one layer's adapter gradients from the plain ones, and the plain ones, as vectors.

        `gradients` are those of the flat copy, whose B is multiplied by the LoRA scaling.
        """
        half = len(gradients) // 2
        parts = [gradient.float().flatten() for gradient in gradients[:half]]
        parts += [gradient.float().flatten() * self.flat.scaling for gradient in gradients[half:]]
        plain = torch.cat([gradient.float().flatten() for gradient in expected])
        return torch.cat(parts) - plain, plain

    @contextmanager
    def _plain_modules(self) -> Generator[None]:
        """Run the layers as transformers and peft run them inside the `with` block."""
        forwards = [module.__dict__.pop("forward") for module in self._patched]
        try:
            yield
        finally:
            for module, forward in zip(self._patched, forwards, strict=True):
                module.forward = forward  # the same object: compiled code stays valid

    @contextmanager
    def _without_dropout(self) -> Generator[None]:
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
            return "more layers are recomputed"
        return ""

    def discard_compiled(self) -> None:
        """Delete the captured graphs and the compiled code."""
        self._release_graphs()
        torch.compiler.reset()

    def restore_modules(self) -> None:
        """Give the modules their original forward methods back."""
        self._restore_forwards()

    def _restore_forwards(self) -> None:
        for module in self._patched:
            del module.forward
        self._patched = []

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
        hidden, angles, *rest = self._prepare_inputs(row)
        with torch.enable_grad():
            return hidden, self._layer_function(self.layers[0], hidden, angles[0], *rest)

    def _prepare_inputs(self, row: PackedRow) -> tuple[Any, ...]:
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
        hidden, angles, *rest = self._prepare_inputs(row)
        with torch.enable_grad(), torch.autocast(hidden.device.type, enabled=False):
            for number, layer in enumerate(self.layers):
                inputs = (layer, hidden, angles[number], *rest)
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


def _find_common_activation(layers: Any, groups_by_layer: list[list[list[Any]]]) -> str:
    """Return the activation of the gated MLP that all layers have, or ""."""
    found = {
        find_activation(getattr(layer, "mlp", None), *groups[-2:]) if len(groups) > 1 else ""
        for layer, groups in zip(layers, groups_by_layer, strict=True)
    }
    return found.pop() if len(found) == 1 else ""


def _relative(difference: Tensor, reference: Tensor, rounding: Tensor | None = None) -> float:
    """Return the norm of a difference beyond that of `rounding`, relative to the norm of the reference."""
    with torch.no_grad():
        excess = difference.float().norm() - (0.0 if rounding is None else rounding.float().norm())
        value = float(excess / reference.float().norm())
    return math.inf if math.isnan(value) else max(0.0, value)  # NaN is no agreement, and max() would drop it


def measure_free_memory() -> int:
    """Return the bytes that this process may still allocate within its share of the GPU."""
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info()
    get_fraction = getattr(torch.cuda, "get_per_process_memory_fraction", None)
    fraction = get_fraction() if get_fraction else 1.0
    return min(free, int(fraction * total) - torch.cuda.memory_reserved())


def _layer(layer: Any, hidden: Tensor, angles: Angles, positions: Tensor, cu_seq_lens: Tensor, longest: int) -> Tensor:
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
