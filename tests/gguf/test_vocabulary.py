"""Tokenizers of real models split texts in llama.cpp as they do in transformers."""

import json

import pytest

from phoque.errors import UsageError
from phoque.gguf.llama_cpp import Vocabulary
from phoque.gguf.vocabulary import (
    MARKED_TEXTS,
    GgufVocabulary,
    PreTokenizer,
    _write_vocabulary_file,
    find_pre_tokenizer,
    read_vocabulary,
)
from tests import tiny
from tests.gguf.conftest import LLAMA3, add_merges

CHAT = "<s>[INST]Qu'est-ce que les mouettes veulent, 12345 harengs?\n[/INST]Hrmph — 🦭 tide's out.</s>"


def test_ministrals_tokens_are_llama_cpps(llama_cpp, tmp_path):
    """But for combining marks: llama.cpp's rules for tekken have no place for them."""
    tokenizer = tiny.tekken()
    vocabulary = read_vocabulary(tokenizer, len(tokenizer), tokenizer.eos_token_id)
    assert find_pre_tokenizer(vocabulary, tokenizer, llama_cpp, tmp_path) == PreTokenizer("tekken", None, True)
    _write_vocabulary_file(tmp_path / "v.gguf", vocabulary, "tekken", None)
    with Vocabulary(llama_cpp, tmp_path / "v.gguf") as loaded:
        assert loaded.tokenize(CHAT) == tokenizer(CHAT, add_special_tokens=False)["input_ids"]
        assert loaded.tokenize(MARKED_TEXTS[0]) != tokenizer(MARKED_TEXTS[0], add_special_tokens=False)["input_ids"]


def sentencepiece_tokenizer(legacy: bool):
    """A tokenizer in the style of Llama 2 (a space before every text) or Gemma (none)."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers
    from transformers import PreTrainedTokenizerFast

    control, letters = ["<unk>", "<s>", "</s>"], sorted({*"The seal's herring: 1234567890,.;()gulnotdA-zqx▁"})
    merges = [("▁", "T"), ("h", "e"), ("▁T", "he"), ("▁", "s"), ("e", "a"), ("ea", "l"), ("▁s", "eal"), ("▁", "h")]
    pieces = [*control, *(f"<0x{byte:02X}>" for byte in range(256)), *("".join(pair) for pair in merges), *letters]
    vocabulary = {piece: index for index, piece in enumerate(dict.fromkeys(pieces))}
    core = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    steps = [normalizers.Replace(" ", "▁")]
    core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), *steps] if legacy else steps)
    core.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    core.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in control])
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


@pytest.mark.parametrize("legacy", [True, False])
def test_sentencepiece_tokens_are_llama_cpps(legacy, llama_cpp, tmp_path):
    tokenizer = sentencepiece_tokenizer(legacy)
    vocabulary = read_vocabulary(tokenizer, len(tokenizer) + 5, tokenizer.eos_token_id)
    pre = find_pre_tokenizer(vocabulary, tokenizer, llama_cpp, tmp_path)
    assert pre.space_prefix is legacy and vocabulary.model == "llama" and len(vocabulary.tokens) == len(tokenizer) + 5


def test_a_tokenizer_that_llama_cpp_does_not_have_is_refused(llama_cpp, tmp_path):
    folder = add_merges(tiny.llama(tmp_path / "m"), LLAMA3.replace(r"\p{L}+", r"\p{L}{1,2}"))
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    vocabulary = read_vocabulary(tokenizer, 320, tokenizer.eos_token_id)
    with pytest.raises(UsageError) as caught:
        find_pre_tokenizer(vocabulary, tokenizer, llama_cpp, tmp_path)
    assert "cannot split texts" in caught.value.what


def test_a_unigram_tokenizer_and_one_with_too_many_tokens_are_refused(tmp_path):
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    unigram = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.Unigram([("a", 0.0), ("b", -1.0)], unk_id=0)))
    with pytest.raises(UsageError) as caught:
        read_vocabulary(unigram, 2, 0)
    assert "Unigram" in caught.value.why
    with pytest.raises(UsageError) as caught:
        read_vocabulary(tiny.tokenizer(), 20, 2)
    assert "more tokens" in caught.value.what


def test_an_empty_vocabulary_is_refused_with_llama_cpps_reason(llama_cpp, tmp_path):
    vocabulary = GgufVocabulary("gpt2", ["a"], [1])
    with pytest.raises(UsageError) as caught:
        find_pre_tokenizer(vocabulary, tiny.tokenizer(), llama_cpp, tmp_path)
    assert "merges" in caught.value.why


def test_the_trial_texts_are_in_composed_form():
    """Qwen's tokenizers compose characters, and llama.cpp does not."""
    import unicodedata

    from phoque.gguf.vocabulary import TRIAL_TEXTS

    assert all(unicodedata.is_normalized("NFC", text) for text in TRIAL_TEXTS)
    assert len(json.dumps(TRIAL_TEXTS)) > 500
