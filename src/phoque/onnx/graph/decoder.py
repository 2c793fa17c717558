"""Turn the traced decoder into a session of Transformers.js: names, sizes, embeddings, head and quantized weights."""

import re
from typing import TYPE_CHECKING

import onnx_ir as ir
import torch
from onnx_ir.passes.common import RemoveUnusedNodesPass

from phoque.models.checkpoint_reader import HEAD
from phoque.models.config import head_dim_of, logits_scaling_of
from phoque.onnx.component import DTYPES, EMBEDDINGS, Component, Weights
from phoque.onnx.graph.nodes import add_float, add_ints, add_node, strip_metadata
from phoque.onnx.graph.simplify import replace_attention_masks, simplify, split_packed_matmuls
from phoque.onnx.graph.stored_weights import add_embedding_lookup, add_quantized_linear, add_weight, fill_weights
from phoque.onnx.graph.trace import TracedDecoder
from phoque.onnx.quantize.block_format import Quantizer, can_quantize

if TYPE_CHECKING:
    from transformers import PretrainedConfig

SLICE_END = 2**31 - 1  # the end of a Slice that goes to the end of the axis


def decoder_component(
    traced: TracedDecoder,
    weights: Weights,
    name: str,
    *,
    dtype: torch.dtype,
    quantizer: Quantizer | None,
    takes_embeds: bool,
) -> Component:
    """Build the decoder session: `model` takes input_ids, `decoder_model_merged` takes inputs_embeds (`takes_embeds`).

    The graph computes in `dtype`. `quantizer` quantizes the weights of linear layers and embeddings; without it they
    are stored in `dtype`. inputs_embeds and logits are always fp32, so sessions of different precisions can be mixed.
    """
    config = weights.config.get_text_config()
    component = Component(name, traced.model, weights)
    graph = component.model.graph
    replace_attention_masks(graph, config)
    RemoveUnusedNodesPass()(component.model)
    simplify(graph)
    RemoveUnusedNodesPass()(component.model)
    split_packed_matmuls(graph, traced.recipes)
    _rename_inputs_outputs(graph, config, dtype)
    _replace_head(component, traced, weights, dtype, quantizer)
    if takes_embeds:
        _cast_input(graph, dtype)
    else:
        _replace_inputs_embeds(component, weights, dtype, quantizer)
    fill_weights(component, traced, weights, dtype, quantizer)
    RemoveUnusedNodesPass()(component.model)
    graph.sort()
    strip_metadata(component.model)
    return component


def embeddings_component(weights: Weights, dtype: torch.dtype, quantizer: Quantizer | None) -> Component:
    """Build the session `embed_tokens`: input_ids in, inputs_embeds in fp32 out."""
    model = _make_empty_model()
    component = Component("embed_tokens", model, weights)
    ids = _add_input_ids(model.graph)
    embeddings = add_embedding_lookup(component, weights, ids, dtype, quantizer)
    embeddings.name, embeddings.type = "inputs_embeds", ir.TensorType(ir.DataType.FLOAT)
    embeddings.shape = ir.Shape([1, "sequence_length", weights.shape(EMBEDDINGS)[1]])
    model.graph.outputs.append(embeddings)
    return component


def _make_empty_model() -> ir.Model:
    graph = ir.Graph([], [], nodes=[], opset_imports={"": 20, "com.microsoft": 1}, name="main_graph")
    return ir.Model(graph, ir_version=10, producer_name="phoque")


def _add_input_ids(graph: ir.Graph) -> ir.Value:
    ids = ir.Value(name="input_ids", shape=ir.Shape([1, "sequence_length"]), type=ir.TensorType(ir.DataType.INT64))
    graph.inputs.insert(0, ids)
    return ids


def _rename_inputs_outputs(graph: ir.Graph, config: "PretrainedConfig", dtype: torch.dtype) -> None:
    """Rename inputs and outputs to Transformers.js's names, in layer order, and give them static sizes where possible.

    Transformers.js sets every symbolic size of an empty cache but batch_size to 0, so heads and head_dim are numbers.
    """
    heads = config.num_key_value_heads
    head_dim = head_dim_of(config)
    shapes = {
        "inputs_embeds": [1, "sequence_length", config.hidden_size],
        "attention_mask": [1, "total_sequence_length"],
        "position_ids": [1, "sequence_length"],
    }
    sides = (
        (graph.inputs, "past_key_values", "past_sequence_length"),
        (graph.outputs, "present", "total_sequence_length"),
    )
    for values, prefix, length in sides:
        for value in values:
            # transformers 5.23 calls the caches input.past_key_values and output.past_key_values, 5.24 past_key_values
            # and cache
            if cache := re.fullmatch(r"(?:\w+\.)+layers\.(\d+)\.(key|value)s", str(value.name)):
                value.name = f"{prefix}.{cache[1]}.{cache[2]}"
                value.shape, value.type = ir.Shape([1, heads, length, head_dim]), ir.TensorType(DTYPES[dtype])
            elif value.name in shapes:
                value.shape = ir.Shape(shapes[value.name])
        ordered = sorted(values, key=lambda v: [int(n) for n in re.findall(r"\.(\d+)\.", str(v.name))])
        values.clear()
        values.extend(ordered)


def _replace_head(
    component: Component, traced: TracedDecoder, weights: Weights, dtype: torch.dtype, quantizer: Quantizer | None
) -> None:
    """Replace the traced head by one that returns logits for the last `num_logits_to_keep` tokens; 0 means all."""
    graph = component.model.graph
    (weight_name,) = (name for name, parameters in traced.recipes.items() if parameters[0].name == HEAD)
    traced.recipes.pop(weight_name)
    (head_node,) = (node for node, _ in graph.initializers[weight_name].uses())
    hidden, traced_logits = head_node.inputs[0], graph.outputs[0]
    assert hidden is not None
    num_logits = ir.Value(name="num_logits_to_keep", shape=ir.Shape([]), type=ir.TensorType(ir.DataType.INT64))
    graph.inputs.append(num_logits)
    start = add_node(graph, "Reshape", [add_node(graph, "Neg", [num_logits]), add_ints(graph, "one_axis", [1])])
    ends, axes = add_ints(graph, "slice_ends", [SLICE_END]), add_ints(graph, "slice_axes", [1])
    last_hidden = add_node(graph, "Slice", [hidden, start, ends, axes])
    vocab_size, hidden_size = weights.shape(HEAD)
    if quantizer and can_quantize((vocab_size, hidden_size)):
        output = add_quantized_linear(
            component, last_hidden, [HEAD], quantizer=quantizer, dtype=dtype, label=EMBEDDINGS if weights.tied else HEAD
        )
    else:
        table = add_weight(component, weights, EMBEDDINGS if weights.tied else HEAD, dtype)
        flat = add_node(graph, "Reshape", [last_hidden, add_ints(graph, "head_in", [-1, hidden_size])])
        matmul = add_node(graph, "Gemm", [flat, table], attributes={"transB": 1})
        output = add_node(graph, "Reshape", [matmul, add_ints(graph, "head_out", [1, -1, vocab_size])])
    if dtype != torch.float32:
        output = add_node(graph, "Cast", [output], attributes={"to": int(ir.DataType.FLOAT)})
    if (scaling := logits_scaling_of(weights.config.get_text_config())) != 1.0:
        output = add_node(graph, "Div", [output, add_float(graph, "logits_scaling", scaling)])
    traced_logits.name = "unused_logits"
    output.name, output.type = "logits", ir.TensorType(ir.DataType.FLOAT)
    output.shape = ir.Shape([1, "logits_length", vocab_size])
    graph.outputs[0] = output
    RemoveUnusedNodesPass()(component.model)  # the traced head, and what scaled its logits
    graph.initializers.pop(weight_name, None)


def _cast_input(graph: ir.Graph, dtype: torch.dtype) -> None:
    embeds = graph.inputs[0]
    embeds.type = ir.TensorType(ir.DataType.FLOAT)
    if dtype != torch.float32:
        uses = list(embeds.uses())
        cast = add_node(graph, "Cast", [embeds], attributes={"to": int(DTYPES[dtype])})
        for node, index in uses:
            node.replace_input_with(index, cast)


def _replace_inputs_embeds(
    component: Component, weights: Weights, dtype: torch.dtype, quantizer: Quantizer | None
) -> None:
    """Replace the input inputs_embeds by input_ids and an embedding lookup."""
    graph = component.model.graph
    embeds = graph.inputs[0]
    uses = list(embeds.uses())
    graph.inputs.remove(embeds)
    embeddings = add_embedding_lookup(component, weights, _add_input_ids(graph), dtype, quantizer, dtype)
    for node, index in uses:
        node.replace_input_with(index, embeddings)
