"""Answers in batches are the answers one by one, and the sampler draws from the likeliest tokens."""

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from phoque.chat.answer import generate_answer, generate_answers
from phoque.chat.models import TorchChatModel
from phoque.chat.sampling import Sampling, _likeliest
from phoque.inference.generate import find_end_tokens
from tests import tiny

SAMPLING = Sampling(tokens=24, temperature=0.9, top_p=0.95, penalty=1.1, seed=3)
QUESTIONS = [
    "Gulls?",
    "What do you think of the tide today, and of the herring that it brings?",
    "Why?",
    "A rock, then",
]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> TorchChatModel:
    folder = tiny.talking_llama(tmp_path_factory.mktemp("talking") / "llama")
    llama = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return TorchChatModel("base", llama, AutoTokenizer.from_pretrained(folder), find_end_tokens(llama))


@pytest.mark.parametrize("tokens_at_once", [8_192, 96, 1])
def test_a_batch_gives_the_answers_that_single_questions_get(model, monkeypatch, tokens_at_once):
    monkeypatch.setattr(model, "tokens_at_once", tokens_at_once)
    monkeypatch.setattr(model, "_ends", set(range(60, 90)))  # so that answers end at different steps
    conversations = [[{"role": "user", "content": question}] for question in QUESTIONS * 3]
    done = []
    answers = generate_answers(model, conversations, SAMPLING, show=done.append)
    singly = [
        generate_answer(model, messages, SAMPLING, number=number) for number, messages in enumerate(conversations)
    ]
    assert [answer.text for answer in answers] == [answer.text for answer in singly]
    assert [answer.finish_reason for answer in answers] == [answer.finish_reason for answer in singly]
    assert {answer.finish_reason for answer in answers} == {"stop", "length"}
    assert done[-1] == len(answers) and (len(done) > 1) == (tokens_at_once < 8_192)
    assert len({answer.tokens for answer in answers}) > 3


def test_the_model_drops_the_rows_that_have_ended(model, monkeypatch):
    seen = []
    whole = model._model.forward
    monkeypatch.setattr(model._model, "forward", lambda *a, **k: seen.append(len(k["input_ids"])) or whole(*a, **k))
    monkeypatch.setattr(model, "_ends", set(range(60, 90)))
    generate_answers(model, [[{"role": "user", "content": question}] for question in QUESTIONS * 3], SAMPLING)
    assert seen[0] == 12 > seen[-1]


def test_candidates_are_those_of_a_full_sort():
    draws = np.random.default_rng(0)
    for top_p, spread in [(0.5, 1), (0.95, 0.1), (1.0, 1), (0.999, 4), (0.01, 1)]:
        probabilities = np.exp(spread * draws.standard_normal(5000))
        probabilities /= probabilities.sum()
        order = np.argsort(-probabilities, kind="stable")
        whole = order[: int(np.searchsorted(probabilities[order].cumsum(), top_p)) + 1]
        assert _likeliest(probabilities, top_p).tolist() == whole.tolist()
