"""The layers made fast compute what the plain ones do: hidden states, gradients, whole runs."""

import json
import re
import shutil
import weakref

import pytest
import torch
from safetensors.torch import load_file
from tests import tiny
from tests.rows import row, write_rows
from transformers import LlamaConfig

from phoque.data.chat_template import EncodedChat
from phoque.data.packing import Packing, Shape, build_batch
from phoque.errors import PhoqueError
from phoque.models.architectures import architecture_of
from phoque.models.fp8 import Fp8Linear, check_fp8_support
from phoque.models.load import load_model
from phoque.models.lora import LoraOptions, add_lora_adapter, find_target_modules, load_adapter, save_adapter
from phoque.models.source import Source
from phoque.training.engine import attention
from phoque.training.engine.cuda_graphs import PackedRow, _GraphPair
from phoque.training.engine.engine import POINTWISE_RECOMPUTED, Engine
from phoque.training.engine.lora_linear import apply_lora_linear, join_weights
from phoque.training.engine.select import select_engine
from phoque.training.engine.trial import check_against_plain

LENGTHS = (17, 40, 23, 9, 31)
PACKING = Packing(5, 24.0, 40, static=True)


@pytest.fixture(scope="module")
def mistral3(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mistral3")
    tiny.fp8_mistral3(folder)
    return folder


def family(folder, name):
    """A tiny model of another architecture, saved."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **tiny.SIZES))
    for parameter in model.parameters():  # biases are zero at first, where a mistake with them would not show
        if parameter.dim() == 1:
            torch.nn.init.normal_(parameter, 1.0, 0.1)
    model.save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return folder


def adapted_model(folder, quantization="fp32", traced=True, dropout=0.0, seed=3, modules="all-linear", rslora=False):
    name, _ = attention.select_attention(torch.device("cpu"), LlamaConfig(), torch.float32, 0, 100, traced)
    torch.manual_seed(seed)
    model = load_model(Source("tiny", folder, "0", "test"), quantization, name)
    targets = find_target_modules(model, modules)
    model = add_lora_adapter(model, LoraOptions(rank=4, alpha=8, dropout=dropout, targets=targets, rslora=rslora))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return model.train()


def make_chats():
    drawn = torch.Generator().manual_seed(0)
    ids = [torch.randint(3, 250, (n,), generator=drawn).tolist() for n in LENGTHS]
    return [EncodedChat(one, one) for one in ids]


def label_answer(number, text):
    return row(messages=[{"role": "user", "content": f"Gull {number}?"}, {"role": "assistant", "content": text}])


def static_row():
    return PackedRow.from_batch(**build_batch(make_chats(), PACKING.shape(sum(LENGTHS))))


def weights_by_module(hidden):
    return torch.randn(hidden.shape, generator=torch.Generator().manual_seed(7)).to(hidden.dtype)


def run_plain_layers(folder, quantization="fp32", dtype=None, seed=3, **options):
    """Hidden states and gradients of the plain layers on unpadded rows; `dtype` computes in another precision."""
    model = adapted_model(folder, quantization, traced=False, seed=seed, **options)
    if dtype:
        model = model.to(dtype)
    batch = build_batch(make_chats())
    inputs = {k: batch[k] for k in ("input_ids", "position_ids", "cu_seq_lens_q", "max_length_q")}
    with torch.autocast("cpu", torch.bfloat16, quantization != "fp32" and dtype is None):  # as the trainer does
        hidden = model.get_base_model().model(**inputs, use_cache=False).last_hidden_state
    (hidden * weights_by_module(hidden)).sum().backward()
    return hidden.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def run_engine(engine):
    engine.model.zero_grad()
    hidden = engine.compute_hidden(static_row())[:, : sum(LENGTHS)]
    (hidden * weights_by_module(hidden)).sum().backward()
    return hidden.detach(), {n: p.grad.clone() for n, p in engine.model.named_parameters() if p.grad is not None}


def relative_distance(found, wanted):
    """The largest relative distance of hidden states and of any gradient."""
    hidden = (found[0].float() - wanted[0].float()).norm() / wanted[0].float().norm()
    assert found[1].keys() == wanted[1].keys()
    return max(float(hidden), *(float((found[1][n] - g).norm() / g.norm()) for n, g in wanted[1].items()))


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2", "qwen3", "ministral3"])
def test_own_products_give_the_plain_hidden_states_and_gradients(name, tmp_path):
    folder = family(tmp_path / name, name)
    assert relative_distance(run_engine(Engine(adapted_model(folder))), run_plain_layers(folder)) < 1e-5


@pytest.mark.parametrize("modules", ["attention", "q_proj,v_proj", "gate_proj", "down_proj"])
@pytest.mark.parametrize(("quantization", "most"), [("fp32", 1e-5), ("nf4", 0.03), ("fp8", 0.3)])
def test_layers_without_an_adapter_run_beside_those_that_have_one(mistral3, modules, quantization, most):
    engine = Engine(adapted_model(mistral3, quantization, modules=modules, rslora=True))
    plain = run_plain_layers(mistral3, quantization, modules=modules, rslora=True)
    assert relative_distance(run_engine(engine), plain) < most
    engine.set_weight_cache(True)
    assert relative_distance(run_engine(engine), plain) < most


def test_an_adapter_in_some_layers_alone_runs_on_plain_layers(mistral3):
    model = adapted_model(mistral3, modules=r".*layers\.1\.mlp\..*")
    choice = select_engine(model, "compile", PACKING, 10, recompute=False)
    assert choice.engine is None and "other modules in some layers" in choice.reason


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("quantization", ["nf4", "bf16", "fp8"])
@pytest.mark.thorough
def test_quantised_products_are_as_near_to_fp32_as_the_plain_ones(mistral3, quantization, whole):
    ours, theirs = [], []
    for seed in range(3, 7):  # the largest of fourteen distances is a matter of luck in one adapter
        engine = Engine(adapted_model(mistral3, quantization, seed=seed))
        engine.set_weight_cache(whole)
        exact = run_plain_layers(mistral3, quantization, torch.float32, seed)
        ours.append(relative_distance(run_engine(engine), exact))
        theirs.append(relative_distance(run_plain_layers(mistral3, quantization, seed=seed), exact))
    # FP8 products round what goes in as well, where the plain ones only read the weights in full
    assert sum(ours) < (4 * 0.4 if quantization == "fp8" else 1.3 * sum(theirs)), (ours, theirs)


def test_fp8_products_are_off_by_what_three_bits_of_mantissa_explain():
    torch.manual_seed(0)
    linears = []
    for rows in (48, 16):
        linear = Fp8Linear(64, rows, bias=False)
        linear.set_weight(torch.randn(rows, 64) * torch.rand(rows, 1), None)
        linears.append(linear)
    a, b = torch.zeros(8, 64), torch.zeros(64, 4)
    x, slope = torch.randn(30, 64), torch.randn(30, 64)
    exact = torch.cat([linear.dequantize(torch.float32) for linear in linears])
    for whole in (False, True):
        given = x.clone().requires_grad_(True)
        out = torch.cat(
            apply_lora_linear(given, None, a, b.clone().requires_grad_(True), join_weights(linears, whole)), -1
        )
        (out * slope).sum().backward()
        wanted = x @ exact.T, slope @ exact
        for found, right in zip((out.detach(), given.grad), wanted, strict=True):
            assert (found - right).norm() / right.norm() < 0.04


def test_fp8_keeps_no_more_of_the_input_than_other_formats():
    """For the backward pass: the input and x A^T. Its FP8 codes are not differentiated."""
    linear = Fp8Linear(64, 48, bias=False)
    linear.set_weight(torch.randn(48, 64), None)
    a, b = torch.zeros(4, 64), torch.zeros(48, 4)
    x = torch.randn(30, 64, requires_grad=True)
    kept = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        apply_lora_linear(x, None, a, b.requires_grad_(True), join_weights([linear], True))
    assert sorted(tuple(t.shape) for t in kept if len(t) == 30) == [(30, 4), (30, 64)]


def test_only_gpus_with_fp8_units_are_asked_for_them(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda on: (8, 6))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda on: "NVIDIA A10G")
    with pytest.raises(PhoqueError, match="A10G has no FP8 units"):
        check_fp8_support(torch.device("cuda"))
    check_fp8_support(torch.device("cpu"))


def test_fp8_holds_the_checkpoint_as_it_was_published(mistral3):
    from safetensors import safe_open

    model = load_model(Source("tiny", mistral3, "0", "test"), "fp8")
    stored = {}
    for file in mistral3.glob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            stored |= {key: opened.get_tensor(key) for key in opened.keys() if ".layers.0." in key}  # noqa: SIM118
    name = next(key for key in stored if key.endswith("layers.0.mlp.up_proj.weight") and "vision" not in key)
    module = model.model.layers[0].mlp.up_proj
    assert torch.equal(module.weight, stored[name].view(torch.uint8))
    assert (module.scale == stored[name + "_scale_inv"].float()).all()


def test_gradients_add_up_over_rows_and_go_with_zero_grad(mistral3):
    engine = Engine(adapted_model(mistral3, "fp32"))
    _, once = run_engine(engine)
    hidden = engine.compute_hidden(static_row())[:, : sum(LENGTHS)]
    (hidden * weights_by_module(hidden)).sum().backward()
    twice = {n: p.grad for n, p in engine.model.named_parameters() if p.grad is not None}
    for name, grad in once.items():
        torch.testing.assert_close(twice[name], 2 * grad, rtol=1e-5, atol=1e-6)
    _, again = run_engine(engine)
    assert all(torch.equal(again[name], grad) for name, grad in once.items())


@pytest.mark.parametrize("limit", [0.1, 1e9])
def test_gradients_are_clipped_as_torch_clips_them(mistral3, limit):
    engine = Engine(adapted_model(mistral3, "fp32"))
    _, gradients = run_engine(engine)
    trained = [p for p in engine.model.parameters() if p.requires_grad]
    assert sum(p.numel() for p in trained) == engine.flat.gradients.numel()
    norm = engine.flat.clip_gradients(limit)
    clipped = [p.grad.clone() for p in trained]
    for parameter, gradient in zip(trained, gradients.values(), strict=True):
        parameter.grad = gradient
    torch.testing.assert_close(norm, torch.nn.utils.clip_grad_norm_(trained, limit))
    torch.testing.assert_close(clipped, [p.grad for p in trained])


def test_recomputed_layers_change_nothing(mistral3):
    engine = Engine(adapted_model(mistral3, "fp32"))
    found = run_engine(engine)
    engine.recomputed_layers = len(engine.layers)
    assert relative_distance(run_engine(engine), found) < 1e-6


def test_a_frugal_engine_keeps_less_and_changes_nothing(mistral3):
    engine, kept = Engine(adapted_model(mistral3, "bf16"), compiled=True), []
    known = {t.data_ptr() for t in [*engine.model.parameters(), *engine.flat.leaves]}

    def seen(tensor):
        if tensor.data_ptr() not in known:
            kept[-1][tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    found = []
    for _ in range(2):
        kept.append({})
        with torch.autograd.graph.saved_tensors_hooks(seen, lambda tensor: tensor):
            engine._run_first_layer(static_row())
        found.append(run_engine(engine))
        engine.enable_pointwise_recompute()
    config, tokens = engine.model.config, static_row().ids.shape[1]
    normed_and_gated = tokens * (2 * config.hidden_size + config.intermediate_size) * 2
    assert sum(kept[0].values()) - sum(kept[1].values()) == normed_and_gated
    assert relative_distance(*found) < 0.05  # what bf16 rounds away in other places


def test_an_optimizer_and_a_checkpoint_still_reach_the_weights(mistral3, tmp_path):
    model = adapted_model(mistral3, "fp32")
    engine, kind = Engine(model), architecture_of(model.config)
    save_adapter(model, tmp_path / "before", kind)
    before, _ = run_engine(engine)
    torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 0.01).step()
    after, _ = run_engine(engine)
    assert (after - before).abs().max() > 0.01
    load_adapter(model, tmp_path / "before", kind)
    assert torch.equal(run_engine(engine)[0], before)


def test_dropout_is_drawn_anew_and_leaves_the_frozen_products_alone(mistral3):
    engine = Engine(adapted_model(mistral3, "fp32", dropout=0.5))
    first, second = run_engine(engine)[0], run_engine(engine)[0]
    assert not torch.equal(first, second)
    engine.model.eval()
    assert relative_distance(run_engine(engine), run_plain_layers(mistral3)) < 1e-5


def test_a_wrong_adapter_is_found_out_under_dropout_too(mistral3, monkeypatch):
    from phoque.training.engine import lora_linear as module

    found = {}
    for sign in (1, -1):

        def signed(x, dropped, a, b, weight, real=module.apply_lora_linear, sign=sign):
            return real(x, dropped, a, sign * b, weight)

        monkeypatch.setattr(module, "apply_lora_linear", signed)
        model = adapted_model(mistral3, "fp32", traced=False, dropout=0.3)
        found[sign] = select_engine(model, "compile", PACKING, 10, recompute=False).mode
        assert all(m.training for m in model.modules() if isinstance(m, torch.nn.Dropout))
        monkeypatch.undo()
    assert found == {1: "compiled", -1: "eager"}


def test_a_wrong_layer_is_found_out_and_gives_way(mistral3, monkeypatch):
    from phoque.training.engine import lora_linear as module

    real = module.apply_lora_linear
    monkeypatch.setattr(module, "apply_lora_linear", lambda x, *rest: tuple(1.5 * part for part in real(x, *rest)))
    model = adapted_model(mistral3, "fp32", traced=False)
    chosen = select_engine(model, "compile", PACKING, 10, recompute=False)
    assert chosen.mode == "eager" and chosen.engine is None
    assert re.search(r"compiled failed: layer \d differs by \d+.*fused linear layers failed: layer", chosen.reason)
    assert not any("forward" in vars(m) for m in model.modules() if hasattr(m, "lora_A"))


def test_a_wrong_adapter_is_found_out_though_a_fresh_one_does_nothing(mistral3, monkeypatch):
    from phoque.training.engine import lora_linear as module

    real = module.apply_lora_linear
    monkeypatch.setattr(module, "apply_lora_linear", lambda x, dropped, a, b, weight: real(x, dropped, a, -b, weight))
    model = adapted_model(mistral3, "fp32", traced=False)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.zeros_(parameter)
    assert select_engine(model, "compile", PACKING, 10, recompute=False).mode == "eager"
    assert all(not p.any() for n, p in model.named_parameters() if "lora_B" in n)


@pytest.mark.parametrize(("factor", "problem"), [(1, ""), (2, "the captured graphs compute something else")])
def test_captured_graphs_are_compared_with_the_run_before_their_capture(mistral3, factor, problem):
    class Graphs:
        def forward(self, row, run_forward, run_backward, gradients):
            self.out = run_forward(row).detach()
            return self.out * factor

        def backward(self, grad):
            pass

        def take_uncaptured_output(self):
            return self.out

    engine = Engine(adapted_model(mistral3, traced=False), captured=True)
    engine._graphs = Graphs()
    assert check_against_plain(engine, static_row(), sum(LENGTHS)) == problem
    assert engine._compiled is None  # torch.compile would import inductor, which takes a second


def fail_with_out_of_memory(monkeypatch, times):
    """A pass of the layers finds no memory so many times; whether what it had made was gone before it was spared."""
    run, spare, left, made, freed = Engine._run, Engine.reduce_memory, [times], [], []

    def running(self, row):
        out = run(self, row)
        left[0] -= 1
        if left[0] >= 0:
            made.append(weakref.ref(out))
            raise torch.OutOfMemoryError("CUDA out of memory")
        return out

    def spared(self):
        self._graphs._current = _GraphPair(static_row(), torch.zeros(1), torch.zeros(1), None, None)
        found = spare(self)
        freed.append(made[-1]() is None and self._graphs._current is None)
        return found

    monkeypatch.setattr(Engine, "_run", running)
    monkeypatch.setattr(Engine, "reduce_memory", spared)
    return freed


def test_a_padding_token_that_embeds_to_zeros_does_not_fail_the_trial(tmp_path):
    """Each norm multiplies the gradient at a position of zeros by up to 1,000: in a deep model it becomes infinite."""
    deep = tiny.llama(tmp_path / "deep", num_hidden_layers=24, rms_norm_eps=1e-12)
    model = adapted_model(deep)
    assert bool((model.get_input_embeddings().weight[0] == 0).all())
    packing = Packing(4, 30.0, 60, False, True)
    assert select_engine(model, "compile", packing, 10, recompute=False).mode == "compiled"


def test_memory_that_runs_out_in_the_trial_is_spared_until_it_does(mistral3, monkeypatch):
    freed = fail_with_out_of_memory(monkeypatch, 3)
    chosen = select_engine(adapted_model(mistral3, "fp32"), "compile", PACKING, 10, recompute=False)
    assert chosen.mode == "compiled" and chosen.engine.recomputed_layers == 2 and freed == [True] * 3
    assert f"ran out in a trial: {POINTWISE_RECOMPUTED}; memory ran out in a trial: more blocks" in chosen.reason
    assert chosen.reason.endswith("2 of 3 decoder blocks are recomputed")
    assert relative_distance(run_engine(chosen.engine), run_plain_layers(mistral3)) < 1e-5


def test_memory_that_runs_out_whatever_is_spared_is_said(mistral3, monkeypatch):
    fail_with_out_of_memory(monkeypatch, 9)
    with pytest.raises(torch.OutOfMemoryError):
        select_engine(adapted_model(mistral3, "fp32"), "compile", PACKING, 10, recompute=False)


def test_whole_weights_go_before_layers_are_recomputed(mistral3):
    engine = Engine(adapted_model(mistral3, "nf4"), compiled=True)
    engine.set_weight_cache(enabled=True)
    assert (
        engine.reduce_memory() == "the weight cache is dropped"
        and not engine.weight_cache
        and not engine.recomputed_layers
    )
    assert [engine.reduce_memory() for _ in range(5)] == [POINTWISE_RECOMPUTED, *["more blocks are recomputed"] * 3, ""]


@pytest.mark.parametrize("quantization", ["fp32", "nf4", "fp8"])
@pytest.mark.thorough
def test_a_compiled_run_learns_what_the_eager_one_does(phoque, mistral3, tmp_path, quantization):
    rows = write_rows(tmp_path / "rows.jsonl", [row(n) for n in range(80)])
    found = {}
    for mode in ("eager", "compile"):
        run = tmp_path / mode
        phoque(
            "train",
            "--base-model",
            mistral3,
            "--dataset",
            rows,
            "--quantization",
            quantization,
            "--batch-size",
            4,
            "--max-steps",
            6,
            "--log-every",
            1,
            "--sample-every",
            0,
            "--learning-rate",
            0.002,
            "--engine-mode",
            mode,
            "--output-dir",
            run,
            env={"WANDB_MODE": "disabled"},
        )
        metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        found[mode] = [(m["loss"], m["tokens"]) for m in metrics if "loss" in m]
        record = json.loads((run / "run.json").read_text())
        assert record["engine"]["mode"] == {"eager": "eager", "compile": "compiled"}[mode]
    losses, compiled = ([loss for loss, _ in found[mode]] for mode in ("eager", "compile"))
    assert compiled == pytest.approx(losses, abs=1e-4 if quantization == "fp32" else 0.02)
    assert [t for _, t in found["eager"]] == [t for _, t in found["compile"]] and losses[-1] < losses[0]


def test_graphs_on_a_cpu_give_way_to_compiling_in_one_line(mistral3):
    chosen = select_engine(adapted_model(mistral3, "fp32"), "graph", PACKING, 10, recompute=True)
    assert chosen.mode == "compiled" and "no CUDA graphs on a CPU" in chosen.reason
    assert chosen.record()["recomputed_layers"] == len(chosen.engine.layers)
    assert relative_distance(run_engine(chosen.engine), run_plain_layers(mistral3)) < 1e-5


@pytest.mark.thorough
def test_layers_compile_once_for_all_of_them_and_for_every_length(mistral3):
    from torch._dynamo.utils import counters

    for several, graphs in ((False, 4), (True, 2)):
        torch.compiler.reset()
        counters.clear()
        engine = Engine(adapted_model(mistral3, "fp32"), compiled=True, dynamic=several)
        for tokens in (128, 160, 192, 224):
            row = PackedRow.from_batch(**build_batch(make_chats(), Shape(tokens, 12, 40)))
            engine.compute_hidden(row).sum().backward()
        assert counters["stats"]["unique_graphs"] == graphs


@pytest.mark.thorough
def test_compiled_exact_steps_of_a_stopped_run_goes_on_as_it_was(phoque, mistral3, tmp_path):
    rows = write_rows(tmp_path / "rows.jsonl", [label_answer(n, "gull " * (1 + n * 7 % 60)) for n in range(80)])
    asked = [
        "train",
        "--base-model",
        mistral3,
        "--dataset",
        rows,
        "--quantization",
        "fp32",
        "--batch-size",
        8,
        "--packing",
        "exact",
        "--log-every",
        1,
        "--sample-every",
        0,
        "--save-steps",
        3,
        "--learning-rate",
        0.002,
        "--engine-mode",
        "compile",
        "--max-steps",
        6,
    ]
    env = {"WANDB_MODE": "disabled"}
    phoque(*asked, "--output-dir", tmp_path / "whole", env=env)
    losses = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    assert len({m["tokens"] for m in losses if "tokens" in m}) > 4
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    for name in ("checkpoint-6", "adapter"):
        shutil.rmtree(tmp_path / "cut" / name)
    record = json.loads((tmp_path / "cut" / "run.json").read_text())
    del record["result"]
    (tmp_path / "cut" / "run.json").write_text(json.dumps(record))
    resumed = phoque(*asked, "--output-dir", tmp_path / "cut", env=env)
    assert "continuing from step 3" in resumed.err
    first, second = (load_file(tmp_path / n / "adapter" / "adapter_model.safetensors") for n in ("whole", "cut"))
    assert all(torch.equal(first[name], second[name]) for name in first)
