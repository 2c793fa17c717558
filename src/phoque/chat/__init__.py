"""Talking to a model: an adapter, a merged model, a GGUF file or an ONNX export, in the terminal or in a page."""
