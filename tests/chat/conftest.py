"""The models of the GGUF tests, for the conversations with a GGUF file."""

from tests.gguf.conftest import llama_cpp, llama_model, with_llama_cpp

__all__ = ["llama_cpp", "llama_model", "with_llama_cpp"]
