"""What is captured once is replayed on other rows. Graphs need a GPU: a stand-in notes and repeats what is run here."""

from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import pytest
import torch

from phoque.training.engine.cuda_graphs import CudaGraphs, PackedRow


class RecordedGraph:
    """A graph on a CPU: what says so while it is captured is done again."""

    capturing = None

    def __init__(self):
        self.steps = []

    def replay(self):
        for step in self.steps:
            step()


def record(step):
    step()
    if RecordedGraph.capturing:
        RecordedGraph.capturing.steps.append(step)


@pytest.fixture
def cuda(monkeypatch):
    @contextmanager
    def graph(made, pool, capture_error_mode):
        RecordedGraph.capturing = made
        yield
        RecordedGraph.capturing = None

    stream = SimpleNamespace(wait_stream=lambda other: None)
    stand_ins = {
        "CUDAGraph": RecordedGraph,
        "graph": graph,
        "Stream": lambda: stream,
        "current_stream": lambda: stream,
        "stream": lambda given: nullcontext(),
        "graph_pool_handle": lambda: (0, 1),
    }
    for name, stand_in in stand_ins.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)


def make_row(*ids):
    return PackedRow(torch.tensor([ids]), torch.arange(len(ids))[None], torch.tensor([0, len(ids)]), len(ids))


def test_each_length_is_captured_once_and_gradients_only_count_what_is_trained_on(cuda):
    gradients, runs = torch.zeros(()), []

    def run(row):
        out = torch.zeros(row.ids.shape)
        runs.append(len(row.ids[0]))
        record(lambda: out.copy_(row.ids * 2.0))
        return out

    def back(out, grad):
        record(lambda: gradients.add_((out * grad).sum()))

    graphs, total = CudaGraphs(), 0.0
    for ids in ((1, 2, 3), (4, 5, 6), (7, 8), (9, 9, 9), (1, 1)):
        out = graphs.forward(make_row(*ids), run, back, gradients)
        assert out.tolist() == [[2.0 * n for n in ids]]
        if ids in ((1, 2, 3), (7, 8)):  # the first of its length
            assert torch.equal(graphs.take_uncaptured_output(), out)
        with pytest.raises(AssertionError):
            graphs.take_uncaptured_output()
        graphs.backward(torch.full_like(out, 0.5))
        total += sum(ids)
        assert float(gradients) == total
    assert runs == [3, 3, 2, 2]  # once to warm up, once captured
    graphs.clear()
    with pytest.raises(AssertionError):
        graphs.backward(torch.ones(1, 2))
    graphs.forward(make_row(5, 5), run, back, gradients)
    assert runs[4:] == [2, 2] and float(gradients) == total
