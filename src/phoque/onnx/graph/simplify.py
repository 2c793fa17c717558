"""Simplifies a traced decoder: windows in place of masks, and nothing that only costs time (known sizes, copies)."""

import re
from typing import TYPE_CHECKING, Any

import onnx_ir as ir

from phoque.models.config import sliding_window_of
from phoque.onnx.graph.nodes import add_ints, add_node, get_attribute, get_scalar
from phoque.onnx.graph.trace import PackedParameter

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def replace_attention_masks(graph: ir.Graph, config: "PretrainedConfig") -> None:
    """Replace the mask of fused attention by its window, and remove Where nodes that zero rows without any token.

    GroupQueryAttention is causal without a mask, and a batch of one conversation has no padding.
    """
    attention_nodes = [node for node in graph if node.op_type == "GroupQueryAttention"]
    window, kinds = sliding_window_of(config), getattr(config, "layer_types", None)
    for node in attention_nodes:
        if len(node.inputs) > 10:
            node.replace_input_with(10, None)
        if window and (not kinds or kinds[_layer_number(node)] == "sliding_attention"):
            node.attributes["local_window_size"] = ir.AttrInt64("local_window_size", window)
    where_nodes = (
        [n for n in graph if n.op_type == "Where" and get_scalar(n.inputs[1]) == 0.0] if attention_nodes else []
    )
    for node in where_nodes:
        attention_output = node.inputs[2]
        assert attention_output is not None
        node.outputs[0].replace_all_uses_with(attention_output)


def _layer_number(attention: ir.Node) -> int:
    """Return the layer of a GroupQueryAttention node, from the name of its cache input."""
    past_key = attention.inputs[3]
    match = re.search(r"layers\.(\d+)\.", str(past_key.name)) if past_key is not None else None
    assert match, "the cache of fused attention is an input of the graph"
    return int(match[1])


def simplify(graph: ir.Graph) -> None:
    """Remove what only costs time: Shape nodes of known sizes, Reshape nodes after attention, and unused outputs."""
    for node in list(graph):
        if node.op_type == "Shape":
            sizes = _read_shape_output(node)
            static_sizes = [size for size in sizes if isinstance(size, int)]
            if len(static_sizes) == len(sizes):
                node.outputs[0].replace_all_uses_with(add_ints(graph, f"{node.outputs[0].name}.known", static_sizes))
        elif node.op_type == "SkipSimplifiedLayerNormalization":
            for unused in (value for value in node.outputs[1:3] if not value.uses()):
                unused.name = ""  # mean and inverse deviation for every token
        elif node.op_type == "GroupQueryAttention":
            out = node.outputs[0]  # [1, tokens, heads * head_dim], the shape that the next linear layer reads
            last = out
            while [user.op_type for user, _ in last.uses()] == ["Reshape"]:
                last = next(iter(last.uses()))[0].outputs[0]
            last.replace_all_uses_with(out)


def _read_shape_output(node: ir.Node) -> list[Any]:
    """Return the sizes that a Shape node outputs: integers where they are static, else symbols or None."""
    shape = node.inputs[0].shape if node.inputs[0] is not None else None
    return [None] if shape is None else list(shape)[get_attribute(node, "start", 0) : get_attribute(node, "end", None)]


def split_packed_matmuls(graph: ir.Graph, recipes: dict[str, tuple[PackedParameter, ...]]) -> None:
    """Replace a packed MatMul that is followed by Split with one MatMul per parameter: Split copies its outputs."""
    for packed_name in list(recipes):
        packed_weight = graph.initializers[packed_name]
        matmuls = [user for user, _ in packed_weight.uses()]
        if [matmul.op_type for matmul in matmuls] != ["MatMul"]:
            continue
        matmul = matmuls[0]
        consumers = [user for user, _ in matmul.outputs[0].uses()]
        if [user.op_type for user in consumers] != ["Split"]:
            continue
        if len(consumers[0].outputs) != len(recipes[packed_name]):  # the model itself splits one parameter's output
            continue
        hidden = matmul.inputs[0]
        assert hidden is not None
        for parameter, value in zip(recipes.pop(packed_name), consumers[0].outputs, strict=True):
            weight = ir.Value(name=f"{packed_name}.{parameter.name}")
            weight.const_value = packed_weight.const_value  # a placeholder; the recipe says what to fill in
            graph.register_initializer(weight)
            recipes[str(weight.name)] = (parameter,)
            value.replace_all_uses_with(add_node(graph, "MatMul", [hidden, weight], before=matmul))
        graph.remove([consumers[0], matmul], safe=True)
        del graph.initializers[packed_name]
