"""Level `graph`: inputs, outputs, sizes and operators are those that Transformers.js feeds and its runtimes have."""

import re
from typing import Any

import numpy as np

from phoque.errors import first_line
from phoque.onnx.session import SUFFIXES
from phoque.onnx.transformers_js import SESSIONS
from phoque.onnx.verify.checks import CheckFailed, Verdict
from phoque.onnx.verify.export_dir import ExportDir, read_json
from phoque.onnx.verify.files import load_graph

LEVEL = "graph"
NEWEST = {"": 21, "com.microsoft": 1}  # opsets that ONNX Runtime Web of Transformers.js 4.3.1 runs
NEWEST_IR = 11
FED = {  # what Transformers.js feeds each session, and what it reads
    "model": {"input_ids": 7, "attention_mask": 7, "position_ids": 7, "num_logits_to_keep": 7},
    "decoder_model_merged": {"inputs_embeds": 1, "attention_mask": 7, "position_ids": 7, "num_logits_to_keep": 7},
    "embed_tokens": {"input_ids": 7},
    "vision_encoder": {"pixel_values": 1},
}
NEEDED = {
    "model": "input_ids",
    "decoder_model_merged": "inputs_embeds",
    "embed_tokens": "input_ids",
    "vision_encoder": "pixel_values",
}
READ = {
    "model": "logits",
    "decoder_model_merged": "logits",
    "embed_tokens": "inputs_embeds",
    "vision_encoder": "image_features",
}
# contrib operators with a kernel in wasm, tried with onnxruntime-web 1.31; GatherBlockQuantized has none
ON_WASM = {
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
IN_STANDARD_DOMAIN = {"SimplifiedLayerNormalization"}  # where ONNX Runtime registers them, and ONNX does not
UNKNOWN_STANDARD = {"Attention", "RMSNormalization", "SwiGLU"}  # opset 23 and later
FLOAT, HALF, INT64 = 1, 10, 7


def check_graphs(place: ExportDir, layout: str, dtypes: list[str], verdict: Verdict) -> None:
    """Add this level's checks for each session of each precision."""
    config = read_json(place, "config.json")
    for dtype in dtypes:
        for name in SESSIONS[layout]:
            path = f"onnx/{name}{SUFFIXES[dtype]}.onnx"
            if path not in place.sizes:
                continue  # the level before has said so
            with verdict.check(LEVEL, f"{path}: valid, and in versions that the runtimes have") as said:
                said.append(_valid(load_graph(place, path)))
            with verdict.check(LEVEL, f"{path}: inputs and outputs as Transformers.js feeds and reads them"):
                _ends(load_graph(place, path), name, config)
            with verdict.check(LEVEL, f"{path}: every operator has a kernel on wasm and WebGPU") as said:
                said.append(_operators(load_graph(place, path), dtype))
            if name in ("model", "decoder_model_merged"):
                with verdict.check(LEVEL, f"{path}: the rotary frequencies are the config's") as said:
                    said.append(_frequencies(load_graph(place, path), config))


def _valid(model: Any) -> str:
    import onnx

    try:
        onnx.checker.check_model(_checkable(model))
    except onnx.checker.ValidationError as error:
        raise CheckFailed(f"onnx.checker: {first_line(error)}") from error
    for entry in model.opset_import:
        if entry.domain not in NEWEST:
            if entry.domain in {node.domain for node in model.graph.node}:
                raise CheckFailed(f"it has operators of {entry.domain!r}, which no runtime of Transformers.js has")
        elif entry.version > NEWEST[entry.domain]:
            raise CheckFailed(f"it is of opset {entry.version}; ONNX Runtime Web goes to {NEWEST[entry.domain]}")
    if model.ir_version > NEWEST_IR:
        raise CheckFailed(f"it is of IR version {model.ir_version}; ONNX Runtime Web goes to {NEWEST_IR}")
    return f"opset {model.opset_import[0].version}, IR {model.ir_version}"


def _checkable(model: Any) -> Any:
    """The graph as the checker can see it without the files beside it.

    External initializers become inputs, and ONNX Runtime's own operators in the standard domain go to theirs.
    """
    import onnx

    bare = onnx.ModelProto()
    bare.CopyFrom(model)
    kept = [tensor for tensor in bare.graph.initializer if tensor.data_location != 1]
    for tensor in bare.graph.initializer:
        if tensor.data_location == 1:
            bare.graph.input.append(onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
    del bare.graph.initializer[:]
    bare.graph.initializer.extend(kept)
    for node in bare.graph.node:
        if node.op_type in IN_STANDARD_DOMAIN:
            node.domain = "com.microsoft"
    return bare


def _ends(model: Any, name: str, config: dict[str, Any]) -> None:
    text = config.get("text_config", config)
    initial = {tensor.name for tensor in model.graph.initializer}
    inputs = {v.name: v.type.tensor_type for v in model.graph.input if v.name not in initial}
    outputs = {v.name: v.type.tensor_type for v in model.graph.output}
    past = {n: v for n, v in inputs.items() if n.startswith("past_key_values.")}
    for entry in inputs.keys() - past.keys() - FED[name].keys():
        raise CheckFailed(f"it needs the input {entry}, which Transformers.js does not give it")
    if NEEDED[name] not in inputs:
        raise CheckFailed(f"it has no input {NEEDED[name]}")
    for entry, kind in FED[name].items():
        if entry in inputs and inputs[entry].elem_type != kind:
            raise CheckFailed(f"its input {entry} is of type {inputs[entry].elem_type}, Transformers.js gives {kind}")
    if READ[name] not in outputs:
        raise CheckFailed(f"it has no output {READ[name]}")
    width = {"logits": text["vocab_size"]}.get(READ[name], text["hidden_size"])
    last = outputs[READ[name]].shape.dim[-1]
    if last.dim_value and last.dim_value != width:
        raise CheckFailed(f"{READ[name]} ends in {last.dim_value}, config.json says {width}")
    if name in ("model", "decoder_model_merged"):
        _cache(past, outputs, text)


def _cache(past: dict[str, Any], outputs: dict[str, Any], text: dict[str, Any]) -> None:
    heads, layers = text["num_key_value_heads"], text["num_hidden_layers"]
    head_dim = text.get("head_dim") or text["hidden_size"] // text["num_attention_heads"]
    wanted = {f"past_key_values.{n}.{kind}" for n in range(layers) for kind in ("key", "value")}
    for entry in sorted(wanted - past.keys()):
        raise CheckFailed(f"the cache has no input {entry}: config.json says {layers} layers")
    for entry in sorted(past.keys() - wanted):
        raise CheckFailed(f"the cache has the input {entry}: config.json says {layers} layers")
    for entry in sorted(wanted):
        if entry.replace("past_key_values", "present") not in outputs:
            raise CheckFailed(f"the cache has no output {entry.replace('past_key_values', 'present')}")
        batch, kv, _, size = past[entry].shape.dim
        if not batch.dim_value and batch.dim_param != "batch_size":
            raise CheckFailed(
                f"{entry} has the batch size {batch.dim_param!r}: Transformers.js takes it for 0, unless it is "
                "a number or batch_size"
            )
        for what, dim, number in (("heads", kv, heads), ("head size", size, head_dim)):
            if not dim.dim_value:
                raise CheckFailed(f"{entry} has the {what} {dim.dim_param!r}: Transformers.js takes a name for 0")
            if dim.dim_value != number:
                raise CheckFailed(f"{entry} has the {what} {dim.dim_value}, config.json says {number}")


def _operators(model: Any, dtype: str) -> str:
    for node in model.graph.node:
        contrib = node.domain == "com.microsoft"
        if node.domain not in ("", "ai.onnx", "com.microsoft"):
            raise CheckFailed(f"{node.op_type} of {node.domain} has no kernel in a browser")
        if contrib and node.op_type not in ON_WASM:
            raise CheckFailed(
                f"{node.op_type} has no kernel on wasm: the model would load in Node and fail in a browser"
            )
        if not contrib and node.op_type in UNKNOWN_STANDARD:
            raise CheckFailed(f"{node.op_type} has no kernel in ONNX Runtime Web")
        if node.op_type == "MatMulNBits":
            numbers = {a.name: a.i for a in node.attribute}
            if numbers.get("bits") not in (4, 8) or numbers.get("block_size") not in (16, 32, 64, 128):
                raise CheckFailed(
                    f"MatMulNBits in {numbers.get('bits')} bits by {numbers.get('block_size')} has no kernel"
                )
    return "on WebGPU it needs shader-f16" if dtype in ("fp16", "q4f16") else ""


def _frequencies(model: Any, config: dict[str, Any]) -> str:
    from onnx import numpy_helper
    from transformers import AutoConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    text = AutoConfig.for_model(**_plain(config)).get_text_config()
    rope = text.rope_parameters
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    if rope["rope_type"] == "default":
        wanted = 1.0 / rope["rope_theta"] ** (np.arange(0, head_dim, 2) / head_dim)
    else:
        import torch

        wanted = ROPE_INIT_FUNCTIONS[rope["rope_type"]](text, torch.device("cpu"))[0].numpy()
    held = [t for t in model.graph.initializer if re.search(r"inv_freq", t.name) and t.data_location != 1]
    if not held:
        return "it has no table of them to compare; the level ort compares what it says"
    found = numpy_helper.to_array(held[0]).flatten()
    if found.shape != wanted.shape or not np.allclose(found, wanted, rtol=1e-4):
        raise CheckFailed(
            f"its rotary frequencies end at {found[-1]:.3g}, config.json gives {wanted[-1]:.3g}: it was "
            "exported with another rope theta or scaling"
        )
    return f"theta {rope['rope_theta']:g}, {rope['rope_type']}"


def _plain(config: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in config.items() if name not in ("transformers.js_config", "architectures")}
