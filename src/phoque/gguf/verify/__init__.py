"""Verification of GGUF files: metadata, tensors, llama.cpp itself, Node and a browser."""
