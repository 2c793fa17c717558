"""Weights of a decoder session, quantized or in its dtype; their values are computed when the session is written."""

import onnx_ir as ir
import torch

from phoque.models.architectures import architecture_of
from phoque.onnx.component import DTYPES, EMBEDDINGS, Component, Weights
from phoque.onnx.graph.nodes import add_float, add_ints, add_node
from phoque.onnx.graph.trace import PackedParameter, TracedDecoder
from phoque.onnx.quantize.block_format import Quantizer, can_quantize, choose_group_size


def add_embedding_lookup(
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
        row_scales = add_node(graph, "Gather", [scales, ids])
        if scales.dtype != ir.DataType.FLOAT:
            row_scales = add_node(graph, "Cast", [row_scales], attributes={"to": int(ir.DataType.FLOAT)})
        dequantized = _add_dequantize(graph, add_node(graph, "Gather", [codes, ids]), row_scales)
        embeddings = add_node(graph, "Reshape", [dequantized, add_ints(graph, "embed_shape", [1, -1, shape[1]])])
        current_dtype = torch.float32
    else:
        embeddings, current_dtype = (
            add_node(graph, "Gather", [add_weight(component, weights, EMBEDDINGS, dtype), ids]),
            dtype,
        )
    config = component.weights.config
    if (scale := architecture_of(config).embedding_scale(config.get_text_config())) != 1.0:
        if current_dtype != torch.float32:
            embeddings = add_node(graph, "Cast", [embeddings], attributes={"to": int(ir.DataType.FLOAT)})
            current_dtype = torch.float32
        embeddings = add_node(graph, "Mul", [embeddings, add_float(graph, "embedding_scale", scale)])
    if current_dtype == output_dtype:
        return embeddings
    return add_node(graph, "Cast", [embeddings], attributes={"to": int(DTYPES[output_dtype])})


def _add_dequantize(graph: ir.Graph, codes: ir.Value, scales: ir.Value, before: ir.Node | None = None) -> ir.Value:
    """Dequantize 8-bit codes [..., groups, group size] with standard operators; `scales` [..., groups] are fp32."""
    levels = add_node(graph, "Cast", [codes], attributes={"to": int(ir.DataType.FLOAT)}, before=before)
    levels = add_node(graph, "Sub", [levels, add_float(graph, "middle_code", 128.0)], before=before)
    scale = add_node(graph, "Unsqueeze", [scales, add_ints(graph, "last_axis", [-1])], before=before)
    return add_node(graph, "Mul", [levels, scale], before=before)


def add_weight(component: Component, weights: Weights, name: str, dtype: torch.dtype) -> ir.Value:
    """Return the initializer of an unquantized parameter, added once; embeddings and a tied head share it."""
    if name in component.model.graph.initializers:
        return component.model.graph.initializers[name]
    value = component.add_initializer(name, weights.shape(name), dtype)
    component.fills.append(([value], lambda: [weights.read(name).to(dtype)]))
    return value


def fill_weights(
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
            output = add_quantized_linear(
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


def add_quantized_linear(
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
        matrix = add_node(
            graph, "Reshape", [dequantized, add_ints(graph, f"{label}.shape", [rows, columns])], before=before
        )
        transposed = add_node(graph, "Transpose", [matrix], attributes={"perm": [1, 0]}, before=before)
        return add_node(graph, "MatMul", [hidden, transposed], before=before)
    attributes = {"K": columns, "N": rows, "bits": bits, "block_size": choose_group_size(columns), "accuracy_level": 4}
    inputs = [hidden, codes, scales, *([zeros] if zeros is not None else [])]
    component.model.graph.opset_imports["com.microsoft"] = (
        1  # a graph traced without fused operators does not import it
    )
    return add_node(component.model.graph, "MatMulNBits", inputs, "com.microsoft", attributes, before)


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
