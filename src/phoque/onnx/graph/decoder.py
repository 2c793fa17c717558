"""Turn the traced decoder into a session of Transformers.js: names, sizes, embeddings, head and quantized weights."""

import re
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir
import torch
from onnx_ir.passes.common import RemoveUnusedNodesPass

from phoque.models.architectures import architecture_of
from phoque.models.checkpoint_reader import HEAD
from phoque.models.config import head_dim_of, logits_scaling_of, sliding_window_of
from phoque.onnx.component import DTYPES, EMBEDDINGS, Component, Weights
from phoque.onnx.graph.trace import PackedParameter, TracedDecoder
from phoque.onnx.quantize.block_format import Quantizer, can_quantize, choose_group_size

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
    _replace_attention_masks(graph, config)
    RemoveUnusedNodesPass()(component.model)
    _simplify(graph)
    RemoveUnusedNodesPass()(component.model)
    _split_packed_matmuls(graph, traced.recipes)
    _rename_inputs_outputs(graph, config, dtype)
    _replace_head(component, traced, weights, dtype, quantizer)
    if takes_embeds:
        _cast_input(graph, dtype)
    else:
        _replace_inputs_embeds(component, weights, dtype, quantizer)
    _fill_weights(component, traced, weights, dtype, quantizer)
    RemoveUnusedNodesPass()(component.model)
    graph.sort()
    strip_metadata(component.model)
    return component


def embeddings_component(weights: Weights, dtype: torch.dtype, quantizer: Quantizer | None) -> Component:
    """Build the session `embed_tokens`: input_ids in, inputs_embeds in fp32 out."""
    model = _make_empty_model()
    component = Component("embed_tokens", model, weights)
    ids = _add_input_ids(model.graph)
    embeddings = _add_embedding_lookup(component, weights, ids, dtype, quantizer)
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


def _replace_attention_masks(graph: ir.Graph, config: "PretrainedConfig") -> None:
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
        [n for n in graph if n.op_type == "Where" and _get_scalar(n.inputs[1]) == 0.0] if attention_nodes else []
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


def _simplify(graph: ir.Graph) -> None:
    """Remove what only costs time: Shape nodes of known sizes, Reshape nodes after attention, and unused outputs."""
    for node in list(graph):
        if node.op_type == "Shape":
            sizes = _read_shape_output(node)
            static_sizes = [size for size in sizes if isinstance(size, int)]
            if len(static_sizes) == len(sizes):
                node.outputs[0].replace_all_uses_with(_add_ints(graph, f"{node.outputs[0].name}.known", static_sizes))
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
    return (
        [None] if shape is None else list(shape)[_get_attribute(node, "start", 0) : _get_attribute(node, "end", None)]
    )


def _split_packed_matmuls(graph: ir.Graph, recipes: dict[str, tuple[PackedParameter, ...]]) -> None:
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
            value.replace_all_uses_with(_add_node(graph, "MatMul", [hidden, weight], before=matmul))
        graph.remove([consumers[0], matmul], safe=True)
        del graph.initializers[packed_name]


def _get_attribute(node: ir.Node, name: str, default: Any) -> Any:
    return node.attributes[name].value if name in node.attributes else default


def _get_scalar(value: ir.Value | None) -> float | None:
    tensor = value.const_value if value is not None else None
    return float(tensor.numpy().flat[0]) if tensor is not None and tensor.size == 1 else None


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
    start = _add_node(graph, "Reshape", [_add_node(graph, "Neg", [num_logits]), _add_ints(graph, "one_axis", [1])])
    ends, axes = _add_ints(graph, "slice_ends", [SLICE_END]), _add_ints(graph, "slice_axes", [1])
    last_hidden = _add_node(graph, "Slice", [hidden, start, ends, axes])
    vocab_size, hidden_size = weights.shape(HEAD)
    if quantizer and can_quantize((vocab_size, hidden_size)):
        output = _add_quantized_linear(
            component, last_hidden, [HEAD], quantizer=quantizer, dtype=dtype, label=EMBEDDINGS if weights.tied else HEAD
        )
    else:
        table = _add_weight(component, weights, EMBEDDINGS if weights.tied else HEAD, dtype)
        flat = _add_node(graph, "Reshape", [last_hidden, _add_ints(graph, "head_in", [-1, hidden_size])])
        matmul = _add_node(graph, "Gemm", [flat, table], attributes={"transB": 1})
        output = _add_node(graph, "Reshape", [matmul, _add_ints(graph, "head_out", [1, -1, vocab_size])])
    if dtype != torch.float32:
        output = _add_node(graph, "Cast", [output], attributes={"to": int(ir.DataType.FLOAT)})
    if (scaling := logits_scaling_of(weights.config.get_text_config())) != 1.0:
        output = _add_node(graph, "Div", [output, _add_float(graph, "logits_scaling", scaling)])
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
        cast = _add_node(graph, "Cast", [embeds], attributes={"to": int(DTYPES[dtype])})
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
    embeddings = _add_embedding_lookup(component, weights, _add_input_ids(graph), dtype, quantizer, dtype)
    for node, index in uses:
        node.replace_input_with(index, embeddings)


def _add_embedding_lookup(
    component: Component,
    weights: Weights,
    ids: ir.Value,
    dtype: torch.dtype,
    quantizer: Quantizer | None,
    output_dtype: torch.dtype = torch.float32,
) -> ir.Value:
    """Add a lookup of token embeddings, in `output_dtype`; quantized rows are dequantized with standard operators."""
    graph = component.model.graph
    shape = weights.shape(EMBEDDINGS)
    if quantizer and can_quantize(shape):
        codes, scales = _add_quantized_weights(component, [EMBEDDINGS], quantizer, torch.float32, EMBEDDINGS)[:2]
        row_scales = _add_node(graph, "Gather", [scales, ids])
        if scales.dtype != ir.DataType.FLOAT:
            row_scales = _add_node(graph, "Cast", [row_scales], attributes={"to": int(ir.DataType.FLOAT)})
        dequantized = _add_dequantize(graph, _add_node(graph, "Gather", [codes, ids]), row_scales)
        embeddings = _add_node(graph, "Reshape", [dequantized, _add_ints(graph, "embed_shape", [1, -1, shape[1]])])
        current_dtype = torch.float32
    else:
        embeddings, current_dtype = (
            _add_node(graph, "Gather", [_add_weight(component, weights, EMBEDDINGS, dtype), ids]),
            dtype,
        )
    config = component.weights.config
    if (scale := architecture_of(config).embedding_scale(config.get_text_config())) != 1.0:
        if current_dtype != torch.float32:
            embeddings = _add_node(graph, "Cast", [embeddings], attributes={"to": int(ir.DataType.FLOAT)})
            current_dtype = torch.float32
        embeddings = _add_node(graph, "Mul", [embeddings, _add_float(graph, "embedding_scale", scale)])
    if current_dtype == output_dtype:
        return embeddings
    return _add_node(graph, "Cast", [embeddings], attributes={"to": int(DTYPES[output_dtype])})


def _add_dequantize(graph: ir.Graph, codes: ir.Value, scales: ir.Value, before: ir.Node | None = None) -> ir.Value:
    """Dequantize 8-bit codes [..., groups, group size] with standard operators; `scales` [..., groups] are fp32."""
    levels = _add_node(graph, "Cast", [codes], attributes={"to": int(ir.DataType.FLOAT)}, before=before)
    levels = _add_node(graph, "Sub", [levels, _add_float(graph, "middle_code", 128.0)], before=before)
    scale = _add_node(graph, "Unsqueeze", [scales, _add_ints(graph, "last_axis", [-1])], before=before)
    return _add_node(graph, "Mul", [levels, scale], before=before)


def _add_weight(component: Component, weights: Weights, name: str, dtype: torch.dtype) -> ir.Value:
    """Return the initializer of an unquantized parameter, added once; embeddings and a tied head share it."""
    if name in component.model.graph.initializers:
        return component.model.graph.initializers[name]
    value = component.add_initializer(name, weights.shape(name), dtype)
    component.fills.append(([value], lambda: [weights.read(name).to(dtype)]))
    return value


def _fill_weights(
    component: Component, traced: TracedDecoder, weights: Weights, dtype: torch.dtype, quantizer: Quantizer | None
) -> None:
    """Replace every traced weight: quantized where possible, else assembled in `dtype` as its recipe says."""
    graph = component.model.graph
    for weight_name, parameters in traced.recipes.items():
        traced_weight = graph.initializers[weight_name]
        consumers = [node for node, _ in traced_weight.uses()]
        names = [p.name for p in parameters]
        is_linear = all(node.op_type == "MatMul" and node.inputs[1] is traced_weight for node in consumers)
        if quantizer and is_linear and all(p.transposed and can_quantize(weights.shape(p.name)) for p in parameters):
            (node,) = consumers
            hidden = node.inputs[0]
            assert hidden is not None
            output = _add_quantized_linear(
                component, hidden, names, quantizer=quantizer, dtype=dtype, label=_joint_name(names), before=node
            )
            node.outputs[0].replace_all_uses_with(output, replace_graph_outputs=True)
            graph.remove(node, safe=True)
        elif consumers:
            shapes = [weights.shape(p.name)[:: -1 if p.transposed else 1] for p in parameters]
            shape = (*shapes[0][:-1], sum(s[-1] for s in shapes))
            value = component.add_initializer(f"{_joint_name(names)}.filled", shape, dtype)
            traced_weight.replace_all_uses_with(value)
            component.fills.append(
                ([value], lambda parameters=parameters: [_concatenate_parameters(weights, parameters).to(dtype)])
            )
        del graph.initializers[weight_name]


def _concatenate_parameters(weights: Weights, parameters: tuple[PackedParameter, ...]) -> torch.Tensor:
    tensors = []
    for parameter in parameters:
        tensor = weights.read(parameter.name)
        tensors.append(tensor.T if parameter.transposed else tensor + parameter.plus_one)
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors, -1)


def _joint_name(names: list[str]) -> str:
    """Return one name for several parameters, such as `model.layers.0.self_attn.q_proj+k_proj+v_proj.weight`."""
    if len(names) == 1:
        return names[0]
    stem, leaf = names[0].rsplit(".", 2)[0], names[0].rsplit(".", 1)[1]
    return f"{stem}.{'+'.join(name.rsplit('.', 2)[1] for name in names)}.{leaf}"


def _add_quantized_linear(
    component: Component,
    hidden: ir.Value,
    names: list[str],
    *,
    quantizer: Quantizer,
    dtype: torch.dtype,
    label: str,
    before: ir.Node | None = None,
) -> ir.Value:
    """Add one linear layer whose quantized weights are concatenated along the output rows; all have the same bits."""
    codes, scales, zeros, bits, rows, columns = _add_quantized_weights(component, names, quantizer, dtype, label)
    if (
        quantizer.dequantize_on_load
    ):  # dequantization reads only constants, so runtimes fold it when they load the graph
        graph = component.model.graph
        dequantized = _add_dequantize(graph, codes, scales, before)
        matrix = _add_node(
            graph, "Reshape", [dequantized, _add_ints(graph, f"{label}.shape", [rows, columns])], before=before
        )
        transposed = _add_node(graph, "Transpose", [matrix], attributes={"perm": [1, 0]}, before=before)
        return _add_node(graph, "MatMul", [hidden, transposed], before=before)
    attributes = {"K": columns, "N": rows, "bits": bits, "block_size": choose_group_size(columns), "accuracy_level": 4}
    inputs = [hidden, codes, scales, *([zeros] if zeros is not None else [])]
    component.model.graph.opset_imports["com.microsoft"] = (
        1  # a graph traced without fused operators does not import it
    )
    return _add_node(component.model.graph, "MatMulNBits", inputs, "com.microsoft", attributes, before)


def _add_quantized_weights(
    component: Component, names: list[str], quantizer: Quantizer, dtype: torch.dtype, label: str
) -> tuple[ir.Value, ir.Value, ir.Value | None, int, int, int]:
    """Add quantized parameters once; return (codes, scales, zeros or None, bits, rows, columns)."""
    (bits, has_zeros), *other_formats = {quantizer.format_of(name) for name in names}
    assert not other_formats, f"{label} is one linear layer, and its parameters differ in bits"
    shapes = [component.weights.shape(name) for name in names]
    rows, columns = sum(shape[0] for shape in shapes), shapes[0][1]
    registered = component.model.graph.initializers
    if f"{label}.codes" in registered:
        return (
            registered[f"{label}.codes"],
            registered[f"{label}.scales"],
            registered.get(f"{label}.zeros"),
            bits,
            rows,
            columns,
        )
    group_size = choose_group_size(columns)
    values = [
        component.add_initializer(f"{label}.codes", (rows, columns // group_size, group_size * bits // 8), torch.uint8),
        component.add_initializer(f"{label}.scales", (rows, columns // group_size), dtype),
    ]
    if has_zeros:
        width = -(-columns // group_size * bits // 8)
        values.append(component.add_initializer(f"{label}.zeros", (rows, width), torch.uint8))

    def compute_values() -> list[torch.Tensor]:
        matrices = [quantizer.quantize(name) for name in names]
        tensors = [torch.cat([m.codes for m in matrices]), torch.cat([m.scales for m in matrices]).to(dtype)]
        return tensors + ([torch.cat([m.pack_zeros() for m in matrices])] if has_zeros else [])

    component.fills.append((values, compute_values))
    return values[0], values[1], values[2] if has_zeros else None, bits, rows, columns


def _add_node(
    graph: ir.Graph,
    op_type: str,
    inputs: list[ir.Value],
    domain: str = "",
    attributes: dict[str, Any] | None = None,
    before: ir.Node | None = None,
) -> ir.Value:
    node = ir.node(op_type, inputs, attributes=attributes, domain=domain)  # the graph gives it a name
    graph.append(node) if before is None else graph.insert_before(before, node)
    return node.outputs[0]


def _add_ints(graph: ir.Graph, name: str, numbers: list[int]) -> ir.Value:
    return _add_constant(graph, name, np.array(numbers, np.int64))


def _add_float(graph: ir.Graph, name: str, number: float) -> ir.Value:
    return _add_constant(graph, name, np.array(number, np.float32))


def _add_constant(graph: ir.Graph, name: str, array: np.ndarray) -> ir.Value:
    if name not in graph.initializers:
        tensor = ir.tensor(array, name=name)
        graph.register_initializer(
            ir.Value(name=name, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype), const_value=tensor)
        )
    return graph.initializers[name]


def strip_metadata(model: ir.Model) -> None:
    """Remove tracebacks and local paths, and the shapes of intermediate values, which runtimes infer."""
    model.metadata_props.clear()
    model.graph.metadata_props.clear()
    model.producer_name, model.producer_version, model.doc_string = "phoque", None, None
    ends = {*model.graph.inputs, *model.graph.outputs}
    for value in model.graph.initializers.values():
        value.metadata_props.clear()
    for node in model.graph:
        node.metadata_props.clear()
        node.doc_string = None
        for value in node.outputs:
            value.metadata_props.clear()
            if value not in ends:
                value.shape, value.type = None, None
