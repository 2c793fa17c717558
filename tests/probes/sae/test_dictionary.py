"""Dictionaries beside sae-lens itself: read as it reads them, written as it loads them, trained by it and resumed."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from phoque.errors import PhoqueError
from phoque.probes.sae import training
from phoque.probes.sae.activation_store import ActivationStore
from phoque.probes.sae.dictionary import calibrate_threshold, read_dictionary, write_dictionary
from phoque.probes.sae.training import ARCHITECTURES, Recipe, train_dictionary

HIDDEN, FEATURES, K = 24, 96, 6


def save_sae_lens_dictionary(folder, kind, **changes):
    """An autoencoder that sae-lens has made and saved, its weights drawn so that nothing is zero by chance."""
    from sae_lens import SAE
    from sae_lens.registry import get_sae_class

    sae_class, config_class = get_sae_class(kind)
    options = {"k": K} if kind == "topk" else {}
    torch.manual_seed(3)
    sae = sae_class(config_class(d_in=HIDDEN, d_sae=FEATURES, **options | changes))
    for name, parameter in sae.named_parameters():
        parameter.data = torch.randn_like(parameter) * 0.3
        if name == "threshold":
            parameter.data = parameter.data.abs()
    sae.save_model(folder)
    return SAE.load_from_disk(folder)


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("standard", {}),
        ("standard", {"apply_b_dec_to_input": False}),
        ("jumprelu", {}),
        ("topk", {}),
        ("topk", {"rescale_acts_by_decoder_norm": True}),
    ],
)
def test_what_is_read_is_what_sae_lens_reads(tmp_path, kind, changes):
    theirs, ours = save_sae_lens_dictionary(tmp_path, kind, **changes), read_dictionary(tmp_path)
    x = torch.randn(50, HIDDEN, generator=torch.Generator().manual_seed(1)) * 2
    with torch.no_grad():
        z = theirs.encode(x)
        made = theirs.decode(z)
    assert (z > 0).any() and (z == 0).any()
    torch.testing.assert_close(ours.encode(x), z, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(ours.decode(ours.encode(x)), made, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"architecture": "gated"}, "architecture is gated"),
        ({"normalize_activations": "layer_norm"}, "normalize_activations is layer_norm"),
        ({"reshape_activations": "hook_z"}, "reshape_activations is hook_z"),
    ],
)
def test_what_would_be_read_wrongly_is_refused(tmp_path, config, said):
    save_sae_lens_dictionary(tmp_path, "standard")
    path = tmp_path / "cfg.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    with pytest.raises(PhoqueError) as error:
        read_dictionary(tmp_path)
    assert said in error.value.why


def test_files_that_are_missing_or_broken_are_refused(tmp_path):
    with pytest.raises(PhoqueError, match="not a sparse autoencoder"):
        read_dictionary(tmp_path)
    save_sae_lens_dictionary(tmp_path, "standard")
    (tmp_path / "cfg.json").write_text("{")
    with pytest.raises(PhoqueError, match="cannot be read"):
        read_dictionary(tmp_path)


@pytest.mark.parametrize(
    ("name", "block"),
    [
        ("model.layers.9", 9),
        ("model.language_model.layers.13", 13),
        ("blocks.7.hook_resid_post", 7),
        ("blocks.7.hook_resid_pre", 6),
        ("blocks.7.hook_mlp_out", None),
        ("", None),
    ],
)
def test_the_block_is_read_from_the_hooks_name(tmp_path, name, block):
    save_sae_lens_dictionary(tmp_path, "standard")
    path = tmp_path / "cfg.json"
    config = json.loads(path.read_text())
    config["metadata"]["hook_name"] = name
    path.write_text(json.dumps(config))
    assert read_dictionary(tmp_path).block_index() == block


def test_the_threshold_lets_k_features_a_token_through(tmp_path):
    save_sae_lens_dictionary(tmp_path, "jumprelu")
    found = read_dictionary(tmp_path)
    x = torch.randn(3000, HIDDEN, generator=torch.Generator().manual_seed(1)) * 2
    for k in (1, K, 20):
        active = (calibrate_threshold(found, x, k).encode(x) > 0).sum(1).float().mean()
        assert float(active) == pytest.approx(k, abs=0.01)


@pytest.fixture(scope="module")
def sparse_activations(tmp_path_factory):
    """Activations that are sparse sums of known directions beside an offset, as a dictionary wants them."""
    folder = tmp_path_factory.mktemp("shards")
    chance = torch.Generator().manual_seed(8)
    directions = torch.nn.functional.normalize(torch.randn(48, HIDDEN, generator=chance), dim=1)
    for n in range(4):
        on = torch.rand(2000, 48, generator=chance) < 0.08
        x = (on * (1 + torch.rand(2000, 48, generator=chance))) @ directions * 10 + 5
        save_file({"2": x.bfloat16()}, folder / f"{n:06}.safetensors", {"kept": "2000"})
    return ActivationStore(folder, (2,))


def make_recipe(architecture="batchtopk", seed=0, passes=6):
    return Recipe(architecture, FEATURES, K, 64, passes, 3e-3, seed)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.thorough
def test_every_architecture_learns_and_is_loaded_by_sae_lens(sparse_activations, tmp_path, architecture):
    from sae_lens import SAE

    made = train_dictionary(
        make_recipe(architecture),
        sparse_activations,
        2,
        metadata={"model_name": "gull", "hook_name": "model.layers.2"},
        folder=tmp_path,
        on=torch.device("cpu"),
    )
    x = sparse_activations.tensor(sparse_activations.files()[0], 2).float()
    z = made.encode(x)
    explained = 1 - (x - made.decode(z)).square().sum() / (x - x.mean(0)).square().sum()
    assert explained > 0.5 and K / 2 <= float((z > 0).sum(1).float().mean()) <= 2 * K
    theirs = SAE.load_from_disk(tmp_path / "sae")
    with torch.no_grad():
        torch.testing.assert_close(theirs.encode(x), z, atol=1e-3, rtol=1e-4)
    assert theirs.cfg.metadata.hook_name == "model.layers.2" and made.block_index() == 2
    assert sorted(f.name for f in (tmp_path / "sae").iterdir()) == ["cfg.json", "sae_weights.safetensors"]
    assert not list(tmp_path.glob("step-*"))


def test_the_largest_of_a_batch_are_those_of_sae_lens_and_so_is_their_gradient():
    from sae_lens.saes.batchtopk_sae import BatchTopK

    drives = torch.randn(70, FEATURES, generator=torch.Generator().manual_seed(6)) - 1.0
    found = []
    for module in (BatchTopK(K), training.CpuBatchTopK(K)):
        x = drives.clone().requires_grad_()
        z = module(x)
        (z**2).sum().backward()
        found.append((z.detach(), x.grad))
    for ours, theirs in zip(*found, strict=True):
        assert torch.equal(ours, theirs) and int((ours > 0).sum()) == K * 70


def test_a_killed_training_ends_as_one_that_was_not(sparse_activations, tmp_path, monkeypatch):
    def train(folder, stop=None):
        def show(done, _):
            if done == stop:
                raise KeyboardInterrupt

        train_dictionary(
            make_recipe(passes=2), sparse_activations, 2, metadata={}, folder=folder, on=torch.device("cpu"), show=show
        )
        return load_file(folder / "sae" / "sae_weights.safetensors")

    whole = train(tmp_path / "whole")
    monkeypatch.setattr(training, "CHECKPOINT_S", 0.0)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "killed", stop=150)
    assert [f.name for f in (tmp_path / "killed").glob("step-*")] == ["step-000000149"]
    again = train(tmp_path / "killed")
    assert all(torch.equal(tensor, again[name]) for name, tensor in whole.items())


def test_a_dictionary_that_is_there_is_not_trained_again(sparse_activations, tmp_path, monkeypatch):
    first = train_dictionary(
        make_recipe(passes=1), sparse_activations, 2, metadata={}, folder=tmp_path, on=torch.device("cpu")
    )
    monkeypatch.setattr(training, "make_trainer", None)
    again = train_dictionary(
        make_recipe(passes=1), sparse_activations, 2, metadata={}, folder=tmp_path, on=torch.device("cpu")
    )
    assert torch.equal(first.encoder, again.encoder)


def test_another_seed_is_another_dictionary(sparse_activations, tmp_path):
    one, other = (
        train_dictionary(
            make_recipe(seed=n, passes=1),
            sparse_activations,
            2,
            metadata={},
            folder=tmp_path / str(n),
            on=torch.device("cpu"),
        )
        for n in (0, 1)
    )
    assert not torch.allclose(one.encoder, other.encoder)


def test_too_few_activations_are_an_error_in_words(sparse_activations, tmp_path):
    with pytest.raises(PhoqueError, match="too few activations"):
        train_dictionary(
            Recipe("batchtopk", FEATURES, K, 100_000, 1, 1e-3, 0),
            sparse_activations,
            2,
            metadata={},
            folder=tmp_path,
            on=torch.device("cpu"),
        )


def test_a_loss_that_is_not_finite_stops_the_training(sparse_activations, tmp_path):
    with pytest.raises(PhoqueError, match="not finite"):
        train_dictionary(
            Recipe("batchtopk", FEATURES, K, 64, 1, 1e30, 0),
            sparse_activations,
            2,
            metadata={},
            folder=tmp_path,
            on=torch.device("cpu"),
        )


def test_what_is_written_is_read_back(tmp_path):
    save_sae_lens_dictionary(tmp_path / "one", "jumprelu")
    found = read_dictionary(tmp_path / "one")
    write_dictionary(found, tmp_path / "two")
    assert torch.equal(read_dictionary(tmp_path / "two").threshold, found.threshold)


def test_a_difference_sae_finds_planted_directions_and_nothing_in_no_difference():
    from phoque.probes.sae.difference_sae import fit_differences

    chance = torch.Generator().manual_seed(0)
    planted = torch.nn.functional.normalize(torch.randn(3, 48, generator=chance), dim=1)
    owners = torch.arange(1200) % 4  # the tokens of the fourth group differ in nothing but noise
    rows = 0.1 * torch.randn(1200, 48, generator=chance)
    for n in range(3):
        rows[owners == n] += 4.0 * planted[n]
    dictionary = fit_differences(rows, 16, 0, torch.device("cpu"))
    cosines = torch.nn.functional.normalize(dictionary.decoder, dim=1) @ planted.T
    values, found = cosines.max(0)
    assert (values > 0.8).all() and len(set(found.tolist())) == 3
    rebuilt = dictionary.decode(dictionary.encode(rows)) @ planted.T
    for n in range(3):  # found where it was planted, with the strength that was planted
        assert (
            rebuilt[owners == n, n].mean() == pytest.approx(4.0, rel=0.1) and rebuilt[owners == 3, n].abs().mean() < 0.4
        )
    assert not dictionary.encode(torch.zeros(4, 48)).any()
    assert not dictionary.decode(torch.zeros(1, 16)).any()
