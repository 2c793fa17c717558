"""Every family: a packed row is trained as transformers runs each conversation alone, and decoding is transformers'."""

import ast
import re
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from tests.tiny import randomize_lora
from tests.tiny.families import FAMILIES, WINDOW, build

import phoque
from phoque.data.chat_template import IGNORE_INDEX, EncodedChat
from phoque.data.packing import build_batch
from phoque.errors import PhoqueError
from phoque.inference import likelihood
from phoque.inference.generate import Request, generate_greedy, generate_replies
from phoque.inference.residual_stream import Turn, sum_residuals
from phoque.models.architectures import ARCHITECTURES, architecture_of
from phoque.models.config import load_config, max_conversation_tokens, sliding_window_of
from phoque.models.load import load_model
from phoque.models.lora import LoraOptions, add_lora_adapter
from phoque.models.source import Source
from phoque.training.engine import attention
from phoque.training.engine.engine import Engine
from phoque.training.engine.loss import add_token_loss

LENGTHS = (11, 30, 5)  # the second is longer than the windows
CPU = torch.device("cpu")


def source_of(folder):
    return Source("tiny", folder, "0", "test")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Each family's folder, built when it is first asked for."""
    root, folders = tmp_path_factory.mktemp("families"), {}

    def folder_of(family):
        if family not in folders:
            folders[family] = build(family, root / family.replace(" ", "-"))
        return folders[family]

    return folder_of


def adapted(folder, kernel):
    torch.manual_seed(3)
    model = add_lora_adapter(load_model(source_of(folder), "fp32", kernel, CPU), LoraOptions(rank=4, alpha=8))
    return randomize_lora(model, 0.1).train()


def conversations():
    drawn = torch.Generator().manual_seed(0)
    return [torch.randint(3, 250, (n,), generator=drawn).tolist() for n in LENGTHS]


def gradients_of(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def transformers_loss(folder):
    """The summed loss over conversations, each run alone by transformers' own model, and the adapter's gradients."""
    model = adapted(folder, "sdpa")
    total = torch.zeros(())
    for ids in conversations():
        logits = model(input_ids=torch.tensor([ids])).logits[0, :-1].float()
        total = total + torch.nn.functional.cross_entropy(logits, torch.tensor(ids[1:]), reduction="sum")
    total.backward()
    return total.item(), gradients_of(model)


def packed_loss(folder, kernel, with_engine):
    model = adapted(folder, kernel)
    add_token_loss(model.get_base_model(), Engine(model) if with_engine else None)
    batch = build_batch([EncodedChat(ids, [IGNORE_INDEX, *ids[1:]]) for ids in conversations()])
    loss = model(**batch, token_loss=True)
    loss.nll.backward()
    return loss.nll.item(), gradients_of(model)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_packed_row_gives_the_loss_and_gradients_of_its_conversations_alone(saved, family):
    folder = saved(family)
    expected, expected_gradients = transformers_loss(folder)
    variants = [("_sdpa_per_conversation", False, False)]
    if not architecture_of(load_config(source_of(folder))).no_engine:
        variants += [("_sdpa_per_conversation", False, True), ("_sdpa_with_mask", True, True)]
    for kernel, compiled, with_engine in variants:
        name, _ = attention.select_attention(CPU, load_config(source_of(folder)), torch.float32, 0, 100, compiled)
        loss, gradients = packed_loss(folder, name, with_engine)
        assert loss == pytest.approx(expected, rel=1e-5), kernel
        assert gradients.keys() == expected_gradients.keys() and len(gradients) >= 24
        for parameter, gradient in expected_gradients.items():
            assert (gradients[parameter] - gradient).norm() < 1e-4 * gradient.norm(), (kernel, parameter)


@pytest.mark.parametrize("family", FAMILIES)
def test_batched_decoding_gives_the_tokens_of_transformers(saved, family):
    model = load_model(source_of(saved(family)), "fp32", on=CPU).eval()
    model.generation_config.eos_token_id = None
    model.config.eos_token_id = None
    prompts = conversations()
    replies = generate_replies(model, [Request(ids) for ids in prompts], 16, temperature=1.0, top_p=1.0)
    for ids, reply in zip(prompts, replies, strict=True):
        assert reply.ids == generate_greedy(model, torch.tensor([ids]), 16, stops=False)


@pytest.mark.parametrize("family", ["lfm2", "qwen3.5", "gemma3"])
def test_rows_that_stop_early_leave_the_batch_and_the_others_go_on(saved, family):
    model = load_model(source_of(saved(family)), "fp32", on=CPU).eval()
    prompts = conversations() * 2
    alone = [generate_greedy(model, torch.tensor([ids]), 16, stops=False) for ids in prompts[:3]]
    # the first row stops at its third token, so that at most three quarters of the rows are left
    model.generation_config.eos_token_id = model.config.eos_token_id = [alone[0][2], alone[1][4]]
    ends = set(model.generation_config.eos_token_id)
    replies = generate_replies(model, [Request(ids) for ids in prompts], 16, temperature=1.0, top_p=1.0)
    for number, reply in enumerate(replies):
        tokens = alone[number % 3]
        stop = next((index for index, token in enumerate(tokens) if token in ends), len(tokens))
        assert reply.ids == tokens[:stop]


@pytest.mark.parametrize("family", [name for name, (_, changes, _) in FAMILIES.items() if "sliding_window" in changes])
def test_the_window_of_a_tiny_model_has_an_effect(saved, family):
    """Otherwise the tests above would pass with a window that is ignored."""
    if family == "ministral3":
        return
    config = load_config(source_of(saved(family))).get_text_config()
    assert sliding_window_of(config) == WINDOW < max(LENGTHS)
    assert max_conversation_tokens(config)[0] == config.max_position_embeddings
    model = load_model(source_of(saved(family)), "fp32", on=CPU).eval()
    ids = torch.tensor([conversations()[1]])
    changed = ids.clone()
    changed[0, 0] = 200
    one_layer = model.model.layers[:1]
    del model.model.layers[1:]
    assert len(one_layer) == 1
    with torch.no_grad():
        first, second = (model(input_ids=x).logits[0] for x in (ids, changed))
    has_window = getattr(config, "layer_types", None) is None or config.layer_types[0] == "sliding_attention"
    assert torch.equal(first[WINDOW:], second[WINDOW:]) == has_window


def test_every_model_type_is_tried():
    assert {model_type for model_type, _, _ in FAMILIES.values()} == ARCHITECTURES.keys() - {"mistral3"}


def test_a_model_that_is_not_dense_is_refused_with_what_it_has():
    from transformers import AutoConfig

    experts = AutoConfig.for_model("granitemoehybrid", num_local_experts=4)
    mamba = AutoConfig.for_model("granitemoehybrid", num_local_experts=0)
    for config, cause in ((experts, "4 experts per block"), (mamba, "Mamba")):
        with pytest.raises(PhoqueError) as caught:
            architecture_of(config)
        assert cause in caught.value.why


def test_nothing_outside_the_architectures_names_a_family():
    """Names, calls and strings count; comments and docstrings may explain with an example."""
    package = Path(phoque.__file__).parent
    # llama.cpp and what belongs to it (llama-server, llama_decode, libllama, Ollama) are programs
    program = r"(?<![wbo])llama(?![._-]?cpp|_|\.dll|-server|filetype| )"
    names = r"mistral|ministral(?!-3b)|pixtral|qwen|gemma|granite|olmo|phi3|smollm3|lfm2"
    family = re.compile(f"{program}|{names}", re.IGNORECASE)
    exempt = {package / "settings" / "presets.py"}  # presets have names, and each names its base model
    found = []
    for file in set(package.rglob("*.py")) - exempt:
        if (package / "models" / "architectures") in file.parents:
            continue
        tree = ast.parse(file.read_text())
        docstrings = {
            ast.get_docstring(node, clean=False)
            for node in ast.walk(tree)
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
        }
        for node in ast.walk(tree):
            name = getattr(node, "id", None) or getattr(node, "attr", None) or getattr(node, "module", None) or ""
            text = node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else ""
            if text not in docstrings and (match := family.search(f"{name} {text}")):
                found.append(f"{file.relative_to(package)}:{getattr(node, 'lineno', 0)} {match[0]}")
    assert found == [], "\n".join(found)


@pytest.mark.parametrize("family", FAMILIES)
def test_likelihoods_with_shared_prompts_are_those_of_rows_by_themselves(saved, family, monkeypatch):
    """Prompts and responses have several lengths; one prompt is a single token; one row is longer than the windows."""
    model = load_model(source_of(saved(family)), "fp32", on=CPU).eval()
    drawn = torch.Generator().manual_seed(0)
    ids = lambda n: torch.randint(3, 250, (n,), generator=drawn).tolist()
    prompts = [ids(3), ids(1), ids(4), ids(3)]
    short = [Turn(prompts[n % 4], ids(1 + n % 3)) for n in range(16)]
    shared = []
    long = [*short, *(Turn(prompts[2], ids(25)) for _ in range(2))]
    padded = [row for _ in range(4) for row in (Turn(prompts[0] * 2, ids(2)), Turn(prompts[0][:2], ids(6)))]  # 6 + 6
    for rows in (short, long, padded):
        alone = [value for row in rows for value in likelihood.mean_nll(model, [row])]
        run = Mock(side_effect=likelihood._run_with_shared_prompts)
        monkeypatch.setattr(likelihood, "_run_with_shared_prompts", run)
        monkeypatch.setitem(likelihood.TOKENS_AT_ONCE, "cpu", 40)  # several batches
        assert likelihood.mean_nll(model, rows) == pytest.approx(alone, abs=1e-4)
        monkeypatch.undo()
        shared.append(run.call_count)
    recurrent, window = architecture_of(model.config).is_recurrent, sliding_window_of(model.config.get_text_config())
    assert (shared[0] > 1) == (not recurrent)
    assert (shared[1] > 1) == (shared[2] > 0) == (not recurrent and not window)


def test_residual_means_are_those_of_transformers_hidden_states(saved):
    for family in ("gemma3", "granite", "lfm2", "qwen3.5"):
        model = load_model(source_of(saved(family)), "fp32", on=CPU).eval()
        rows = [Turn(ids[:4], ids[4:]) for ids in conversations()]
        response, _ = sum_residuals(model, rows, range(len(rows)), len(rows)).means()
        for number, ids in enumerate(conversations()):
            with torch.no_grad():
                states = model(input_ids=torch.tensor([ids]), output_hidden_states=True).hidden_states
            for block in range(len(model.model.layers) - 1):  # the last of hidden_states is after the final norm
                expected = states[block + 1][0, 4:]
                norms = expected.norm(dim=-1)
                if float(norms.max()) < 5 * float(norms.median()):  # nothing is left out as massive
                    torch.testing.assert_close(response[number, block], expected.mean(0), rtol=1e-4, atol=1e-4)
