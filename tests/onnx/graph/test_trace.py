"""The middle layer repeated is the model traced whole, whatever the architecture."""

from collections import Counter

import numpy as np
import pytest
import torch
from tests import tiny

from phoque.errors import PhoqueError
from phoque.models.checkpoint_reader import CheckpointReader
from phoque.models.load import load_model
from phoque.models.source import Source
from phoque.onnx.component import Weights
from phoque.onnx.graph import trace
from phoque.onnx.graph.decoder import decoder_component
from phoque.onnx.session import OnnxChatModel


def export_decoder(folder, out, dtype=torch.float32, suffix=""):
    """An export's decoder alone, and the source it came from."""
    source = Source("tiny", folder, "1", "here")
    weights = Weights(CheckpointReader(source))
    traced = trace.trace_decoder(weights.config.get_text_config(), dtype, "cpu" if dtype == torch.float32 else "webgpu")
    part = decoder_component(traced, weights, "model", dtype=dtype, quantizer=None, takes_embeds=False)
    (out / "onnx").mkdir(parents=True, exist_ok=True)
    part.write(out / "onnx", suffix, lambda _: None)
    return source, part


@pytest.mark.thorough
def test_it_says_what_the_model_says_at_once_in_pieces_and_far_out(any_model, tmp_path):
    source, part = export_decoder(any_model, tmp_path / "out")
    kinds = Counter(node.op_type for node in part.model.graph)
    assert kinds["GroupQueryAttention"] == 5 and not kinds["Split"]
    norms = [node for node in part.model.graph if node.op_type == "SkipSimplifiedLayerNormalization"]
    assert len(norms) == 10 and not any(value.name for node in norms for value in node.outputs[1:3])
    for node in part.model.graph:
        if node.op_type == "GroupQueryAttention":
            assert [user.op_type for user, _ in node.outputs[0].uses()] == ["MatMul"]
    model = load_model(source, "fp32", on=torch.device("cpu"))
    chat = OnnxChatModel(tmp_path / "out", "fp32")
    ids = torch.randint(3, 250, (1, 24), generator=torch.Generator().manual_seed(0))
    for first in (0, 1000):
        with torch.no_grad():
            wanted = model(input_ids=ids, position_ids=torch.arange(first, first + 24)[None]).logits.numpy()
        found, _ = chat.run(ids.numpy(), first_position=first)
        assert np.abs(found - wanted).max() < 1e-4 * np.abs(wanted).max()
        if first == 0:
            one, past = chat.run(ids[:, :9].numpy())
            rest, _ = chat.run(ids[:, 9:].numpy(), past)
            assert np.abs(np.concatenate([one, rest], 1) - wanted).max() < 1e-4 * np.abs(wanted).max()
            assert np.array_equal(chat.run(ids.numpy(), None, 1)[0], found[:, -1:])
            assert chat.run(ids.numpy(), None, 3)[0].shape[1] == 3


@pytest.mark.thorough
def test_plain_operators_say_the_same(tmp_path):
    folder = tiny.llama(tmp_path / "m", num_hidden_layers=5, initializer_range=0.3)
    weights = Weights(CheckpointReader(Source("tiny", folder, "1", "here")))
    traced = trace.trace_decoder(weights.config.get_text_config(), torch.float32, None)
    part = decoder_component(traced, weights, "model", dtype=torch.float32, quantizer=None, takes_embeds=False)
    assert not any(node.domain for node in part.model.graph)
    (tmp_path / "plain" / "onnx").mkdir(parents=True)
    part.write(tmp_path / "plain" / "onnx", "", lambda _: None)
    export_decoder(folder, tmp_path / "fused")
    ids = np.arange(3, 40)[None]
    first, second = (OnnxChatModel(tmp_path / name, "fp32").run(ids)[0] for name in ("plain", "fused"))
    assert np.abs(first - second).max() < 1e-4 * np.abs(first).max()


@pytest.mark.thorough
def test_the_repeated_graph_is_the_whole_one(tmp_path, monkeypatch):
    folder = tiny.llama(tmp_path / "m", num_hidden_layers=5, initializer_range=0.3)
    _, repeated = export_decoder(folder, tmp_path / "repeated")
    monkeypatch.setattr(trace, "TRACED_LAYERS", 5)
    _, whole = export_decoder(folder, tmp_path / "whole")
    kinds = lambda part: sorted(node.op_type for node in part.model.graph)
    assert kinds(repeated) == kinds(whole)
    ends = lambda part: [[v.name for v in values] for values in (part.model.graph.inputs, part.model.graph.outputs)]
    assert ends(repeated) == ends(whole)
    ids = np.arange(3, 40)[None]
    first, second = (OnnxChatModel(tmp_path / name, "fp32").run(ids)[0] for name in ("repeated", "whole"))
    assert np.array_equal(first, second)


@pytest.mark.thorough
def test_no_path_of_this_machine_is_in_the_file(tmp_path):
    export_decoder(tiny.llama(tmp_path / "m"), tmp_path / "out")
    content = (tmp_path / "out" / "onnx" / "model.onnx").read_bytes()
    assert b"site-packages" not in content and str(tmp_path).encode() not in content and b".py" not in content


@pytest.mark.thorough
def test_a_weight_that_the_exporter_folds_away_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(trace, "_read_watermarks", lambda array, names: iter(()))
    with pytest.raises(PhoqueError) as refused:
        export_decoder(tiny.llama(tmp_path / "m"), tmp_path / "out")
    assert "weight" in refused.value.why and refused.value.code == 1
