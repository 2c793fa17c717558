"""Pixtral's tower and Mistral3's projector as one graph: an image of any size in, its tokens' embeddings out."""

from typing import Any

import onnx_ir as ir
import torch
from onnx_ir.passes.common import RemoveUnusedNodesPass

from phoque.errors import PhoqueError
from phoque.onnx.component import DTYPES, Component, Weights
from phoque.onnx.graph.decoder import forget
from phoque.onnx.graph.trace import quiet
from phoque.onnx.quantize.block_format import block_size, fits, rounded

TOWER, PROJECTOR = "vision_tower.", "multi_modal_projector."
LARGE = 4096  # bytes; smaller initializers stay in the graph


class Encoder(torch.nn.Module):
    """pixel_values [1, 3, height, width] -> image_features [tokens, width of the text model], for one image.

    It says what transformers' own get_image_features says, without the loops over images that no graph can hold.
    Heights and widths are multiples of patch_size * spatial_merge_size, as the processor makes them.
    """

    def __init__(self, config: Any, dtype: torch.dtype) -> None:
        from transformers import AutoModel
        from transformers.models.mistral3.modeling_mistral3 import Mistral3MultiModalProjector

        super().__init__()
        self.tower: Any = AutoModel.from_config(config.vision_config, dtype=dtype, attn_implementation="sdpa")
        self.projector: Any = Mistral3MultiModalProjector(config).to(dtype)
        self.merge, self.dtype = config.spatial_merge_size, dtype

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        tower, merge = self.tower, self.merge
        patches = tower.patch_conv(pixel_values.to(self.dtype))
        width, rows, columns = patches.shape[1:]
        hidden = tower.ln_pre(patches.flatten(2).transpose(1, 2))
        down = torch.arange(rows)[:, None].expand(rows, columns).reshape(-1)
        across = torch.arange(columns)[None].expand(rows, columns).reshape(-1)
        turned = tower.patch_positional_embedding(hidden, torch.stack([down, across], -1))
        hidden = tower.transformer(hidden, attention_mask=None, position_embeddings=turned).last_hidden_state
        grid = self.projector.norm(hidden[0]).view(rows // merge, merge, columns // merge, merge, width)
        merged = grid.permute(0, 2, 4, 1, 3).reshape(-1, width * merge * merge)
        projected = self.projector.linear_1(self.projector.patch_merger.merging_layer(merged))
        return self.projector.linear_2(self.projector.act(projected)).float()


def vision_component(weights: Weights, dtype: torch.dtype, eight: bool) -> Component:
    """`vision_encoder`, computed in `dtype`; with `eight` the weights of its products are in 8 bits.

    Raises PhoqueError (2) for a model whose features do not come from the last layer of its tower.
    """
    config = weights.config
    if config.vision_feature_layer != -1:
        raise PhoqueError(
            "The vision encoder of this model is not one that phoque exports.",
            f"Its features come from layer {config.vision_feature_layer}, not from the last.",
            "Export the text model alone with --layout text.",
        )
    encoder = Encoder(config, dtype).eval().requires_grad_(False)
    for module, prefix in ((encoder.tower, TOWER), (encoder.projector, PROJECTOR)):
        found = {name: weights.full(key).to(dtype) for name, key in weights.named(prefix).items()}
        module.load_state_dict(found)
    unit = config.vision_config.patch_size * config.spatial_merge_size
    height, width = torch.export.Dim("height", min=1, max=512), torch.export.Dim("width", min=1, max=512)
    with quiet(), torch.no_grad():
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
    part = Component("vision_encoder", program.model, weights)
    if eight:
        _in_eight_bits(part, dtype)
    _move_out(part)
    RemoveUnusedNodesPass()(part.model)
    graph = part.model.graph
    graph.inputs[0].shape = ir.Shape([1, 3, "height", "width"])
    graph.outputs[0].shape = ir.Shape(["image_tokens", config.text_config.hidden_size])
    forget(part.model)
    return part


def _in_eight_bits(part: Component, dtype: torch.dtype) -> None:
    """Products with constant weights in blocks of 8 bits."""
    graph = part.model.graph
    for node in [n for n in graph if n.op_type == "MatMul"]:
        held = node.inputs[1]
        if held is None or held.const_value is None:
            continue
        weight = torch.from_numpy(held.const_value.numpy()).float().T
        if not fits(tuple(weight.shape)):
            continue
        label = str(held.name)
        blocks = rounded(weight)
        rows, columns = weight.shape
        values = [
            part.initializer(f"{label}.codes", tuple(blocks.codes.shape), torch.uint8),
            part.initializer(f"{label}.scales", tuple(blocks.scales.shape), dtype),
        ]
        part.fills.append((values, lambda blocks=blocks: [blocks.codes, blocks.scales.to(dtype)]))
        attributes = {"K": columns, "N": rows, "bits": 8, "block_size": block_size(columns), "accuracy_level": 4}
        product = ir.node("MatMulNBits", [node.inputs[0], *values], attributes, domain="com.microsoft")
        graph.insert_before(node, product)
        node.outputs[0].replace_all_uses_with(product.outputs[0], replace_graph_outputs=True)
        graph.remove(node, safe=True)
    part.model.graph.opset_imports["com.microsoft"] = 1
    RemoveUnusedNodesPass()(part.model)


def _move_out(part: Component) -> None:
    """Large initializers beside the graph, as the decoder's."""
    numpy_dtypes = {dtype: torch_dtype for torch_dtype, dtype in DTYPES.items()}
    for value in part.model.graph.initializers.values():
        held = value.const_value
        if held is None or isinstance(held, ir.ExternalTensor) or held.nbytes < LARGE or held.dtype not in numpy_dtypes:
            continue
        part.fills.append(([value], lambda held=held: [torch.from_numpy(held.numpy())]))
