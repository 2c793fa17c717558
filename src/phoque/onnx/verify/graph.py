"""Level `graph`: inputs, outputs and shapes are what Transformers.js uses, and its runtimes have every operator."""

import re
from typing import Any

import numpy as np

from phoque.checks import CheckFailed, Verdict
from phoque.errors import first_line
from phoque.models.config import head_dim_of
from phoque.onnx.session import SUFFIXES
from phoque.onnx.transformers_js import SESSIONS
from phoque.onnx.verify.export_dir import ExportDir, read_json
from phoque.onnx.verify.files import load_graph

LEVEL = "graph"
MAX_OPSETS = {"": 21, "com.microsoft": 1}  # the newest opsets that ONNX Runtime Web of Transformers.js 4.3.1 runs
MAX_IR_VERSION = 11
INPUT_TYPES = {  # the inputs that Transformers.js gives each session, with their ONNX types
    "model": {"input_ids": 7, "attention_mask": 7, "position_ids": 7, "num_logits_to_keep": 7},
    "decoder_model_merged": {"inputs_embeds": 1, "attention_mask": 7, "position_ids": 7, "num_logits_to_keep": 7},
    "embed_tokens": {"input_ids": 7},
    "vision_encoder": {"pixel_values": 1},
}
REQUIRED_INPUT = {
    "model": "input_ids",
    "decoder_model_merged": "inputs_embeds",
    "embed_tokens": "input_ids",
    "vision_encoder": "pixel_values",
}
OUTPUT = {
    "model": "logits",
    "decoder_model_merged": "logits",
    "embed_tokens": "inputs_embeds",
    "vision_encoder": "image_features",
}
# contrib operators that have a kernel on wasm, tested with onnxruntime-web 1.31; GatherBlockQuantized has none
WASM_OPERATORS = {
    "GroupQueryAttention",
    "MatMulNBits",
    "SkipSimplifiedLayerNormalization",
    "SimplifiedLayerNormalization",
    "RotaryEmbedding",
    "MultiHeadAttention",
    "SkipLayerNormalization",
    "FusedMatMul",
    "Gelu",
    "FastGelu",
    "QuickGelu",
    "BiasGelu",
}
CONTRIB_IN_STANDARD_DOMAIN = {"SimplifiedLayerNormalization"}  # ONNX Runtime registers these there, ONNX does not
UNSUPPORTED_STANDARD = {"Attention", "RMSNormalization", "SwiGLU"}  # opset 23 and later
FLOAT, HALF, INT64 = 1, 10, 7


def check_graphs(export: ExportDir, layout: str, dtypes: list[str], verdict: Verdict) -> None:
    """Add this level's checks for each session of each precision."""
    config = read_json(export, "config.json")
    for dtype in dtypes:
        for name in SESSIONS[layout]:
            path = f"onnx/{name}{SUFFIXES[dtype]}.onnx"
            if path not in export.sizes:
                continue  # the level `files` has reported this
            with verdict.check(LEVEL, f"{path}: valid, in an opset and IR version that the runtimes support") as notes:
                notes.append(_check_versions(load_graph(export, path)))
            with verdict.check(LEVEL, f"{path}: inputs and outputs are the ones that Transformers.js uses"):
                _check_inputs_and_outputs(load_graph(export, path), name, config)
            with verdict.check(LEVEL, f"{path}: every operator has a kernel on wasm and WebGPU") as notes:
                notes.append(_check_operators(load_graph(export, path), dtype))
            if name in ("model", "decoder_model_merged"):
                with verdict.check(LEVEL, f"{path}: the rotary frequencies match config.json") as notes:
                    notes.append(_check_frequencies(load_graph(export, path), config))


def _check_versions(model: Any) -> str:
    import onnx

    try:
        onnx.checker.check_model(_without_external_data(model))
    except onnx.checker.ValidationError as error:
        raise CheckFailed(f"onnx.checker: {first_line(error)}") from error
    for entry in model.opset_import:
        if entry.domain not in MAX_OPSETS:
            if entry.domain in {node.domain for node in model.graph.node}:
                raise CheckFailed(f"it has operators of the domain {entry.domain!r}, which Transformers.js cannot run")
        elif entry.version > MAX_OPSETS[entry.domain]:
            raise CheckFailed(f"it uses opset {entry.version}; ONNX Runtime Web supports {MAX_OPSETS[entry.domain]}")
    if model.ir_version > MAX_IR_VERSION:
        raise CheckFailed(f"it has IR version {model.ir_version}; ONNX Runtime Web supports at most {MAX_IR_VERSION}")
    return f"opset {model.opset_import[0].version}, IR {model.ir_version}"


def _without_external_data(model: Any) -> Any:
    """Return a copy of the graph that onnx.checker accepts without the external data.

    External initializers become inputs, and ONNX Runtime's operators in the standard domain move to com.microsoft.
    """
    import onnx

    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    internal = [tensor for tensor in copy.graph.initializer if tensor.data_location != 1]
    for tensor in copy.graph.initializer:
        if tensor.data_location == 1:
            copy.graph.input.append(onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
    del copy.graph.initializer[:]
    copy.graph.initializer.extend(internal)
    for node in copy.graph.node:
        if node.op_type in CONTRIB_IN_STANDARD_DOMAIN:
            node.domain = "com.microsoft"
    return copy


def _check_inputs_and_outputs(model: Any, name: str, config: dict[str, Any]) -> None:
    text_config = config.get("text_config", config)
    initializers = {tensor.name for tensor in model.graph.initializer}
    inputs = {v.name: v.type.tensor_type for v in model.graph.input if v.name not in initializers}
    outputs = {v.name: v.type.tensor_type for v in model.graph.output}
    past = {n: v for n, v in inputs.items() if n.startswith("past_key_values.")}
    for entry in inputs.keys() - past.keys() - INPUT_TYPES[name].keys():
        raise CheckFailed(f"it needs the input {entry}, which Transformers.js does not provide")
    if REQUIRED_INPUT[name] not in inputs:
        raise CheckFailed(f"it has no input {REQUIRED_INPUT[name]}")
    for entry, element_type in INPUT_TYPES[name].items():
        if entry in inputs and inputs[entry].elem_type != element_type:
            raise CheckFailed(
                f"its input {entry} has type {inputs[entry].elem_type}; Transformers.js gives {element_type}"
            )
    if OUTPUT[name] not in outputs:
        raise CheckFailed(f"it has no output {OUTPUT[name]}")
    width = {"logits": text_config["vocab_size"]}.get(OUTPUT[name], text_config["hidden_size"])
    last_dim = outputs[OUTPUT[name]].shape.dim[-1]
    if last_dim.dim_value and last_dim.dim_value != width:
        raise CheckFailed(f"the last dimension of {OUTPUT[name]} is {last_dim.dim_value}; config.json says {width}")
    if name in ("model", "decoder_model_merged"):
        _check_cache(past, outputs, text_config)


def _check_cache(past: dict[str, Any], outputs: dict[str, Any], text_config: dict[str, Any]) -> None:
    heads, layers = text_config["num_key_value_heads"], text_config["num_hidden_layers"]
    head_dim = text_config.get("head_dim") or text_config["hidden_size"] // text_config["num_attention_heads"]
    expected = {f"past_key_values.{n}.{kind}" for n in range(layers) for kind in ("key", "value")}
    for entry in sorted(expected - past.keys()):
        raise CheckFailed(f"the cache has no input {entry}: config.json says {layers} layers")
    for entry in sorted(past.keys() - expected):
        raise CheckFailed(f"the cache has the input {entry}: config.json says {layers} layers")
    for entry in sorted(expected):
        if entry.replace("past_key_values", "present") not in outputs:
            raise CheckFailed(f"the cache has no output {entry.replace('past_key_values', 'present')}")
        batch, kv_heads, _, size = past[entry].shape.dim
        if not batch.dim_value and batch.dim_param != "batch_size":
            raise CheckFailed(
                f"{entry} has the batch size {batch.dim_param!r}: Transformers.js reads any name but batch_size as 0"
            )
        for label, dim, configured in (("heads", kv_heads, heads), ("head size", size, head_dim)):
            if not dim.dim_value:
                raise CheckFailed(f"{entry} has the {label} {dim.dim_param!r}: Transformers.js reads a name as 0")
            if dim.dim_value != configured:
                raise CheckFailed(f"{entry} has the {label} {dim.dim_value}; config.json says {configured}")


def _check_operators(model: Any, dtype: str) -> str:
    for node in model.graph.node:
        is_contrib = node.domain == "com.microsoft"
        if node.domain not in ("", "ai.onnx", "com.microsoft"):
            raise CheckFailed(f"{node.op_type} of the domain {node.domain} has no kernel in a browser")
        if is_contrib and node.op_type not in WASM_OPERATORS:
            raise CheckFailed(
                f"{node.op_type} has no kernel on wasm: the model would load in Node and fail in a browser"
            )
        if not is_contrib and node.op_type in UNSUPPORTED_STANDARD:
            raise CheckFailed(f"{node.op_type} has no kernel in ONNX Runtime Web")
        if node.op_type == "MatMulNBits":
            attributes = {a.name: a.i for a in node.attribute}
            if attributes.get("bits") not in (4, 8) or attributes.get("block_size") not in (16, 32, 64, 128):
                raise CheckFailed(
                    f"MatMulNBits with {attributes.get('bits')} bits by {attributes.get('block_size')} has no kernel"
                )
    return "WebGPU needs shader-f16 for it" if dtype in ("fp16", "q4f16") else ""


def _check_frequencies(model: Any, config: dict[str, Any]) -> str:
    from onnx import numpy_helper
    from transformers import AutoConfig

    text_config = AutoConfig.for_model(**_strip_export_keys(config)).get_text_config()
    ropes = text_config.rope_parameters
    by_layer_type = {None: ropes} if "rope_type" in ropes else ropes  # Gemma has one for each type of layer
    expected = {kind: _compute_frequencies(text_config, kind, rope) for kind, rope in by_layer_type.items()}
    tables = [t for t in model.graph.initializer if re.search(r"inv_freq", t.name) and t.data_location != 1]
    if not tables:
        return "it has no frequency table to compare; the level `ort` compares its logits"
    for table in tables:
        frequencies = numpy_helper.to_array(table).flatten()
        if not any(f.shape == frequencies.shape and np.allclose(frequencies, f, rtol=1e-4) for f in expected.values()):
            values = " or ".join(f"{f[-1]:.3g}" for f in expected.values())
            raise CheckFailed(
                f"its last rotary frequency is {frequencies[-1]:.3g}; config.json gives {values}: it was "
                "exported with another rope theta or scaling"
            )
    return "; ".join(f"theta {rope['rope_theta']:g}, {rope['rope_type']}" for rope in by_layer_type.values())


def _compute_frequencies(text_config: Any, layer_type: str | None, rope: dict[str, Any]) -> np.ndarray:
    """Return the rotary frequencies (rotated size / 2,) that the config gives for a type of layer."""
    import torch
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    if rope["rope_type"] != "default":
        by_type = {} if layer_type is None else {"layer_type": layer_type}
        return ROPE_INIT_FUNCTIONS[rope["rope_type"]](text_config, torch.device("cpu"), **by_type)[0].numpy()
    rotated = int(head_dim_of(text_config) * rope.get("partial_rotary_factor", 1.0))
    return 1.0 / rope["rope_theta"] ** (np.arange(0, rotated, 2) / rotated)


def _strip_export_keys(config: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in config.items() if name not in ("transformers.js_config", "architectures")}
