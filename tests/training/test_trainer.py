"""Our loss, attention and step against the plain ones: the same numbers, then faster."""

import copy

import pytest
import torch
from tests import tiny
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig

from phoque.data.chat_template import ChatTemplate
from phoque.data.held_out import HeldOut
from phoque.data.packing import Packing, build_batch
from phoque.data.readers import open_dataset
from phoque.data.stream import TrainStream
from phoque.models.lora import LoraOptions, add_lora_adapter
from phoque.models.source import Source
from phoque.training.engine import attention, loss
from phoque.training.engine.loss import add_token_loss


@pytest.fixture
def chat():
    return ChatTemplate(tiny.tokenizer(), "", 512)


def exact_packing(count):
    return Packing(count, 60.0, 512, exact=True)


def loaded(folder, name="sdpa"):
    from phoque.models.load import load_model

    return load_model(Source("tiny", folder, "0", "test"), "fp32", name)


def open_stream(rows, chat, size=4):
    return TrainStream(
        open_dataset(str(rows), "train", None, None),
        chat,
        held_out=HeldOut(),
        packing=exact_packing(size),
        seed=0,
    )


def randomize_adapter(model):
    """An adapter whose B is not zero, so that a wrong mask or scale would show."""
    torch.manual_seed(3)
    model = add_lora_adapter(model, LoraOptions(rank=4, alpha=8))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


def test_token_loss_is_cross_entropy_of_the_full_logits(tiny_llama, rows, chat):
    batch = next(iter(open_stream(rows, chat)))
    name, _ = attention.select_attention(torch.device("cpu"), LlamaConfig(), torch.float32, 0, 100)
    model = randomize_adapter(loaded(tiny_llama, name))
    add_token_loss(model.get_base_model())
    inputs = {k: v for k, v in batch.items() if k not in ("labels", "loss_at")}
    logits = model(**inputs).logits[0, :-1]
    plain = cross_entropy(logits, batch["labels"][0, 1:], reduction="sum")
    plain.backward()
    wanted = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    found = model(**batch, token_loss=True)
    found.nll.backward()
    assert found.nll.item() == pytest.approx(plain.item(), rel=1e-6)
    labelled = batch["labels"][0, 1:] != -100
    assert found.count == labelled.sum()
    assert found.correct == (logits.argmax(-1) == batch["labels"][0, 1:])[labelled].sum()
    for n, p in model.named_parameters():
        if p.requires_grad:
            torch.testing.assert_close(p.grad, wanted[n], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("compiled", [False, True])
def test_positions_that_fill_up_a_shape_count_for_nothing(compiled, monkeypatch):
    monkeypatch.setattr(loss, "LOGITS_AT_ONCE", 50 * 40)  # several chunks
    judged = torch.compile(loss._token_losses, dynamic=True) if compiled else loss._token_losses
    torch.manual_seed(0)
    hidden, weight = torch.randn(90, 8, requires_grad=True), torch.randn(50, 8)
    places, labels = torch.arange(3, 88), torch.randint(0, 50, (85,))
    found = []
    for at, wanted in ((places, labels), loss._pad_to_tile(places, labels, 89)):
        nll, right = loss._HeadLoss.apply(hidden, weight, at, wanted, judged)
        found.append([nll, right, *torch.autograd.grad(nll, hidden)])
    assert len(at) == 128
    logits = hidden[places] @ weight.T
    plain = cross_entropy(logits, labels, reduction="sum")
    right = (logits.argmax(-1) == labels).sum()
    for ours in found:
        for one, other in zip(
            ours, (plain, right, *torch.autograd.grad(plain, hidden, retain_graph=True)), strict=True
        ):
            torch.testing.assert_close(one, other)


def test_packed_logits_and_gradients_equal_unpacked_ones(tiny_llama, chat, rows):
    stream = open_stream(rows, chat, 1)
    singles = [b for _, b in zip(range(5), stream, strict=False)]
    talks = [chat.encode(open_row["messages"]) for open_row in _rows(rows)[:5]]
    name, _ = attention.select_attention(torch.device("cpu"), LlamaConfig(), torch.float32, 0, 100)
    ours, plain = randomize_adapter(loaded(tiny_llama, name)), randomize_adapter(loaded(tiny_llama))
    batch = build_batch(talks)
    together = ours(**{k: v for k, v in batch.items() if k not in ("labels", "loss_at")}).logits[0]
    alone = torch.cat([plain(input_ids=torch.tensor([t.ids])).logits[0] for t in talks])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)
    together.square().mean().backward()
    alone.square().mean().backward()
    grads = zip(ours.parameters(), plain.parameters(), strict=True)
    for a, b in ((a.grad, b.grad) for a, b in grads if a.grad is not None):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)
    assert len(singles) == 5


def _rows(path):
    import json

    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_run_follows_trl(tiny_llama, rows, chat, phoque, tmp_path):
    """The same rows in the same order through TRL's own trainer, collator and loss: the same losses to 1e-4."""
    import json

    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    run = tmp_path / "run"
    phoque(
        "train",
        "--base-model",
        tiny_llama,
        "--dataset",
        rows,
        "--quantization",
        "fp32",
        "--batch-size",
        4,
        "--packing",
        "exact",
        "--max-steps",
        8,
        "--log-every",
        1,
        "--sample-every",
        0,
        "--held-out-rows",
        0,
        "--learning-rate",
        0.01,
        "--output-dir",
        run,
    )
    ours = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]

    taken = [b for _, b in zip(range(32), open_stream(rows, ChatTemplate(tiny.tokenizer(), "", 2048), 1), strict=False)]
    data = Dataset.from_list([{k: b[k][0].tolist() for k in ("input_ids", "labels")} for b in taken])
    torch.manual_seed(0)
    model = add_lora_adapter(loaded(tiny_llama), LoraOptions(rank=16, alpha=64))
    arguments = SFTConfig(
        output_dir=str(tmp_path / "trl"),
        max_steps=8,
        per_device_train_batch_size=4,
        learning_rate=0.01,
        lr_scheduler_type="cosine",
        warmup_steps=0,
        optim="adamw_torch",
        use_cpu=True,
        bf16=False,
        report_to=[],
        gradient_checkpointing=False,
        logging_steps=1,
        save_strategy="no",
        max_length=None,
        disable_tqdm=True,
        dataset_kwargs={"skip_prepare_dataset": True},
        seed=0,
    )
    trainer = SFTTrainer(
        model=model, args=arguments, train_dataset=data, processing_class=AutoTokenizer.from_pretrained(tiny_llama)
    )
    trainer._get_train_sampler = lambda dataset=None: torch.utils.data.SequentialSampler(data)
    trainer.train()
    theirs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [m["loss"] for m in ours if "loss" in m] == pytest.approx([t["loss"] for t in theirs], abs=1e-4)
    assert [m["grad_norm"] for m in ours if "loss" in m] == pytest.approx([t["grad_norm"] for t in theirs], rel=1e-3)
    assert len(theirs) == 8


@pytest.mark.parametrize("fused", [True, False])
def test_an_optimizer_state_goes_on_on_a_machine_with_other_kernels(fused):
    """A CPU saves `fused: None`; on a GPU the same state must run fused, where found_inf can skip a step."""
    from phoque.training.trainer import adapt_optimizer

    torch.manual_seed(0)
    gradients = [torch.randn(5, 3) for _ in range(3)]

    def make(is_fused):
        weight = torch.nn.Parameter(torch.ones(5, 3))
        return weight, torch.optim.AdamW([weight], lr=0.1, fused=is_fused)

    def step(weight, optimizer, gradient):
        weight.grad = gradient.clone()
        optimizer.step()

    weight, saved = make(not fused)
    step(weight, saved, gradients[0])
    other_weight, other = make(fused)
    other_weight.data.copy_(weight.data)
    other.load_state_dict(copy.deepcopy(saved.state_dict()))
    adapt_optimizer(other, fused)
    assert other.param_groups[0]["fused"] == fused
    for gradient in gradients[1:]:
        step(weight, saved, gradient)
        if fused:
            other.found_inf = torch.zeros(())
            other.grad_scale = None
        step(other_weight, other, gradient)
    torch.testing.assert_close(other_weight, weight)
    if fused:
        other.found_inf = torch.ones(())
        step(other_weight, other, gradients[0])
        torch.testing.assert_close(other_weight, weight)
