"""A step of decoding is captured once and replayed. Graphs need a GPU: a stand-in takes the captured step again."""

from contextlib import nullcontext
from itertools import pairwise
from unittest.mock import Mock

import pytest
import torch

from phoque.inference import cuda_decoder
from phoque.inference.cuda_decoder import BatchDecoder
from phoque.inference.generate import Request, count_rows, generate_replies
from phoque.inference.gpu_memory import estimate_cache_bytes, estimate_row_bytes


@pytest.fixture(scope="module")
def model(tiny_llama):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32).eval()
    model.generation_config.eos_token_id = 2
    return model


class RecordedGraph:
    """A graph that keeps what the step read and wrote, and does it there again when it is replayed."""

    made, off, broken = [], 0.0, False

    def __init__(self):
        self.replays, self.pool_given = 0, None
        RecordedGraph.made.append(self)

    def capture_begin(self, pool, capture_error_mode):
        self.pool_given = pool
        if RecordedGraph.broken:
            raise RuntimeError("this operation is not permitted")

    def capture_end(self):
        RecordedGraph.step = None

    def pool(self):
        return self

    def replay(self):
        self.replays += 1
        self.out.copy_(self.step() * (1 + RecordedGraph.off))


@pytest.fixture
def gpu(monkeypatch):
    """Decoding as on a GPU; what it counts are the steps that Python takes."""
    steps, plain, begun = [], BatchDecoder._step, BatchDecoder.__init__

    def again(self):
        read = {name: getattr(self, name) for name in ("_ids", "_position_ids", "_attention_mask")}

        def replayed():
            now = {name: getattr(self, name) for name in read}
            self.__dict__ |= read
            try:
                return plain(self)
            finally:
                self.__dict__ |= now

        return replayed

    def step(self):
        steps.append(self)
        out = plain(self).clone()
        if RecordedGraph.made and not hasattr(RecordedGraph.made[-1], "out"):
            RecordedGraph.made[-1].out, RecordedGraph.made[-1].step = out, again(self)
        return out

    def begin(self, *given):
        begun(self, *given)
        self._can_capture = True

    monkeypatch.setattr(BatchDecoder, "_step", step)
    monkeypatch.setattr(BatchDecoder, "__init__", begin)
    monkeypatch.setattr(cuda_decoder, "_get_capture_stream", lambda: None)
    monkeypatch.setattr(torch.cuda, "stream", lambda given: nullcontext())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", RecordedGraph)
    monkeypatch.setattr(RecordedGraph, "made", [])
    return steps


def make_requests(count):
    drawn = torch.Generator().manual_seed(0)
    return [Request(torch.randint(5, 90, (3 + n % 4,), generator=drawn).tolist(), f"{n}") for n in range(count)]


def test_a_step_is_captured_once_for_a_batch_and_replayed(model, gpu, monkeypatch):
    model.generation_config.eos_token_id = []
    found = generate_replies(model, make_requests(6), 12, temperature=1.0, top_p=1.0)
    assert len(gpu) == 3 and [g.replays for g in RecordedGraph.made] == [
        10
    ]  # two plain ones and the captured, then replays
    monkeypatch.undo()
    assert [r.ids for r in generate_replies(model, make_requests(6), 12, temperature=1.0, top_p=1.0)] == [
        r.ids for r in found
    ]


def test_a_batch_that_shrinks_is_captured_again_into_the_same_memory(model, gpu, monkeypatch):
    model.generation_config.eos_token_id = [*range(3, 30)]
    found = generate_replies(model, make_requests(24), 16, temperature=1.0, top_p=1.0)
    graphs = [*RecordedGraph.made]
    assert len(graphs) > 2 and graphs[0].pool_given is None
    assert all(later.pool_given is before for before, later in pairwise(graphs))
    monkeypatch.undo()
    assert [r.ids for r in generate_replies(model, make_requests(24), 16, temperature=1.0, top_p=1.0)] == [
        r.ids for r in found
    ]


def test_few_steps_are_not_worth_a_capture(model, gpu):
    model.generation_config.eos_token_id = []
    generate_replies(model, make_requests(3), 1 + cuda_decoder.MIN_STEPS_TO_CAPTURE, temperature=1.0, top_p=1.0)
    assert not RecordedGraph.made and len(gpu) == cuda_decoder.MIN_STEPS_TO_CAPTURE


@pytest.mark.parametrize(("fault", "why"), [("off", "5.0% off"), ("broken", "not permitted")])
def test_a_graph_that_fails_or_differs_is_not_used_and_says_so(model, gpu, monkeypatch, fault, why):
    model.generation_config.eos_token_id = []
    monkeypatch.setattr(RecordedGraph, fault, 0.05)
    with pytest.warns(RuntimeWarning, match=why):
        found = generate_replies(model, make_requests(5), 10, temperature=1.0, top_p=1.0)
    assert len(RecordedGraph.made) == 1 and RecordedGraph.made[0].replays <= 1 and len(gpu) >= 9
    monkeypatch.undo()
    assert [r.ids for r in generate_replies(model, make_requests(5), 10, temperature=1.0, top_p=1.0)] == [
        r.ids for r in found
    ]


def test_steps_see_exactly_what_was_said_before(model):
    prompts = [[9, 8, 7, 6], [5]]
    ids, mask = torch.tensor([prompts[0], [0, 0, 0, 5]]), torch.tensor([[1, 1, 1, 1], [0, 0, 0, 1]])
    said = torch.tensor([[11, 12, 13], [21, 22, 23]])
    with torch.no_grad(), BatchDecoder(model, ids, mask, 4) as steps:
        found = [steps.prefill(), *(steps.step(said[:, n]) for n in range(3))]
        for row, prompt in enumerate(prompts):
            whole = model(torch.tensor([prompt + said[row].tolist()])).logits[0, len(prompt) - 1 :]
            torch.testing.assert_close(torch.stack([f[row] for f in found]), whole, atol=1e-5, rtol=1e-4)


def test_as_many_rows_are_decoded_at_once_as_fit_into_the_free_memory(model, monkeypatch):
    row = estimate_row_bytes(model, 600, 40)
    assert 640 * estimate_cache_bytes(model) < row < estimate_row_bytes(model, 1200, 40)
    assert estimate_cache_bytes(model) == 2 * 2 * 2 * 16 * 4  # keys and values, blocks, heads, their size, bytes
    on_gpu = Mock(
        device=torch.device("cuda"),
        config=model.config,
        get_input_embeddings=model.get_input_embeddings,
        spec=["device", "config", "get_input_embeddings"],
    )
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: 3 * row)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: row)
    for free, rows in ((10**12, 1024), (62 * row, 32), (60 * row, 16), (0, 1)):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda free=free: (free, 10**12))
        assert count_rows(on_gpu, 600, 40) == rows
    assert count_rows(model, 600, 40) == 64
