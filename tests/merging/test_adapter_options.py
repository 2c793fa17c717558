"""`phoque merge` on every kind of adapter of peft: the logits of the live adapter, or a refusal with its reason."""

import dataclasses
import json
import os

import pytest
import torch
from hypothesis import HealthCheck, assume, event, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tests import tiny
from tests.merging.test_merge import randomize

from phoque.models.adapter_source import WEIGHTS

TOKENS = torch.tensor([[5, 9, 20, 33, 47, 60, 80, 3, 4]])
EXAMPLES = int(os.environ.get("PHOQUE_TEST_EXAMPLES", "25"))


def make_adapter(base, folder, vocabulary=None, **options):
    """A random adapter of peft, saved; the logits of the live adapter, and the model that holds it."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if vocabulary:
        model.resize_token_embeddings(vocabulary, mean_resizing=False)
    tuned = randomize(get_peft_model(model, LoraConfig(**({"task_type": "CAUSAL_LM"} | options)))).eval()
    tuned.save_pretrained(folder)
    with torch.no_grad():
        return tuned(TOKENS).logits, tuned


def merged_logits(folder):
    from transformers import AutoModelForCausalLM

    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()(TOKENS).logits


def merge_command(base, folder, *more):
    return ["merge", "--adapter-source", folder, "--base-model", base, "--output-dir", folder.with_name("out"), *more]


def rename(folder, edit):
    tensors = {edit(name): tensor for name, tensor in load_file(folder / WEIGHTS).items()}
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})


def in_embeddings(*names):
    return {"r": 4, "lora_alpha": 16, "target_modules": ["q_proj", *names]}


MERGED = {  # name: (is the base tied, options, new vocabulary, edit of the tensors' names)
    "head": (False, in_embeddings("lm_head"), None, None),
    "head of a tied base": (True, in_embeddings("lm_head"), None, None),
    "embeddings of a tied base": (True, in_embeddings("embed_tokens"), None, None),
    "DoRA on both": (False, in_embeddings("lm_head", "embed_tokens") | {"use_dora": True}, None, None),
    "both saved, tied": (True, in_embeddings() | {"modules_to_save": ["embed_tokens", "lm_head"]}, None, None),
    "tokens of a tied base": (True, in_embeddings() | {"trainable_token_indices": [3, 4]}, None, None),
    "resized, tied": (True, in_embeddings(), 324, None),
    "resized and saved": (False, in_embeddings() | {"modules_to_save": ["embed_tokens", "lm_head"]}, 324, None),
    "compiled": (True, in_embeddings(), None, lambda name: name.replace("model.model.", "model._orig_mod.model.")),
    "raw state dict of DoRA": (
        False,
        in_embeddings("lm_head") | {"use_dora": True},
        None,
        lambda name: name.replace("_A.w", "_A.default.w").replace("_vector", "_vector.default.weight"),
    ),
    "raw state dict": (True, in_embeddings(), None, lambda name: name.replace("_A.w", "_A.default.w")),
}


@pytest.mark.parametrize("kind", MERGED)
def test_it_computes_what_the_live_adapter_computes(phoque, tmp_path, kind):
    is_tied, options, vocabulary, edit = MERGED[kind]
    base = tiny.llama(tmp_path / "base", tie_word_embeddings=is_tied)
    wanted, tuned = make_adapter(base, tmp_path / "adapter", vocabulary, **options)
    if edit:
        rename(tmp_path / "adapter", edit)
    ran = phoque(*merge_command(base, tmp_path / "adapter", "--dtype", "fp32", "--json"))
    torch.testing.assert_close(merged_logits(tmp_path / "out"), wanted, rtol=0, atol=5e-6)
    assert ran.json["proof"]["holds"] and ran.json["proof"]["max_difference"] < 1e-3
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    head, embeddings = tuned.get_output_embeddings(), tuned.get_input_embeddings()
    assert config["vocab_size"] == (vocabulary or 320)
    separate = is_tied and (("base" in kind and "tokens" not in kind) or kind == "both saved, tied")
    assert ("lm_head.weight" in load_file(tmp_path / "out" / "model.safetensors")) == (not is_tied or separate)
    assert config["tie_word_embeddings"] == (is_tied and not separate), (head, embeddings)


REFUSED = {  # name: (options of peft, what the error names)
    "aLoRA": ({"alora_invocation_tokens": [5, 9]}, "alora_invocation_tokens"),
    "layers that repeat": ({"layer_replication": [[0, 2], [0, 2]]}, "layer_replication"),
    "PiSSA": ({"init_lora_weights": "pissa"}, "init_lora_weights pissa"),
    "a bias for layers without": ({"lora_bias": True}, "does not fit"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_has_no_merged_form_is_refused(phoque, tmp_path, tiny_llama, kind):
    options, words = REFUSED[kind]
    make_adapter(tiny_llama, tmp_path / "adapter", target_modules=["q_proj", "v_proj"], **options)
    error = phoque(*merge_command(tiny_llama, tmp_path / "adapter"), expect=2).error
    assert words in error[0] and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"peft_type": "IA3"}, "a IA3 adapter"),
        ({"harbour_gating": True}, "harbour_gating"),
        ({"use_dora": True}, "lora_magnitude_vector is missing"),
        ({"r": 8}, "config says 8"),
        ({"base_model_name_or_path": "harbour/seal-3b-unsloth-bnb-4bit"}, "--base-model harbour/seal-3b"),
        ({"base_model_name_or_path": "/content/outputs/base"}, "folder of another machine"),
    ],
)
def test_a_config_that_does_not_fit_is_refused(phoque, tmp_path, tiny_llama, config, words):
    make_adapter(tiny_llama, tmp_path / "adapter", r=4, target_modules=["q_proj", "v_proj"])
    file = tmp_path / "adapter" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | config))
    command = merge_command(tiny_llama, tmp_path / "adapter")
    if "base_model_name_or_path" in config:
        command = [part for part in command if part not in ("--base-model", tiny_llama)]
    error = phoque(*command, expect=2).error
    assert any(words in line for line in error), error
    assert not (tmp_path / "out").exists()


def test_empty_tensors_are_named(phoque, tmp_path, tiny_llama):
    make_adapter(tiny_llama, tmp_path / "adapter", target_modules=["q_proj"])
    file = tmp_path / "adapter" / WEIGHTS
    save_file({name: torch.zeros(0) for name in load_file(file)}, file, {"format": "pt"})
    assert "ZeRO-3" in phoque(*merge_command(tiny_llama, tmp_path / "adapter"), expect=2).error[1]


def test_a_tensor_of_an_unknown_kind_is_refused(phoque, tmp_path, tiny_llama):
    make_adapter(tiny_llama, tmp_path / "adapter", target_modules=["q_proj"])
    rename(
        tmp_path / "adapter", lambda name: name.replace("0.self_attn.q_proj.lora_A.weight", "0.self_attn.q_proj.gull")
    )
    error = phoque(*merge_command(tiny_llama, tmp_path / "adapter"), expect=2).error
    assert "effect on the weights is not known" in error[1] and not (tmp_path / "out").exists()


def test_a_vocabulary_that_was_resized_in_one_of_two_tied_matrices_is_refused(phoque, tmp_path, tiny_llama):
    options = in_embeddings() | {"modules_to_save": ["embed_tokens"]}
    _, tuned = make_adapter(tiny_llama, tmp_path / "adapter", 324, **options)
    tuned.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    error = phoque(*merge_command(tiny_llama, tmp_path / "adapter"), expect=2).error
    assert "only one of the two resized matrices" in error[0] and "save_embedding_layers" in error[2]


def test_every_option_of_peft_is_accounted_for():
    from peft import LoraConfig

    from phoque.merging.adapter_config import MERGED, REFUSED, WITHOUT_EFFECT

    options = {field.name for field in dataclasses.fields(LoraConfig)}
    assert options == {*MERGED, *REFUSED, *WITHOUT_EFFECT}


LAYERS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@st.composite
def lora_options(draw):
    """Options of LoraConfig at random, and whether the base is tied, has biases, and its vocabulary was resized."""
    targets = draw(st.lists(st.sampled_from([*LAYERS, "embed_tokens", "lm_head"]), min_size=1, max_size=5, unique=True))
    saved = draw(st.lists(st.sampled_from(["norm", "embed_tokens", "lm_head"]), max_size=2, unique=True))
    options = {
        "r": draw(st.integers(1, 6)),
        "lora_alpha": draw(st.integers(1, 32)),
        "target_modules": targets,
        "use_rslora": draw(st.booleans()),
        "use_dora": draw(st.booleans()),
        "bias": draw(st.sampled_from(["none", "all", "lora_only"])),
        "init_lora_weights": draw(st.sampled_from([True, "gaussian", "orthogonal"])),
        "rank_pattern": draw(st.dictionaries(st.sampled_from(targets), st.integers(1, 6), max_size=2)),
        "alpha_pattern": draw(st.dictionaries(st.sampled_from(targets), st.integers(1, 32), max_size=2)),
        "modules_to_save": [name for name in saved if name not in targets] or None,
        "ensure_weight_tying": draw(st.booleans()),
        "layers_to_transform": draw(st.sampled_from([None, [0], [1], [0, 1]])),
    }
    if draw(st.integers(0, 3)) == 0:
        indices = draw(st.lists(st.integers(0, 299), min_size=1, max_size=4, unique=True))
        names = draw(st.lists(st.sampled_from(["embed_tokens", "lm_head"]), max_size=2, unique=True))
        options["trainable_token_indices"] = dict.fromkeys(names, indices) if names else indices
    if draw(st.integers(0, 4)) == 0:
        options |= {"lora_bias": True, "use_dora": False, "target_modules": ["q_proj", "k_proj"]}
        options |= {"rank_pattern": {}, "alpha_pattern": {}}
    vocabulary = draw(st.sampled_from([None, None, None, 324, 300]))
    return draw(st.booleans()), draw(st.booleans()), vocabulary, options


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    root = tmp_path_factory.mktemp("bases")
    return {
        (tied, bias): tiny.llama(root / f"{tied}-{bias}", tie_word_embeddings=tied, attention_bias=bias)
        for tied in (True, False)
        for bias in (True, False)
    }


@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=[*HealthCheck], print_blob=True)
@given(asked=lora_options())
@pytest.mark.filterwarnings("ignore")
def test_random_options_are_merged_as_the_live_adapter_or_refused(bases, tmp_path_factory, asked):
    """Any difference from the live adapter is a fault; so is an error that is not a UsageError."""
    from phoque.errors import UsageError
    from phoque.merging.writer import write_merged
    from phoque.models.checkpoint_reader import CheckpointReader
    from phoque.models.source import Source

    is_tied, bias, vocabulary, options = asked
    root = tmp_path_factory.mktemp("case")
    base = bases[is_tied, bias]
    try:
        wanted, _ = make_adapter(base, root / "adapter", vocabulary, **options)
    except (ValueError, RuntimeError, KeyError, TypeError, AttributeError, IndexError, NotImplementedError) as error:
        event(f"peft: {type(error).__name__}")
        assume(False)
    reader = CheckpointReader(Source(str(base), base, "", ""))
    try:
        write_merged(reader, root / "adapter", root / "out", "fp32")
    except UsageError as error:
        event(f"refused: {error.why.rpartition(': ')[2]}")
        assert not (root / "out").exists() and "no such weight" not in error.why, error.why
        return
    got = merged_logits(root / "out")
    if vocabulary and not any(vocabulary in tensor.shape for tensor in load_file(root / "adapter" / WEIGHTS).values()):
        event("peft saved no resized embeddings")
        tokens = min(vocabulary, 320)
        got, wanted = got[..., :tokens], wanted[..., :tokens]
    torch.testing.assert_close(got, wanted, rtol=0, atol=2e-5)
