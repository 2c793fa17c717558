"""The exported graph of each kind of family computes what the checkpoint computes, whole and token by token."""

from collections import Counter

import numpy as np
import pytest
import torch
from tests.tiny.families import WINDOW, build

from phoque.models.checkpoint_reader import CheckpointReader
from phoque.models.load import load_model
from phoque.models.source import Source
from phoque.onnx.component import Weights
from phoque.onnx.graph.decoder import decoder_component
from phoque.onnx.graph.trace import trace_decoder
from phoque.onnx.session import OnnxChatModel

LENGTH = 24  # more than the windows
# what each has of its own: a window everywhere; windows, two rotary tables and norms of 1 + weight; fused layers;
# multipliers; norms after the layers; blocks without rotary embeddings
FAMILIES = ("mistral", "gemma3", "phi3", "granite 4", "olmo3", "smollm3")


@pytest.mark.thorough
@pytest.mark.parametrize("family", FAMILIES)
def test_the_graph_computes_what_the_checkpoint_computes(family, tmp_path):
    source = Source("tiny", build(family, tmp_path / "model"), "0", "test")
    weights = Weights(CheckpointReader(source))
    traced = trace_decoder(weights.config.get_text_config(), torch.float32, "cpu")
    part = decoder_component(traced, weights, "model", dtype=torch.float32, quantizer=None, takes_embeds=False)
    (tmp_path / "out" / "onnx").mkdir(parents=True)
    part.write(tmp_path / "out" / "onnx", "", lambda _: None)
    assert Counter(node.op_type for node in part.model.graph)["GroupQueryAttention"] == 4
    ids = torch.randint(3, 250, (1, LENGTH), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = load_model(source, "fp32", on=torch.device("cpu"))(input_ids=ids).logits.numpy()
    chat = OnnxChatModel(tmp_path / "out", "fp32")
    whole, _ = chat.run(ids.numpy())
    logits, past = chat.run(ids[:, : WINDOW + 1].numpy())
    steps = [logits]
    for position in range(WINDOW + 1, LENGTH):
        logits, past = chat.run(ids[:, position : position + 1].numpy(), past)
        steps.append(logits)
    for logits in (whole, np.concatenate(steps, 1)):
        assert np.abs(logits - expected).max() < 1e-4 * np.abs(expected).max()
