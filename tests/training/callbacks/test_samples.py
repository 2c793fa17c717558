"""Samples are answered together, and each is what the model says when it is asked alone; time is told apart."""

from types import SimpleNamespace

import pytest
import torch
from tests import tiny
from transformers import LlamaConfig

from phoque.data.chat_template import ChatTemplate
from phoque.data.packing import build_batch
from phoque.models.config import load_tokenizer
from phoque.models.load import load_model
from phoque.models.lora import LoraOptions, add_lora_adapter
from phoque.models.source import Source
from phoque.training import timer
from phoque.training.callbacks.metrics import measure_held_out_loss
from phoque.training.callbacks.samples import generate_answers
from phoque.training.engine import attention
from phoque.training.engine.loss import add_token_loss

PROMPTS = ["Gulls?", "What do you think of the tide today, seal?", "Fish."]


@pytest.fixture(scope="module", params=["llama", "mistral3"])
def model_with_adapter(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("speaker") / request.param
    (tiny.llama if request.param == "llama" else tiny.fp8_mistral3)(folder)
    source = Source("tiny", folder, "0", "test")
    name, _ = attention.select_attention(torch.device("cpu"), LlamaConfig(), torch.float32, 0, 100)
    model = add_lora_adapter(load_model(source, "fp32", name), LoraOptions(rank=4, alpha=8))
    torch.manual_seed(0)
    for key, parameter in model.named_parameters():
        if "lora_B" in key:
            parameter.data.normal_(0, 2.0)
    add_token_loss(model.get_base_model())
    return model, ChatTemplate(load_tokenizer(source), "", 512)


def test_each_answer_is_the_one_to_its_prompt_alone(model_with_adapter, monkeypatch):
    model, chat = model_with_adapter
    # bytes at random are no text, and look all alike as such
    monkeypatch.setattr(chat.tokenizer, "decode", lambda ids, **_: [int(token) for token in ids])
    config = model.get_base_model().generation_config
    together = generate_answers(model, chat, PROMPTS, "You are a seal.", 24)
    assert [row["prompt"] for row in together] == PROMPTS and together[0]["response"] != together[1]["response"]
    begun = []
    for prompt, row in zip(PROMPTS, together, strict=True):
        ids = torch.tensor([chat.prompt_ids(prompt, "You are a seal.")])
        with attention.plain_attention(model.get_base_model()), torch.no_grad():
            alone = model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=24, do_sample=False, pad_token_id=0
            )[0, ids.shape[1] :]
        assert alone.tolist() == row["response"] and len(alone) == row["n_tokens"]
        begun.append(int(alone[0]))
    monkeypatch.setattr(config, "eos_token_id", begun[:1])  # the first answer ends where it begins
    short = generate_answers(model, chat, PROMPTS, "You are a seal.", 24)
    assert (short[0]["response"], short[0]["n_tokens"]) == ([], 1)
    monkeypatch.setattr(config, "eos_token_id", None)
    monkeypatch.setattr(model.get_base_model().config, "eos_token_id", None)
    assert generate_answers(model, chat, PROMPTS, "You are a seal.", 5)[0]["n_tokens"] == 5


def test_the_held_out_loss_is_that_of_each_conversation_alone(model_with_adapter):
    model, chat = model_with_adapter
    talks = [
        chat.encode([{"role": "user", "content": "Gull?"}, {"role": "assistant", "content": "Hrmph. " * number}])
        for number in (1, 9, 4, 2)
    ]
    found = measure_held_out_loss(model, talks, tokens=100)
    with torch.no_grad():
        alone = [model(**build_batch([talk]), token_loss=True) for talk in talks]
    count = sum(part.count for part in alone)
    assert found["held_out_loss"] == pytest.approx(sum(part.nll.item() for part in alone) / count, rel=1e-5)
    assert found["held_out_accuracy"] == pytest.approx(sum(part.correct.item() for part in alone) / count)


def test_time_is_counted_once_and_by_what_it_went_to(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(timer, "time", SimpleNamespace(monotonic=lambda: now[0]))
    watch = timer.Timer()
    now[0] += 20
    watch.mark_loaded()
    watch.lap()
    for seconds in (30, 2):
        with watch.measure("samples"):
            now[0] += seconds
    now[0] += 25
    assert watch.lap() == 25 and watch.seconds == 77
    assert [*watch.seconds_by_name().items()] == [("samples", 32), ("steps", 25), ("loading", 20)]
