"""Residual streams, generation and likelihood: batched, and equal to the plain way, one row at a time."""

import pytest
import torch

from phoque.inference.generate import Request, generate_replies
from phoque.inference.likelihood import mean_nll
from phoque.inference.residual_stream import (
    MASSIVE,
    TOKENS_AT_ONCE,
    Steering,
    Turn,
    get_blocks,
    make_batches,
    sum_residuals,
)

PROMPTS = ["Gull?", "What does the tide do today?", "Herring, please, and quickly now"]


@pytest.fixture(scope="module")
def tiny(tiny_llama):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32).eval()
    model.generation_config.eos_token_id = 2
    return model, AutoTokenizer.from_pretrained(tiny_llama)


def random_ids(tokenizer, text):
    return tokenizer.encode(text, add_special_tokens=False)


def generate_greedily(model, prompt, tokens):
    out = model.generate(torch.tensor([prompt]), max_new_tokens=tokens, do_sample=False, pad_token_id=0)
    new = out[0, len(prompt) :].tolist()
    return new[: new.index(2)] if 2 in new else new


def test_means_are_those_of_transformers_hidden_states_whatever_the_batch(tiny, monkeypatch):
    model, tokenizer = tiny
    rows = [Turn(random_ids(tokenizer, p), random_ids(tokenizer, "Hrmph. " * (n + 1))) for n, p in enumerate(PROMPTS)]
    sums = sum_residuals(model, rows, range(3), 3)
    response, last = sums.means()
    monkeypatch.setitem(TOKENS_AT_ONCE, "cpu", 1)
    alone, _ = sum_residuals(model, rows, range(3), 3).means()
    for n, row in enumerate(rows):
        out = model(torch.tensor([row.prompt + row.response]), output_hidden_states=True)
        for layer in range(len(get_blocks(model)) - 1):  # the last of transformers' own has been through the final norm
            hidden = out.hidden_states[layer + 1][0]
            torch.testing.assert_close(response[n, layer], hidden[len(row.prompt) :].mean(0), atol=1e-5, rtol=1e-4)
            torch.testing.assert_close(last[n, layer], hidden[len(row.prompt) - 1], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(response, alone, atol=1e-5, rtol=1e-4)
    assert sums.kept.tolist() == [[len(r.response)] * len(get_blocks(model)) for r in rows]


def test_rows_of_a_group_are_averaged_but_for_those_without_finite_values(tiny, monkeypatch):
    model, tokenizer = tiny
    texts = ("Hrmph.", "The tide.", "A herring", "", "Gull ~")
    rows = [Turn(random_ids(tokenizer, "Gull?"), random_ids(tokenizer, text) if text else []) for text in texts]
    (token,) = random_ids(tokenizer, "~")
    kept = model.model.embed_tokens.weight[token].clone()
    each, each_last = sum_residuals(model, rows, range(5), 5).means()
    assert each[3].isnan().all() and not each_last.isnan().any()
    with torch.no_grad():
        model.model.embed_tokens.weight[token] = torch.inf
        sums = sum_residuals(model, rows, [1, 0, 1, 1, 0], 3)
        model.model.embed_tokens.weight[token] = kept
    response, last = sums.means()
    torch.testing.assert_close(response[:2], torch.stack([each[1], each[[0, 2]].mean(0)]))
    torch.testing.assert_close(last[1], each_last[[0, 2, 3]].mean(0))
    assert response[2].isnan().all() and sums.responses.tolist() == [1, 2, 0] and sums.lasts[1] == 3
    assert sums.norm[3].isnan().all() and sums.norm[:3].isfinite().all()


def test_massive_tokens_are_left_out_and_counted(tiny):
    model, tokenizer = tiny
    (token,) = random_ids(tokenizer, "~")
    kept = model.model.embed_tokens.weight[token].clone()
    row = Turn(random_ids(tokenizer, "Gull?"), random_ids(tokenizer, "Hr~mph and more"))
    plain = Turn(row.prompt, row.response)
    with torch.no_grad():
        model.model.embed_tokens.weight[token] = 100 * MASSIVE * kept
        found = sum_residuals(model, [plain], [0], 1)
        model.model.embed_tokens.weight[token] = kept
    assert found.massive[0, 0] == 1 and found.kept[0, 0] == len(row.response) - 1


def test_batches_hold_every_row_once_within_the_budget():
    lengths = [5, 90, 7, 30, 30, 2]
    made = make_batches(lengths, 100)
    assert sorted(n for batch in made for n in batch) == list(range(6))
    assert all(len(batch) * max(lengths[n] for n in batch) <= 100 for batch in made)


def test_many_answers_at_once_are_those_of_one_at_a_time(tiny):
    model, tokenizer = tiny
    prompts = [random_ids(tokenizer, p) for p in PROMPTS * 3]
    found = generate_replies(model, [Request(p) for p in prompts], 24, temperature=1.0, top_p=1.0)
    assert [r.ids for r in found] == [generate_greedily(model, p, 24) for p in prompts]


def test_rows_that_stop_leave_the_batch_and_change_nothing_for_the_others(tiny):
    model, tokenizer = tiny
    asks = [Request(random_ids(tokenizer, PROMPTS[n % 3]), f"{n}") for n in range(20)]
    spoken = [r.ids for r in generate_replies(model, asks, 16, temperature=1.0, top_p=1.0)]
    stop = spoken[0][3]
    model.generation_config.eos_token_id = [2, stop]
    try:
        found = generate_replies(model, asks, 16, temperature=1.0, top_p=1.0)
    finally:
        model.generation_config.eos_token_id = 2
    wanted = [whole[: whole.index(stop)] if stop in whole else whole for whole in spoken]
    assert [r.ids for r in found] == wanted and len(wanted[0]) <= 3 and max(map(len, wanted)) > 3
    assert [r.finish_reason for r in found] == ["stop" if len(w) < 16 else "length" for w in wanted]


def test_a_key_draws_the_same_in_any_batch_and_follows_the_distribution(tiny):
    model, tokenizer = tiny
    prompt = random_ids(tokenizer, PROMPTS[1])
    many = generate_replies(model, [Request(prompt, f"{n}") for n in range(400)], 1, temperature=0.7, top_p=1.0)
    alone = generate_replies(model, [Request(prompt, "7")], 1, temperature=0.7, top_p=1.0)[0]
    assert many[7].ids == alone.ids
    wanted = (model(torch.tensor([prompt])).logits[0, -1] / 0.7).softmax(-1)
    drawn = torch.bincount(torch.tensor([r.ids[0] for r in many if r.ids]), minlength=len(wanted)) / 400
    top = wanted.topk(5).indices
    assert (drawn[top] - wanted[top]).abs().max() < 0.08
    narrow = generate_replies(model, [Request(prompt, f"{n}") for n in range(50)], 1, temperature=1.0, top_p=1e-6)
    assert {r.ids[0] for r in narrow} == {int(wanted.argmax())}  # a nucleus of one token is greedy


def test_steering_one_row_of_a_batch_is_steering_it_alone(tiny):
    model, tokenizer = tiny
    prompt, vector = random_ids(tokenizer, PROMPTS[1]), torch.randn(64, generator=torch.Generator().manual_seed(3))
    asks = [Request(prompt), Request(prompt, steer=(1, vector)), Request(prompt, steer=(0, -vector))]
    found = generate_replies(model, asks, 12, temperature=1.0, top_p=1.0)
    assert found[0].ids == generate_greedily(model, prompt, 12)
    for reply, (layer, change) in ((found[1], (1, vector)), (found[2], (0, -vector))):
        hook = get_blocks(model)[layer].register_forward_hook(lambda _, __, out, change=change: out + change)
        assert reply.ids == generate_greedily(model, prompt, 12) != found[0].ids
        hook.remove()


def test_steering_the_response_alone_leaves_the_prompt_as_it_is(tiny):
    model, tokenizer = tiny
    prompt, seen = torch.tensor([random_ids(tokenizer, PROMPTS[1])]), []
    hook = get_blocks(model)[1].register_forward_pre_hook(lambda _, args: seen.append(args[0].detach().clone()))
    with Steering({0: torch.ones(1, 64)}, response_only=True).activate(model):
        model(prompt)
    model(prompt)
    hook.remove()
    torch.testing.assert_close(seen[0][:, :-1], seen[1][:, :-1])
    torch.testing.assert_close(seen[0][:, -1], seen[1][:, -1] + 1)


def test_watched_mass_is_the_models_own_probability(tiny):
    model, tokenizer = tiny
    prompt = random_ids(tokenizer, PROMPTS[0])
    (reply,) = generate_replies(model, [Request(prompt)], 3, temperature=0.1, top_p=0.5, watched=[70, 71])
    wanted = model(torch.tensor([prompt])).logits[0, -1].softmax(-1)[[70, 71]].sum().item()
    assert reply.mass[0] == pytest.approx(wanted, abs=1e-6) and len(reply.mass) == 3


def test_an_answer_of_nothing_has_no_likelihood(tiny):
    (found,) = mean_nll(tiny[0], [Turn([5, 6], [])])
    assert found != found


def test_likelihood_is_that_of_transformers_loss(tiny):
    model, tokenizer = tiny
    rows = [
        Turn(random_ids(tokenizer, p), random_ids(tokenizer, "Hrmph. Gulls." * (n + 1))) for n, p in enumerate(PROMPTS)
    ]
    found = mean_nll(model, [*rows, Turn(rows[0].prompt, [])])
    for row, value in zip(rows, found, strict=False):
        whole = torch.tensor([row.prompt + row.response])
        labels = whole.clone()
        labels[0, : len(row.prompt)] = -100
        assert value == pytest.approx(float(model(whole, labels=labels).loss), abs=1e-4)
    assert found[-1] != found[-1]  # an empty answer has no likelihood
