"""Activation shards: which tokens are in them, a killed run that goes on, and the stream that is made of them."""

import pytest
import torch

from phoque.inference.residual_stream import MASSIVE, get_blocks
from phoque.probes.sae import activation_store
from phoque.probes.sae.activation_store import ActivationStore, ActivationStream, collect_activations, group_rows

SPECIAL = [0, 1, 2]


@pytest.fixture(scope="module")
def model(tiny_llama):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(tiny_llama).eval()


@pytest.fixture(scope="module")
def rows():
    chance = torch.Generator().manual_seed(3)
    return [torch.randint(1, 250, (int(n),), generator=chance).tolist() for n in torch.arange(5, 45)]


def hidden_states_of(model, row, layer):
    """The outputs of a block by transformers' own list; the last of it has been through the norm, so never asked."""
    with torch.no_grad():
        return model(torch.tensor([row]), output_hidden_states=True).hidden_states[layer + 1][0]


def test_shards_hold_every_ordinary_token_and_no_other(model, rows, tmp_path):
    shards = collect_activations(model, rows, (0,), special=SPECIAL, folder=tmp_path)
    held = torch.cat([shards.tensor(file, 0) for file in shards.files()]).float()
    wanted = []
    for row in rows:
        states = hidden_states_of(model, row, 0)[1:]
        assert float(states.norm(dim=1).max()) < MASSIVE * float(states.norm(dim=1).median())  # none is massive here
        wanted.append(states[[token not in SPECIAL for token in row[1:]]])
    wanted = torch.cat(wanted)
    assert held.shape == wanted.shape
    torch.testing.assert_close(held.sort(0).values, wanted.sort(0).values, atol=2e-2, rtol=1e-2)  # kept in bf16
    special = sum(token in SPECIAL for row in rows for token in row[1:])
    assert special and shards.token_counts() == {
        "kept": len(wanted),
        "position_0": len(rows),
        "massive": 0,
        "special": special,
    }


def test_massive_tokens_are_left_out_and_counted(model, rows, tmp_path):
    def swell(_, __, out):
        out = out.clone()
        out[:, 3] *= 100
        return out

    hook = get_blocks(model)[0].register_forward_hook(swell)
    try:
        found = collect_activations(model, [[5] * 20] * 6, (0,), special=SPECIAL, folder=tmp_path).token_counts()
    finally:
        hook.remove()
    assert found == {"kept": 6 * 18, "position_0": 6, "massive": 6, "special": 0}


def test_blocks_above_are_not_run_and_are_there_again_afterwards(model, rows, tmp_path):
    calls = []
    hook = get_blocks(model)[1].register_forward_hook(lambda *_: calls.append(1))
    whole = len(get_blocks(model))
    collect_activations(model, rows, (0,), special=SPECIAL, folder=tmp_path / "one")
    assert not calls and len(get_blocks(model)) == whole
    both = collect_activations(model, rows, (0, 1), special=SPECIAL, folder=tmp_path / "two")
    hook.remove()
    assert calls and both.shard_sizes(0) == both.shard_sizes(1)


def test_a_collection_that_was_killed_goes_on_without_reading_again(model, rows, tmp_path, monkeypatch):
    monkeypatch.setattr(activation_store, "SHARD_TOKENS", 100)
    whole = collect_activations(model, rows, (0,), special=SPECIAL, folder=tmp_path / "whole")
    part = collect_activations(model, rows, (0,), special=SPECIAL, folder=tmp_path / "part")
    lost = part.files()[2:5]
    kept = {file: file.stat().st_mtime_ns for file in part.files() if file not in lost}
    for file in lost:
        file.unlink()
    (tmp_path / "part" / ".000003.safetensors.17").write_bytes(b"half")  # what a killed writer leaves
    seen = []
    again = collect_activations(
        model, rows, (0,), special=SPECIAL, folder=tmp_path / "part", show=lambda done, _: seen.append(done)
    )
    assert {file: file.stat().st_mtime_ns for file in kept} == kept and seen[-1] == len(rows)
    assert len(again.files()) == len(whole.files())
    for one, other in zip(again.files(), whole.files(), strict=True):
        assert torch.equal(again.tensor(one, 0), whole.tensor(other, 0))


def test_a_disk_that_fails_is_an_error_and_leaves_no_half_shard(model, rows, tmp_path, monkeypatch):
    monkeypatch.setattr(activation_store, "SHARD_TOKENS", 100)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(activation_store, "save_file", full)
    with pytest.raises(OSError, match="No space"):
        collect_activations(model, rows, (0,), special=SPECIAL, folder=tmp_path)
    assert not list(tmp_path.glob("0*"))


def store_of_numbers(folder, sizes):
    """Shards whose tokens are numbers, so that each can be told apart."""
    from safetensors.torch import save_file

    start = 0
    for n, size in enumerate(sizes):
        save_file(
            {"0": torch.arange(start, start + size).float()[:, None]}, folder / f"{n:06}.safetensors", {"kept": "1"}
        )
        start += size
    return ActivationStore(folder, (0,))


def test_every_pass_sees_tokens_once_in_a_new_order_and_a_stream_can_be_begun_anywhere(tmp_path):
    stream = ActivationStream(store_of_numbers(tmp_path, [40, 25, 33, 50, 7, 61, 20, 44, 38, 12]), 0, 16, 3, seed=4)
    seen = [batch[:, 0].tolist() for batch in stream.iter_batches(torch.device("cpu"))]
    assert len(seen) == stream.count_batches() and {len(batch) for batch in seen} == {16}
    each = stream.count_batches() // 3
    for n in range(3):
        own = [token for batch in seen[n * each : (n + 1) * each] for token in batch]
        assert len(set(own)) == len(own) and 330 - len(own) < 2 * 16  # what fills no batch waits for another pass
    assert seen[:each] != seen[each : 2 * each]
    for skip in (1, each, len(seen) - 1):
        assert [b[:, 0].tolist() for b in stream.iter_batches(torch.device("cpu"), skip)] == seen[skip:]
    other = ActivationStream(stream.store, 0, 16, 3, seed=5)
    assert next(other.iter_batches(torch.device("cpu")))[:, 0].tolist() != seen[0]


def test_rows_are_grouped_in_order():
    assert group_rows([5, 5, 5, 20, 1], 10) == [[0, 1], [2], [3], [4]]
