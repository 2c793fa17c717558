"""The decoder's graph as Transformers.js wants it: its names, sizes and inputs; embeddings and head; blocks of bits."""

import re
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from onnx_ir.passes.common import RemoveUnusedNodesPass

from phoque.models.load import HEAD
from phoque.onnx.component import DTYPES, EMBEDDINGS, Component, Weights
from phoque.onnx.graph.trace import Decoder, Part
from phoque.onnx.quantize.block_format import Quantised, block_size, fits

LAST = 2**31 - 1  # of a slice: to the end


def decoder_component(
    traced: Decoder, weights: Weights, name: str, dtype: torch.dtype, quantised: Quantised | None, embeds: bool
) -> Component:
    """The decoder, ready to be written: `model` with its embeddings, or `decoder_model_merged` without (`embeds`).

    `quantised` gives a parameter in blocks; without it the weights are of `dtype`, which the graph computes in.
    Whatever that is, embeddings and logits are fp32, so that sessions of different precisions go together.
    """
    config = weights.config.get_text_config()
    part = Component(name, traced.model, weights)
    graph = part.model.graph
    _attend_causally(graph)
    RemoveUnusedNodesPass()(part.model)
    _tidy(graph)
    RemoveUnusedNodesPass()(part.model)
    _unpack(graph, traced.recipes)
    _rename(graph, config, dtype)
    _head(part, traced, weights, dtype, quantised)
    if embeds:
        _cast_input(graph, dtype)
    else:
        _embed(part, weights, dtype, quantised)
    _fill(part, traced, weights, dtype, quantised)
    RemoveUnusedNodesPass()(part.model)
    graph.sort()
    forget(part.model)
    return part


def embeddings_component(weights: Weights, dtype: torch.dtype, quantised: Quantised | None) -> Component:
    """`embed_tokens`: input_ids in, inputs_embeds in fp32 out."""
    model = _empty()
    part = Component("embed_tokens", model, weights)
    ids = _ids(model.graph)
    out = _gathered(part, weights, ids, dtype, quantised)
    out.name, out.type = "inputs_embeds", ir.TensorType(ir.DataType.FLOAT)
    out.shape = ir.Shape([1, "sequence_length", weights.shape(EMBEDDINGS)[1]])
    model.graph.outputs.append(out)
    return part


def _empty() -> ir.Model:
    graph = ir.Graph([], [], nodes=[], opset_imports={"": 20, "com.microsoft": 1}, name="main_graph")
    return ir.Model(graph, ir_version=10, producer_name="phoque")


def _ids(graph: ir.Graph) -> ir.Value:
    ids = ir.Value(name="input_ids", shape=ir.Shape([1, "sequence_length"]), type=ir.TensorType(ir.DataType.INT64))
    graph.inputs.insert(0, ids)
    return ids


def _attend_causally(graph: ir.Graph) -> None:
    """Drop the mask's bias, and the zeroing of rows that attend to nothing.

    Attention that is fused with its cache is causal by itself, and one conversation has no padding.
    """
    fused = [node for node in graph if node.op_type == "GroupQueryAttention"]
    for node in fused:
        if len(node.inputs) > 10:
            node.replace_input_with(10, None)
    unattended = [n for n in graph if n.op_type == "Where" and _constant(n.inputs[1]) == 0.0] if fused else []
    for node in unattended:
        attended = node.inputs[2]
        assert attended is not None
        node.outputs[0].replace_all_uses_with(attended)


def _tidy(graph: ir.Graph) -> None:
    """Drop what the exporter leaves that only costs time: sizes that are known, reshapes, outputs that nobody reads."""
    for node in list(graph):
        if node.op_type == "Shape":
            sizes = _sizes_asked(node)
            known = [size for size in sizes if isinstance(size, int)]
            if len(known) == len(sizes):
                node.outputs[0].replace_all_uses_with(_numbers(graph, f"{node.outputs[0].name}.known", known))
        elif node.op_type == "SkipSimplifiedLayerNormalization":
            for unread in (value for value in node.outputs[1:3] if not value.uses()):
                unread.name = ""  # as many rows of means and deviations as there are tokens
        elif node.op_type == "GroupQueryAttention":
            out = node.outputs[0]  # (1, tokens, heads x head size), which the product that follows takes
            last = out
            while [user.op_type for user, _ in last.uses()] == ["Reshape"]:
                last = next(iter(last.uses()))[0].outputs[0]
            last.replace_all_uses_with(out)


def _sizes_asked(node: ir.Node) -> list[Any]:
    """What a Shape node gives, as far as it is known beforehand."""
    shape = node.inputs[0].shape if node.inputs[0] is not None else None
    return [None] if shape is None else list(shape)[_attribute(node, "start", 0) : _attribute(node, "end", None)]


def _unpack(graph: ir.Graph, recipes: dict[str, tuple[Part, ...]]) -> None:
    """Make products apart that are made as one only to be split: two small ones cost less than the copies do."""
    for held in list(recipes):
        old = graph.initializers[held]
        products = [user for user, _ in old.uses()]
        if [product.op_type for product in products] != ["MatMul"]:
            continue
        product = products[0]
        users = [user for user, _ in product.outputs[0].uses()]
        if [user.op_type for user in users] != ["Split"]:
            continue
        hidden = product.inputs[0]
        assert hidden is not None
        for part, value in zip(recipes.pop(held), users[0].outputs, strict=True):
            weight = ir.Value(name=f"{held}.{part.name}")
            weight.const_value = old.const_value  # as if it were held: what it is, its recipe says
            graph.register_initializer(weight)
            recipes[str(weight.name)] = (part,)
            value.replace_all_uses_with(_op(graph, "MatMul", [hidden, weight], before=product))
        graph.remove([users[0], product], safe=True)
        del graph.initializers[held]


def _attribute(node: ir.Node, name: str, otherwise: Any) -> Any:
    return node.attributes[name].value if name in node.attributes else otherwise


def _constant(value: ir.Value | None) -> float | None:
    held = value.const_value if value is not None else None
    return float(held.numpy().flat[0]) if held is not None and held.size == 1 else None


def _rename(graph: ir.Graph, config: Any, dtype: torch.dtype) -> None:
    """Transformers.js's names, and sizes as numbers: of an empty cache it takes every unknown size for 0."""
    heads = config.num_key_value_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    shapes = {
        "inputs_embeds": [1, "sequence_length", config.hidden_size],
        "attention_mask": [1, "total_sequence_length"],
        "position_ids": [1, "sequence_length"],
    }
    for value in [*graph.inputs, *graph.outputs]:
        cache = re.fullmatch(r"(input|output)\.past_key_values\.layers\.(\d+)\.(key|value)s", str(value.name))
        if cache:
            way, number, kind = cache.groups()
            value.name = f"{'past_key_values' if way == 'input' else 'present'}.{number}.{kind}"
            length = "past_sequence_length" if way == "input" else "total_sequence_length"
            value.shape, value.type = ir.Shape([1, heads, length, head_dim]), ir.TensorType(DTYPES[dtype])
        elif value.name in shapes:
            value.shape = ir.Shape(shapes[value.name])
    for values in (graph.inputs, graph.outputs):
        ordered = sorted(values, key=lambda v: [int(n) for n in re.findall(r"\.(\d+)\.", str(v.name))])
        values.clear()
        values.extend(ordered)


def _head(part: Component, traced: Decoder, weights: Weights, dtype: torch.dtype, quantised: Quantised | None) -> None:
    """The last tokens' logits alone, as many as `num_logits_to_keep` asks for; 0 asks for all of them."""
    graph = part.model.graph
    (held,) = (name for name, parts in traced.recipes.items() if parts[0].name == HEAD)
    traced.recipes.pop(held)
    (old,) = (node for node, _ in graph.initializers[held].uses())
    hidden, logits = old.inputs[0], graph.outputs[0]
    assert hidden is not None and logits is old.outputs[0]
    keep = ir.Value(name="num_logits_to_keep", shape=ir.Shape([]), type=ir.TensorType(ir.DataType.INT64))
    graph.inputs.append(keep)
    start = _op(graph, "Reshape", [_op(graph, "Neg", [keep]), _numbers(graph, "one_axis", [1])])
    ends, axes = _numbers(graph, "slice_ends", [LAST]), _numbers(graph, "slice_axes", [1])
    kept = _op(graph, "Slice", [hidden, start, ends, axes])
    rows, width = weights.shape(HEAD)
    if quantised and fits((rows, width)):
        made = _by_bits(part, kept, [HEAD], quantised, dtype, EMBEDDINGS if weights.tied else HEAD)
    else:
        table = _table(part, weights, EMBEDDINGS if weights.tied else HEAD, dtype)
        flat = _op(graph, "Reshape", [kept, _numbers(graph, "head_in", [-1, width])])
        product = _op(graph, "Gemm", [flat, table], attributes={"transB": 1})
        made = _op(graph, "Reshape", [product, _numbers(graph, "head_out", [1, -1, rows])])
    if dtype != torch.float32:
        made = _op(graph, "Cast", [made], attributes={"to": int(ir.DataType.FLOAT)})
    logits.name = "unused_logits"
    made.name, made.type = "logits", ir.TensorType(ir.DataType.FLOAT)
    made.shape = ir.Shape([1, "logits_length", rows])
    graph.outputs[0] = made
    graph.remove(old, safe=True)
    del graph.initializers[held]


def _cast_input(graph: ir.Graph, dtype: torch.dtype) -> None:
    embeds = graph.inputs[0]
    embeds.type = ir.TensorType(ir.DataType.FLOAT)
    if dtype != torch.float32:
        uses = list(embeds.uses())
        cast = _op(graph, "Cast", [embeds], attributes={"to": int(DTYPES[dtype])})
        for node, index in uses:
            node.replace_input_with(index, cast)


def _embed(part: Component, weights: Weights, dtype: torch.dtype, quantised: Quantised | None) -> None:
    """input_ids in place of inputs_embeds."""
    graph = part.model.graph
    embeds = graph.inputs[0]
    uses = list(embeds.uses())
    graph.inputs.remove(embeds)
    made = _gathered(part, weights, _ids(graph), dtype, quantised, dtype)
    for node, index in uses:
        node.replace_input_with(index, made)


def _gathered(
    part: Component,
    weights: Weights,
    ids: ir.Value,
    dtype: torch.dtype,
    quantised: Quantised | None,
    wanted: torch.dtype = torch.float32,
) -> ir.Value:
    """The tokens' rows of the embeddings in `wanted`; from 8 bits by operators that every runtime has."""
    graph = part.model.graph
    shape = weights.shape(EMBEDDINGS)
    if quantised and fits(shape):
        codes, scales = _coded(part, [EMBEDDINGS], quantised, torch.float32, EMBEDDINGS)[:2]
        size = _op(graph, "Gather", [scales, ids])
        if scales.dtype != ir.DataType.FLOAT:
            size = _op(graph, "Cast", [size], attributes={"to": int(ir.DataType.FLOAT)})
        whole = _dequantised(graph, _op(graph, "Gather", [codes, ids]), size)
        made = _op(graph, "Reshape", [whole, _numbers(graph, "embed_shape", [1, -1, shape[1]])])
        held = torch.float32
    else:
        made, held = _op(graph, "Gather", [_table(part, weights, EMBEDDINGS, dtype), ids]), dtype
    return made if held == wanted else _op(graph, "Cast", [made], attributes={"to": int(DTYPES[wanted])})


def _dequantised(graph: ir.Graph, codes: ir.Value, scales: ir.Value, before: ir.Node | None = None) -> ir.Value:
    """8 bits [..., blocks, block size] as fp32, by plain operators; `scales` [..., blocks] are fp32."""
    steps = _op(graph, "Cast", [codes], attributes={"to": int(ir.DataType.FLOAT)}, before=before)
    steps = _op(graph, "Sub", [steps, _floats(graph, "middle_code", 128.0)], before=before)
    size = _op(graph, "Unsqueeze", [scales, _numbers(graph, "last_axis", [-1])], before=before)
    return _op(graph, "Mul", [steps, size], before=before)


def _table(part: Component, weights: Weights, name: str, dtype: torch.dtype) -> ir.Value:
    """A parameter as it is; embeddings and a tied head share one."""
    if name in part.model.graph.initializers:
        return part.model.graph.initializers[name]
    value = part.initializer(name, weights.shape(name), dtype)
    part.fills.append(([value], lambda: [weights.text(name).to(dtype)]))
    return value


def _fill(part: Component, traced: Decoder, weights: Weights, dtype: torch.dtype, quantised: Quantised | None) -> None:
    """Every traced weight: in blocks of bits, or as its recipe says."""
    graph = part.model.graph
    for held, parts in traced.recipes.items():
        old = graph.initializers[held]
        users = [node for node, _ in old.uses()]
        names = [p.name for p in parts]
        products = all(node.op_type == "MatMul" and node.inputs[1] is old for node in users)
        if quantised and products and all(p.transposed and fits(weights.shape(p.name)) for p in parts):
            (node,) = users
            hidden = node.inputs[0]
            assert hidden is not None
            new = _by_bits(part, hidden, names, quantised, dtype, _joint(names), node)
            node.outputs[0].replace_all_uses_with(new, replace_graph_outputs=True)
            graph.remove(node, safe=True)
        elif users:
            shapes = [weights.shape(p.name)[:: -1 if p.transposed else 1] for p in parts]
            shape = (*shapes[0][:-1], sum(one[-1] for one in shapes))
            value = part.initializer(f"{_joint(names)}.filled", shape, dtype)
            old.replace_all_uses_with(value)
            part.fills.append(([value], lambda parts=parts: [_joined(weights, parts).to(dtype)]))
        del graph.initializers[held]


def _joined(weights: Weights, parts: tuple[Part, ...]) -> torch.Tensor:
    pieces = [weights.text(p.name).T if p.transposed else weights.text(p.name) for p in parts]
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, -1)


def _joint(names: list[str]) -> str:
    """`model.layers.0.self_attn.q_proj+k_proj+v_proj.weight`."""
    if len(names) == 1:
        return names[0]
    stem, leaf = names[0].rsplit(".", 2)[0], names[0].rsplit(".", 1)[1]
    return f"{stem}.{'+'.join(name.rsplit('.', 2)[1] for name in names)}.{leaf}"


def _by_bits(
    part: Component,
    hidden: ir.Value,
    names: list[str],
    quantised: Quantised,
    dtype: torch.dtype,
    label: str,
    before: ir.Node | None = None,
) -> ir.Value:
    """A product with parameters in blocks, side by side, all in the same bits."""
    codes, scales, zeros, bits, rows, columns = _coded(part, names, quantised, dtype, label)
    if quantised.whole:  # of constants alone, so that runtimes compute it when they load the graph
        graph = part.model.graph
        blocks = _dequantised(graph, codes, scales, before)
        matrix = _op(graph, "Reshape", [blocks, _numbers(graph, f"{label}.shape", [rows, columns])], before=before)
        turned = _op(graph, "Transpose", [matrix], attributes={"perm": [1, 0]}, before=before)
        return _op(graph, "MatMul", [hidden, turned], before=before)
    attributes = {"K": columns, "N": rows, "bits": bits, "block_size": block_size(columns), "accuracy_level": 4}
    inputs = [hidden, codes, scales, *([zeros] if zeros is not None else [])]
    part.model.graph.opset_imports["com.microsoft"] = 1  # which a graph of plain operators lacks
    return _op(part.model.graph, "MatMulNBits", inputs, "com.microsoft", attributes, before)


def _coded(
    part: Component, names: list[str], quantised: Quantised, dtype: torch.dtype, label: str
) -> tuple[ir.Value, ir.Value, ir.Value | None, int, int, int]:
    """The initializers of parameters in blocks: codes, scales and zeros; then bits, rows and columns."""
    (bits, has_zeros), *others = {quantised.layout(name) for name in names}
    assert not others, f"{label} is one product, and has parameters in different bits"
    shapes = [part.weights.shape(name) for name in names]
    rows, columns = sum(shape[0] for shape in shapes), shapes[0][1]
    known = part.model.graph.initializers
    if f"{label}.codes" in known:
        return known[f"{label}.codes"], known[f"{label}.scales"], known.get(f"{label}.zeros"), bits, rows, columns
    size = block_size(columns)
    values = [
        part.initializer(f"{label}.codes", (rows, columns // size, size * bits // 8), torch.uint8),
        part.initializer(f"{label}.scales", (rows, columns // size), dtype),
    ]
    if has_zeros:
        width = -(-columns // size * bits // 8)
        values.append(part.initializer(f"{label}.zeros", (rows, width), torch.uint8))

    def made() -> list[torch.Tensor]:
        blocks = [quantised.make(name) for name in names]
        tensors = [torch.cat([b.codes for b in blocks]), torch.cat([b.scales for b in blocks]).to(dtype)]
        return tensors + ([torch.cat([b.packed_zeros() for b in blocks])] if has_zeros else [])

    part.fills.append((values, made))
    return values[0], values[1], values[2] if has_zeros else None, bits, rows, columns


def _op(
    graph: ir.Graph,
    kind: str,
    inputs: list[ir.Value],
    domain: str = "",
    attributes: dict[str, Any] | None = None,
    before: ir.Node | None = None,
) -> ir.Value:
    node = ir.node(kind, inputs, attributes=attributes, domain=domain)  # the graph names it
    graph.append(node) if before is None else graph.insert_before(before, node)
    return node.outputs[0]


def _numbers(graph: ir.Graph, name: str, numbers: list[int]) -> ir.Value:
    return _small(graph, name, np.array(numbers, np.int64))


def _floats(graph: ir.Graph, name: str, number: float) -> ir.Value:
    return _small(graph, name, np.array(number, np.float32))


def _small(graph: ir.Graph, name: str, array: np.ndarray) -> ir.Value:
    if name not in graph.initializers:
        tensor = ir.tensor(array, name=name)
        graph.register_initializer(
            ir.Value(name=name, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype), const_value=tensor)
        )
    return graph.initializers[name]


def forget(model: ir.Model) -> None:
    """No traceback or path of this machine in the file, and no sizes between input and output: runtimes infer them."""
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
