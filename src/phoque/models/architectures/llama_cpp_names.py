"""Names that llama.cpp and transformers give to rules of tokenizers and rotary embeddings, mostly after families."""

BYTE_LEVEL, SENTENCEPIECE = "gpt2", "llama"  # llama.cpp's two kinds of tokenizers that chat models have
TOKENIZERS = (BYTE_LEVEL, SENTENCEPIECE, "gemma4")
ANY_ARCHITECTURE = "llama"  # of a file with a vocabulary alone, which llama.cpp loads for any
# llama.cpp's pre-tokenizers of byte-level BPE, the common ones first
PRE_TOKENIZERS = (
    "llama-bpe",
    "qwen2",
    "smollm",
    "tekken",
    "gpt-4o",
    "refact",
    "gpt-2",
    "dbrx",
    "olmo",
    "superbpe",
    "smaug-bpe",
    "deepseek-llm",
    "deepseek-coder",
    "command-r",
    "starcoder",
    "mpt",
    "falcon3",
    "viking",
    "bloom",
    "exaone",
    "minerva-7b",
    "qwen35",
)
ROPE_BY_WAVELENGTH = "llama3"  # transformers' name: long wavelengths are stretched, short ones are not
ROPE_TYPES = ("default", "linear", "yarn", ROPE_BY_WAVELENGTH, "longrope")  # that a GGUF file has entries for
