"""The text decoder as an ONNX graph: transformers' own exporter traces three layers, the middle one is repeated.

No weight is needed for that. Every parameter is traced as a watermark, numbers that say which one it is and which way
round it lies, so whatever the exporter transposes or packs, the finished graph says how to make it from the checkpoint.
"""

import copy
import logging
import re
from collections.abc import Generator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, replace
from io import StringIO
from typing import Any, Literal

import numpy as np
import onnx_ir as ir
import torch

from phoque.errors import FAILED, PhoqueError

FIRST_MARK = 100  # whole numbers to 2,048 are exact in fp16
TRACED = 3  # layers: the first, the one to repeat, the last
Provider = Literal["cpu", "webgpu"] | None
SHARED = -1  # the layer of what all layers share, such as the mask


@dataclass(frozen=True)
class Part:
    """One parameter of the text model within an initializer, as it is or transposed."""

    name: str
    transposed: bool


@dataclass(frozen=True)
class Decoder:
    """A graph whose weights are still to be filled in: `recipes` says what each initializer is made of."""

    model: ir.Model
    recipes: dict[str, tuple[Part, ...]]

    def copy(self) -> "Decoder":
        """Another one, to change."""
        return Decoder(self.model.clone(), dict(self.recipes))


def decoder(config: Any, dtype: torch.dtype, provider: Provider) -> Decoder:
    """The graph of a text model: inputs_embeds, attention_mask, position_ids and cache in, logits and cache out.

    `provider` is the ONNX Runtime provider that it is fused for, cpu or webgpu, or None for plain operators. Raises
    PhoqueError (1) if a parameter does not come through the exporter as itself.
    """
    kinds = getattr(config, "layer_types", None)
    uniform = not kinds or len(set(kinds)) == 1
    layers = config.num_hidden_layers
    few = TRACED if uniform and layers > TRACED else layers
    model, names = _skeleton(config, dtype, few)
    program = _exported(model, config, dtype, few, provider)
    recipes = _recipes(program, names)
    traced = Decoder(program, recipes)
    return _repeated(traced, layers) if few < layers else traced


def _skeleton(config: Any, dtype: torch.dtype, layers: int) -> tuple[Any, list[str]]:
    """The model with a few layers and watermarks for weights; the head has eight rows, whatever the vocabulary."""
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    config = copy.deepcopy(config)
    config.num_hidden_layers, config.vocab_size = layers, 8
    config.tie_word_embeddings, config.pad_token_id = False, None
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:layers]
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
    names = [name for name, _ in model.named_parameters()]
    for number, name in enumerate(names):
        path, _, leaf = name.rpartition(".")
        held = model.get_submodule(path)._parameters
        held[leaf] = torch.nn.Parameter(_watermark(number, held[leaf].shape, dtype), requires_grad=False)
    return model.eval(), names


def _watermark(number: int, shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
    """A tensor that takes no memory: `mark` everywhere, but mark + 1 in the first row of a matrix."""
    mark = FIRST_MARK + 2 * number
    if len(shape) == 1:
        return torch.tensor([mark], dtype=dtype).expand(shape)
    column = torch.full((shape[0], 1), mark, dtype=dtype)
    column[0] = mark + 1
    return column.expand(shape)


def _exported(model: Any, config: Any, dtype: torch.dtype, layers: int, provider: Provider) -> ir.Model:
    from transformers import DynamicCache
    from transformers.exporters.exporter_onnx import OnnxConfig, OnnxExporter

    width = config.hidden_size
    head_dim = getattr(config, "head_dim", None) or width // config.num_attention_heads
    cache, past, new = DynamicCache(config=model.config), 3, 4
    for layer in range(layers):
        states = torch.zeros(1, config.num_key_value_heads, past, head_dim, dtype=dtype)
        cache.update(states, states.clone(), layer)
    sample: dict[str, Any] = {
        "inputs_embeds": torch.zeros(1, new, width, dtype=dtype),
        "attention_mask": torch.ones(1, past + new, dtype=torch.long),
        "position_ids": torch.arange(past, past + new)[None],
        "past_key_values": cache,
    }
    forward = model.forward

    def checked(inputs_embeds: Any, attention_mask: Any, position_ids: Any, past_key_values: Any) -> Any:
        """What the exporter cannot know: which lengths are equal. Without it attention is not fused."""
        length, so_far = inputs_embeds.shape[1], past_key_values.layers[0].keys.shape[2]
        for layer in past_key_values.layers:
            torch._check(layer.keys.shape[2] == so_far)
            torch._check(layer.values.shape[2] == so_far)
        torch._check(position_ids.shape[1] == length)
        torch._check(attention_mask.shape[1] == so_far + length)
        return forward(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
        )

    model.forward = checked
    varies = torch.export.Dim.AUTO
    lengths = {name: {1: varies} for name in ("inputs_embeds", "attention_mask", "position_ids")}
    shapes = {**lengths, "past_key_values": [{2: varies}] * 2 * layers}
    asked = OnnxConfig(dynamic_shapes=shapes, ort_fusions=provider)
    with quiet():
        return OnnxExporter().export(model, sample, config=asked).program


@contextmanager
def quiet() -> Generator[None]:
    """The exporter prints its stages and logs every dimension; the progress bar says what it is at."""
    noisy = [logging.getLogger(name) for name in ("torch", "transformers", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in noisy]
    for logger in noisy:
        logger.setLevel(logging.ERROR)
    try:
        with redirect_stdout(StringIO()):
            yield
    finally:
        for logger, level in zip(noisy, levels, strict=True):
            logger.setLevel(level)


def _recipes(model: ir.Model, names: list[str]) -> dict[str, tuple[Part, ...]]:
    """What each initializer that holds watermarks is made of."""
    found = {}
    for name, value in model.graph.initializers.items():
        array = value.const_value.numpy() if value.const_value is not None else np.zeros(0)
        if array.dtype.kind != "f" or array.ndim not in (1, 2) or array.size < 2 or array.flat[-1] < FIRST_MARK:
            continue
        found[name] = tuple(_parts(array, names))
    missing = sorted(
        set(names) - {part.name for parts in found.values() for part in parts} - {"model.embed_tokens.weight"}
    )
    if missing:
        raise PhoqueError(
            "The exporter changed a weight of this architecture beyond recognition.",
            f"{missing[0]} is not in the graph as it is, transposed, or packed with others.",
            "Report it with the model's config.json; transformers is held to a range in pyproject.toml.",
            FAILED,
        )
    return found


def _parts(array: np.ndarray, names: list[str]) -> Generator[Part]:
    """The parameters side by side in an array, read off its last row."""
    line = array if array.ndim == 1 else array[-1]
    marks = (line.astype(np.int64) - FIRST_MARK) // 2
    for number in dict.fromkeys(marks.tolist()):
        transposed = array.ndim == 2 and array[0, marks == number][-1] == array[-1, marks == number][-1]
        yield Part(names[number], bool(transposed))


def _repeated(traced: Decoder, layers: int) -> Decoder:
    """The graph with its middle layer as often as the model has it. Raises PhoqueError (1) if layers differ."""
    graph = traced.model.graph
    level = _levels(traced)
    middle, last = ([n for n in graph if level[n.outputs[0]] == at] for at in (1, 2))
    if [_kind(n) for n in middle] != [_kind(n) for n in last]:
        raise PhoqueError(
            "The layers of this model do not export alike.",
            "The exporter fused its second and third differently.",
            "Report it with the model's config.json.",
            FAILED,
        )
    ahead = {  # from what the middle layer reads of the first to what the last reads of the middle, slot by slot
        a: b
        for one, other in zip(middle, last, strict=True)
        for a, b in zip(one.inputs, other.inputs, strict=True)
        if a is not None and b is not None and a is not b and a.producer() is not None and level[a] == 0
    }
    for value in [*graph.inputs, *graph.outputs, *graph.initializers.values()]:
        value.name = str(value.name).replace("layers.2.", f"layers.{layers - 1}.")
    recipes = {
        name.replace("layers.2.", f"layers.{layers - 1}."): tuple(_of_layer(part, 2, layers - 1) for part in parts)
        for name, parts in traced.recipes.items()
    }
    newest = {b: b for b in ahead.values()}  # the middle layer's values, as the newest copy has them
    for number in range(2, layers - 1):
        known = {a: newest[b] for a, b in ahead.items()}
        for node in middle:
            _copy(graph, node, known, number, level, recipes)
        newest = {b: known[b] for b in newest}
    for node in list(graph):
        if level.get(node.outputs[0], 0) >= 2:
            for index, value in enumerate(node.inputs):
                if value is not None and value in newest:
                    node.replace_input_with(index, newest[value])
    graph.sort()
    return replace(traced, recipes=recipes)


def _levels(traced: Decoder) -> dict[ir.Value, int]:
    """The layer of every value: the highest one whose weights it comes from; the final norm and head count as one more.

    The caches are shared: whichever of them the exporter reads the lengths off, all layers use.
    """
    graph = traced.model.graph
    level = dict.fromkeys(graph.inputs, SHARED)
    for name, value in graph.initializers.items():
        parts = traced.recipes.get(name, ())
        level[value] = max((_number(part.name, TRACED) for part in parts), default=SHARED)
    for node in graph:
        of_inputs = (level[value] for value in node.inputs if value is not None)
        level |= dict.fromkeys(node.outputs, max(of_inputs, default=SHARED))
    return level


def _number(name: str, otherwise: int) -> int:
    found = re.search(r"layers\.(\d+)\.", name)
    return int(found[1]) if found else otherwise


def _kind(node: ir.Node) -> tuple[Any, ...]:
    attributes = {name: attribute.value for name, attribute in node.attributes.items()}
    return node.domain, node.op_type, len(node.inputs), str(sorted(attributes.items()))


def _copy(
    graph: ir.Graph,
    node: ir.Node,
    known: dict[ir.Value, ir.Value],
    number: int,
    level: dict[ir.Value, int],
    recipes: dict[str, tuple[Part, ...]],
) -> None:
    """A node of the middle layer again, for layer `number`; `known` learns what it reads and makes."""
    for value in node.inputs:
        if value is None or value in known:
            continue
        own_cache = value.is_graph_input() and "layers.1." in str(value.name)
        if not own_cache and level[value] != 1:
            continue
        made = ir.Value(name=_renamed(value, number), shape=value.shape, type=value.type, const_value=value.const_value)
        known[value] = made
        if own_cache:
            graph.inputs.append(made)
        else:
            graph.register_initializer(made)
            recipes[str(made.name)] = tuple(_of_layer(part, 1, number) for part in recipes[str(value.name)])
    inputs = [known.get(value, value) if value is not None else None for value in node.inputs]
    copied = ir.node(
        node.op_type,
        inputs,
        attributes=dict(node.attributes),
        domain=node.domain,
        num_outputs=len(node.outputs),
        name=f"{node.name}.{number}",
    )
    graph.append(copied)
    for old, new in zip(node.outputs, copied.outputs, strict=True):
        new.name, new.shape, new.type = _renamed(old, number), old.shape, old.type
        known[old] = new
        if old.is_graph_output():
            graph.outputs.append(new)


def _renamed(value: ir.Value, number: int) -> str:
    name = str(value.name)
    return name.replace("layers.1.", f"layers.{number}.") if "layers.1." in name else f"{name}.{number}"


def _of_layer(part: Part, old: int, new: int) -> Part:
    return replace(part, name=part.name.replace(f"layers.{old}.", f"layers.{new}."))
