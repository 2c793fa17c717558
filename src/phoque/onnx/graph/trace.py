"""The text decoder as an ONNX graph: transformers' exporter traces three layers, and the middle one is repeated.

Tracing needs no weights. Every parameter is traced as a watermark: values that encode its number and its orientation.
The exporter may transpose parameters and pack several into one initializer; the watermarks in the graph then show how
to compute each initializer from the checkpoint.
"""

import copy
import logging
import re
from collections.abc import Generator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, replace
from io import StringIO
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import onnx_ir as ir
import torch

from phoque.errors import RunError, UsageError
from phoque.models.architectures import architecture_of
from phoque.models.config import head_dim_of

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

FIRST_MARK = 100
MAX_FP16_MARK = 2048  # fp16 represents integers up to this one exactly
TRACED_LAYERS = 3  # layers: the first, the one to repeat, the last
Provider = Literal["cpu", "webgpu"] | None
SHARED = -1  # layer number of values that all layers share, such as the mask


@dataclass(frozen=True)
class PackedParameter:
    """One parameter of the text model that is packed into an initializer, possibly transposed, or a vector plus 1."""

    name: str
    transposed: bool
    plus_one: bool = False


@dataclass(frozen=True)
class TracedDecoder:
    """A graph without weights; `recipes` lists by initializer the parameters that it is made of, side by side."""

    model: ir.Model
    recipes: dict[str, tuple[PackedParameter, ...]]

    def copy(self) -> "TracedDecoder":
        """Return an independent copy."""
        return TracedDecoder(self.model.clone(), dict(self.recipes))


def trace_decoder(config: "PretrainedConfig", dtype: torch.dtype, provider: Provider) -> TracedDecoder:
    """Trace a text model: inputs_embeds, attention_mask, position_ids and cache in, logits and cache out.

    `provider` is the ONNX Runtime provider whose fused operators are used, cpu or webgpu, or None for plain operators.
    Raises RunError if the exporter changed a parameter so that it cannot be identified.
    """
    is_uniform = all(len(set(kinds)) == 1 for kinds in _layer_lists(config).values())
    layers = config.num_hidden_layers
    traced_layers = TRACED_LAYERS if is_uniform and layers > TRACED_LAYERS else layers
    traced = _trace_layers(config, dtype, traced_layers, provider)
    if traced_layers == layers:
        return traced
    # where the exporter fuses the last block with the final norm, it is not like the others
    return _repeat_middle_layer(traced, layers) or _trace_layers(config, dtype, layers, provider)


def _trace_layers(config: "PretrainedConfig", dtype: torch.dtype, layers: int, provider: Provider) -> TracedDecoder:
    model, names = _build_skeleton(config, dtype, layers)
    program = _run_exporter(model, config, dtype, layers, provider)
    return TracedDecoder(program, _read_recipes(program, names))


def _layer_lists(config: "PretrainedConfig") -> dict[str, list[Any]]:
    """Return the lists of the config that say by layer how it computes; layers with equal entries are alike."""
    return {name: kinds for name in architecture_of(config).layer_lists if (kinds := getattr(config, name, None))}


def _build_skeleton(config: "PretrainedConfig", dtype: torch.dtype, layers: int) -> tuple[Any, list[str]]:
    """Build the model with `layers` layers, watermarks as weights and a vocabulary of 8; return it and the names."""
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    config = copy.deepcopy(config)
    config.num_hidden_layers, config.vocab_size = layers, 8
    config.tie_word_embeddings, config.pad_token_id = False, None
    for name, kinds in _layer_lists(config).items():
        setattr(config, name, kinds[:layers])
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
    names = [name for name, _ in model.named_parameters()]
    if dtype == torch.float16 and FIRST_MARK + 2 * len(names) > MAX_FP16_MARK:
        limit = (MAX_FP16_MARK - FIRST_MARK) // 2
        raise UsageError(
            what=f"phoque cannot export this model in fp16: its {layers} layers differ from each other.",
            why=f"They have {len(names)} parameters, and a trace in fp16 tells at most {limit} apart.",
            fix="Export it with --dtype fp32, q8, q4 or int8.",
        )
    for number, name in enumerate(names):
        path, _, leaf = name.rpartition(".")
        parameters = model.get_submodule(path)._parameters
        parameters[leaf] = torch.nn.Parameter(
            _make_watermark(number, parameters[leaf].shape, dtype), requires_grad=False
        )
    return model.eval(), names


def _make_watermark(number: int, shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
    """Return a tensor of `mark`, with mark + 1 in the first row of a matrix; it is expanded, so it takes no memory."""
    mark = FIRST_MARK + 2 * number
    if len(shape) == 1:
        return torch.tensor([mark], dtype=dtype).expand(shape)
    column = torch.full((shape[0], 1), mark, dtype=dtype)
    column[0] = mark + 1
    return column.expand(shape)


def _run_exporter(
    model: "PreTrainedModel", config: "PretrainedConfig", dtype: torch.dtype, layers: int, provider: Provider
) -> ir.Model:
    from transformers import DynamicCache
    from transformers.exporters.exporter_onnx import OnnxConfig, OnnxExporter

    width, head_dim = config.hidden_size, head_dim_of(config)
    # a cache without a config keeps every token also in layers with a window: Transformers.js keeps one length
    cache, past_length, new_length = DynamicCache(), 3, 4
    for layer in range(layers):
        states = torch.zeros(1, config.num_key_value_heads, past_length, head_dim, dtype=dtype)
        cache.update(states, states.clone(), layer)
    sample: dict[str, Any] = {
        "inputs_embeds": torch.zeros(1, new_length, width, dtype=dtype),
        "attention_mask": torch.ones(1, past_length + new_length, dtype=torch.long),
        "position_ids": torch.arange(past_length, past_length + new_length)[None],
        "past_key_values": cache,
    }
    forward = model.forward

    def forward_with_checks(inputs_embeds: Any, attention_mask: Any, position_ids: Any, past_key_values: Any) -> Any:
        """Run the model after asserting which lengths are equal; the exporter fuses attention only if it knows that."""
        length, cached_length = inputs_embeds.shape[1], past_key_values.layers[0].keys.shape[2]
        for layer in past_key_values.layers:
            torch._check(layer.keys.shape[2] == cached_length)
            torch._check(layer.values.shape[2] == cached_length)
        torch._check(position_ids.shape[1] == length)
        torch._check(attention_mask.shape[1] == cached_length + length)
        return forward(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
        )

    model.forward = forward_with_checks
    dynamic = torch.export.Dim.AUTO
    lengths = {name: {1: dynamic} for name in ("inputs_embeds", "attention_mask", "position_ids")}
    shapes = {**lengths, "past_key_values": [{2: dynamic}] * 2 * layers}
    onnx_config = OnnxConfig(dynamic_shapes=shapes, ort_fusions=provider)
    with silence_exporter():
        return OnnxExporter().export(model, sample, config=onnx_config).program


@contextmanager
def silence_exporter() -> Generator[None]:
    """Suppress what the exporter prints and logs below errors; phoque's progress bar shows the stage instead."""
    loggers = [logging.getLogger(name) for name in ("torch", "transformers", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with redirect_stdout(StringIO()):
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _read_recipes(model: ir.Model, names: list[str]) -> dict[str, tuple[PackedParameter, ...]]:
    """Return the parameters that each initializer is made of, read from its watermarks."""
    recipes = {}
    for name, value in model.graph.initializers.items():
        array = value.const_value.numpy() if value.const_value is not None else np.zeros(0)
        if array.dtype.kind != "f" or array.ndim not in (1, 2) or array.size < 2 or array.flat[-1] < FIRST_MARK:
            continue
        recipes[name] = tuple(_read_watermarks(array, names))
    missing = sorted(
        set(names)
        - {parameter.name for parameters in recipes.values() for parameter in parameters}
        - {"model.embed_tokens.weight"}
    )
    if missing:
        raise RunError(
            what="The exporter changed a weight of this architecture in an unknown way.",
            why=f"The weight {missing[0]} is not in the graph: not as it is, not transposed, not packed with others.",
            fix="Report it with the model's config.json and the version of transformers.",
        )
    return recipes


def _read_watermarks(array: np.ndarray, names: list[str]) -> Generator[PackedParameter]:
    """Yield the parameters that lie side by side in an initializer, identified by its last row."""
    last_row = array if array.ndim == 1 else array[-1]
    marks = (last_row.astype(np.int64) - FIRST_MARK) // 2
    for number in dict.fromkeys(marks.tolist()):
        transposed = array.ndim == 2 and array[0, marks == number][-1] == array[-1, marks == number][-1]
        plus_one = array.ndim == 1 and (int(last_row[marks == number][-1]) - FIRST_MARK) % 2 == 1  # Gemma's norms
        yield PackedParameter(names[number], bool(transposed), plus_one)


def _repeat_middle_layer(traced: TracedDecoder, layers: int) -> TracedDecoder | None:
    """Repeat the middle layer until the graph has `layers` layers; return None if the last one differs from it."""
    graph = traced.model.graph
    layer_of = _find_layers(traced)
    middle, last = ([n for n in graph if layer_of[n.outputs[0]] == layer] for layer in (1, 2))
    if [_signature_of(n) for n in middle] != [_signature_of(n) for n in last]:
        return None
    counterparts = {  # value of the first layer that the middle one reads -> its counterpart in the middle layer
        source: target
        for middle_node, last_node in zip(middle, last, strict=True)
        for source, target in zip(middle_node.inputs, last_node.inputs, strict=True)
        if source is not None
        and target is not None
        and source is not target
        and source.producer() is not None
        and layer_of[source] == 0
    }
    for value in [*graph.inputs, *graph.outputs, *graph.initializers.values()]:
        value.name = str(value.name).replace("layers.2.", f"layers.{layers - 1}.")
    recipes = {
        name.replace("layers.2.", f"layers.{layers - 1}."): tuple(
            _move_to_layer(parameter, 2, layers - 1) for parameter in parameters
        )
        for name, parameters in traced.recipes.items()
    }
    latest = {
        target: target for target in counterparts.values()
    }  # maps each value of the middle layer to its latest copy
    for number in range(2, layers - 1):
        copies = {source: latest[target] for source, target in counterparts.items()}
        for node in middle:
            _copy_node(graph, node, copies, number, layer_of, recipes)
        latest = {target: copies[target] for target in latest}
    for node in list(graph):
        if layer_of.get(node.outputs[0], 0) >= 2:
            for index, value in enumerate(node.inputs):
                if value is not None and value in latest:
                    node.replace_input_with(index, latest[value])
    graph.sort()
    return replace(traced, recipes=recipes)


def _find_layers(traced: TracedDecoder) -> dict[ir.Value, int]:
    """Return the layer of every value: the highest layer whose weights it depends on; final norm and head are layer 3.

    Cache inputs count as shared, because the exporter takes the lengths for all layers from any one of them.
    """
    graph = traced.model.graph
    layer_of = dict.fromkeys(graph.inputs, SHARED)
    for name, value in graph.initializers.items():
        parameters = traced.recipes.get(name, ())
        layer_of[value] = max((_parse_layer(parameter.name, TRACED_LAYERS) for parameter in parameters), default=SHARED)
    for node in graph:
        of_inputs = (layer_of[value] for value in node.inputs if value is not None)
        layer_of |= dict.fromkeys(node.outputs, max(of_inputs, default=SHARED))
    return layer_of


def _parse_layer(name: str, default: int) -> int:
    match = re.search(r"layers\.(\d+)\.", name)
    return int(match[1]) if match else default


def _signature_of(node: ir.Node) -> tuple[Any, ...]:
    attributes = {name: attribute.value for name, attribute in node.attributes.items()}
    return node.domain, node.op_type, len(node.inputs), str(sorted(attributes.items()))


def _copy_node(
    graph: ir.Graph,
    node: ir.Node,
    copies: dict[ir.Value, ir.Value],
    number: int,
    layer_of: dict[ir.Value, int],
    recipes: dict[str, tuple[PackedParameter, ...]],
) -> None:
    """Copy a node of the middle layer for layer `number`; add the copies of its inputs and outputs to `copies`."""
    for value in node.inputs:
        if value is None or value in copies:
            continue
        is_own_cache = value.is_graph_input() and "layers.1." in str(value.name)
        if not is_own_cache and layer_of[value] != 1:
            continue
        new_value = ir.Value(
            name=_name_of_copy(value, number), shape=value.shape, type=value.type, const_value=value.const_value
        )
        copies[value] = new_value
        if is_own_cache:
            graph.inputs.append(new_value)
        else:
            graph.register_initializer(new_value)
            recipes[str(new_value.name)] = tuple(
                _move_to_layer(parameter, 1, number) for parameter in recipes[str(value.name)]
            )
    inputs = [copies.get(value, value) if value is not None else None for value in node.inputs]
    new_node = ir.node(
        node.op_type,
        inputs,
        attributes=dict(node.attributes),
        domain=node.domain,
        num_outputs=len(node.outputs),
        name=f"{node.name}.{number}",
    )
    graph.append(new_node)
    for old, new in zip(node.outputs, new_node.outputs, strict=True):
        new.name, new.shape, new.type = _name_of_copy(old, number), old.shape, old.type
        copies[old] = new
        if old.is_graph_output():
            graph.outputs.append(new)


def _name_of_copy(value: ir.Value, number: int) -> str:
    name = str(value.name)
    return name.replace("layers.1.", f"layers.{number}.") if "layers.1." in name else f"{name}.{number}"


def _move_to_layer(parameter: PackedParameter, old: int, new: int) -> PackedParameter:
    return replace(parameter, name=parameter.name.replace(f"layers.{old}.", f"layers.{new}."))
