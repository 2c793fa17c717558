"""Export to GGUF, the format of llama.cpp, and verification of such files in llama.cpp itself."""
