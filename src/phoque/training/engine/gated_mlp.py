"""A decoder block's gated MLP with its adapters as one operator: down(act(gate(x)) * up(x)).

The kernels between the matrix products are Triton's (gated_kernels.py). For the backward pass, the output of gate and
up without their adapters is kept, and act(gate(x)) * up(x) unless memory is short.
"""

from types import MethodType
from typing import Any

import torch
from torch import Tensor

from phoque.training.engine.lora_linear import AdaptedWeight, dequantize, quantize_fp8, scaled_matmul

# the classes in transformers of activations that the kernels know, and what the kernels call them
ACTIVATIONS = {"SiLUActivation": "silu", "SiLU": "silu", "GELUTanh": "gelu_pytorch_tanh"}
MAX_RANK = 64  # the kernels compute what an adapter adds a tile at a time, which a high rank makes slow


def find_activation(mlp: Any, gate_up: list[Any], down: list[Any]) -> str:
    """Return the activation of a gated MLP whose layers are in these two groups, or "" if it is of another kind."""
    names = ("gate_proj", "up_proj", "down_proj")
    modules: list[Any] = [getattr(mlp, name, None) for name in names]
    if not modules[0] or gate_up != modules[:2] or down != modules[2:]:
        return ""
    rank = max(module.r[module.active_adapters[0]] for module in modules)
    has_bias = any(module.base_layer.bias is not None for module in modules)
    if rank > MAX_RANK or has_bias:
        return ""
    return ACTIVATIONS.get(type(getattr(mlp, "act_fn", None)).__name__, "")


def fuse_gated_mlp(mlp: Any, gate_up: AdaptedWeight, down: AdaptedWeight, activation: str, keep_hidden: bool) -> None:
    """Make a gated MLP run as one operator while gradients are enabled; else it runs as before.

    `keep_hidden` keeps act(gate(x)) * up(x) for the backward pass, which otherwise computes it again.
    """

    def forward(self: Any, x: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            return type(self).forward(self, x)
        return apply_gated_mlp(x, gate_up, down, activation, keep_hidden)

    mlp.forward = MethodType(forward, mlp)


def apply_gated_mlp(
    x: Tensor, gate_up: AdaptedWeight, down: AdaptedWeight, activation: str, keep_hidden: bool
) -> Tensor:
    """Return down(act(gate(x)) * up(x)) for x (..., columns), each with its adapter."""
    flat = x.reshape(-1, gate_up.frozen.columns)
    kind = gate_up.frozen.kind
    codes, factors = quantize_fp8(flat.detach()) if kind == "fp8" else (None, None)
    weights = *_list_tensors(gate_up), *_list_tensors(down)
    out = _gated_mlp(flat, codes, factors, *weights, kind, activation, keep_hidden)[0]
    return out.view(*x.shape[:-1], down.frozen.rows)


def _list_tensors(weight: AdaptedWeight) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    frozen = weight.frozen
    return weight.a, weight.b, frozen.values, frozen.scales, frozen.transposed


@torch.library.custom_op("phoque::gated_mlp", mutates_args=())
def _gated_mlp(
    x: Tensor,
    codes: Tensor | None,
    factors: Tensor | None,
    a: Tensor,
    b: Tensor,
    values: Tensor,
    scales: Tensor | None,
    transposed: Tensor | None,
    down_a: Tensor,
    down_b: Tensor,
    down_values: Tensor,
    down_scales: Tensor | None,
    down_transposed: Tensor | None,
    kind: str,
    activation: str,
    keep_hidden: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the output, and what the backward pass needs.

    That is the output of gate and up without adapters, x A^T, act(gate(x)) * up(x) (empty unless `keep_hidden`), and
    its product with the A of the down projection.
    """
    from phoque.training.engine.gated_kernels import gate

    columns, features = x.shape[1], down_a.shape[1]
    xa = x @ a.T
    if codes is not None and factors is not None and scales is not None:
        base = scaled_matmul(codes, factors, values.T, scales.T, x.dtype)
    else:
        base = x @ dequantize(values, scales, kind, 2 * features, columns, x.dtype).T
    hidden, quantized = gate(base, xa, b, activation, kind == "fp8")
    hidden_xa = hidden @ down_a.T
    if quantized and down_scales is not None:
        out = scaled_matmul(quantized.codes, quantized.factors, down_values.T, down_scales.T, x.dtype)
        out.addmm_(hidden_xa, down_b.T)
    else:
        out = hidden_xa @ down_b.T
        out.addmm_(hidden, dequantize(down_values, down_scales, kind, len(down_b), features, x.dtype).T)
    return out, base, xa, hidden if keep_hidden else x.new_empty(0), hidden_xa


@_gated_mlp.register_fake
def _(
    x: Tensor,
    codes: Tensor | None,
    factors: Tensor | None,
    a: Tensor,
    b: Tensor,
    values: Tensor,
    scales: Tensor | None,
    transposed: Tensor | None,
    down_a: Tensor,
    down_b: Tensor,
    down_values: Tensor,
    down_scales: Tensor | None,
    down_transposed: Tensor | None,
    kind: str,
    activation: str,
    keep_hidden: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    tokens, features = x.shape[0], down_a.shape[1]
    return (
        x.new_empty(tokens, down_b.shape[0]),
        x.new_empty(tokens, 2 * features),
        x.new_empty(tokens, a.shape[0]),
        x.new_empty(tokens, features) if keep_hidden else x.new_empty(0),
        x.new_empty(tokens, down_a.shape[0]),
    )


@torch.library.custom_op("phoque::gated_mlp_backward", mutates_args=())
def _gated_mlp_backward(
    grad: Tensor,
    codes: Tensor | None,
    factors: Tensor | None,
    x: Tensor,
    base: Tensor,
    xa: Tensor,
    hidden: Tensor,
    hidden_xa: Tensor,
    a: Tensor,
    b: Tensor,
    values: Tensor,
    scales: Tensor | None,
    transposed: Tensor | None,
    down_a: Tensor,
    down_b: Tensor,
    down_values: Tensor,
    down_scales: Tensor | None,
    down_transposed: Tensor | None,
    kind: str,
    activation: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of x and of both adapters' A and B."""
    from phoque.training.engine.gated_kernels import gate_backward

    rank, features = b.shape[1], down_a.shape[1]
    grad_hidden_xa, grad_down_b = grad @ down_b, grad.T @ hidden_xa
    if codes is not None and factors is not None and down_transposed is not None:
        grad_hidden = _multiply_transposed(codes, factors, down_transposed, grad.dtype)
    else:
        grad_hidden = grad @ dequantize(down_values, down_scales, kind, len(down_b), features, grad.dtype)
    column_scales = None if transposed is None or scales is None else scales.reshape(-1)
    recompute = not hidden.numel()
    gated = gate_backward(grad_hidden, grad_hidden_xa, base, xa, b, down_a, activation, column_scales, recompute)
    del grad_hidden
    grad_down_a = grad_hidden_xa.T @ (hidden if gated.hidden is None else gated.hidden)
    grad_xa, grad_b = torch.empty_like(xa), torch.empty_like(b)
    for part in range(2):
        wide, narrow = slice(part * features, (part + 1) * features), slice(part * rank, (part + 1) * rank)
        torch.mm(gated.base[:, wide], b[wide], out=grad_xa[:, narrow])
        torch.mm(gated.base[:, wide].T, xa[:, narrow], out=grad_b[wide])
    if gated.quantized and transposed is not None:
        grad_x = _multiply_transposed(gated.quantized.codes, gated.quantized.factors, transposed, grad.dtype)
        grad_x.addmm_(grad_xa, a)
    else:
        grad_x = grad_xa @ a
        grad_x.addmm_(gated.base, dequantize(values, scales, kind, len(b), x.shape[1], grad.dtype))
    return grad_x, grad_xa.T @ x, grad_b, grad_down_a, grad_down_b


def _multiply_transposed(codes: Tensor, factors: Tensor, transposed: Tensor, dtype: torch.dtype) -> Tensor:
    """Multiply an FP8 gradient, to which the weight's scales were applied, with the weight's codes."""
    return scaled_matmul(codes, factors, transposed, factors.new_ones(1, transposed.shape[1]), dtype)


@_gated_mlp_backward.register_fake
def _(
    grad: Tensor,
    codes: Tensor | None,
    factors: Tensor | None,
    x: Tensor,
    base: Tensor,
    xa: Tensor,
    hidden: Tensor,
    hidden_xa: Tensor,
    a: Tensor,
    b: Tensor,
    values: Tensor,
    scales: Tensor | None,
    transposed: Tensor | None,
    down_a: Tensor,
    down_b: Tensor,
    down_values: Tensor,
    down_scales: Tensor | None,
    down_transposed: Tensor | None,
    kind: str,
    activation: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    gradients = [tensor.new_empty(tensor.shape) for tensor in (x, a, b, down_a, down_b)]
    return gradients[0], gradients[1], gradients[2], gradients[3], gradients[4]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, _, _, *weights, ctx.kind, ctx.activation, _ = inputs
    ctx.save_for_backward(x, *output[1:], *weights)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad: Tensor, *_: None) -> tuple[Any, ...]:
    saved = ctx.saved_tensors
    down_scales, down_transposed = saved[-2:]
    codes, factors = (None, None) if down_transposed is None else quantize_fp8(grad * down_scales.T)
    grad_x, grad_a, grad_b, grad_down_a, grad_down_b = _gated_mlp_backward(
        grad.contiguous(), codes, factors, *saved, ctx.kind, ctx.activation
    )
    frozen = (None, None, None)
    return grad_x, None, None, grad_a, grad_b, *frozen, grad_down_a, grad_down_b, *frozen, None, None, None


_gated_mlp.register_autograd(_backward, setup_context=_setup_context)
