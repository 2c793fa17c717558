"""Reading and adding nodes and constants of an ONNX graph."""

from typing import Any

import numpy as np
import onnx_ir as ir


def get_attribute(node: ir.Node, name: str, default: Any) -> Any:
    """Return the value of a node's attribute, or the default."""
    return node.attributes[name].value if name in node.attributes else default


def get_scalar(value: ir.Value | None) -> float | None:
    """Return the value of a constant with one element, None for any other value."""
    tensor = value.const_value if value is not None else None
    return float(tensor.numpy().flat[0]) if tensor is not None and tensor.size == 1 else None


def add_node(
    graph: ir.Graph,
    op_type: str,
    inputs: list[ir.Value],
    domain: str = "",
    attributes: dict[str, Any] | None = None,
    before: ir.Node | None = None,
) -> ir.Value:
    """Add a node at the end of the graph, or before another node; return its first output."""
    node = ir.node(op_type, inputs, attributes=attributes, domain=domain)  # the graph gives it a name
    graph.append(node) if before is None else graph.insert_before(before, node)
    return node.outputs[0]


def add_ints(graph: ir.Graph, name: str, numbers: list[int]) -> ir.Value:
    """Return the constant of int64 numbers with this name, added once."""
    return _add_constant(graph, name, np.array(numbers, np.int64))


def add_float(graph: ir.Graph, name: str, number: float) -> ir.Value:
    """Return the fp32 constant with this name, added once."""
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
