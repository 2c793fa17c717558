"""A tokenizer as llama.cpp stores it, and the name of llama.cpp's pre-tokenizer that splits texts in the same way.

llama.cpp has the pre-tokenizers' rules in its code, under names. Its converter knows a name by a hash of the tokens of
one text; here each name is tried in llama.cpp itself, and the first that gives the tokenizer's own tokens is taken.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gguf import GGUFWriter, TokenType

from phoque.errors import UsageError
from phoque.gguf.llama_cpp import Library, Vocabulary
from phoque.models.architectures.llama_cpp_names import (
    ANY_ARCHITECTURE,
    BYTE_LEVEL,
    PRE_TOKENIZERS,
    SENTENCEPIECE,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SPACE = "\u2581"  # what SentencePiece writes for a space
# what pre-tokenizers treat differently: digits, contractions, quotes before words, white space, scripts, emoji
TRIAL_TEXTS = (
    "The seal's herring: 1 12 123 1234 12345 1,234.56; they're, THEY'RE, we'Ve, I'd'nt. (gulls) -- ``no''!!! ???",
    "'student\n'dear\n'lives\n'mother\n'vessel\n'Tide 'REAL \"'quoted\" ‘single’ “double” it’s rock'n'roll",
    "  two spaces\tand\t\ttabs \n\nline ends\r\n\r\n   indented\n \n  \n",
    "Größe façade naïve Ωμέγα привет мир 你好，世界１２３ こんにちは 안녕하세요 مرحبا שלום",
    "🦭🌊 😀👩‍👩‍👧 ✅ #herring @gull https://harbour.example/a?b=c&d=1 snake_case camelCase HTTPServer",
    "def seal(x: int) -> str:\n    return f'{x:>3}'  # ¶ §\n\t\tif (a<=b && c!=d) {}[]()<>/\\|~^",
    "\u00a0nbsp\u2003em\u200bzero… ½ ² ₂ ﬁ Ⅳ 𝒽𝒶𝓇 ٣٤٥ 3.14e-10 0x1F 10\u202f000",
)
# words with combining marks, at which some of llama.cpp's rules split a word and the models' own do not
MARKED_TEXTS = ("हिन्दी में लहरें और मछली", "ไทยน้ำทะเล", "தமிழ் கடல்", "বাংলা সমুদ্র")


@dataclass(frozen=True)
class GgufVocabulary:
    """A tokenizer's entries in a GGUF file; `types` are those of gguf.TokenType, `keys` go into the metadata."""

    model: str
    tokens: list[str]
    types: list[int]
    merges: list[str] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    keys: dict[str, Any] = field(default_factory=dict)

    def write(self, writer: GGUFWriter, pre: str, *, space_prefix: bool | None = None) -> None:
        """Add the vocabulary to a file's metadata."""
        writer.add_tokenizer_model(self.model)
        writer.add_tokenizer_pre(pre)
        writer.add_token_list(self.tokens)
        writer.add_token_types(self.types)
        if self.scores:
            writer.add_token_scores(self.scores)
        if self.merges:
            writer.add_token_merges(self.merges)
        if space_prefix is not None:
            writer.add_add_space_prefix(space_prefix)
        for name, value in self.keys.items():
            (writer.add_bool if isinstance(value, bool) else writer.add_uint32)(f"tokenizer.ggml.{name}", value)


@dataclass(frozen=True)
class PreTokenizer:
    """What the file says about splitting: llama.cpp's name of the rules, and whether a space is put before a text.

    `splits_marks`: whether llama.cpp gives other tokens for words with combining marks, such as Hindi or Thai.
    """

    name: str
    space_prefix: bool | None = None
    splits_marks: bool = False


def read_vocabulary(tokenizer: Any, size: int, stop: int) -> GgufVocabulary:
    """The vocabulary of a fast tokenizer, padded to `size` tokens; `stop` is the token that ends an answer.

    Raises UsageError for a kind of tokenizer that llama.cpp does not have.
    """
    core = json.loads(tokenizer.backend_tokenizer.to_str())
    model = core["model"]
    is_byte_level = "ByteLevel" in json.dumps([core.get("pre_tokenizer"), core.get("decoder")])
    if model.get("type") != "BPE" or not (is_byte_level or model.get("byte_fallback")):
        raise UsageError(
            what="This tokenizer cannot be written to a GGUF file.",
            why=f"It is a {model.get('type')} tokenizer; llama.cpp's are BPE, on bytes or with a fallback to bytes.",
            fix="Export to ONNX instead, or use a model with another tokenizer.",
        )
    added = {entry["id"]: entry for entry in core["added_tokens"]}
    by_id = {index: token for token, index in model["vocab"].items()} | {n: e["content"] for n, e in added.items()}
    if (largest := max(by_id)) >= size:
        raise UsageError(
            what="The tokenizer has more tokens than the model.",
            why=f"Its largest id is {largest}; the embeddings have {size} rows.",
            fix="Use the tokenizer that belongs to the model.",
        )
    kind = BYTE_LEVEL if is_byte_level else SENTENCEPIECE
    tokens = [by_id.get(index, f"[PAD{index}]") for index in range(size)]
    types = [int(_type_of(index, by_id, added, kind, model.get("unk_token"))) for index in range(size)]
    if kind == SENTENCEPIECE:  # these are matched in the text as it is, where a space is a space
        tokens = [t.replace(SPACE, " ") if types[n] == TokenType.USER_DEFINED else t for n, t in enumerate(tokens)]
        # the order of the ids is the order of the merges, and llama.cpp merges the pair with the highest score
        scores = [float(-index) if types[index] == TokenType.NORMAL else 0.0 for index in range(size)]
        return GgufVocabulary(kind, tokens, types, [], scores, _special_keys(tokenizer, stop))
    merges = [" ".join(pair) if isinstance(pair, list) else pair for pair in model["merges"]]
    return GgufVocabulary(kind, tokens, types, merges, [], _special_keys(tokenizer, stop))


def find_pre_tokenizer(
    vocabulary: GgufVocabulary, tokenizer: "PreTrainedTokenizerBase", library: Library, folder: Path
) -> PreTokenizer:
    """The first of llama.cpp's pre-tokenizers that splits all trial texts as the tokenizer does.

    One that also splits words with combining marks alike is preferred. Files with the vocabulary alone are written
    into `folder`. Raises UsageError if there is none.
    """
    texts = (*TRIAL_TEXTS, *MARKED_TEXTS)
    expected = [list(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts]
    prefixes: tuple[bool | None, ...] = (None,) if vocabulary.model == BYTE_LEVEL else (False, True)
    names = PRE_TOKENIZERS if vocabulary.model == BYTE_LEVEL else ("default",)
    best, problem, second = 0, "", None
    file = folder / "vocabulary.gguf"
    try:
        for prefix in prefixes:
            _write_vocabulary_file(file, vocabulary, names[0], prefix)
            for name in names:
                try:
                    with Vocabulary(library, file, name) as candidate:
                        equal = [candidate.tokenize(text) == ids for text, ids in zip(texts, expected, strict=True)]
                except UsageError as error:  # this llama.cpp has no such pre-tokenizer, or refuses the vocabulary
                    problem = error.why
                    continue
                if all(equal):
                    return PreTokenizer(name, prefix)
                best = max(best, sum(equal[: len(TRIAL_TEXTS)]))
                if second is None and all(equal[: len(TRIAL_TEXTS)]):
                    second = PreTokenizer(name, prefix, splits_marks=True)
    finally:
        file.unlink(missing_ok=True)
    if second:
        return second
    raise UsageError(
        what="llama.cpp cannot split texts as this tokenizer does.",
        why=f"Of {len(names)} pre-tokenizers none gives its tokens; the best agrees on {best} of {len(TRIAL_TEXTS)} "
        "texts." + (f" {problem}" if problem and not best else ""),
        fix="Export to ONNX instead. The model would answer worse with other tokens, and nothing would say so.",
    )


def _write_vocabulary_file(file: Path, vocabulary: GgufVocabulary, pre: str, prefix: bool | None) -> None:
    writer = GGUFWriter(file, ANY_ARCHITECTURE)
    vocabulary.write(writer, pre, space_prefix=prefix)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()


def _type_of(
    index: int, by_id: dict[int, str], added: dict[int, dict[str, Any]], kind: str, unknown: str | None
) -> TokenType:
    token = by_id.get(index)
    if token is None:
        return TokenType.UNUSED
    if kind == SENTENCEPIECE and token == unknown:
        return TokenType.UNKNOWN
    if index in added:
        return TokenType.CONTROL if added[index]["special"] else TokenType.USER_DEFINED
    is_byte = kind == SENTENCEPIECE and len(token) == 6 and token.startswith("<0x") and token.endswith(">")
    return TokenType.BYTE if is_byte else TokenType.NORMAL


def _special_keys(tokenizer: Any, stop: int) -> dict[str, Any]:
    """The special tokens of the metadata: llama.cpp stops at `eos` and `eot`."""
    names = {"bos_token_id": "bos", "eos_token_id": "eos", "padding_token_id": "pad", "unknown_token_id": "unk"}
    keys: dict[str, Any] = {
        key: value for key, name in names.items() if (value := getattr(tokenizer, f"{name}_token_id")) is not None
    }
    keys["eot_token_id"] = stop
    first = list(tokenizer("a")["input_ids"])[:1]  # what the tokenizer adds by itself
    keys["add_bos_token"] = bool(first) and first[0] == tokenizer.bos_token_id
    return keys
