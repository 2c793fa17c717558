"""The step's decoder layers, made fast: our own products, compiled, and captured as CUDA graphs.

What is replaced is how the layers run while they train, and nothing of what they compute: tests hold every mode to the
plain model. Measuring and generating go on through the plain modules, which share the same weights.
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

from phoque.errors import PhoqueError
from phoque.training.engine.cuda_graphs import Graphs, Row
from phoque.training.engine.flat_params import Flat
from phoque.training.engine.lora_linear import sharing, speed_up

ROOM = 0.92  # of the free memory that a step may plan with
HEAD_BYTES = 3 * 2**28  # the chunks of logits in training/loss.py
FRUGAL = "normed and gated activations are made again"
NOISE = 0.05  # of B while the layers are tried, which makes an adapter's share as large as a trained one's and larger


@dataclass
class Engine:
    """Runs the layers of one model on rows of static shape.

    `compiled` by torch.compile, for any length at once if there are `several`; `captured` as CUDA graphs, one for each
    length; the first `recomputed` layers keep no activations. A `frugal` one, if it is compiled, keeps no normed and
    gated activations: they are made again from others.
    """

    model: Any
    compiled: bool = False
    captured: bool = False
    several: bool = False
    recomputed: int = 0
    frugal: bool = False
    _graphs: Graphs = field(default_factory=Graphs)
    _out: Tensor | None = None

    def __post_init__(self) -> None:
        base = self.model.get_base_model()
        self._core, self.layers = base.model, base.model.layers
        self.dtype = self._core.embed_tokens.weight.dtype
        apart = self._drops  # each adapter then sees its own share of an input
        self._groups = [group for layer in self.layers for group in sharing(layer, apart)]
        self.flat = Flat(self._groups, self.dtype)
        self._anchor = torch.zeros((), device=self.flat.weights.device, requires_grad=True)
        self.hold(whole=False)
        self._compile()

    def hold(self, whole: bool) -> None:
        """Have the products run on the weights as they are held, or kept whole, which takes `whole_bytes` more."""
        self.whole = whole
        for group, a, b in zip(self._groups, self.flat.a, self.flat.b, strict=True):
            speed_up(group, a, b, whole)

    def be_frugal(self) -> None:
        """Keep less from here on; what was compiled goes."""
        self.frugal = True
        self.forget()
        self._compile()

    @property
    def in_fp8(self) -> bool:
        """Whether products are of FP8."""
        return type(self._groups[0][0].base_layer).__name__ == "Fp8Linear"

    @property
    def whole_bytes(self) -> int:
        """What keeping the weights whole takes: NF4 as bf16, FP8 a second time, turned; others are."""
        size = {"Linear4bit": 2, "Fp8Linear": 1}
        bases = [module.base_layer for group in self._groups for module in group]
        return sum(base.in_features * base.out_features * size.get(type(base).__name__, 0) for base in bases)

    @property
    def mode(self) -> str:
        """What this engine does, in words."""
        parts = ["compiled"] * self.compiled + ["captured"] * self.captured
        return " and ".join(parts) or "own products"

    def hidden(self, row: Row) -> Tensor:
        """Hidden states (1, T, d) after the last norm; its backward pass fills the gradients of the adapter."""
        self.flat.begin()
        return _Layers.apply(self._anchor, self, row)

    def forward(self, row: Row) -> Tensor:
        """The hidden states, without a graph of autograd outside."""
        if not self.captured:
            self._out = self._run(row)
            return self._out.detach()
        return self._graphs.forward(row, self._run, self._backward, self.flat.gradients)

    def backward(self, grad: Tensor) -> None:
        """Add the gradients of the adapter, given that of the hidden states."""
        if self.captured:
            return self._graphs.backward(grad)
        out, self._out = self._out, None
        return self._backward(out, grad)

    def _backward(self, out: Any, grad: Tensor) -> None:
        self.flat.add(torch.autograd.grad(out, self.flat.leaves, grad))

    def difference(self, row: Row, real: int) -> float:
        """How far hidden states of the first `real` positions are from the plain layers', relative to their size.

        A whole forward and backward pass with adapters that do something, which leaves nothing behind. With dropout no
        two passes are the same: then they are run, and own products are compared without it.
        """
        with self.flat.shaken(NOISE):
            found = self._difference(row, real)
            if self._drops:
                with self._undropped():
                    found = self._difference(row, real)
            return found

    @contextmanager
    def _undropped(self) -> Generator[None]:
        """Own products as they are, without dropout: what is compiled or captured has it built in."""
        drops = [m for m in self.model.modules() if isinstance(m, torch.nn.Dropout) and m.training]
        asked = self.compiled, self.captured, self.recomputed
        self.compiled, self.captured, self.recomputed = False, False, len(self.layers)
        for drop in drops:
            drop.eval()
        try:
            yield
        finally:
            self.compiled, self.captured, self.recomputed = asked
            for drop in drops:
                drop.train()

    def _difference(self, row: Row, real: int) -> float:
        with torch.no_grad(), torch.autocast(row.ids.device.type, torch.bfloat16, self.dtype == torch.bfloat16):
            plain = self._core(
                input_ids=row.ids,
                position_ids=row.positions,
                cu_seq_lens_q=row.borders,
                max_length_q=row.longest,
                use_cache=False,
            ).last_hidden_state[0, :real]
        out = self.hidden(row)
        out.backward(torch.ones_like(out))
        finite = self.flat.gradients.isfinite().all()
        self.flat.gradients.zero_()
        self.model.zero_grad()
        if not bool(finite):
            raise RuntimeError("gradients are not finite")
        return float((out.detach()[0, :real] - plain).float().norm() / plain.float().norm())

    def layer_seconds(self, row: Row) -> float:
        """Seconds of one layer's forward and backward pass, with all that calling it costs."""
        best = float("inf")
        for _ in range(4):
            torch.cuda.synchronize()
            begun = time.monotonic()
            self._one_layer(row)[1].sum().backward()
            torch.cuda.synchronize()
            best = min(best, time.monotonic() - begun)
        self.flat.clear()
        return best

    def layers_to_recompute(self, row: Row, spared: int = 0) -> int:
        """How many layers may not keep their activations, by what one of them takes, if `spared` bytes stay free.

        Raises PhoqueError (2) if a row does not fit even if none keeps them.
        """
        free = _free_memory() - HEAD_BYTES - 2 * self.flat.weights.nbytes - spared  # Adam's two moments
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        given, out = self._one_layer(row)
        kept = torch.cuda.memory_allocated() - before - given.nbytes
        out.sum().backward()
        self.flat.clear()
        most = torch.cuda.max_memory_allocated() - before
        count, border = len(self.layers), out.nbytes
        over = most + 4 * border + count * kept - ROOM * free
        recomputed = max(0, ceil(over / max(1, kept - border)))
        if recomputed > count:
            least = most + 4 * border + count * border
            raise PhoqueError(
                "A row of this run does not fit the GPU's memory.",
                f"{row.ids.shape[1]:,} tokens need {least / 1e9:.1f} GB and {free / 1e9:.1f} GB are free, with every "
                "layer recomputed.",
                "Give --micro-batch (half of --batch-size, say), or a lower --max-length.",
            )
        return recomputed

    def has_room_for_whole(self, row: Row) -> bool:
        """Whether the weights fit the memory whole, beside the activations of every layer."""
        try:
            return bool(self.whole_bytes) and not self.layers_to_recompute(row, self.whole_bytes)
        except PhoqueError:
            return False

    def spare(self) -> str:
        """Take less memory from here on, after it ran out; what is done for it, or nothing if that is all there is."""
        self._release()
        if self.whole:
            self.hold(whole=False)
            return "the weights are not kept whole"
        if self.compiled and not self.frugal:
            self.be_frugal()
            return FRUGAL
        if self.recomputed < len(self.layers):
            self.recomputed = min(len(self.layers), self.recomputed + ceil(len(self.layers) / 4))
            return "more layers are recomputed"
        return ""

    def forget(self) -> None:
        """Let go of what was captured and compiled."""
        self._release()
        torch.compiler.reset()

    def undo(self) -> None:
        """Let the modules run as they were."""
        for module in (module for group in self._groups for module in group):
            del module.forward

    def _compile(self) -> None:
        from torch._functorch import config

        # what a product of ours reads counts as too dear to make again, unless this says that it may be
        keeps = config.patch(ban_recompute_materialized_backward=not self.frugal)
        self._compiled = keeps(torch.compile(_layer, dynamic=self.several))

    def _release(self) -> None:
        """Let go of what was captured, and of what a pass that was broken off left behind."""
        self._graphs.clear()
        self._out = None
        self.model.zero_grad()

    def _one_layer(self, row: Row) -> tuple[Tensor, Tensor]:
        """The first layer's input and output."""
        hidden, *rest = self._begin(row)
        with torch.enable_grad():
            return hidden, self._layer(self.layers[0], hidden, *rest)

    def _begin(self, row: Row) -> tuple[Any, ...]:
        """What the first layer is given."""
        with torch.no_grad():
            hidden = self._core.embed_tokens(row.ids)
            cos, sin = self._core.rotary_emb(hidden, position_ids=row.positions)
        # it needs no gradient, but with one the first layer is compiled like all the others
        return hidden.detach().requires_grad_(True), cos, sin, row.positions, row.borders, row.longest

    def _run(self, row: Row) -> Tensor:
        hidden, *rest = self._begin(row)
        with torch.enable_grad(), torch.autocast(hidden.device.type, enabled=False):
            for number, layer in enumerate(self.layers):
                inputs = (layer, hidden, *rest)
                if number < self.recomputed:
                    hidden = checkpoint(self._layer, *inputs, use_reentrant=False, preserve_rng_state=self._drops)
                else:
                    hidden = self._layer(*inputs)
            return self._core.norm(hidden)

    @property
    def _layer(self) -> Callable[..., Tensor]:
        return self._compiled if self.compiled else _layer

    @property
    def _drops(self) -> bool:
        return any(config.lora_dropout > 0 for config in self.model.peft_config.values())


class _Layers(torch.autograd.Function):
    """Ties the layers, whose gradients go straight to where they belong, into the graph of the loss."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, engine: Engine, row: Row) -> Tensor:
        ctx.engine = engine
        return engine.forward(row)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, None, None]:
        ctx.engine.backward(grads[0])
        return None, None, None


def _free_memory() -> int:
    """Bytes that may still be taken, of the share of the GPU that this process has been given."""
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info()
    known = getattr(torch.cuda, "get_per_process_memory_fraction", None)
    share = known() if known else 1.0
    return min(free, int(share * total) - torch.cuda.memory_reserved())


def _layer(
    layer: Any, hidden: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, borders: Tensor, longest: int
) -> Tensor:
    out = layer.forward(
        hidden,
        attention_mask=None,
        position_ids=positions,
        past_key_values=None,
        use_cache=False,
        position_embeddings=(cos, sin),
        cu_seq_lens_q=borders,
        max_length_q=longest,
    )
    return out[0] if isinstance(out, tuple) else out
