"""Broken exports, each named in words by verify-onnx, and sound ones that pass."""

import json
import re

import numpy as np
import onnx
import pytest
from tests.fakehub import TOKEN

DECODER = "onnx/model.onnx"
ENV = {"HF_TOKEN": TOKEN}
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"


def edit(folder, name, **changes):
    """Change a JSON file; None takes a key out."""
    held = json.loads((folder / name).read_text())
    for path, value in changes.items():
        at, keys = held, path.split("__")
        for key in keys[:-1]:
            at = at[key]
        if value is None:
            at.pop(keys[-1])
        else:
            at[keys[-1]] = value
    (folder / name).write_text(json.dumps(held))


def graph(folder, change, path=DECODER):
    model = onnx.load(str(folder / path), load_external_data=False)
    change(model)
    onnx.save(model, str(folder / path))


def external(model):
    return [t for t in model.graph.initializer if t.data_location == 1]


def entry(tensor, key):
    return next(e for e in tensor.external_data if e.key == key)


def relocate(folder, where):
    def change(model):
        for tensor in external(model):
            entry(tensor, "location").value = where

    graph(folder, change)


def cache_dim(folder, axis, name):
    def change(model):
        dim = next(v for v in model.graph.input if v.name == "past_key_values.1.key").type.tensor_type.shape.dim[axis]
        dim.Clear()
        dim.dim_param = name

    graph(folder, change)


def overlap(model):
    first, second = external(model)[:2]
    entry(second, "offset").value = entry(first, "offset").value


def operator(name, domain="com.microsoft"):
    def change(model):
        node = next(n for n in model.graph.node if n.op_type == "GroupQueryAttention")
        node.op_type, node.domain = name, domain
        if domain not in {o.domain for o in model.opset_import}:
            model.opset_import.append(onnx.helper.make_opsetid(domain, 1))

    return change


def newest(model):
    model.opset_import[0].version = 26


def an_input(model):
    model.graph.input.append(onnx.helper.make_tensor_value_info("token_type_ids", 7, [1, "n"]))


def shorter(path, share=0.5):
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])


def tokens(folder):
    edit(folder, "config.json", vocab_size=100)


TRAPS = {
    "no template for Transformers.js": (
        lambda f: edit(f, "tokenizer_config.json", chat_template=None),
        "no chat_template",
    ),
    "no template for transformers": (lambda f: (f / "chat_template.jinja").unlink(), "chat_template.jinja is missing"),
    "two templates": (lambda f: (f / "chat_template.jinja").write_text("{{ messages }}"), "different templates"),
    "a template that does not render": (
        lambda f: [
            edit(f, "tokenizer_config.json", chat_template="{{ gulls( }}"),
            (f / "chat_template.jinja").write_text("{{ gulls( }}"),
        ],
        "does not render",
    ),
    "a template without the user": (
        lambda f: [
            edit(f, "tokenizer_config.json", chat_template="hello"),
            (f / "chat_template.jinja").write_text("hello"),
        ],
        "omits the user's message",
    ),
    "broken JSON": (lambda f: (f / "generation_config.json").write_text("{"), "generation_config.json is not JSON"),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), "tokenizer.json is missing"),
    "a broken tokenizer": (lambda f: (f / "tokenizer.json").write_text('{"version": "1.0"}'), "does not load"),
    "more tokens than rows": (tokens, "the tokenizer has"),
    "no end": (lambda f: edit(f, "generation_config.json", eos_token_id=None), "would never end"),
    "an unknown architecture": (lambda f: edit(f, "config.json", model_type="gullformer"), "gullformer"),
    "another class": (lambda f: edit(f, "config.json", architectures=["LlamaModel"]), "LlamaForCausalLM"),
    "a default that is not there": (
        lambda f: edit(f, "config.json", **{"transformers.js_config__dtype": "fp16"}),
        "model_fp16.onnx, which is",
    ),
    "no default, so q8 on wasm": (
        lambda f: edit(f, "config.json", **{"transformers.js_config__dtype": None}),
        "model_quantized.onnx, which is",
    ),
    "undeclared external data": (
        lambda f: edit(f, "config.json", **{"transformers.js_config__use_external_data_format": {}}),
        "declares 0",
    ),
    "misnamed external data": (lambda f: relocate(f, "model.onnx.data"), "looks for model.onnx_data"),
    "external data elsewhere": (lambda f: relocate(f, "../model.onnx_data"), "not a plain file name"),
    "missing external data": (lambda f: (f / "onnx/model.onnx_data").unlink(), "model.onnx_data is missing"),
    "a chunk cut short": (lambda f: shorter(f / "onnx/model.onnx_data"), "cut short"),
    "a stray chunk": (lambda f: (f / "onnx/model.onnx_data_7").write_bytes(b"gull"), "belongs to no graph"),
    "two weights on the same bytes": (lambda f: graph(f, overlap), "same bytes"),
    "a graph cut short": (lambda f: shorter(f / DECODER), "not an ONNX file"),
    "a pointer of Git LFS": (lambda f: (f / "onnx/model.onnx_data").write_text(POINTER), "Git LFS pointer"),
    "an empty file": (lambda f: (f / DECODER).write_bytes(b""), "is empty"),
    "a symbolic head size": (lambda f: cache_dim(f, 3, "head_dim"), "head size 'head_dim'"),
    "symbolic heads": (lambda f: cache_dim(f, 1, "heads"), "heads 'heads'"),
    "a batch by another name": (lambda f: cache_dim(f, 0, "batch"), "batch size 'batch'"),
    "a layer too few": (lambda f: edit(f, "config.json", num_hidden_layers=5), "5 layers"),
    "an operator without a kernel on wasm": (
        lambda f: graph(f, operator("GatherBlockQuantized")),
        "GatherBlockQuantized has no kernel on wasm",
    ),
    "an operator of nobody": (lambda f: graph(f, operator("Gull", "harbour")), "'harbour'"),
    "an opset of the future": (lambda f: graph(f, newest), "opset 26"),
    "an input that nobody feeds": (lambda f: graph(f, an_input), "token_type_ids"),
    "another rope theta": (lambda f: edit(f, "config.json", rope_parameters__rope_theta=500.0), "rope theta"),
    "a weight changed after the export": (
        lambda f: flip(f / "onnx/model_q4.onnx_data"),
        "is not the file that was exported",
    ),
}


def flip(path):
    content = bytearray(path.read_bytes())
    content[100] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("trap", TRAPS)
def test_a_trap_is_named_in_words(phoque, broken_text, trap):
    spring, words = TRAPS[trap]
    spring(broken_text)
    ran = phoque("verify-onnx", "--local-dir", broken_text, "--level", "graph", "--json", expect=1)
    said = [check["said"] for check in ran.json["checks"] if check["result"] == "FAIL"]
    assert ran.json["verdict"] == "FAIL" and any(words in text for text in said), said
    assert "Traceback" not in ran.err


SEEING = {
    "no preprocessor": (lambda f: (f / "preprocessor_config.json").unlink(), "preprocessor_config.json is missing"),
    "a patch size with two sides": (
        lambda f: edit(f, "preprocessor_config.json", patch_size={"height": 14, "width": 14}),
        "needs a number",
    ),
    "no image token": (lambda f: edit(f, "processor_config.json", image_token=None), "image_token"),
    "a session of a precision is missing": (
        lambda f: (f / "onnx/vision_encoder_quantized.onnx").unlink(),
        "vision_encoder_quantized.onnx is missing",
    ),
}


@pytest.mark.parametrize("trap", SEEING)
def test_so_is_one_about_images(phoque, broken_seeing, trap):
    spring, words = SEEING[trap]
    spring(broken_seeing)
    ran = phoque("verify-onnx", "--local-dir", broken_seeing, "--level", "files", "--json", expect=1)
    said = [check["said"] for check in ran.json["checks"] if check["result"] == "FAIL"]
    assert any(words in text for text in said), said


def rewrite(folder, change):
    """Change weights in place, as floats; what the export remembers of its files goes."""
    (folder / "export.json").unlink()
    model = onnx.load(str(folder / DECODER), load_external_data=False)
    content = bytearray((folder / "onnx/model.onnx_data").read_bytes())
    held = {}
    for tensor in external(model):
        start, size = int(entry(tensor, "offset").value), int(entry(tensor, "length").value)
        held[tensor.name] = np.frombuffer(content, np.float32, size // 4, start)
    change({name: array for name, array in held.items() if array.flags.writeable})
    (folder / "onnx/model.onnx_data").write_bytes(content)


def swap(held):
    first, second = (held[f"model.layers.{n}.mlp.down_proj.weight.filled"] for n in (1, 2))
    first[:], second[:] = second.copy(), first.copy()


def damage(held):
    held[next(n for n in sorted(held) if "down_proj" in n)][5] = np.nan


@pytest.mark.parametrize(("change", "words"), [(swap, "other weights"), (damage, "NaN")])
def test_weights_that_only_running_shows(phoque, broken_text, text_model, change, words):
    rewrite(broken_text, change)
    ran = phoque(
        "verify-onnx",
        "--local-dir",
        broken_text,
        "--level",
        "ort",
        "--dtype",
        "fp32",
        "--reference",
        text_model,
        "--json",
        expect=1,
    )
    assert ran.json["levels"]["files"] == ran.json["levels"]["graph"] == "PASS"
    said = [check["said"] for check in ran.json["checks"] if check["result"] == "FAIL"]
    assert any(words in text for text in said), said


def test_a_model_of_another_rope_theta_is_found_by_its_reference(phoque, broken_text, text_model, tmp_path):
    import shutil

    other = shutil.copytree(text_model, tmp_path / "other")
    edit(other, "config.json", rope_parameters__rope_theta=300.0)
    ran = phoque(
        "verify-onnx",
        "--local-dir",
        broken_text,
        "--level",
        "ort",
        "--dtype",
        "fp32",
        "--reference",
        other,
        "--json",
        expect=1,
    )
    assert ran.json["levels"]["ort"] == "FAIL"


def test_sound_exports_pass_beside_their_models(phoque, text_export, text_model, seeing_export, seeing_model, tmp_path):
    for (folder, _), model in ((text_export, text_model), (seeing_export, seeing_model)):
        ran = phoque(
            "verify-onnx",
            "--local-dir",
            folder,
            "--level",
            "ort",
            "--reference",
            model,
            "--report-md",
            tmp_path / "report.md",
            "--json",
        )
        assert ran.json["verdict"] == "PASS"
        assert ran.json["levels"] == {
            "files": "PASS",
            "graph": "PASS",
            "ort": "PASS",
            "node": "NOT RUN",
            "browser": "NOT RUN",
        }
        assert ran.json["numbers"]["fp32"]["equal_tokens"] == ran.json["numbers"]["fp32"]["tokens"] == 128
        report = (tmp_path / "report.md").read_text()
        assert "| ort | PASS |" in report and "| browser | NOT RUN |" in report


def test_what_did_not_run_is_never_called_good(phoque, text_export):
    ran = phoque("verify-onnx", "--local-dir", text_export[0], env={"PATH": "/nowhere"})
    assert "NOT RUN" in ran.out and "there is no Node.js" in ran.out and "node NOT RUN" in ran.out
    assert "PASS     node" not in ran.out


def test_a_level_that_was_asked_for_and_did_not_run_is_no_pass(phoque, text_export):
    asked = ["verify-onnx", "--local-dir", text_export[0]]
    ran = phoque(*asked, "--level", "node", "--json", env={"PATH": "/nowhere"}, expect=1)
    assert ran.json["verdict"] == ran.json["levels"]["node"] == "NOT RUN"
    error = phoque(*asked, "--level", "graph", "--dtype", "q4f16", expect=2).error
    assert "has no q4f16" in error[0] and "fp32" in error[1]


def test_a_dry_run_finds_the_export_and_says_where_settings_come_from(phoque, text_export):
    out = phoque("verify-onnx", "--local-dir", text_export[0], "--dry-run", "--verbose").out
    assert f"name: {text_export[0].name}" in out and re.search(r"--port +8017 +\(from default\)", out)
    phoque("verify-onnx", "--local-dir", "nowhere", "--dry-run", expect=2)


def test_on_the_hub_no_weight_is_fetched_for_the_first_levels(phoque, hub, text_export, monkeypatch):
    monkeypatch.setattr("tests.fakehub.store.LFS", (".onnx_data", ".onnx"))  # as the Hub keeps what has 10 MB or more
    folder = text_export[0]
    files = {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}
    hub.add("models", "harbour/seal-onnx", files)
    ran = phoque("verify-onnx", "--repo-id", "harbour/seal-onnx", "--level", "graph", "--json", env=ENV)
    assert ran.json["verdict"] == "PASS" and ran.json["levels"]["ort"] == "NOT RUN"
    fetched = [path for command, path in hub.log if command == "GET" and "resolve" in path]
    assert fetched and not any("onnx_data" in path for path in fetched)
    ran = phoque("verify-onnx", "--repo-id", "harbour/seal-onnx", "--level", "ort", "--json", env=ENV)
    assert ran.json["verdict"] == "PASS" and ran.json["levels"]["ort"] == "PASS"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "Exactly one of --repo-id and --local-dir"),
        (["--local-dir", "nowhere"], "There is no folder"),
        (["--local-dir", ".", "--repo-id", "a/b"], "Exactly one"),
        (["--repo-id", "not an id"], "--repo-id"),
        (["--repo-id", "harbour/none"], "No such repository"),
    ],
)
def test_what_cannot_be_verified_is_said(phoque, hub, arguments, words):
    assert words in " ".join(phoque("verify-onnx", *arguments, expect=2).error)


def test_an_empty_folder_fails_without_a_crash(phoque, tmp_path):
    (tmp_path / "empty").mkdir()
    ran = phoque("verify-onnx", "--local-dir", tmp_path / "empty", expect=1)
    assert "config.json is missing" in ran.out and "Traceback" not in ran.err
