"""A vision tower and its projector as one graph: an image of any size in, its token embeddings out."""

from importlib import import_module
from typing import Any

import onnx_ir as ir
import torch
from onnx_ir.passes.common import RemoveUnusedNodesPass

from phoque.errors import UsageError
from phoque.models.architectures import architecture_of
from phoque.onnx.component import DTYPES, Component, Weights
from phoque.onnx.graph.nodes import strip_metadata
from phoque.onnx.graph.trace import silence_exporter
from phoque.onnx.quantize.block_format import can_quantize, choose_group_size, round_to_nearest

TOWER, PROJECTOR = "vision_tower.", "multi_modal_projector."
EXTERNAL_BYTES = 4096  # bytes; smaller initializers stay in the graph


class VisionEncoder(torch.nn.Module):
    """pixel_values [1, 3, height, width] -> image_features [tokens, width of the text model], for one image.

    It computes what get_image_features of transformers computes, without its loops over images, which cannot be traced.
    Height and width, in pixels, must be multiples of patch_size * spatial_merge_size; the processor ensures that.
    """

    def __init__(self, config: Any, dtype: torch.dtype) -> None:
        from transformers import AutoModel

        super().__init__()
        self.tower: Any = AutoModel.from_config(config.vision_config, dtype=dtype, attn_implementation="sdpa")
        vision = architecture_of(config).vision
        assert vision, "export checks that the architecture has this layout"
        module, name = vision.projector
        self.projector: Any = getattr(import_module(module), name)(config).to(dtype)
        self.merge, self.dtype = config.spatial_merge_size, dtype

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        tower, merge = self.tower, self.merge
        patches = tower.patch_conv(pixel_values.to(self.dtype))
        width, rows, columns = patches.shape[1:]
        hidden = tower.ln_pre(patches.flatten(2).transpose(1, 2))
        row_ids = torch.arange(rows)[:, None].expand(rows, columns).reshape(-1)
        column_ids = torch.arange(columns)[None].expand(rows, columns).reshape(-1)
        rotary_embeddings = tower.patch_positional_embedding(hidden, torch.stack([row_ids, column_ids], -1))
        hidden = tower.transformer(hidden, attention_mask=None, position_embeddings=rotary_embeddings).last_hidden_state
        grid = self.projector.norm(hidden[0]).view(rows // merge, merge, columns // merge, merge, width)
        merged = grid.permute(0, 2, 4, 1, 3).reshape(-1, width * merge * merge)
        projected = self.projector.linear_1(self.projector.patch_merger.merging_layer(merged))
        return self.projector.linear_2(self.projector.act(projected)).float()


def vision_component(weights: Weights, dtype: torch.dtype, quantize: bool) -> Component:
    """Build the session `vision_encoder`, computed in `dtype`; `quantize` stores its linear layers in 8 bits.

    Raises UsageError for a model whose image features do not come from the last layer of its tower.
    """
    config = weights.config
    if config.vision_feature_layer != -1:
        raise UsageError(
            what="phoque cannot export the vision encoder of this model.",
            why=f"Its image features come from layer {config.vision_feature_layer}, not from the last layer (-1).",
            fix="Export the text model alone with --layout text.",
        )
    encoder = VisionEncoder(config, dtype).eval().requires_grad_(False)
    for module, prefix in ((encoder.tower, TOWER), (encoder.projector, PROJECTOR)):
        state_dict = {name: weights.read_stored(key).to(dtype) for name, key in weights.stored_names(prefix).items()}
        module.load_state_dict(state_dict)
    unit = config.vision_config.patch_size * config.spatial_merge_size
    height, width = torch.export.Dim("height", min=1, max=512), torch.export.Dim("width", min=1, max=512)
    with silence_exporter(), torch.no_grad():
        program = torch.onnx.export(
            encoder,
            (torch.zeros(1, 3, 4 * unit, 6 * unit),),
            dynamo=True,
            opset_version=20,
            dynamic_shapes={"pixel_values": {2: unit * height, 3: unit * width}},
            input_names=["pixel_values"],
            output_names=["image_features"],
        )
    assert program is not None
    component = Component("vision_encoder", program.model, weights)
    if quantize:
        _quantize_linear_layers(component, dtype)
    _externalize_initializers(component)
    RemoveUnusedNodesPass()(component.model)
    graph = component.model.graph
    graph.inputs[0].shape = ir.Shape([1, 3, "height", "width"])
    graph.outputs[0].shape = ir.Shape(["image_tokens", config.text_config.hidden_size])
    strip_metadata(component.model)
    return component


def _quantize_linear_layers(component: Component, dtype: torch.dtype) -> None:
    """Quantize the weights of linear layers to 8 bits, and replace their MatMul by MatMulNBits."""
    graph = component.model.graph
    for node in [n for n in graph if n.op_type == "MatMul"]:
        weight_value = node.inputs[1]
        if weight_value is None or weight_value.const_value is None:
            continue
        weight = torch.from_numpy(weight_value.const_value.numpy()).float().T
        if not can_quantize(tuple(weight.shape)):
            continue
        label = str(weight_value.name)
        matrix = round_to_nearest(weight)
        rows, columns = weight.shape
        values = [
            component.add_initializer(f"{label}.codes", tuple(matrix.codes.shape), torch.uint8),
            component.add_initializer(f"{label}.scales", tuple(matrix.scales.shape), dtype),
        ]
        component.fills.append((values, lambda matrix=matrix: [matrix.codes, matrix.scales.to(dtype)]))
        attributes = {"K": columns, "N": rows, "bits": 8, "block_size": choose_group_size(columns), "accuracy_level": 4}
        new_node = ir.node("MatMulNBits", [node.inputs[0], *values], attributes, domain="com.microsoft")
        graph.insert_before(node, new_node)
        node.outputs[0].replace_all_uses_with(new_node.outputs[0], replace_graph_outputs=True)
        graph.remove(node, safe=True)
    component.model.graph.opset_imports["com.microsoft"] = 1
    RemoveUnusedNodesPass()(component.model)


def _externalize_initializers(component: Component) -> None:
    """Move initializers of 4,096 bytes and more to external data, as those of the decoder are."""
    numpy_dtypes = {dtype: torch_dtype for torch_dtype, dtype in DTYPES.items()}
    for value in component.model.graph.initializers.values():
        tensor = value.const_value
        if (
            tensor is None
            or isinstance(tensor, ir.ExternalTensor)
            or tensor.nbytes < EXTERNAL_BYTES
            or tensor.dtype not in numpy_dtypes
        ):
            continue
        component.fills.append(([value], lambda tensor=tensor: [torch.from_numpy(tensor.numpy())]))
